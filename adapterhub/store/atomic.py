"""Files of a store, each of which appears under its final name whole, flushed and at once, or not at all.

A killed writer leaves a temporary file in tmp/, which means nothing and is swept.
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

# What a file system without hard links answers (FAT, some network and container mounts).
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


class Files:
    """The files below `root`. Those of a process that holds a lease are named by it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lease: Lease | None = None

    @contextmanager
    def temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new file in tmp/, unbuffered, gone afterwards unless it was renamed."""
        with self._temporary() as made:
            yield made

    @contextmanager
    def _temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new file in tmp/, gone afterwards unless it was renamed."""
        path = self.root / "tmp" / (f"{self._lease.id}-{random_name()}" if self._lease else random_name())
        with local_errors(path):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
            file = os.fdopen(os.open(path, flags, 0o644), "wb", buffering=0)
            try:
                yield path, file
            finally:
                file.close()
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed writers left in tmp/ more than a day ago; a writer at work touches its files all the time."""
        with local_errors(self.root), contextlib.suppress(FileNotFoundError):  # somebody else swept it
            for path in (self.root / "tmp").iterdir():
                if path.stat().st_mtime < time.time() - ABANDONED:
                    path.unlink()

    def _replace(self, final: Path, data: bytes) -> None:
        with self._temporary() as (path, file):
            write_all(file, data)
            os.fsync(file.fileno())
            file.close()
            os.replace(path, final)
            sync(final.parent)

    def _make_dir(self, folder: Path) -> None:
        for missing in [parent for parent in (folder.parent, folder) if not parent.is_dir()]:
            missing.mkdir(exist_ok=True)
            sync(missing.parent)


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """An OSError in here becomes one line that names `path`."""
    try:
        yield
    except OSError as error:
        hint = "Free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise LocalIOError(str(path), error.strerror or str(error), hint) from error


def open_regular(path: Path) -> BinaryIO:
    """A regular file for reading, unbuffered; a link in its place is refused."""
    with local_errors(path):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0))
        file = os.fdopen(handle, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise RefusedError(str(path), "not a regular file")
    return file


def link(path: Path, final: Path) -> bool:
    """Give a complete file its final name unless that is taken."""
    try:
        os.link(path, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Without hard links the catalog's write lock, which every writer holds here, keeps this from racing.
        if final.exists():
            return False
        os.rename(path, final)
    return True


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file until all is written."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def random_name() -> str:
    """A name that nothing else has."""
    return os.urandom(12).hex()
