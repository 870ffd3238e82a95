"""Attachments of a version: manifests with it as their subject, such as signatures, scans and evaluations.

A registry with the referrers API lists them (distribution-spec v1.1, "Listing Referrers"). One without, like docker-registry
2.8, has an index under the tag `sha256-<hex>`, which the client updates ("Referrers Tag Schema"); the update is not atomic, so
the index is read again afterwards. An image layout lists all its manifests. oras does the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adapterhub.digest import Digest, parse_digest, sha256_bytes, sha256_file
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST, TITLE, Descriptor, Manifest
from adapterhub.manifest.package_files import check_paths
from adapterhub.remotes.download import read_blob, receive
from adapterhub.remotes.layouts import layout_index
from adapterhub.remotes.protocol import Reader, ReferringTarget
from adapterhub.store.store import open_regular
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, RemoteError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

EMPTY_TYPE, EMPTY = "application/vnd.oci.empty.v1+json", b"{}"
EMPTY_CONFIG = {"mediaType": EMPTY_TYPE, "digest": sha256_bytes(EMPTY), "size": len(EMPTY)}
MAX_REFERRERS = 1000
_MAX_SINGLE_FILE_MANIFEST = 64 << 10  # bytes
_MEDIA_TYPE = safe_regex.Pattern(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_MEDIA_TYPES = {".json": "application/json", ".md": "text/markdown", ".txt": "text/plain"}
_MAX_TRIES = 5  # updates of an index that others update as well


@dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest about another: its digest, its size in bytes, its types and its annotations."""

    digest: Digest
    size: int
    media_type: str
    artifact_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)


def referrers(place: ReferringTarget, digest: Digest, artifact_type: str | None = None) -> list[Referrer]:
    """Return the attachments of a manifest, of one type or of all, sorted by type and digest."""
    entries = place.referrers(digest)
    if entries is None:
        entries = _listed_by_tag(place, digest)
    referrers_by_digest: dict[Digest, Referrer] = {}
    for entry in entries[:MAX_REFERRERS]:
        # The list comes from the registry: check it like any other document.
        layout_index.check_descriptor(entry, f"{place.location}: attachments of {digest}")
        artifact = str(entry.get("artifactType"))
        artifact = artifact if _MEDIA_TYPE.fullmatch(artifact) else ""  # it is printed, and comes from the registry
        referrer = Referrer(entry["digest"], entry["size"], entry["mediaType"], artifact, entry.get("annotations") or {})
        # cosign 2 lists what it attaches by the type of the empty config (sigstore/cosign#4422); the manifest has the real one.
        if artifact == EMPTY_TYPE:
            with contextlib.suppress(NotFoundError, FormatError, RefusedError):
                referrer = dataclasses.replace(referrer, artifact_type=_read_referrer(place, referrer)[1].artifact_type)
        referrers_by_digest[referrer.digest] = referrer
    selected = [referrer for referrer in referrers_by_digest.values() if artifact_type in (None, referrer.artifact_type)]
    return sorted(selected, key=lambda referrer: (referrer.artifact_type, referrer.digest))


def _listed_by_tag(place: ReferringTarget, digest: Digest) -> list[dict[str, Any]]:
    """Return the entries of the index under the fallback tag, empty without one."""
    try:
        raw = place.read_document(_fallback_tag(digest))
    except NotFoundError:
        return []
    return layout_index.parse(raw, f"{place.location}:{_fallback_tag(digest)}")


def _fallback_tag(digest: Digest) -> str:
    """Return the tag under which a registry without the referrers API lists attachments."""
    return digest.replace(":", "-")


# ---- attaching


def attach_files(place: ReferringTarget, subject: Manifest, artifact_type: str, files: Sequence[Path]) -> Referrer:
    """Attach files to a manifest, each with the media type of its suffix; the same files are the same attachment."""
    if not _MEDIA_TYPE.fullmatch(artifact_type):
        raise UsageError(artifact_type[:80], "is not a media type", "Write one like application/vnd.example.scan+json")
    check_paths((path.name for path in files), "attachment", RefusedError)
    blobs, paths = [], {}
    for path in sorted(files, key=lambda path: path.name):
        if not path.is_file():
            raise NotFoundError(str(path), "no such file" if not path.exists() else "not a file", code="no-such-file")
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        media_type = _MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
        blobs.append(Descriptor(media_type, sha256_file(path), size, path.name))
        paths[blobs[-1].digest] = path
    return _attach(place, subject, attachment_bytes(subject, artifact_type, blobs), _Blobs(blobs, paths))


def attach_document(
    place: ReferringTarget, subject: Manifest, blob: Descriptor, raw: bytes, annotations: Mapping[str, str]
) -> Referrer:
    """Attach one document whose media type is the type of the attachment too."""
    return attach_manifest(place, subject, attachment_bytes(subject, blob.media_type, [blob], annotations), blob, raw)


