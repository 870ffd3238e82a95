"""Manifests of any kind, as far as a registry must understand them: their references, subject and files.

Image manifests and indexes are checked against the image-spec (v1.1, `manifest.md`, `image-index.md`). Of other types, only
descriptors in the usual places are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.manifest.oci_manifest import FILEPATH, MANIFEST_TYPE, TITLE
from adapterhub.remotes.layouts.layout_index import INDEX_TYPE, artifact_type
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from .names_and_digests import parse_digest
from .oci_errors import OciError

_DOCKER = "application/vnd.docker.distribution.manifest."
_IMAGES = {MANIFEST_TYPE, f"{_DOCKER}v2+json"}
_INDEXES = {INDEX_TYPE, f"{_DOCKER}list.v2+json"}
# Layers that clients fetch from elsewhere, so they may be missing here.
_FOREIGN_LAYERS = ("application/vnd.oci.image.layer.nondistributable.", "application/vnd.docker.image.rootfs.foreign.")
# Content types of clients that do not say what they send.
_GENERIC_TYPES = {"", "application/json", "application/octet-stream", "application/x-www-form-urlencoded", "text/plain"}
_TYPE = safe_regex.Pattern(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_MAX_DESCRIPTORS = 20_000  # descriptors in a manifest


@dataclass(frozen=True, slots=True)
class Reference:
    """A descriptor: its digest (sha256 or sha512), its size in bytes, and whether the blob must exist here."""

    digest: str
    size: int
    required: bool


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest of any kind.

    Attributes:
        subject: The digest of the manifest it is about; empty if there is none.
        references: The blobs and manifests it names, with repetitions.
        files: Path to digest and size, as an image manifest has them; neither is checked.
    """

    media_type: str
    artifact_type: str
    subject: str
    annotations: Mapping[str, str]
    references: tuple[Reference, ...]
    files: Mapping[str, tuple[str, int]]


EMPTY = Document("", "", "", {}, (), {})
"""A document that names nothing."""


def parse(raw: bytes, content_type: str, location: str) -> Document:
    """Parse the manifest in the body of a request.

    Raises:
        FormatError: It is malformed.
        OciError: A digest in it is malformed.
    """
    document = json_file.parse_object(raw, location)
    kind = _media_type(document, content_type.partition(";")[0].strip(), location)
    strict = kind in _IMAGES or kind in _INDEXES
    if strict:
        _check_image(document, kind, location)
    layers, config, subject = _as_list(document.get("layers")), document.get("config"), document.get("subject")
    descriptors = [*([config] if config is not None else []), *layers, *_as_list(document.get("manifests"))]
    if not strict:
        descriptors = [entry for entry in (*descriptors, *_as_list(document.get("blobs"))) if _is_descriptor(entry)]
    if len(descriptors) > _MAX_DESCRIPTORS:
        raise FormatError(location, f"{len(descriptors)} descriptors are over the limit of {_MAX_DESCRIPTORS}")
    annotations = document.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise FormatError(location, "annotations are not a map of strings to strings")
    return Document(
        kind,
        artifact_type(document),
        _reference(subject, location, strict=True).digest if subject is not None else "",
        annotations,
        tuple(_reference(entry, location, strict=strict) for entry in descriptors),
        {name: (layer["digest"], layer["size"]) for layer in layers if (name := _file_path(layer))}
        if kind == MANIFEST_TYPE
        else {},
    )


def _media_type(document: Mapping[str, Any], content_type: str, location: str) -> str:
    """Return the media type of the request, or of the document if the request has none."""
    declared = document.get("mediaType")
    if declared is not None and content_type not in _GENERIC_TYPES and declared != content_type:
        raise FormatError(location, f"its mediaType is {str(declared)[:80]!r}, and it was sent as {content_type[:80]!r}")
    kind = declared if declared is not None else content_type
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind) or (declared is None and kind in _GENERIC_TYPES):
        raise FormatError(location, f"{str(kind)[:80]!r} is not the media type of a manifest")
    return kind


def _check_image(document: Mapping[str, Any], kind: str, location: str) -> None:
    """Check the structure of an image manifest or an index."""
    if document.get("schemaVersion") != 2:
        raise FormatError(location, "schemaVersion is not 2")
    # Another program could take it for the other one (CVE-2021-41190).
    if "manifests" in document and "layers" in document:
        raise FormatError(location, "both an image manifest, with layers, and an image index, with manifests")
    lists, config = ("layers", document.get("config")) if kind in _IMAGES else ("manifests", {})
    if not isinstance(document.get(lists), list) or not isinstance(config, dict):
        raise FormatError(location, "an image manifest needs a config and layers, and an image index needs manifests")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_descriptor(entry: Any) -> bool:
    try:
        return bool(_reference(entry, "", strict=True))
    except (FormatError, OciError):
        return False


def _reference(descriptor: Any, location: str, *, strict: bool) -> Reference:
    """Return a checked descriptor. If `strict`, its blob must exist here, unless it is meant to be fetched from elsewhere."""
    kind, size = (descriptor.get("mediaType"), descriptor.get("size")) if isinstance(descriptor, dict) else (None, None)
    if not isinstance(kind, str) or type(size) is not int or not 0 <= size < 2**63:
        raise FormatError(location, "a descriptor without a media type or a size")
    return Reference(parse_digest(str(descriptor.get("digest"))), size, strict and not kind.startswith(_FOREIGN_LAYERS))


def _file_path(layer: Any) -> str:
    """Return the path of the file in a layer; empty if it has none."""
    annotations = layer.get("annotations") if isinstance(layer, dict) else None
    path = (annotations.get(TITLE) or annotations.get(FILEPATH)) if isinstance(annotations, dict) else None
    return path if isinstance(path, str) else ""
