"""Moving bytes between files at given offsets, and a folder that appears whole or not at all.

`copy_file_range`, `preadv` and `flock` are used where the system has them; every one has a plain substitute.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_converters.errors import FormatError, LocalIOError, OutputExistsError

_CHUNK = 1 << 20
_NO_COPY_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
_seek = threading.Lock()


def read_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from byte `offset` of a file on."""
    done = 0
    while done < len(buffer):
        count = _read_some(fd, buffer[done:], offset + done)
        if not count:
            raise FormatError("base", f"the file ends at byte {offset + done}, in the middle of a tensor")
        done += count


def _read_some(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _seek:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` at byte `offset` of a file."""
    done = 0
    while done < len(buffer):
        done += _write_some(fd, buffer[done:], offset + done)


def _write_some(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, buffer, offset)
    with _seek:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, buffer)


def copy_range(source: int, target: int, offset: int, size: int) -> None:
    """Copy `size` bytes to the same place in another file, inside the kernel where it can."""
    done = 0
    while hasattr(os, "copy_file_range") and done < size:
        try:
            count = os.copy_file_range(source, target, size - done, offset + done, offset + done)
        except OSError as error:
            if error.errno in _NO_COPY_RANGE:
                break
            raise
        if not count:
            break
        done += count
    buffer = memoryview(bytearray(min(_CHUNK, size - done)))
    while done < size:
        piece = buffer[: min(len(buffer), size - done)]
        read_at(source, piece, offset + done)
        write_at(target, piece, offset + done)
        done += len(piece)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill, which becomes `out` when the block ends well, and is gone when it doesn't.

    Killed in between, it stays as `.NAME.partial-…` beside OUT, which the next run for the same `out` removes; one
    that a living process works in holds a lock and stays.

    Raises:
        OutputExistsError: `out` exists and isn't an empty folder.
        LocalIOError: The disk said no.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise OutputExistsError(str(out))
    try:
        _sweep(out)
        # Locked before it gets the name that others sweep.
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
        lock = _locked(fresh)
        folder = fresh.rename(fresh.with_name(fresh.name.replace(".new-", ".partial-")))
    except OSError as error:
        raise LocalIOError(str(out), error.strerror or str(error)) from error
    try:
        yield folder
        _publish(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise LocalIOError(str(out), f"{error.strerror or error}; nothing was left behind") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _publish(folder: Path, out: Path) -> None:
    folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
    for parent, _, _ in os.walk(folder):
        sync(Path(parent))
    if os.name == "nt" and out.exists():
        out.rmdir()
    folder.rename(out)
    sync(out.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Have a file or folder reach the disk; folders only where the system can (not on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sweep(out: Path) -> None:
    """Remove what killed runs for the same `out` left; without locks nothing can be told to be dead, and all stays."""
    for left in out.parent.glob(f".{glob_escape(out.name)}.partial-*"):
        lock = _locked(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def glob_escape(text: str) -> str:
    """`text` as a pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _locked(folder: Path) -> int | None:
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
