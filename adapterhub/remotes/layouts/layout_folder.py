"""An image layout in a folder: each blob is written under a temporary name first, and index.json is replaced as a whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapterhub.digest import Digest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.download import receive_concurrently
from adapterhub.remotes.protocol import Source
from adapterhub.store.store_files import local_errors, write_all
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError

from . import layout_index
from .image_layout import Layout
from .layout_index import Entry

_INGEST = "ingest"  # the folder for incomplete files, as for oras
_ALLOWED_BEFORE_MARK = {"blobs", _INGEST, "index.json"}  # files that may exist before oci-layout


class LayoutFolder(Layout):
    """The layout at `root`, created by the first put."""

    def __init__(self, root: Path, location: str = "", *, any_name: bool = False) -> None:
        super().__init__(location or str(root), any_name=any_name)
        self.root = Path(os.path.realpath(root))  # the folder itself may be reached by a link
        self._files = ConfinedFiles(self.root)
        self._blobs = self.root / "blobs" / "sha256"

    def exists(self) -> bool:
        """Return whether there is a layout.

        Raises:
            FormatError: The folder contains something else.
        """
        mark = self.root / "oci-layout"
        if not self.root.exists():
            return False
        if not self.root.is_dir():
            raise FormatError(self.location, "not an image layout: it is a file")
        if not self._files.exists(mark):
            names = {path.name for path in self.root.iterdir()}
            if names <= _ALLOWED_BEFORE_MARK:
                return False
            # Another process may just have created it.
            if mark.name not in names:
                raise FormatError(self.location, "not an image layout: it has no file oci-layout")
        layout_index.check_mark(self._read(mark, 4096), f"{self.location}: oci-layout")
        return True

    def entries(self) -> list[Entry]:
        """Return the entries of index.json."""
        try:
            raw = self._read(self.root / "index.json", layout_index.MAX_INDEX)
        except NotFoundError:
            return []
        return layout_index.parse(raw, f"{self.location}: index.json")

    def _read(self, path: Path, limit: int) -> bytes:
        if not self._files.exists(path):
            raise NotFoundError(str(path), "no such file", code="no-such-file")
        with local_errors(path), self._files.open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise FormatError(f"{self.location}: {path.name}", f"{size} bytes are over the limit of {limit}")
            return b"".join(iter(lambda: file.read(limit), b""))

    def open_section(self, digest: Digest) -> tuple[BinaryIO, int, int] | None:
        """Open a file in blobs/."""
        path = self._blob_path(digest)
        with local_errors(path), contextlib.suppress(FileNotFoundError):
            file = self._files.open(path)
            return file, 0, os.fstat(file.fileno()).st_size
        return None

    def _blob_path(self, digest: Digest) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    # ---- a target

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Receive a blob, resuming after a run that was killed."""
        self._create()
        part = self.root / _INGEST / f"{blob.digest[7:]}.part"
        with receive_concurrently(source, blob, self._files, part) as (path, file), local_errors(path):
            # Sync before the move, or a crash could leave an empty file under the blob's name.
            os.fsync(file.fileno())
            self._files.move(path, self._blob_path(blob.digest))
        return blob.size

    def put_document(self, raw: bytes, digest: Digest, name: str | None = None) -> bool:
        """Store a manifest or an index, and its entry in index.json."""
        self._create()
        self._write(self._blob_path(digest), raw)
        with local_errors(self._blobs), self._lock():
            # The blobs must be on disk before index.json names them.
            self._files.sync(self._blobs)
            entry = layout_index.describe_manifest(raw, digest, self.location)
            self._write(self.root / "index.json", layout_index.dump_index(layout_index.with_entry(self.entries(), entry, name)))
        return True

    def untag(self, tag: str) -> None:
        """Remove a name; the version stays."""
        self._find_entry(tag, self._label_at(tag))
        self._create()
        with local_errors(self._blobs), self._lock():
            self._write(self.root / "index.json", layout_index.dump_index(layout_index.without_name(self.entries(), tag)))

    def _create(self) -> None:
        """Create an empty layout, unless there is one.

        Raises:
            FormatError: The folder contains other files.
            RefusedError: It is the store of a local registry.
        """
        exists = self.exists()
        if exists and (self.root / "refs").is_dir() and (self.root / "pending").is_dir():
            problem = "is the store of a local registry, whose index only that registry changes"
            raise RefusedError(self.location, problem, "Name an adapter in that registry instead", code="store-of-registry")
        with local_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._files.list_subfolders(self.root)  # refuses links
            for folder in (self._blobs, self.root / _INGEST):
                self._files.make_dir(folder)
            if exists:
                return
            with self._lock():
                if not self._files.exists(self.root / "index.json"):
                    self._write(self.root / "index.json", layout_index.dump_index([]))
                # Last, because it marks the layout as complete.
                if not self._files.exists(self.root / "oci-layout"):
                    self._write(self.root / "oci-layout", layout_index.LAYOUT_MARK)

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file in place of the old one, completely or not at all."""
        new_path = self.root / _INGEST / os.urandom(12).hex()
        with local_errors(path):
            try:
                with self._files.create(new_path) as file:
                    write_all(file, data)
                    os.fsync(file.fileno())
                self._files.move(new_path, path)
                self._files.sync(path.parent)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    self._files.remove(new_path)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Lock index.json against other processes; on systems without locks, the last writer wins."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        handle = os.open(self._blobs, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def remove_stale(self) -> None:
        """Remove the folder for incomplete files; call this only if no other process uses the layout."""
        with contextlib.suppress(OSError):
            (self.root / _INGEST).rmdir()

    def close(self) -> None:
        """Do nothing: no file stays open."""
