"""Moving bytes between files at given offsets.

`copy_file_range` and `preadv` are used where the system has them; every one has a plain substitute.
"""

from __future__ import annotations

import errno
import os
import threading

from adapterhub_converters.errors import FormatError

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


def copy_range(source: int, target: int, offset: int, size: int, at: int) -> None:
    """Copy `size` bytes from `offset` to byte `at` of another file, inside the kernel where it can."""
    done = 0
    while hasattr(os, "copy_file_range") and done < size:
        try:
            count = os.copy_file_range(source, target, size - done, offset + done, at + done)
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
        write_at(target, piece, at + done)
        done += len(piece)
