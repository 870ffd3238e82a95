"""Bases that a registry knows by name: added once, then as good as their files wherever headers are enough."""

from __future__ import annotations

import datetime
import difflib
from dataclasses import dataclass
from typing import Any

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.registry.registry import Registry
from adapterhub.store import named_documents
from adapterhub.store.named_documents import NamedDocument
from adapterhub.store.store import Entry
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import ConflictError, NotFoundError, RefusedError

from . import record


@dataclass(frozen=True)
class Registered:
    """A base under a name.

    Attributes:
        digest: Of its document.
        time: When it was added, ISO 8601 in UTC.
        document: What is kept of it, as `record` has it.
        new: Whether this call added it; False when the name meant the same base already.
    """

    name: str
    digest: Digest
    time: str
    spec: BaseSpec
    document: dict[str, Any]
    new: bool = False


def add(registry: Registry, name: str, spec: BaseSpec, *, source: str, force: bool = False) -> Registered:
    """Keep `spec`, which was read from `source`, under a name.

    The same base again changes nothing. Another one under that name is a ConflictError that says what differs, unless `force`.
    """
    named_documents.parse_document_name(name, name)
    if spec.fingerprint is None:
        raise RefusedError(spec.where, "no shapes were read, so it has no fingerprint", "Name one with its weight files")
    document = record.document(spec, source)
    raw = record.dump(document)
    if len(raw) > record.MAX_RECORD:
        raise RefusedError(spec.where, f"a document of {len(raw)} bytes is over the limit of {record.MAX_RECORD}")
    digest, size = sha256_bytes(raw), len(raw)
    same: Registered | None = None

    def decide(state: NamedDocument) -> Entry | None:
        nonlocal same
        same = None
        registry.store.put_bytes(raw)  # under the lock, as a gc may remove what no name needs yet
        registry.store.sync_blobs()
        if state.there and not force:
            same = _same(registry, state, document)
        elif state.entry and state.entry.digest == digest:
            same = _read(registry, state)
        return None if same else state.next("push", _now(), digest, size)

    named_documents.move(registry.store, registry.locked, name, decide)
    if same is not None:
        return same
    found = get(registry, name)
    return Registered(found.name, found.digest, found.time, found.spec, found.document, new=True)


def _same(registry: Registry, state: NamedDocument, document: dict[str, Any]) -> Registered:
    """What the name means, if that is the base in `document`."""
    found = _read(registry, state)
    different = [key for key in record.IDENTITY if found.document[key] != document[key]]
    if not different:
        return found
    key = different[0]
    here, new = (f"{str(value)[:26]}" for value in (found.document[key], document[key]))
    what = f"is another base: {key} is {here}, not {new}" if key not in ("tensors", "config") else f"is another base in {key}"
    raise ConflictError(state.name, what, "Choose another name, or replace it with --force")


def get(registry: Registry, name: str) -> Registered:
    """The base under a name; NotFoundError when there is none."""
    return _read(registry, _there(registry, name))


def _there(registry: Registry, name: str) -> NamedDocument:
    state = named_documents.current(registry.store, named_documents.parse_document_name(name, name))
    if not state.there:
        close = difflib.get_close_matches(name, names(registry), 1)
        hint = f"Did you mean {close[0]}?" if close else "Run `adapterhub base list`"
        raise NotFoundError(name, "no base of this name", hint)
    return state


def _read(registry: Registry, state: NamedDocument) -> Registered:
    assert state.entry is not None  # noqa: S101 - `there` was asked
    raw = registry.store.read_document(state.entry.digest, limit=record.MAX_RECORD)
    spec, document = record.parse(raw, state.name)
    return Registered(state.name, state.entry.digest, state.entry.time, spec, document)


def names(registry: Registry) -> list[str]:
    """The names that mean a base now, sorted."""
    return [name for name in registry.store.log.document_names() if named_documents.current(registry.store, name).there]


def remove(registry: Registry, name: str) -> None:
    """Free a name; adapters that pin the base keep what they pin."""
    _there(registry, name)

    def decide(state: NamedDocument) -> Entry | None:
        return state.next("delete", _now()) if state.there else None

    named_documents.move(registry.store, registry.locked, name, decide)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
