"""A base as a document: what `adapterhub base add` keeps, so that its files need not be at hand.

Names, logical shapes, dtypes, numbers and digests: all that a check or a conversion asks of a base but its weights. The same
base gives the same bytes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import FormatError, RefusedError

VERSION = 1
MAX_RECORD = 64 << 20  # bytes; a model of 140,000 tensors has 15 MB
_TEXTS = ("kind", "architecture", "model_type", "source")
_MAYBE = ("quantization", "tokenizer_digest", "chat_template_digest", "repo", "revision")
_TENSORS = ("tensors", "stored", "derived")
# What makes it this base; where it was read from and how large the files were does not.
IDENTITY = ("fingerprint", "tensors", "kind", "architecture", "model_type", "config", "tied", *_MAYBE)


def document(spec: BaseSpec, source: str) -> dict[str, Any]:
    """What is kept of a base that was read from `source`."""
    return {
        "version": VERSION,
        "source": source,
        "kind": spec.kind,
        "architecture": spec.architecture,
        "model_type": spec.model_type,
        "config": dict(spec.config),
        **{key: {name: [tensor.dtype, list(tensor.shape)] for name, tensor in getattr(spec, key).items()} for key in _TENSORS},
        "packed": dict(spec.packed),
        "tied": spec.tied,
        **{key: getattr(spec, key) for key in _MAYBE},
        "fingerprint": spec.fingerprint,
        "size": spec.size,
        "notes": list(spec.notes),
    }


def dump(record: dict[str, Any]) -> bytes:
    """The bytes that are stored."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse(raw: bytes, name: str) -> tuple[BaseSpec, dict[str, Any]]:
    """The base and the document in stored bytes; FormatError for what this cannot be."""
    record = parse_object(raw.decode("utf-8", "replace"), name)
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        what = f"base document version {version} is newer than the {VERSION} known here"
        raise RefusedError(name, what, "Upgrade adapterhub")
    if version != VERSION or not _right(record):
        raise FormatError(name, "not the document of a base", "Add the base again with --force")
    spec = BaseSpec(
        where=name,
        tensors=_tensors(record["tensors"]),
        stored=_tensors(record["stored"]),
        derived=_tensors(record["derived"]),
        packed=record["packed"],
        notes=tuple(record["notes"]),
        **{key: record[key] for key in ("kind", "architecture", "model_type", "config", "tied", "size", *_MAYBE)},
    )
    if spec.fingerprint != record["fingerprint"]:
        raise FormatError(name, "its fingerprint is not that of its tensors", "Add the base again with --force")
    return spec, record


def _tensors(found: dict[str, Any]) -> dict[str, BaseTensor]:
    return {name: BaseTensor(tuple(shape), dtype) for name, (dtype, shape) in found.items()}


def _right(record: dict[str, Any]) -> bool:
    notes, packed = record.get("notes"), record.get("packed")
    return (
        all(isinstance(record.get(key), str) for key in _TEXTS)
        and all(key in record and isinstance(record[key], str | None) for key in (*_MAYBE, "fingerprint"))
        and isinstance(record.get("config"), dict)
        and isinstance(record.get("tied"), bool)
        and _count(record.get("size"))
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
        and isinstance(packed, dict)
        and all(isinstance(reason, str) for reason in packed.values())
        and all(isinstance(found := record.get(kind), dict) and all(map(_tensor, found.values())) for kind in _TENSORS)
    )


def _tensor(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and re.fullmatch(r"\w{1,40}", value[0]) is not None
        and isinstance(value[1], list)
        and all(map(_count, value[1]))
    )


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
