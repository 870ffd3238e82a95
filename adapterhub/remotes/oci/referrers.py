"""Attachments of a version: manifests that name it as their subject, such as signatures, scans and evaluations.

A registry with the referrers API lists them (distribution-spec v1.1, "Listing Referrers"). One without, like docker-registry
2.8, has an index under the tag `sha256-<hex>`, which the client updates ("Referrers Tag Schema"); that is not atomic, so it is
read again afterwards. An image layout lists all its manifests. oras does the same.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest, parse_digest, sha256_bytes, sha256_file
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST, TITLE, Descriptor, Manifest, parse_json
from adapterhub.manifest.package_files import check_paths
from adapterhub.remotes.copy import read_blob
from adapterhub.remotes.download import received
from adapterhub.remotes.layouts import index as layout_index
from adapterhub.remotes.protocol import Reader, Referring
from adapterhub.store.store import open_regular
from adapterhub_converters import linear
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.containers.inside import Inside
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, RemoteError, UsageError

EMPTY_TYPE, EMPTY = "application/vnd.oci.empty.v1+json", b"{}"
MAX_REFERRERS = 1000
_MAX_OF_ONE = 64 << 10  # bytes
_TYPE = linear.Pattern(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_TYPES = {".json": "application/json", ".md": "text/markdown", ".txt": "text/plain"}
_TRIES = 5  # updates of an index that others update as well


@dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest about another: its digest, its size in bytes, its types and its annotations."""

    digest: Digest
    size: int
    media_type: str
    artifact_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)


def referrers(place: Referring, digest: Digest, artifact_type: str | None = None) -> list[Referrer]:
    """The attachments of a manifest, of one type or of all, sorted by type and digest."""
    entries = place.referrers(digest)
    if entries is None:
        entries = _tagged(place, digest)
    found = {}
    for entry in entries[:MAX_REFERRERS]:
        layout_index.check(entry, f"{place.where}: attachments of {digest}")
        kind = str(entry.get("artifactType"))
        kind = kind if _TYPE.fullmatch(kind) else ""  # it is shown
        found[entry["digest"]] = Referrer(
            entry["digest"], entry["size"], entry["mediaType"], kind, entry.get("annotations") or {}
        )
    wanted = [each for each in found.values() if artifact_type in (None, each.artifact_type)]
    return sorted(wanted, key=lambda each: (each.artifact_type, each.digest))


def _tagged(place: Referring, digest: Digest) -> list[dict[str, Any]]:
    try:
        raw = place.document(_tag(digest))
    except NotFoundError:
        return []
    return layout_index.parse(raw, f"{place.where}:{_tag(digest)}")


def _tag(digest: Digest) -> str:
    return digest.replace(":", "-")


# ---- attaching


def attach(place: Referring, subject: Manifest, artifact_type: str, files: Sequence[Path]) -> Referrer:
    """Attach files to a manifest; the same files of the same type are the same attachment."""
    if not _TYPE.fullmatch(artifact_type):
        raise UsageError(artifact_type[:80], "is not a media type", "Write one like application/vnd.example.scan+json")
    check_paths((path.name for path in files), "attachment", RefusedError)
    source = _Files(files)
    empty = {"mediaType": EMPTY_TYPE, "digest": sha256_bytes(EMPTY), "size": len(EMPTY)}
    raw = json_file.canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": artifact_type,
            "config": empty,
            "layers": [
                {
                    "mediaType": blob.media_type,
                    "digest": blob.digest,
                    "size": blob.size,
                    "annotations": {TITLE: blob.path},
                }
                for blob in source.blobs
            ],
            "subject": {"mediaType": MANIFEST_TYPE, "digest": subject.digest, "size": len(subject.raw)},
        }
    )
    for blob in (*source.blobs, Descriptor(EMPTY_TYPE, sha256_bytes(EMPTY), len(EMPTY))):
        if not place.has(blob):
            place.put_blob(blob, source)
    return _put(place, raw, subject.digest)


class _Files:
    """Local files, and the empty config, as a source."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._paths: dict[Digest, Path] = {}
        self.blobs: list[Descriptor] = []
        for path in sorted(files, key=lambda path: path.name):
            if not path.is_file():
                raise NotFoundError(str(path), "no such file" if not path.exists() else "not a file", code="no-such-file")
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
            digest = sha256_file(path)
            self._paths[digest] = path
            kind = _TYPES.get(path.suffix.lower(), "application/octet-stream")
            self.blobs.append(Descriptor(kind, digest, size, path.name))

    where = "attachment"

    def manifest(self, reference: str) -> Manifest:
        """None."""
        raise NotFoundError(self.where, f"no version {reference}")

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a file from `start` on."""
        path = self._paths.get(blob.digest)
        with open_regular(path) if path else io.BytesIO(EMPTY) as file:
            file.seek(start)
            yield file  # type: ignore[misc]

    def tags(self) -> list[str]:
        """None."""
        return []

    def stop(self, *, on: bool = True) -> None:
        """Do nothing: files are read at once."""


def _put(place: Referring, raw: bytes, subject: Digest) -> Referrer:
    """Store a manifest whose blobs are there, so that it is found by its subject."""
    digest = sha256_bytes(raw)
    document = _Document.parse(raw, place.where)
    made = Referrer(digest, len(raw), document.media_type, document.artifact_type, document.annotations)
    if not place.put_document(raw, digest):
        _list_by_tag(place, made, subject)
    return made