def attach_manifest(place: ReferringTarget, subject: Manifest, manifest: bytes, blob: Descriptor, raw: bytes) -> Referrer:
    """Attach one document by a manifest that refers to it and to the empty config."""
    return _attach(place, subject, manifest, _Blobs([blob], {}, {blob.digest: raw}))


def _attach(place: ReferringTarget, subject: Manifest, raw: bytes, source: _Blobs) -> Referrer:
    for blob in (*source.blobs, Descriptor(EMPTY_TYPE, sha256_bytes(EMPTY), len(EMPTY))):
        if not place.has_blob(blob):
            place.put_blob(blob, source)
    return _put_referrer(place, raw, subject.digest)


def attachment_bytes(
    subject: Manifest,
    artifact_type: str,
    blobs: Sequence[Descriptor],
    annotations: Mapping[str, str] = MappingProxyType({}),
    blob_annotations: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """Return the bytes of the manifest that attaches blobs, each with its name and `blob_annotations`, to another manifest."""
    return json_file.canonical_bytes(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": artifact_type,
            "config": EMPTY_CONFIG,
            "layers": [
                {
                    "mediaType": blob.media_type,
                    "digest": blob.digest,
                    "size": blob.size,
                    "annotations": {TITLE: blob.path, **blob_annotations},
                }
                for blob in blobs
            ],
            "subject": {"mediaType": MANIFEST_TYPE, "digest": subject.digest, "size": len(subject.raw)},
            **({"annotations": dict(annotations)} if annotations else {}),
        }
    )


@dataclass(frozen=True)
class _Blobs:
    """What is attached, as a source: files, documents in memory, and the empty config."""

    blobs: Sequence[Descriptor]
    paths: Mapping[Digest, Path]
    documents: Mapping[Digest, bytes] = field(default_factory=dict)

    location = "attachment"

    def manifest(self, reference: str) -> Manifest:
        """Raise a NotFoundError: blobs have no versions."""
        raise NotFoundError(self.location, f"no version {reference}")

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a blob for reading from `start` on."""
        path = self.paths.get(blob.digest)
        with open_regular(path) if path else io.BytesIO(self.documents.get(blob.digest, EMPTY)) as file:
            file.seek(start)
            yield file  # type: ignore[misc]

    def tags(self) -> list[str]:
        """Return no tags: blobs have no versions."""
        return []

    def stop(self, *, on: bool = True) -> None:
        """Do nothing: files are read at once."""


def _put_referrer(place: ReferringTarget, raw: bytes, subject: Digest) -> Referrer:
    """Store a manifest whose blobs are there already, so that it can be found by its subject."""
    digest = sha256_bytes(raw)
    document = _ReferrerManifest.parse(raw, place.location)
    referrer = Referrer(digest, len(raw), document.media_type, document.artifact_type, document.annotations)
    if not place.put_document(raw, digest):
        _list_by_tag(place, referrer, subject)
    return referrer


def _list_by_tag(place: ReferringTarget, referrer: Referrer, subject: Digest) -> None:
    """Add a manifest to the index under the fallback tag of its subject."""
    entry: dict[str, Any] = {"mediaType": referrer.media_type, "digest": referrer.digest, "size": referrer.size}
    entry |= {"artifactType": referrer.artifact_type} if referrer.artifact_type else {}
    entry |= {"annotations": dict(referrer.annotations)} if referrer.annotations else {}
    # A registry has no compare-and-swap: write, read again, and repeat if another writer's index replaced ours.
    for _ in range(_MAX_TRIES):
        entries = _listed_by_tag(place, subject)
        if any(listed_entry["digest"] == referrer.digest for listed_entry in entries):
            return
        if len(entries) >= MAX_REFERRERS:
            raise RefusedError(place.location, f"{subject} has {len(entries)} attachments already, as many as are listed")
        index = layout_index.dump_index([*entries, entry])
        place.put_document(index, sha256_bytes(index), _fallback_tag(subject))
    raise RemoteError(place.location, "others are changing the attachments at the same time", "Try again")


# ---- reading attachments


@dataclass(frozen=True)
class _ReferrerManifest:
    """The checked fields of a manifest of any kind."""

    media_type: str
    artifact_type: str
    subject: Digest | None
    config: Descriptor | None
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    @classmethod
    def parse(cls, raw: bytes, location: str) -> _ReferrerManifest:
        """Parse a manifest.

        Raises:
            FormatError: A digest or size is invalid.
            RefusedError: It is another kind of document.
        """
        document = json_file.parse_object(raw, location)
        media_type = document.get("mediaType")
        layers = document.get("layers")
        if media_type != MANIFEST_TYPE or not isinstance(layers, list) or len(layers) > MAX_REFERRERS:
            detail = (
                f" but {str(media_type)[:80]!r}"
                if media_type != MANIFEST_TYPE
                else f": it has no list of at most {MAX_REFERRERS} layers"
            )
            raise RefusedError(location, f"the attachment is not an OCI image manifest{detail}")
        config, subject = document.get("config"), document.get("subject")
        annotations = document.get("annotations") or {}
        layout_index.check_descriptor(
            {"mediaType": media_type, "size": 0, "digest": sha256_bytes(raw), "annotations": annotations}, location
        )
        return cls(
            media_type,
            layout_index.artifact_type(document),
            parse_digest(subject.get("digest"), location) if isinstance(subject, dict) else None,
            _parse_descriptor(config, location),
            tuple(_parse_descriptor(layer, location) for layer in layers),
            annotations,
        )


def _parse_descriptor(value: object, location: str) -> Descriptor:
    entry = layout_index.check_descriptor(value, location)
    return Descriptor(entry["mediaType"], entry["digest"], entry["size"], (entry.get("annotations") or {}).get(TITLE) or "")


def _read_referrer(place: ReferringTarget, referrer: Referrer) -> tuple[bytes, _ReferrerManifest]:
    """Read and parse an attachment's manifest."""
    label = f"{place.location}@{referrer.digest}"
    # The size is the registry's claim; `document` enforces the limit too.
    if referrer.size > MAX_MANIFEST:
        raise FormatError(label, f"a manifest of over {MAX_MANIFEST} bytes")
    raw = place.read_document(referrer.digest)
    return raw, _ReferrerManifest.parse(raw, label)


