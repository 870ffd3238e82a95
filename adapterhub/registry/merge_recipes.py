"""Merged models that a registry keeps as recipes, each under a name of one word; gc keeps what their adapters need."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.store import named_documents
from adapterhub.store.named_documents import Shelved
from adapterhub.store.store import MERGES, Entry
from adapterhub_converters.errors import AdapterhubError, ConflictError, NotFoundError

from . import merge_recipe
from .merge_recipe import Variant
from .registry import Registry, now

EXPLICIT = "merge:"  # before a name, where a file of that name is there too


@dataclass(frozen=True)
class Kept:
    """A recipe under a name; `digest` is that of its document, `time` when it was kept, ISO 8601 in UTC."""

    name: str
    digest: Digest
    time: str
    recipe: Variant


def check_free(registry: Registry, name: str) -> None:
    """ConflictError when there is a recipe of this name."""
    _check_free(named_documents.current(registry.store, named_documents.parse_base_name(name, name), log=MERGES))


def _check_free(state: Shelved) -> None:
    if state.there:
        hint = f"Choose another name, or forget it: `adapterhub materialize --remove {state.name}`"
        raise ConflictError(state.name, "is the name of another model", hint)


def check_adapters(registry: Registry, adapters: list[Mapping[str, str]]) -> None:
    """NotFoundError for an adapter that is neither whole in the registry nor at an address."""
    for adapter in adapters:
        where = adapter.get("ref", "")
        if "://" not in where and not _whole(registry, adapter["digest"]):
            what = "is not in this registry, so that a gc could not keep it for the recipe"
            raise NotFoundError(where or adapter["digest"], what, "Push it first, or write the recipe to a .json file")


def _whole(registry: Registry, digest: Digest) -> bool:
    if registry.store.size(digest) is None:
        return False
    made = oci_manifest.parse(registry.store.read_document(digest), digest)
    return all(registry.store.size(blob.digest) == blob.size for blob in (made.config, *made.layers))


def keep(registry: Registry, name: str, recipe: Variant) -> Kept:
    """Keep a recipe under a name; ConflictError when that means another, NotFoundError when an adapter is missing."""
    raw = merge_recipe.dump(recipe)
    digest, size = sha256_bytes(raw), len(raw)

    def decide(state: Shelved) -> Entry | None:
        registry.store.put_bytes(raw)  # under the lock, as a gc may remove what no name needs yet
        registry.store.sync_blobs()
        check_adapters(registry, recipe["adapters"])
        if state.there and state.entry and state.entry.digest == digest:
            return None
        _check_free(state)
        return state.next("push", now(), digest, size)

    named_documents.move(registry.store, registry.locked, named_documents.parse_base_name(name, name), decide, log=MERGES)
    return get(registry, name)


def get(registry: Registry, name: str) -> Kept:
    """The recipe under a name; NotFoundError when there is none."""
    state = named_documents.current(registry.store, named_documents.parse_base_name(name, name), log=MERGES)
    if not state.there or state.entry is None:
        close = difflib.get_close_matches(name, names(registry), 1)
        hint = f"Did you mean {close[0]}?" if close else "`adapterhub materialize --list` says which there are"
        raise NotFoundError(name, "no model of this name is kept as a recipe", hint)
    raw = registry.store.read_document(state.entry.digest, limit=named_documents.MAX_RECIPE)
    found = merge_recipe.parse(raw.decode("utf-8", "replace"), f"{EXPLICIT}{name}")
    return Kept(name, state.entry.digest, state.entry.time, found)


def names(registry: Registry) -> list[str]:
    """The names that mean a model now, sorted; one whose log was changed among them."""
    found = []
    for name in registry.store.shelved(MERGES):
        try:
            there = named_documents.current(registry.store, name, log=MERGES).there
        except AdapterhubError:
            there = True
        if there:
            found.append(name)
    return found


def forget(registry: Registry, name: str) -> None:
    """Free a name; its adapters stay what they are."""
    if not named_documents.current(registry.store, named_documents.parse_base_name(name, name), log=MERGES).there:
        get(registry, name)

    def decide(state: Shelved) -> Entry | None:
        return state.next("delete", now()) if state.there else None

    named_documents.move(registry.store, registry.locked, name, decide, log=MERGES)
