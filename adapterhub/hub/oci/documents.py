"""A manifest of any kind, as far as a registry has to understand it: what it refers to, what it is about, whose files it has.

Image manifests and indexes are checked as the image-spec has them (v1.1, `manifest.md`, `image-index.md`). Of a type that
is not known here, only descriptors in the places of theirs are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.manifest.oci_manifest import FILEPATH, MANIFEST_TYPE, TITLE, parse_json
from adapterhub.remotes.layouts.index import INDEX_TYPE, artifact_type
from adapterhub_converters import linear
from adapterhub_converters.errors import FormatError

from .answers import OciError
from .references import parse_digest

_DOCKER = "application/vnd.docker.distribution.manifest."
_IMAGES = {MANIFEST_TYPE, f"{_DOCKER}v2+json"}
_INDEXES = {INDEX_TYPE, f"{_DOCKER}list.v2+json"}
# Layers that are fetched from elsewhere, so that they may be missing.
_ELSEWHERE = ("application/vnd.oci.image.layer.nondistributable.", "application/vnd.docker.image.rootfs.foreign.")
# What clients send that do not say what they send.
_UNTOLD = {"", "application/json", "application/octet-stream", "application/x-www-form-urlencoded", "text/plain"}
_TYPE = linear.Pattern(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_MOST = 20_000  # descriptors of a manifest


@dataclass(frozen=True, slots=True)
class Reference:
    """A descriptor: its digest, by sha256 or sha512, its size in bytes, and whether it has to be there."""

    digest: str
    size: int
    required: bool


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest of any kind.

    Attributes:
        subject: The digest of the manifest that it is about; empty without one.
        references: Blobs and manifests that it names, each as often as it does.
        files: Path to digest and size, as an image manifest has them; neither is checked.
    """

    media_type: str
    artifact_type: str
    subject: str
    annotations: Mapping[str, str]
    references: tuple[Reference, ...]
    files: Mapping[str, tuple[str, int]]


def parse(raw: bytes, content_type: str, where: str) -> Document:
    """The manifest in the body of a request.

    Raises:
        FormatError: It is not one.
        OciError: A digest in it is none.
    """
    document = parse_json(raw, where)
    kind = _kind(document, content_type.partition(";")[0].strip(), where)
    strict = kind in _IMAGES or kind in _INDEXES
    if strict:
        _check(document, kind, where)
    layers, config, subject = _listed(document.get("layers")), document.get("config"), document.get("subject")
    named = [*([config] if config is not None else []), *layers, *_listed(document.get("manifests"))]
    if not strict:
        named = [one for one in (*named, *_listed(document.get("blobs"))) if _is_descriptor(one)]
    if len(named) > _MOST:
        raise FormatError(where, f"{len(named)} descriptors are over the limit of {_MOST}")
    annotations = document.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise FormatError(where, "annotations are not a map of strings to strings")
    return Document(
        kind,
        artifact_type(document),
        _reference(subject, where, strict=True).digest if subject is not None else "",
        annotations,
        tuple(_reference(one, where, strict=strict) for one in named),
        {name: (one["digest"], one["size"]) for one in layers if (name := _name(one))} if kind == MANIFEST_TYPE else {},
    )


def _kind(document: Mapping[str, Any], told: str, where: str) -> str:
    """The media type: that of the request, or that of the document if the request has none."""
    own = document.get("mediaType")
    if own is not None and told not in _UNTOLD and own != told:
        raise FormatError(where, f"its mediaType is {str(own)[:80]!r}, and it was sent as {told[:80]!r}")
    kind = own if own is not None else told
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind) or (own is None and kind in _UNTOLD):
        raise FormatError(where, f"{str(kind)[:80]!r} is not the media type of a manifest")
    return kind


def _check(document: Mapping[str, Any], kind: str, where: str) -> None:
    """The form of an image manifest or an index."""
    if document.get("schemaVersion") != 2:
        raise FormatError(where, "schemaVersion is not 2")
    # Another program could take it for the other one (CVE-2021-41190).
    if "manifests" in document and "layers" in document:
        raise FormatError(where, "both an image manifest, with layers, and an image index, with manifests")
    lists, config = ("layers", document.get("config")) if kind in _IMAGES else ("manifests", {})
    if not isinstance(document.get(lists), list) or not isinstance(config, dict):
        raise FormatError(where, "an image manifest needs a config and layers, and an image index needs manifests")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_descriptor(one: Any) -> bool:
    try:
        return bool(_reference(one, "", strict=True))
    except (FormatError, OciError):
        return False


def _reference(one: Any, where: str, *, strict: bool) -> Reference:
    """A checked descriptor; `strict`: what it names has to be there, unless it is meant to be elsewhere."""
    kind, size = (one.get("mediaType"), one.get("size")) if isinstance(one, dict) else (None, None)
    if not isinstance(kind, str) or type(size) is not int or not 0 <= size < 2**63:
        raise FormatError(where, "a descriptor without a media type or a size")
    return Reference(parse_digest(str(one.get("digest"))), size, strict and not kind.startswith(_ELSEWHERE))


def _name(layer: Any) -> str:
    """The name of the file that a layer is; empty for one without."""
    annotations = layer.get("annotations") if isinstance(layer, dict) else None
    found = (annotations.get(TITLE) or annotations.get(FILEPATH)) if isinstance(annotations, dict) else None
    return found if isinstance(found, str) else ""
