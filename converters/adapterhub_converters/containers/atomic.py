"""Files and folders that appear whole or not at all.

What is written goes into a hidden folder beside its destination and gets its name at the end, when it is on the disk.
Killed in between, that folder stays as `.NAME.partial-…` and is removed by the next run for the same destination; one
that a living process works in holds a lock and stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_converters.errors import LocalIOError, OutputExistsError


@contextmanager
def whole(out: Path, *, folder: bool = True) -> Iterator[Path]:
    """A path to write to, an empty folder if `folder`, that becomes `out` when the block ends well, and else is gone.

    Raises:
        OutputExistsError: `out` is there already, and not as the empty folder that may be filled.
        LocalIOError: The disk said no, here or in the block; it names `out`, and nothing was left behind.
    """
    check_free(out, folder=folder)
    place = Path(os.path.abspath(out))  # "." has no name to write beside
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
    """A hidden folder beside `out`, on the same disk, for as long as the block takes; what killed ones left is removed."""
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
    """OutputExistsError unless `out` is free to be written: absent or, for a folder, an empty one."""
    try:
        if folder and out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
            return
    except OSError as error:
        raise LocalIOError(str(out), error.strerror or str(error)) from error
    if os.path.lexists(out):
        raise OutputExistsError(str(out))


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Errors of the disk name `out`, not the temporary folder, which means nothing to anybody."""
    try:
        yield
    except LocalIOError as error:
        raise LocalIOError(str(out), error.what, error.hint) from error
    except OutputExistsError:
        raise
    except (FileExistsError, NotADirectoryError) as error:
        raise LocalIOError(str(out), "lies under a file, not a folder; nothing was left behind") from error
    except OSError as error:
        raise LocalIOError(str(out), f"{error.strerror or error}; nothing was left behind") from error


def _scratch(out: Path) -> tuple[Path, int | None]:
    """A new folder beside `out` and the lock on it, which it has before it gets the name that others sweep."""
    import tempfile  # a command that only reads imports this module for `sync` and starts faster without

    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    lock = locked(fresh)
    return fresh.rename(fresh.with_name(fresh.name.replace(".new-", ".partial-"))), lock


def _sweep(out: Path) -> None:
    """Remove what killed runs for the same `out` left; without locks nothing can be told to be dead, and all stays."""
    for left in out.parent.glob(f".{escaped(out.name)}.partial-*"):
        lock = locked(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def escaped(text: str) -> str:
    """`text` as a pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None when another process does or there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return None
        return fd
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
        os.link(inside, out)  # unlike a rename, never replaces what somebody else made meanwhile
    except FileExistsError as error:
        raise OutputExistsError(str(out)) from error
    except OSError:  # a file system without hard links
        inside.rename(out)


def sync(path: Path) -> None:
    """Have a file's bytes or a folder's names reach the disk; a system that cannot open folders (Windows) does so itself."""
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
