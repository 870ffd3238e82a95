"""The files of a store: read, listed and removed without following links, and written complete and flushed or not at all.

Every access to a store goes through here. A killed writer leaves a temporary file in tmp/, which nothing refers to and `sweep`
removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapterhub.manifest.oci_manifest import MAX_MANIFEST
from adapterhub_converters.containers import open_file
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import LocalIOError

from .leases import ABANDONED, Lease

ASIDE = "taken-"
"""Begins the names in tmp/ of blobs that a hub may remove, or else gives their names again."""
MAX_DOCUMENT = MAX_MANIFEST
"""Bytes of any JSON document of a store: a manifest, an entry of a log, a record, a recipe."""
# The error of a file system without hard links (FAT, some network and container mounts).
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


_WRITE = 2  # SYNC_FILE_RANGE_WRITE
# Python's os module lacks the call.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None


class StoreFiles(ConfinedFiles):
    """The files below `root`, the folder of a store.

    Attributes:
        lease: The lease that this process holds, if any. Its id starts the names of temporary files, so that those of a killed
            process are recognized.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lease: Lease | None = None

    @contextmanager
    def temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        """Open a new unbuffered file in tmp/; it is removed at the end unless it was renamed."""
        path = self.root / "tmp" / (f"{self.lease.id}-{random_name()}" if self.lease else random_name())
        with local_errors(path):
            file = self.create(path)
            try:
                yield path, file
            finally:
                file.close()
                with contextlib.suppress(FileNotFoundError):
                    self.remove(path)

    def sweep(self) -> None:
        """Delete files in tmp/ that were last written more than a day ago; a running writer keeps writing to its own.

        A blob that was set aside stays, to be restored (`Store.restore_set_aside`).
        """
        with local_errors(self.root):
            for path in self.list_folder(self.root / "tmp"):
                if path.name.startswith(ASIDE):
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process swept it
                    status = self.status(path)
                    if status.st_mtime < time.time() - ABANDONED and not stat.S_ISDIR(status.st_mode):
                        self.remove(path)

    def replace(self, final: Path, data: bytes) -> None:
        """Write `data` as `final`, flushed; an existing file is replaced in one step."""
        with self.temporary() as (path, file):
            write_all(file, data)
            os.fsync(file.fileno())
            file.close()
            self.move(path, final)
            self.sync(final.parent)

    def claim(self, path: Path, final: Path) -> bool:
        """Give a complete file its final name; return False if that name is taken."""
        try:
            # A hard link fails if the name exists, where a rename would replace it: this is the compare-and-swap of the logs.
            self.link(path, final)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Without hard links, the write lock of registry.db, which every writer holds here, prevents a race.
            if self.exists(final):
                return False
            self.move(path, final)
        return True


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a LocalIOError that names `path`."""
    try:
        yield
    except OSError as error:
        hint = "Free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise LocalIOError(str(path), error.strerror or str(error), hint) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file anywhere for reading, unbuffered; RefusedError for a link, a pipe or a device."""
    with local_errors(path):
        return open_file.open_regular(path, follow=False)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered file, which may take less in one call."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def start_flush(file: BinaryIO, start: int, count: int) -> None:
    """Ask Linux to start writing a part of a file to the disk (sync_file_range(2)), so that a later flush has less left to do.

    Does nothing on other systems.
    """
    if _sync_file_range and count:
        _sync_file_range(file.fileno(), ctypes.c_int64(start), ctypes.c_int64(count), _WRITE)


def random_name() -> str:
    """Return 24 random hexadecimal digits."""
    return os.urandom(12).hex()
