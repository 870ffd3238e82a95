"""An image layout as a source, in a folder or a tar: names from index.json, blobs by digest."""

from __future__ import annotations

import contextlib
import io
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, BinaryIO, Self

from adapterhub import references
from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST, Descriptor, Manifest
from adapterhub.ref import LATEST
from adapterhub.remotes.protocol import Connected, Put, Reader, check_complete
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError

from . import index as layout_index
from .index import Entry


class Layout(Connected):
    """The common part of a folder and an archive; `where` is its name in errors.

    Attributes:
        any_name: `latest` is the only version there, if there is one only, because the address has no name.
    """

    kind = "an image layout"

    def __init__(self, where: str, *, any_name: bool = False) -> None:
        super().__init__()
        self._where = where
        self.any_name = any_name

    @property
    def where(self) -> str:
        """The path, as it was written."""
        return self._where

    @abstractmethod
    def exists(self) -> bool:
        """Tell whether there is a layout."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """The entries of index.json; empty if there is none yet."""

    @abstractmethod
    def blob(self, digest: Digest) -> tuple[BinaryIO, int, int] | None:
        """An unbuffered file, the position of a blob in it, and its size in bytes; None without the blob."""

    def referring(self) -> Self:
        """Itself."""
        return self

    @abstractmethod
    def put_document(self, raw: bytes, digest: Digest, name: str | None = None) -> bool:
        """Store a manifest or an index, and its entry in index.json."""

    @abstractmethod
    def untag(self, tag: str) -> None:
        """Remove a name; the version stays."""

    # ---- a source

    def manifest(self, reference: str) -> Manifest:
        """The checked manifest of a name or a digest."""
        return oci_manifest.parse(self.document(reference), self._at(reference))

    def _at(self, reference: str) -> str:
        return f"{self.where}{'@' if reference.startswith('sha256:') else ':'}{reference}"

    def _entry(self, name: str, where: str) -> Entry:
        if not self.exists():
            raise NotFoundError(self.where, "no such file or folder", code="no-such-file")
        entries = self.entries()
        found = layout_index.find(entries, name)
        if found is None and name == LATEST and self.any_name:
            found = layout_index.only(entries)
        if found is None and (chosen := self._in_range(name, entries, where)):
            found = layout_index.find(entries, chosen)
        if found is None:
            names = layout_index.names(entries)
            there = f"it has {', '.join(names[:5])}{' …' if names[5:] else ''}" if names else "nothing in it has a name"
            raise NotFoundError(where, f"no such name in this image layout; {there}", f"Write {self.where}:NAME")
        return found

    def digests(self, adapter: str) -> set[Digest]:
        """The digests to which the names of an adapter lead, `team/sql:v1` and so on."""
        entries = self.entries() if self.exists() else []
        return {entry["digest"] for entry in entries if (layout_index.name_of(entry) or "").rpartition(":")[0] == adapter}

    def _in_range(self, name: str, entries: list[Entry], where: str) -> str | None:
        """The name that a range selects, `^1.2` or `team/sql:^1.2`, among those of that adapter."""
        adapter, colon, wanted = name.rpartition(":")
        named = {layout_index.name_of(entry) or "": entry["digest"] for entry in entries}
        tags = {full.rpartition(":")[2]: digest for full, digest in named.items() if full.rpartition(":")[0] == adapter}
        tag = references.in_range(wanted, lambda: tags, tags.get, where)
        return tag and f"{adapter}{colon}{tag}"

    def document(self, reference: str) -> bytes:
        """The bytes of a manifest or an index, verified."""
        where = self._at(reference)
        if references.is_prefix(reference):
            digests = (entry["digest"] for entry in (self.entries() if self.exists() else []))
            digest = references.begins(reference, digests, where) or reference
        else:
            digest = reference if reference.startswith("sha256:") else self._entry(reference, where)["digest"]
        found = self.blob(digest)
        if found is None:
            raise NotFoundError(where, "no manifest of this digest in the image layout")
        file, offset, size = found
        with file:
            if size > MAX_MANIFEST:
                raise FormatError(where, f"a manifest of over {MAX_MANIFEST} bytes")
            file.seek(offset)
            raw = b"".join(iter(lambda: file.read(size - file.tell() + offset), b""))
        if sha256_bytes(raw) != digest:
            raise IntegrityError(where, f"its bytes do not match {digest}")
        return raw

    def referrers(self, digest: Digest) -> list[Entry] | None:
        """The entries of the manifests about a manifest; all manifests are read for it."""
        found, seen = {}, {digest}
        for entry in self.entries() if self.exists() else []:
            if entry["digest"] in seen or entry["mediaType"] != MANIFEST_TYPE:
                continue
            seen.add(entry["digest"])
            document = oci_manifest.parse_json(self.document(entry["digest"]), self._at(entry["digest"]))
            subject = document.get("subject")
            if isinstance(subject, dict) and subject.get("digest") == digest:
                found[entry["digest"]] = {"artifactType": layout_index.artifact_type(document), **entry}
        return list(found.values())

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a blob from `start` on."""
        found = self.blob(blob.digest)
        if found is None:
            raise NotFoundError(self.where, f"no blob {blob.digest}")
        file, offset, size = found
        with file:
            if size != blob.size:
                raise IntegrityError(f"{self.where}: {blob.path or blob.digest}", f"has {size} bytes, not {blob.size}")
            yield Window(file, offset + start, size - start)

    def tags(self) -> list[str]:
        """All names, sorted."""
        if not self.exists():
            raise NotFoundError(self.where, "no such file or folder", code="no-such-file")
        return layout_index.names(self.entries())

    def find(self, digest: Digest) -> Any:
        """An unbuffered file with the unverified bytes of a digest, to be closed; None without one."""
        found = self.blob(digest)
        return Window(*found) if found else None

    def has(self, blob: Descriptor) -> bool:
        """Tell whether a blob of this digest and size is there; its bytes are not read."""
        found = self.blob(blob.digest)
        if found is None:
            return False
        found[0].close()
        return found[2] == blob.size

    def put_manifest(self, made: Manifest, tag: str | None) -> Put:
        """Store a manifest whose blobs are all here, and point a name at it."""
        check_complete((*made.layers, made.config), self.has, self.where)
        entries = self.entries() if self.exists() else []
        before = layout_index.find(entries, tag) if tag else None
        self.put_document(made.raw, made.digest, tag)
        return Put(
            new=all(entry["digest"] != made.digest for entry in entries),
            moved=tag is not None and (before is None or before["digest"] != made.digest),
        )


class Window(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as an unbuffered file; closing it closes the file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._left = file, max(size, 0)
        file.seek(offset)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes; 0 at the end."""
        view = memoryview(buffer).cast("B")
        n = self._file.readinto(view[: self._left]) or 0  # type: ignore[attr-defined]
        self._left -= n
        return int(n)

    def close(self) -> None:
        """Close the file as well."""
        self._file.close()
        super().close()
