"""Base models that a registry knows by name: added once, then as good as their files wherever headers are enough.

The document of a base has names, logical shapes, dtypes, numbers and digests: all that a check or a conversion needs of it but
its weights. The same base always gives the same bytes.
"""

from __future__ import annotations

import datetime
import difflib
from dataclasses import dataclass, replace
from typing import Any

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.registry.registry import Registry
from adapterhub.store import named_documents
from adapterhub.store.named_documents import NamedDocument
from adapterhub.store.store import Entry
from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, ConflictError, FormatError, NotFoundError, RefusedError

VERSION = 1
MAX_DOCUMENT = 64 << 20  # bytes; that of a model with 140,000 tensors has 15 MB
_TEXTS = ("kind", "architecture", "model_type", "source")
_OPTIONAL = ("text_type", "quantization", "tokenizer_digest", "chat_template_digest", "repo", "revision")
_TENSORS = ("tensors", "stored", "derived")
# What identifies a base; where it was read from and the size of its files do not.
_IDENTITY = ("fingerprint", "tensors", "kind", "architecture", "model_type", "config", "tied", *_OPTIONAL)


@dataclass(frozen=True)
class BaseDocument:
    """The record of a base: what its headers contain, and where they were read from."""

    spec: BaseSpec
    source: str

    def to_dict(self) -> dict[str, Any]:
        """The document as JSON."""
        spec = self.spec
        tensors = {kind: getattr(spec, kind) for kind in _TENSORS}
        return {
            "version": VERSION,
            "source": self.source,
            "kind": spec.kind,
            "architecture": spec.architecture,
            "model_type": spec.model_type,
            "config": dict(spec.config),
            **{kind: {name: [one.dtype, list(one.shape)] for name, one in found.items()} for kind, found in tensors.items()},
            "packed": dict(spec.packed),
            "tied": spec.tied,
            **{key: getattr(spec, key) for key in _OPTIONAL},
            "fingerprint": spec.fingerprint,
            "size": spec.size,
            "notes": list(spec.notes),
        }

    def dump(self) -> bytes:
        """The bytes to store."""
        return json_file.canonical(self.to_dict())

    @classmethod
    def parse(cls, raw: bytes, name: str) -> BaseDocument:
        """The document in stored bytes; its base is called `name`.

        Raises:
            FormatError: It is not the document of a base, or its fingerprint is not that of its tensors.
            RefusedError: A newer version wrote it.
        """
        document = json_file.parse_object(raw.decode("utf-8", "replace"), name)
        version = document.get("version")
        if isinstance(version, int) and version > VERSION:
            what = f"base document version {version} is newer than the supported {VERSION}"
            raise RefusedError(name, what, "Upgrade adapterhub", code="newer-version")
        document.setdefault("text_type", None)  # the first documents lack it
        if version != VERSION or not _is_document(document):
            raise FormatError(name, "not the document of a base", "Add the base again", code="add-base")
        spec = BaseSpec(
            where=name,
            tensors=_parsed(document["tensors"]),
            stored=_parsed(document["stored"]),
            derived=_parsed(document["derived"]),
            packed=document["packed"],
            notes=tuple(document["notes"]),
            **{key: document[key] for key in ("kind", "architecture", "model_type", "config", "tied", "size", *_OPTIONAL)},
        )
        if spec.fingerprint != document["fingerprint"]:
            raise FormatError(name, "its fingerprint is not that of its tensors", "Add the base again", code="add-base")
        return cls(spec, document["source"])


@dataclass(frozen=True)
class Registered:
    """A base under a name.

    Attributes:
        digest: Of its document.
        time: When it was added, ISO 8601 in UTC.
        new: This call added it; False if the name pointed at the same base already.
    """

    name: str
    digest: Digest
    time: str
    document: BaseDocument
    new: bool = False

    @property
    def spec(self) -> BaseSpec:
        """The base."""
        return self.document.spec


