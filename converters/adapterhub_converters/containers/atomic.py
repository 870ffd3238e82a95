"""Write files and folders that appear whole or not at all.

The output is written to a hidden folder next to its destination and renamed at the end, once it is on the disk. If the process
is killed in between, that folder remains as `.NAME.partial-…`, or for a moment at its start as `.NAME.new-…`, and a later run
for the same destination removes it; the folder of a running process is locked and remains.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_converters.errors import LocalIOError, OutputExistsError

from .open_file import FOLDER

_OLD = 24 * 3600  # seconds


@contextmanager
def whole(out: Path, *, folder: bool = True) -> Iterator[Path]:
    """Yield a path to write to, an empty folder if `folder`, that becomes `out` if the block succeeds and is removed otherwise.

    Raises:
        OutputExistsError: `out` exists, other than as an empty folder that may be filled.
        LocalIOError: A disk error, here or in the block; it names `out`, and nothing is left behind.
    """
    check_free(out, folder=folder)
    place = Path(os.path.abspath(out))  # "." has no name for a hidden folder
    with beside(out) as scratch, _naming(out):
        inside = scratch / place.name
        if folder:
            inside.mkdir()
        yield inside
        _flush(inside)
        check_free(out, folder=folder)
        _publish(inside, place, folder=folder)
        sync(place.parent)


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `out`, on the same disk, for the duration of the block; remove those of killed runs."""
    place = Path(os.path.abspath(out))
    with _naming(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        scratch, lock = _scratch(place)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_free(out: Path, *, folder: bool = True) -> None:
    """Raise OutputExistsError unless `out` is absent or, if `folder`, an empty folder."""
    try:
        if folder and out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
            return
    except OSError as error:
        raise LocalIOError(str(out), error.strerror or str(error)) from error
    if os.path.lexists(out):
        raise OutputExistsError(str(out))


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Name `out` in disk errors, rather than the temporary folder, which is unknown to the user."""
    try:
        yield
    except LocalIOError as error:
        raise LocalIOError(str(out), error.what, error.hint) from error
    except OutputExistsError:
        raise
    except (FileExistsError, NotADirectoryError) as error:
        raise LocalIOError(str(out), "its parent is a file, not a folder; nothing was left behind") from error
    except OSError as error:
        raise LocalIOError(str(out), f"{error.strerror or error}; nothing was left behind") from error


def _scratch(out: Path) -> tuple[Path, int | None]:
    """Create a folder next to `out` and lock it, before it gets the name that other runs sweep."""
    import tempfile  # late: commands that only read import this module for `sync`, and start faster without

    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    lock = locked(fresh)
    try:
        return fresh.rename(fresh.with_name(fresh.name.replace(".new-", ".partial-"))), lock
    except OSError:
        fresh.rmdir()
        if lock is not None:
            os.close(lock)
        raise


def _sweep(out: Path) -> None:
    """Remove the folders that killed runs for the same `out` left; none without locks, which tell the running ones.

    One that was killed before it had locked its folder left it as `new`, which is removed when it is old.
    """
    for kind in ("partial", "new"):
        for left in out.parent.glob(f".{escaped(out.name)}.{kind}-*"):
            lock = locked(left)
            if lock is None:
                continue
            found = os.fstat(lock)
            if found.st_uid == os.geteuid() and (kind == "partial" or found.st_mtime < time.time() - _OLD):
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def escaped(text: str) -> str:
    """`text` as a glob pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def locked(folder: Path) -> int | None:
    """Lock a folder and return the descriptor; None if another process holds the lock, or for a link or anything else.

    None, too, if the name went to another folder while this one was being locked, and where locks are not supported.
    """
    try:
        import fcntl
    except ImportError:
        return None
    with suppress(OSError):
        fd = os.open(folder, FOLDER)
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), folder.lstat()):
                return fd
        os.close(fd)
    return None


def _flush(inside: Path) -> None:
    for parent, _, files in os.walk(inside):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))
    if inside.is_file():
        sync(inside)


def _publish(inside: Path, out: Path, *, folder: bool) -> None:
    if folder:
        if out.is_dir():
            out.rmdir()  # empty, or this fails
        inside.rename(out)
        return
    try:
        os.link(inside, out)  # unlike a rename, never replaces a file created meanwhile
    except FileExistsError as error:
        raise OutputExistsError(str(out)) from error
    except OSError:  # a file system without hard links
        inside.rename(out)


def sync(path: Path) -> None:
    """Flush a file's bytes or a folder's names to the disk; a system that cannot open folders (Windows) does so itself."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | getattr(os, "O_BINARY", 0))
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
