"""An image layout in a tar, read in place and written as a whole.

Blobs are read from the middle of the file; nothing is unpacked. New blobs wait in a folder next to the archive, which is
written when the context ends without an error: `oci-layout`, `index.json`, the blobs by digest. The same content gives the same
bytes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO

from adapterhub.digest import CHUNK, Digest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.download import receive
from adapterhub.remotes.protocol import Reader, Source, damaged_error
from adapterhub.store.leases import ABANDONED
from adapterhub.store.store import local_errors
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.containers.file_lock import wait_for_lock
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import ConflictError, FormatError

from . import archive_tar, layout_index
from .archive_tar import Member
from .image_layout import FileSection, Layout
from .layout_index import Entry

_BLOB_PREFIX = "blobs/sha256/"
_SCRATCH_INFIX = ".blobs-"  # part of the name of the folder next to an archive in which new blobs wait
Opener = Callable[[], AbstractContextManager[Reader]]
"""Opens the bytes of a blob at their start."""
OnWritten = Callable[[int], None]
"""Called with the number of bytes that were just written."""


class LayoutArchive(Layout):
    """The layout in the tar at `path`, written if something was put and the context ends without an error."""

    def __init__(self, path: Path, location: str = "", *, any_name: bool = False) -> None:
        super().__init__(location or str(path), any_name=any_name)
        self.path = path
        self._members: dict[str, Member] | None = None
        self._entries: list[Entry] | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._new_sizes: dict[Digest, int] = {}
        self._changed = False
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.RLock()  # several blobs are put at once

    def exists(self) -> bool:
        """Return whether there is an archive, or will be one."""
        return self._changed or bool(self._read_members())

    def _read_members(self) -> Mapping[str, Member]:
        """Return the members of the archive, whose headers are read only once."""
        with self._lock:
            if self._members is None:
                self._members = {}
                if os.path.lexists(self.path):
                    with self._open() as file, local_errors(self.path):
                        self._members = archive_tar.scan_members(file, os.fstat(file.fileno()).st_size, self.location)
                    layout_index.check_mark(self._read_member("oci-layout", 4096), f"{self.location}: oci-layout")
            return self._members

    def _open(self) -> BinaryIO:
        """Open the file.

        Raises:
            ConflictError: It is not the file whose headers were read.
        """
        with local_errors(self.path):
            file = open_regular(self.path)
        stat = os.fstat(file.fileno())
        # The offsets of blobs are only valid in the file whose headers were read.
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._stamp not in (None, stamp):
            file.close()
            raise ConflictError(
                self.location, "changed while it was in use", "Nothing was written; try again", code="changed-meanwhile"
            )
        self._stamp = stamp
        return file

    def _read_member(self, name: str, limit: int) -> bytes:
        member = self._read_members().get(name)
        if member is None:
            raise FormatError(self.location, f"not an image layout: it has no file {name}")
        if member.size > limit:
            raise FormatError(f"{self.location}: {name}", f"{member.size} bytes are over the limit of {limit}")
        with self._open() as file, FileSection(file, member.offset, member.size) as window, local_errors(self.path):
            return window.readall() or b""

    def entries(self) -> list[Entry]:
        """Return the entries of index.json, including those not written yet."""
        if self._entries is None:
            raw = (
                self._read_member("index.json", layout_index.MAX_INDEX) if self._read_members() else layout_index.dump_index([])
            )
            self._entries = layout_index.parse(raw, f"{self.location}: index.json")
        return self._entries

    def open_section(self, digest: Digest) -> tuple[BinaryIO, int, int] | None:
        """Open the section of the archive that has a blob, or the file of a blob that is not written yet."""
        if digest in self._new_sizes:
            with local_errors(self._scratch_path(digest)):
                return open_regular(self._scratch_path(digest), follow=False), 0, self._new_sizes[digest]
        member = self._read_members().get(_BLOB_PREFIX + digest.removeprefix("sha256:"))
        return (self._open(), member.offset, member.size) if member else None

    # ---- a target

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Receive a blob next to the archive."""
        self._read_members()
        path = self._scratch_path(blob.digest)
        # A blob is stored next to the archive, since a tar can only be written as a whole.
        with receive(source, blob, ConfinedFiles(path.parent), path):
            self._new_sizes[blob.digest] = blob.size
        return blob.size

    def put_document(self, raw: bytes, digest: Digest, name: str | None = None) -> bool:
        """Store a manifest or an index, and its entry in index.json."""
        entries = layout_index.with_entry(self.entries(), layout_index.describe_manifest(raw, digest, self.location), name)
        with local_errors(self._scratch_path(digest)):
            self._scratch_path(digest).write_bytes(raw)
        self._new_sizes[digest] = len(raw)
        self._entries, self._changed = entries, True
        return True

    def untag(self, tag: str) -> None:
        """Remove a name; the version stays."""
        self._find_entry(tag, self._label_at(tag))
        self._entries, self._changed = layout_index.without_name(self.entries(), tag), True

    def _scratch_path(self, digest: Digest) -> Path:
        with self._lock, local_errors(self.path):
            if self._scratch is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _remove_abandoned(self.path)
                self._scratch = tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}{_SCRATCH_INFIX}")
        return Path(self._scratch.name) / f"{digest[7:]}.part"

    def commit(self) -> None:
        """Write the archive with everything that was put, in place of the old one."""
        if not self._changed:
            return
        old_sizes = {
            f"sha256:{name.removeprefix(_BLOB_PREFIX)}": member.size
            for name, member in self._read_members().items()
            if name.startswith(_BLOB_PREFIX) and "/" not in name.removeprefix(_BLOB_PREFIX)
        }
        blobs = [Descriptor("", digest, size) for digest, size in {**old_sizes, **self._new_sizes}.items()]
        openers: dict[Digest, Opener] = {blob.digest: partial(self.open_blob, blob) for blob in blobs}
        if not self._read_members():
            write_archive(self.path, self.entries(), blobs, openers)
        else:
            new_path = self._scratch_path("sha256:new")
            write_archive(new_path, self.entries(), blobs, openers)
            with self._open() as file, local_errors(self.path):
                wait_for_lock(file.fileno())
                # The last holder of the lock may have replaced the file: `_open` compares it with the one that was read.
                self._open().close()
                os.replace(new_path, self.path)
                atomic.sync_to_disk(self.path.parent)
        self._reset()

    def _reset(self) -> None:
        self._changed, self._members, self._entries, self._stamp, self._new_sizes = False, None, None, None, {}

    def close(self) -> None:
        """Discard everything that was not written."""
        if self._scratch:
            self._scratch.cleanup()
        self._scratch = None
        self._reset()

    def __exit__(self, error_type: object = None, *_: object) -> None:
        try:
            if error_type is None:
                self.commit()
        finally:
            self.close()


