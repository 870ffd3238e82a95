"""An image layout in a folder or a tar, as a source and target: names from index.json, blobs by digest."""

from __future__ import annotations

import contextlib
import io
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, BinaryIO, Self

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST, Descriptor, Manifest
from adapterhub.ref import LATEST
from adapterhub.registry import version_selection
from adapterhub.remotes.protocol import OpenRemote, PutResult, Reader, check_complete
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError

from . import layout_index
from .layout_index import Entry


class Layout(OpenRemote):
    """The common part of a layout in a folder and one in an archive; `location` is its name in errors.

    Attributes:
        any_name: The address has no name, so `latest` selects the only version if there is just one.
    """

    kind = "an image layout"

    def __init__(self, location: str, *, any_name: bool = False) -> None:
        super().__init__()
        self._label = location
        self.any_name = any_name

    @property
    def location(self) -> str:
        """The path, as it was written."""
        return self._label

    @abstractmethod
    def exists(self) -> bool:
        """Return whether there is a layout."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """Return the entries of index.json; empty if there is none yet."""

    @abstractmethod
    def open_section(self, digest: Digest) -> tuple[BinaryIO, int, int] | None:
        """Return an unbuffered file, the offset of a blob in it, and its size in bytes; None without the blob."""

    def as_referring_target(self) -> Self:
        """Return the layout itself."""
        return self

    @abstractmethod
    def put_document(self, raw: bytes, digest: Digest, name: str | None = None) -> bool:
        """Store a manifest or an index, and its entry in index.json."""

    @abstractmethod
    def untag(self, tag: str) -> None:
        """Remove a name; the version stays."""

    # ---- a source

    def manifest(self, reference: str) -> Manifest:
        """Return the checked manifest of a name or a digest."""
        return oci_manifest.parse(self.read_document(reference), self._label_at(reference))

    def _label_at(self, reference: str) -> str:
        return f"{self.location}{'@' if reference.startswith('sha256:') else ':'}{reference}"

    def _find_entry(self, name: str, location: str) -> Entry:
        if not self.exists():
            raise NotFoundError(self.location, "no such file or folder", code="no-such-file")
        entries = self.entries()
        entry = layout_index.find_entry(entries, name)
        # `layout://bundle.tar` means its only version, whatever that is called.
        if entry is None and name == LATEST and self.any_name:
            entry = layout_index.only_entry(entries)
        if entry is None and (chosen := self._name_in_range(name, entries, location)):
            entry = layout_index.find_entry(entries, chosen)
        if entry is None:
            names = layout_index.names(entries)
            contents = f"it has {', '.join(names[:5])}{' …' if names[5:] else ''}" if names else "nothing in it has a name"
            raise NotFoundError(location, f"no such name in this image layout; {contents}", f"Write {self.location}:NAME")
        return entry

    def digests_of_adapter(self, adapter: str) -> set[Digest]:
        """Return the digests of an adapter's names, `team/sql:v1` and so on."""
        entries = self.entries() if self.exists() else []
        return {entry["digest"] for entry in entries if (layout_index.name_of(entry) or "").rpartition(":")[0] == adapter}

    def _name_in_range(self, name: str, entries: list[Entry], location: str) -> str | None:
        """Return the name that a range selects, `^1.2` or `team/sql:^1.2`, among those of that adapter."""
        adapter, colon, range_text = name.rpartition(":")
        digests_by_name = {layout_index.name_of(entry) or "": entry["digest"] for entry in entries}
        tags = {
            name_in_layout.rpartition(":")[2]: digest
            for name_in_layout, digest in digests_by_name.items()
            if name_in_layout.rpartition(":")[0] == adapter
        }
        tag = version_selection.highest_tag_in_range(range_text, lambda: tags, tags.get, location)
        return tag and f"{adapter}{colon}{tag}"

    def read_document(self, reference: str) -> bytes:
        """Return the bytes of a manifest or an index, verified."""
        label = self._label_at(reference)
        if version_selection.is_prefix(reference):
            digests = (entry["digest"] for entry in (self.entries() if self.exists() else []))
            digest = version_selection.matching_digest(reference, digests, label) or reference
        else:
            digest = reference if reference.startswith("sha256:") else self._find_entry(reference, label)["digest"]
        section = self.open_section(digest)
        if section is None:
            raise NotFoundError(label, "no manifest of this digest in the image layout")
        file, offset, size = section
        with file:
            if size > MAX_MANIFEST:
                raise FormatError(label, f"a manifest of over {MAX_MANIFEST} bytes")
            file.seek(offset)
            raw = b"".join(iter(lambda: file.read(size - file.tell() + offset), b""))
        if sha256_bytes(raw) != digest:
            raise IntegrityError(label, f"its bytes do not match {digest}")
        return raw

    def referrers(self, digest: Digest) -> list[Entry] | None:
        """Return the entries of the manifests about a manifest; all manifests are read for it."""
        entries_by_digest, visited = {}, {digest}
        # A layout has no index by subject.
        for entry in self.entries() if self.exists() else []:
            if entry["digest"] in visited or entry["mediaType"] != MANIFEST_TYPE:
                continue
            visited.add(entry["digest"])
            document = json_file.parse_object(self.read_document(entry["digest"]), self._label_at(entry["digest"]))
            subject = document.get("subject")
            if isinstance(subject, dict) and subject.get("digest") == digest:
                entries_by_digest[entry["digest"]] = {"artifactType": layout_index.artifact_type(document), **entry}
        return list(entries_by_digest.values())

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a blob for reading from `start` on."""
        section = self.open_section(blob.digest)
        if section is None:
            raise NotFoundError(self.location, f"no blob {blob.digest}")
        file, offset, size = section
        with file:
            if size != blob.size:
                raise IntegrityError(f"{self.location}: {blob.path or blob.digest}", f"has {size} bytes, not {blob.size}")
            yield FileSection(file, offset + start, size - start)

    def tags(self) -> list[str]:
        """Return all names, sorted."""
        if not self.exists():
            raise NotFoundError(self.location, "no such file or folder", code="no-such-file")
        return layout_index.names(self.entries())

    def open_digest(self, digest: Digest) -> Any:
        """Open a digest as an unbuffered file of unverified bytes, for the caller to close; None without one."""
        section = self.open_section(digest)
        return FileSection(*section) if section else None

    def has_blob(self, blob: Descriptor) -> bool:
        """Return whether there is a blob of this digest and size; its bytes are not read."""
        section = self.open_section(blob.digest)
        if section is None:
            return False
        section[0].close()
        return section[2] == blob.size

    def put_manifest(self, manifest: Manifest, tag: str | None) -> PutResult:
        """Store a manifest whose blobs are all here, and point a name at it."""
        check_complete((*manifest.layers, manifest.config), self.has_blob, self.location)
        entries = self.entries() if self.exists() else []
        # Look before writing, to report whether the tag has moved.
        previous_entry = layout_index.find_entry(entries, tag) if tag else None
        self.put_document(manifest.raw, manifest.digest, tag)
        return PutResult(
            new=all(entry["digest"] != manifest.digest for entry in entries),
            moved=tag is not None and (previous_entry is None or previous_entry["digest"] != manifest.digest),
        )


class FileSection(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as an unbuffered file; closing it closes the file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._bytes_left = file, max(size, 0)
        file.seek(offset)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes; return 0 at the end."""
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view[: self._bytes_left]) or 0  # type: ignore[attr-defined]
        self._bytes_left -= count
        return int(count)

    def close(self) -> None:
        """Close the file as well."""
        self._file.close()
        super().close()
