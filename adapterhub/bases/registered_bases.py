"""Base models that a registry knows by name: once added, they serve in place of the files where headers are enough.

The document of a base has names, logical shapes, dtypes, numbers and digests: everything except the weights that a check or a
conversion needs. The same base always gives the same bytes.
"""

from __future__ import annotations

import datetime
import difflib
from dataclasses import replace
from typing import Any

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.registry.registry import Registry
from adapterhub.store import named_documents
from adapterhub.store.named_documents import NamedDocument
from adapterhub.store.store import Entry
from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, ConflictError, FormatError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

VERSION = 1
MAX_DOCUMENT = 64 << 20  # bytes; the document of a model with 140,000 tensors has 15 MB
_REQUIRED_TEXTS = ("kind", "architecture", "model_type", "source")
_OPTIONAL_TEXTS = ("text_type", "quantization", "tokenizer_digest", "chat_template_digest", "repo", "revision")
_TENSOR_TABLES = ("tensors", "stored", "derived")
# Keys that identify a base; its source and the size of its files do not.
_IDENTITY = ("fingerprint", "tensors", "kind", "architecture", "model_type", "config", "tied", *_OPTIONAL_TEXTS)


@dataclass(frozen=True)
class BaseDocument:
    """The record of a base: the contents of its headers, and the source that they were read from."""

    spec: BaseSpec
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Return the document as JSON values."""
        spec = self.spec
        tensors = {table: getattr(spec, table) for table in _TENSOR_TABLES}
        return {
            "version": VERSION,
            "source": self.source,
            "kind": spec.kind,
            "architecture": spec.architecture,
            "model_type": spec.model_type,
            "config": dict(spec.config),
            **{
                table: {name: [tensor.dtype, list(tensor.shape)] for name, tensor in tensors_by_name.items()}
                for table, tensors_by_name in tensors.items()
            },
            "packed": dict(spec.packed),
            "tied": spec.tied,
            **{key: getattr(spec, key) for key in _OPTIONAL_TEXTS},
            "fingerprint": spec.fingerprint,
            "size": spec.size,
            "notes": list(spec.notes),
        }

    def dump(self) -> bytes:
        """Return the bytes to store."""
        return json_file.canonical_bytes(self.to_dict())

    @classmethod
    def parse(cls, raw: bytes, name: str) -> BaseDocument:
        """Parse stored bytes; `name` becomes the name of the base.

        Raises:
            FormatError: It is not the document of a base, or its fingerprint does not match its tensors.
            RefusedError: A newer version wrote it.
        """
        document = json_file.parse_object(raw.decode("utf-8", "replace"), name)
        version = document.get("version")
        if isinstance(version, int) and version > VERSION:
            problem = f"base document version {version} is newer than the supported {VERSION}"
            raise RefusedError(name, problem, "Upgrade adapterhub", code="newer-version")
        document.setdefault("text_type", None)  # the oldest documents lack it
        if version != VERSION or not _is_document(document):
            raise FormatError(name, "not the document of a base", "Add the base again", code="add-base", name=name)
        spec = BaseSpec(
            source=name,
            tensors=_base_tensors(document["tensors"]),
            stored=_base_tensors(document["stored"]),
            derived=_base_tensors(document["derived"]),
            packed=document["packed"],
            notes=tuple(document["notes"]),
            **{
                key: document[key] for key in ("kind", "architecture", "model_type", "config", "tied", "size", *_OPTIONAL_TEXTS)
            },
        )
        if not spec.has_fingerprint(document["fingerprint"]):
            problem = "its fingerprint is not that of its tensors"
            raise FormatError(name, problem, "Add the base again", code="add-base", name=name)
        return cls(spec, document["source"])


@dataclass(frozen=True)
class RegisteredBase:
    """A base with a name in a registry.

    Attributes:
        digest: The digest of its document.
        time: The time when it was added, ISO 8601 in UTC.
        new: Whether this call added it; False if the name referred to the same base already.
    """

    name: str
    digest: Digest
    time: str
    document: BaseDocument
    new: bool = False

    @property
    def spec(self) -> BaseSpec:
        """The description of the base."""
        return self.document.spec


def add(registry: Registry, name: str, spec: BaseSpec, *, source: str, force: bool = False) -> RegisteredBase:
    """Store `spec`, which was read from `source`, under a name; adding the same base again changes nothing.

    Raises:
        RefusedError: The base has no fingerprint, because no shapes were read, or its document is too large.
        ConflictError: The name refers to another base and `force`, which replaces it, is not set.
    """
    named_documents.parse_document_name(name, name)
    if spec.fingerprint is None:
        raise RefusedError(spec.source, "no shapes were read, so it has no fingerprint", "Name one with its weight files")
    document = BaseDocument(spec, source)
    raw = document.dump()
    if len(raw) > MAX_DOCUMENT:
        raise RefusedError(spec.source, f"a document of {len(raw)} bytes is over the limit of {MAX_DOCUMENT}")
    digest, size = sha256_bytes(raw), len(raw)
    unchanged: RegisteredBase | None = None

    def decide(state: NamedDocument) -> Entry | None:
        nonlocal unchanged
        # `decide` may run again if another process moves the name first.
        unchanged = None
        registry.store.put_bytes(raw)  # stored under the lock: a gc would remove a blob that no name refers to yet
        registry.store.sync_blobs()
        if state.exists and not force:
            unchanged = _same_or_conflict(registry, state, document)
        elif state.entry and state.entry.digest == digest:
            unchanged = _read(registry, state)
        return None if unchanged else state.next("push", _now(), digest, size)

    named_documents.move(registry.store, registry.write_lock, name, decide)
    if unchanged is not None:
        return unchanged
    return replace(get(registry, name), new=True)


def _same_or_conflict(registry: Registry, state: NamedDocument, document: BaseDocument) -> RegisteredBase:
    """Return the base that the name refers to if it is the one in `document`; otherwise raise ConflictError."""
    existing = _read(registry, state)
    existing_document, new_document = existing.document.to_dict(), document.to_dict()
    key = next((key for key in _IDENTITY if existing_document[key] != new_document[key]), None)
    if key is None:
        return existing
    existing_value, new_value = (f"{str(value)[:26]}" for value in (existing_document[key], new_document[key]))
    problem = (
        f"is another base: {key} is {existing_value}, not {new_value}"
        if key not in ("tensors", "config")
        else f"is another base in {key}"
    )
    raise ConflictError(state.name, problem, "Choose another name, or replace it", code="base-name-taken")


def get(registry: Registry, name: str) -> RegisteredBase:
    """Return the base with a name; raise NotFoundError if there is none."""
    return _read(registry, _existing_document(registry, name))


def _existing_document(registry: Registry, name: str) -> NamedDocument:
    state = named_documents.current(registry.store, named_documents.parse_document_name(name, name))
    if not state.exists:
        if suggestions := difflib.get_close_matches(name, names(registry), 1):
            raise NotFoundError(
                name, "no base of this name", f"Did you mean {suggestions[0]}?", code="no-such-base", meant=suggestions[0]
            )
        raise NotFoundError(name, "no base of this name", "List the bases", code="no-such-base")
    return state


def _read(registry: Registry, state: NamedDocument) -> RegisteredBase:
    assert state.entry is not None  # noqa: S101 - `there` was checked
    raw = registry.store.read_document(state.entry.digest, limit=MAX_DOCUMENT)
    return RegisteredBase(state.name, state.entry.digest, state.entry.time, BaseDocument.parse(raw, state.name))


def names(registry: Registry) -> list[str]:
    """Return the names that refer to a base, sorted."""
    return [name for name in registry.store.log.document_names() if named_documents.current(registry.store, name).exists]


def all_bases(registry: Registry) -> tuple[list[RegisteredBase], dict[str, AdapterhubError]]:
    """Return every named base, and the errors of unreadable ones by name."""
    bases, damaged = [], {}
    for name in registry.store.log.document_names():
        try:
            bases.append(get(registry, name))
        except NotFoundError:  # removed in the meantime
            continue
        except AdapterhubError as error:
            damaged[name] = error
    return bases, damaged


def remove(registry: Registry, name: str) -> None:
    """Remove a name; adapters that pin the base keep their pins."""
    _existing_document(registry, name)

    def decide(state: NamedDocument) -> Entry | None:
        return state.next("delete", _now()) if state.exists else None

    named_documents.move(registry.store, registry.write_lock, name, decide)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- the document


def _base_tensors(entries: dict[str, tuple[str, list[int]]]) -> dict[str, BaseTensor]:
    return {name: BaseTensor(tuple(shape), dtype) for name, (dtype, shape) in entries.items()}


def _is_document(document: dict[str, Any]) -> bool:
    # A stored document may be damaged or hostile, so every value is checked before it is used.
    notes, packed = document.get("notes"), document.get("packed")
    return (
        all(isinstance(document.get(key), str) for key in _REQUIRED_TEXTS)
        and all(key in document and isinstance(document[key], str | None) for key in (*_OPTIONAL_TEXTS, "fingerprint"))
        and isinstance(document.get("config"), dict)
        and isinstance(document.get("tied"), bool)
        and _is_size(document.get("size"))
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
        and isinstance(packed, dict)
        and all(isinstance(reason, str) for reason in packed.values())
        and all(
            isinstance(tensors := document.get(table), dict) and all(map(_is_tensor, tensors.values()))
            for table in _TENSOR_TABLES
        )
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
    return json_file.is_integer(value) and 0 <= value < 2**63