def _remove_abandoned(out: Path) -> None:
    """Remove the folders that killed writers left next to an archive more than a day ago."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}{_SCRATCH_INFIX}*"):
        with contextlib.suppress(OSError):
            if max(path.lstat().st_mtime for path in (folder, *folder.iterdir())) < time.time() - ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def write_archive(
    out: Path,
    entries: Iterable[Entry],
    blobs: Iterable[Descriptor],
    openers: Mapping[Digest, Opener],
    on_written: OnWritten | None = None,
    *,
    replace: bool = False,
) -> None:
    """Write a tar of a layout at `out`, completely or not at all; `replace` is as in `atomic.pending_output`.

    Raises:
        IntegrityError: The bytes of a blob do not have its digest.
    """
    with atomic.pending_output(out, folder=False, replace=replace) as path, open(path, "xb", buffering=0) as file:
        for name, data in (("oci-layout", layout_index.LAYOUT_MARK), ("index.json", layout_index.dump_index(list(entries)))):
            _write_all(file, archive_tar.header(name, len(data)) + data + archive_tar.padding(len(data)))
        # Sorted, so that the same content gives the same bytes.
        for blob in sorted(blobs, key=lambda blob: blob.digest):
            _write_all(file, archive_tar.header(_BLOB_PREFIX + blob.digest[7:], blob.size))
            with ExitStack() as stack:
                _write_blob(stack.enter_context(openers[blob.digest]()), blob, file, on_written)
            _write_all(file, archive_tar.padding(blob.size))
        _write_all(file, archive_tar.END)


def _write_blob(reader: Reader, blob: Descriptor, file: BinaryIO, on_written: OnWritten | None) -> None:
    state, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(min(CHUNK, blob.size + 1)))
    # Read one byte more than expected, to detect a source that is longer than its descriptor says.
    while size <= blob.size and (count := reader.readinto(buffer[: blob.size + 1 - size])):
        state.update(buffer[:count])
        _write_all(file, buffer[:count])
        size += count
        if on_written:
            on_written(count)
    digest = f"sha256:{state.hexdigest()}"
    if (size, digest) != (blob.size, blob.digest):
        raise damaged_error(blob.path or blob.digest, size, digest, blob, "Nothing was written")


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