def copy_referrers(source: ReferringTarget, digest: Digest, target: ReferringTarget) -> list[Referrer]:
    """Copy the attachments of a manifest, and their own, to another place; return all of them, even those already there."""
    copied: list[Referrer] = []
    pending = [digest]
    visited = {digest}
    while pending and len(copied) < MAX_REFERRERS:
        subject = pending.pop()
        for referrer in referrers(source, subject):
            if referrer.digest in visited:
                continue
            visited.add(referrer.digest)
            raw, document = _read_referrer(source, referrer)
            if document.subject != subject:
                raise FormatError(
                    f"{source.location}@{referrer.digest}", f"is listed as an attachment of {subject}, but is not"
                )
            for blob in dict.fromkeys((*document.layers, *([document.config] if document.config else []))):
                if not target.has_blob(blob):
                    target.put_blob(blob, source)
            copied.append(_put_referrer(target, raw, subject))
            # An attachment may have attachments itself, such as the signature of a scan.
            pending.append(referrer.digest)
    return copied


def single_file(place: ReferringTarget, referrer: Referrer, subject: Digest, limit: int) -> Descriptor:
    """Return the only file of an attachment.

    The file may have `limit` bytes, and the manifest as many as one with a file and some annotations has.

    Raises:
        FormatError: It is about another manifest than `subject`, has not exactly one file, or one of both is too large.
    """
    label = f"{place.location}@{referrer.digest}"
    if referrer.size > _MAX_SINGLE_FILE_MANIFEST:
        raise FormatError(label, f"a manifest of one file, and of over {_MAX_SINGLE_FILE_MANIFEST} bytes")
    _, document = _read_referrer(place, referrer)
    if document.subject != subject or len(document.layers) != 1 or document.layers[0].size > limit:
        raise FormatError(label, f"is not one file of at most {limit} bytes about {subject}")
    return document.layers[0]


def read_file(place: ReferringTarget, referrer: Referrer, file: Descriptor) -> bytes:
    """Return the verified bytes of an attachment's file."""
    return read_blob(place, file, f"{place.location}@{referrer.digest}")


def fetch_files(place: ReferringTarget, referrer: Referrer, out: Path) -> list[str]:
    """Write the files of an attachment into `out`, which must be absent or empty; return their names.

    Either all files are written, verified, or none.
    """
    _, document = _read_referrer(place, referrer)
    files = [layer for layer in document.layers if layer.path]
    label = f"{place.location}@{referrer.digest}"
    check_paths((layer.path for layer in files), label)
    if not files:
        raise NotFoundError(label, "the attachment has no files with a name")
    with atomic.pending_output(out) as folder:
        confined = ConfinedFiles(folder)
        for layer in files:
            path = folder / layer.path
            path.parent.mkdir(parents=True, exist_ok=True)
            part_path = folder / f".{layer.digest[7:]}.part"  # no file of an attachment has such a name
            with receive(place, layer, confined, part_path):
                os.replace(part_path, path)
    return sorted(layer.path for layer in files)
