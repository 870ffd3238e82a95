"""Files of a store that appear under their final name complete and flushed, or not at all.

A killed writer leaves a temporary file in tmp/, which nothing refers to and `sweep` removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapterhub_converters.containers.atomic import sync
from adapterhub_converters.errors import LocalIOError, RefusedError

from .leases import ABANDONED, Lease

# The error of a file system without hard links (FAT, some network and container mounts).
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


class Files:
    """Writer of files below `root`.

    Attributes:
        lease: The lease that this process holds, if any. Its id starts the names of temporary files, so that those of a
            killed process are recognized.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lease: Lease | None = None

    @contextmanager
    def temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        """Open a new unbuffered file in tmp/; it is removed afterwards unless it was renamed."""
        path = self.root / "tmp" / (f"{self.lease.id}-{random_name()}" if self.lease else random_name())
        with local_errors(path):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
            file = os.fdopen(os.open(path, flags, 0o644), "wb", buffering=0)
            try:
                yield path, file
            finally:
                file.close()
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete files in tmp/ that were last written more than a day ago; a running writer writes its own all the time."""
        with local_errors(self.root), contextlib.suppress(FileNotFoundError):  # another process swept it
            for path in (self.root / "tmp").iterdir():
                if path.stat().st_mtime < time.time() - ABANDONED:
                    path.unlink()

    def replace(self, final: Path, data: bytes) -> None:
        """Write `data` as `final`, flushed; an existing file is replaced in one step."""
        with self.temporary() as (path, file):
            write_all(file, data)
            os.fsync(file.fileno())
            file.close()
            os.replace(path, final)
            sync(final.parent)

    @staticmethod
    def make_dir(folder: Path) -> None:
        """Create a folder and its parent where they are missing, flushed."""
        for missing in [parent for parent in (folder.parent, folder) if not parent.is_dir()]:
            missing.mkdir(exist_ok=True)
            sync(missing.parent)


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as a LocalIOError that names `path`."""
    try:
        yield
    except OSError as error:
        hint = "Free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise LocalIOError(str(path), error.strerror or str(error), hint) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered; RefusedError for a link or a device."""
    with local_errors(path):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0))
        file = os.fdopen(handle, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise RefusedError(str(path), "not a regular file")
    return file


def link(path: Path, final: Path) -> bool:
    """Give a complete file its final name; False when that name is taken."""
    try:
        os.link(path, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Without hard links, the write lock of registry.db, which every writer holds here, prevents a race.
        if final.exists():
            return False
        os.rename(path, final)
    return True


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered file, which may take less in one call."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def random_name() -> str:
    """Return 24 random hexadecimal digits."""
    return os.urandom(12).hex()
