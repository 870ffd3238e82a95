"""The merge recipes that a registry stores, each under a name of one word; gc keeps the blobs of their adapters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.store import named_documents
from adapterhub.store.named_documents import NamedDocument
from adapterhub.store.store import MERGES, Entry
from adapterhub_converters.errors import AdapterhubError, ConflictError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import merge_recipe
from .merge_recipe import Ingredient, MergeRecipe
from .moves import now
from .registry import Registry

NAME_PREFIX = "merge:"  # prefix of a name that is also the name of a file


@dataclass(frozen=True)
class StoredRecipe:
    """A recipe under a name, with the `digest` of its document and the `time` it was stored, ISO 8601 in UTC."""

    name: str
    digest: Digest
    time: str
    recipe: MergeRecipe


def check_free(registry: Registry, name: str) -> None:
    """Raise ConflictError if there is a recipe with this name."""
    _check_free(named_documents.current(registry.store, named_documents.parse_document_name(name, name), log=MERGES))


def _check_free(state: NamedDocument) -> None:
    if state.exists:
        hint = "Choose another name, or remove that recipe"
        raise ConflictError(state.name, "is the name of another model", hint, code="recipe-name-taken", name=state.name)


def check_adapters(registry: Registry, adapters: Iterable[Ingredient]) -> None:
    """Raise NotFoundError for an adapter that is neither complete in the registry nor at a URL."""
    for adapter in adapters:
        location = adapter.ref or ""
        if "://" not in location and not _is_complete(registry, adapter.digest):
            problem = "is not in this registry, so nothing would keep it for the recipe"
            raise NotFoundError(location or adapter.digest, problem, "Push it first, or write the recipe to a .json file")


def _is_complete(registry: Registry, digest: Digest) -> bool:
    if registry.store.size(digest) is None:
        return False
    manifest = oci_manifest.parse(registry.store.read_document(digest), digest)
    return all(registry.store.size(blob.digest) == blob.size for blob in (manifest.config, *manifest.layers))


def store(registry: Registry, name: str, recipe: MergeRecipe) -> StoredRecipe:
    """Store a recipe under a name; ConflictError if another recipe has the name, NotFoundError if an adapter is missing."""
    raw = recipe.dump()
    digest, size = sha256_bytes(raw), len(raw)

    def decide(state: NamedDocument) -> Entry | None:
        # Stored under the lock: before that, a gc may remove the blob, which no name needs yet.
        registry.store.put_bytes(raw)
        registry.store.sync_blobs()
        # Under the lock as well: no gc may remove an adapter between this check and the entry that keeps it.
        check_adapters(registry, recipe.adapters)
        if state.exists and state.entry and state.entry.digest == digest:
            return None
        _check_free(state)
        return state.next("push", now(), digest, size)

    named_documents.move(
        registry.store, registry.write_lock, named_documents.parse_document_name(name, name), decide, log=MERGES
    )
    return get(registry, name)


def get(registry: Registry, name: str) -> StoredRecipe:
    """Return the recipe with this name; NotFoundError if there is none."""
    state = named_documents.current(registry.store, named_documents.parse_document_name(name, name), log=MERGES)
    if not state.exists or state.entry is None:
        close = difflib.get_close_matches(name, names(registry), 1)
        if close:
            raise NotFoundError(name, "no merge recipe of this name", f"Did you mean {close[0]}?")
        raise NotFoundError(name, "no merge recipe of this name", "List the recipes", code="no-such-recipe")
    raw = registry.store.read_document(state.entry.digest)
    recipe = merge_recipe.parse(raw.decode("utf-8", "replace"), f"{NAME_PREFIX}{name}")
    return StoredRecipe(name, state.entry.digest, state.entry.time, recipe)


def names(registry: Registry) -> list[str]:
    """Return the names that have a recipe now, sorted; a name whose log was tampered with is included."""
    stored_names = []
    for name in registry.store.log.document_names(MERGES):
        try:
            exists = named_documents.current(registry.store, name, log=MERGES).exists
        except AdapterhubError:
            exists = True  # shown in lists, so that the damage is noticed: reading the recipe reports it
        if exists:
            stored_names.append(name)
    return stored_names


def remove(registry: Registry, name: str) -> None:
    """Remove a recipe; its adapters are not affected."""
    if not named_documents.current(registry.store, named_documents.parse_document_name(name, name), log=MERGES).exists:
        get(registry, name)

    def decide(state: NamedDocument) -> Entry | None:
        return state.next("delete", now()) if state.exists else None

    named_documents.move(registry.store, registry.write_lock, name, decide, log=MERGES)