def add(registry: Registry, name: str, spec: BaseSpec, *, source: str, force: bool = False) -> Registered:
    """Store `spec`, which was read from `source`, under a name; adding the same base again changes nothing.

    Raises:
        RefusedError: The base has no fingerprint, because no shapes were read, or its document is too large.
        ConflictError: The name points at another base; not with `force`, which replaces it.
    """
    named_documents.parse_document_name(name, name)
    if spec.fingerprint is None:
        raise RefusedError(spec.where, "no shapes were read, so it has no fingerprint", "Name one with its weight files")
    document = BaseDocument(spec, source)
    raw = document.dump()
    if len(raw) > MAX_DOCUMENT:
        raise RefusedError(spec.where, f"a document of {len(raw)} bytes is over the limit of {MAX_DOCUMENT}")
    digest, size = sha256_bytes(raw), len(raw)
    same: Registered | None = None

    def decide(state: NamedDocument) -> Entry | None:
        nonlocal same
        same = None
        registry.store.put_bytes(raw)  # under the lock: a gc removes what no name needs yet
        registry.store.sync_blobs()
        if state.there and not force:
            same = _same(registry, state, document)
        elif state.entry and state.entry.digest == digest:
            same = _read(registry, state)
        return None if same else state.next("push", _now(), digest, size)

    named_documents.move(registry.store, registry.locked, name, decide)
    if same is not None:
        return same
    return replace(get(registry, name), new=True)


def _same(registry: Registry, state: NamedDocument, document: BaseDocument) -> Registered:
    """The base that the name points at, if it is the one in `document`; else a ConflictError."""
    found = _read(registry, state)
    old, given = found.document.to_dict(), document.to_dict()
    key = next((key for key in _IDENTITY if old[key] != given[key]), None)
    if key is None:
        return found
    here, new = (f"{str(value)[:26]}" for value in (old[key], given[key]))
    what = f"is another base: {key} is {here}, not {new}" if key not in ("tensors", "config") else f"is another base in {key}"
    raise ConflictError(state.name, what, "Choose another name, or replace it", code="base-name-taken")


def get(registry: Registry, name: str) -> Registered:
    """The base under a name; NotFoundError if there is none."""
    return _read(registry, _there(registry, name))


def _there(registry: Registry, name: str) -> NamedDocument:
    state = named_documents.current(registry.store, named_documents.parse_document_name(name, name))
    if not state.there:
        if close := difflib.get_close_matches(name, names(registry), 1):
            raise NotFoundError(name, "no base of this name", f"Did you mean {close[0]}?", code="no-such-base", meant=close[0])
        raise NotFoundError(name, "no base of this name", "List the bases", code="no-such-base")
    return state


def _read(registry: Registry, state: NamedDocument) -> Registered:
    assert state.entry is not None  # noqa: S101 - `there` was checked
    raw = registry.store.read_document(state.entry.digest, limit=MAX_DOCUMENT)
    return Registered(state.name, state.entry.digest, state.entry.time, BaseDocument.parse(raw, state.name))


def names(registry: Registry) -> list[str]:
    """The names that point at a base, sorted."""
    return [name for name in registry.store.log.document_names() if named_documents.current(registry.store, name).there]


def every(registry: Registry) -> tuple[list[Registered], dict[str, AdapterhubError]]:
    """Every named base, and the errors of the unreadable ones by name."""
    found, damaged = [], {}
    for name in registry.store.log.document_names():
        try:
            found.append(get(registry, name))
        except NotFoundError:  # removed meanwhile
            continue
        except AdapterhubError as error:
            damaged[name] = error
    return found, damaged


def remove(registry: Registry, name: str) -> None:
    """Remove a name; adapters that pin the base keep their pins."""
    _there(registry, name)

    def decide(state: NamedDocument) -> Entry | None:
        return state.next("delete", _now()) if state.there else None

    named_documents.move(registry.store, registry.locked, name, decide)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- the document


def _parsed(found: dict[str, tuple[str, list[int]]]) -> dict[str, BaseTensor]:
    return {name: BaseTensor(tuple(shape), dtype) for name, (dtype, shape) in found.items()}


def _is_document(document: dict[str, Any]) -> bool:
    notes, packed = document.get("notes"), document.get("packed")
    return (
        all(isinstance(document.get(key), str) for key in _TEXTS)
        and all(key in document and isinstance(document[key], str | None) for key in (*_OPTIONAL, "fingerprint"))
        and isinstance(document.get("config"), dict)
        and isinstance(document.get("tied"), bool)
        and _is_size(document.get("size"))
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
        and isinstance(packed, dict)
        and all(isinstance(reason, str) for reason in packed.values())
        and all(isinstance(found := document.get(kind), dict) and all(map(_is_tensor, found.values())) for kind in _TENSORS)
    )


def _is_tensor(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and 0 < len(value[0]) <= 40
        and value[0].isascii()
        and value[0].replace("_", "a").isalnum()
        and isinstance(value[1], list)
        and all(map(_is_size, value[1]))
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