def _list_by_tag(place: Referring, made: Referrer, subject: Digest) -> None:
    entry: dict[str, Any] = {"mediaType": made.media_type, "digest": made.digest, "size": made.size}
    entry |= {"artifactType": made.artifact_type} if made.artifact_type else {}
    entry |= {"annotations": dict(made.annotations)} if made.annotations else {}
    for _ in range(_TRIES):
        entries = _tagged(place, subject)
        if any(found["digest"] == made.digest for found in entries):
            return
        if len(entries) >= MAX_REFERRERS:
            raise RefusedError(place.where, f"{subject} has {len(entries)} attachments already, as many as are listed")
        index = layout_index.dump([*entries, entry])
        place.put_document(index, sha256_bytes(index), _tag(subject))
    raise RemoteError(place.where, "others are changing the attachments at the same time", "Try again")


# ---- reading attachments


@dataclass(frozen=True)
class _Document:
    """The checked fields of a manifest of any kind."""

    media_type: str
    artifact_type: str
    subject: Digest | None
    config: Descriptor | None
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    @classmethod
    def parse(cls, raw: bytes, where: str) -> _Document:
        """Parse a manifest; FormatError for invalid digests or sizes, RefusedError for another kind of document."""
        document = parse_json(raw, where)
        kind = document.get("mediaType")
        layers = document.get("layers")
        if kind != MANIFEST_TYPE or not isinstance(layers, list) or len(layers) > MAX_REFERRERS:
            why = f" but {str(kind)[:80]!r}" if kind != MANIFEST_TYPE else f": it has no list of at most {MAX_REFERRERS} layers"
            raise RefusedError(where, f"the attachment is not an OCI image manifest{why}")
        config, subject = document.get("config"), document.get("subject")
        annotations = document.get("annotations") or {}
        layout_index.check({"mediaType": kind, "size": 0, "digest": sha256_bytes(raw), "annotations": annotations}, where)
        return cls(
            kind,
            layout_index.artifact_type(document),
            parse_digest(subject.get("digest"), where) if isinstance(subject, dict) else None,
            _blob(config, where),
            tuple(_blob(layer, where) for layer in layers),
            annotations,
        )


def _blob(value: object, where: str) -> Descriptor:
    entry = layout_index.check(value, where)
    return Descriptor(entry["mediaType"], entry["digest"], entry["size"], (entry.get("annotations") or {}).get(TITLE) or "")


def _document(place: Referring, referrer: Referrer) -> tuple[bytes, _Document]:
    where = f"{place.where}@{referrer.digest}"
    if referrer.size > MAX_MANIFEST:
        raise FormatError(where, f"a manifest of over {MAX_MANIFEST} bytes")
    raw = place.document(referrer.digest)
    return raw, _Document.parse(raw, where)


def copy(source: Referring, digest: Digest, target: Referring) -> list[Referrer]:
    """Copy the attachments of a manifest, and theirs, to another place; return all of them, also those that were there."""
    done: list[Referrer] = []
    waiting = [digest]
    seen = {digest}
    while waiting and len(done) < MAX_REFERRERS:
        about = waiting.pop()
        for referrer in referrers(source, about):
            if referrer.digest in seen:
                continue
            seen.add(referrer.digest)
            raw, document = _document(source, referrer)
            if document.subject != about:
                raise FormatError(f"{source.where}@{referrer.digest}", f"is listed as an attachment of {about}, but is not")
            for blob in dict.fromkeys((*document.layers, *([document.config] if document.config else []))):
                if not target.has(blob):
                    target.put_blob(blob, source)
            done.append(_put(target, raw, about))
            waiting.append(referrer.digest)
    return done


def file_of(place: Referring, referrer: Referrer, about: Digest, limit: int) -> Descriptor:
    """The only file of an attachment; FormatError if that is `about` another manifest, or one of them is too large.

    The file may have `limit` bytes; the manifest as many as one with a file and some annotations has.
    """
    where = f"{place.where}@{referrer.digest}"
    if referrer.size > _MAX_OF_ONE:
        raise FormatError(where, f"a manifest of one file, and of over {_MAX_OF_ONE} bytes")
    _, document = _document(place, referrer)
    if document.subject != about or len(document.layers) != 1 or document.layers[0].size > limit:
        raise FormatError(where, f"is not one file of at most {limit} bytes about {about}")
    return document.layers[0]


def read(place: Referring, referrer: Referrer, file: Descriptor) -> bytes:
    """The verified bytes of the file of an attachment."""
    return read_blob(place, file, f"{place.where}@{referrer.digest}")


def fetch(place: Referring, referrer: Referrer, out: Path) -> list[str]:
    """Write the files of an attachment into `out`, absent or empty: all, verified, or none. Return their names."""
    _, document = _document(place, referrer)
    files = [layer for layer in document.layers if layer.path]
    where = f"{place.where}@{referrer.digest}"
    check_paths((layer.path for layer in files), where)
    if not files:
        raise NotFoundError(where, "the attachment has no files with a name")
    with atomic.whole(out) as folder:
        inside = Inside(folder)
        for layer in files:
            path = folder / layer.path
            path.parent.mkdir(parents=True, exist_ok=True)
            part = folder / f".{layer.digest[7:]}.part"  # no file of an attachment has such a name
            with received(place, layer, inside, part):
                os.replace(part, path)
    return sorted(layer.path for layer in files)
