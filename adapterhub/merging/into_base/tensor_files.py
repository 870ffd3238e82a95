"""Files of tensors read at offsets: each opened once, rows read in float32 a few at a time, byte ranges copied.

Reads and writes go through descriptors at explicit offsets, so that several threads can share a file.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.containers.safetensors_file import byte_view
from adapterhub_converters.errors import FormatError, LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

from .tensor_types import Kind

F32Array = NDArray[np.float32]
T = TypeVar("T")

_CACHED = 3  # tensors whose scales are kept in memory
_CHUNK = 1 << 20  # bytes copied at a time where the kernel cannot copy
_NO_COPY_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
_seek = threading.Lock()


class OpenFiles:
    """Files open for reading, each opened once, on first use.

    A context manager that may be entered again, also while inside; the outermost exit closes the files. A later read opens its
    file again.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self._cache_lock = threading.RLock()  # `load` may call `cached` itself
        self._depth = 0

    def cached(self, key: str, load: Callable[[], T]) -> T:
        """Return the result of `load`, cached until a few other keys were used: tensors are processed one after another."""
        # Loaded under the lock: workers on tiles of the same tensor wait for its scales instead of computing them again.
        with self._cache_lock:
            if key not in self._cache:
                self._cache[key] = load()
                while len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
            value: T = self._cache[key]
            return value

    def fd(self, path: Path) -> int:
        """Return the descriptor of a file, opening it on first use."""
        with self._lock:
            # Under the lock: two threads must not open the same file twice.
            if path not in self._fds:
                try:
                    file = self._stack.enter_context(open_regular(path))
                except OSError as error:
                    raise LocalIOError(str(path), error.strerror or str(error)) from error
                self._fds[path] = file.fileno()
            return self._fds[path]

    def read(self, path: Path, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` with the bytes of a file from `offset` on."""
        read_at(self.fd(path), byte_view(buffer), offset)

    def close(self) -> None:
        """Close all files and drop the cache."""
        with self._lock:
            self._stack.close()
            self._fds.clear()
            self._cache.clear()

    def __enter__(self) -> OpenFiles:
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.close()

    def __del__(self) -> None:
        self.close()


Buffer = Callable[[str, int], NDArray[np.uint8]]
"""Returns scratch memory of the calling thread, given its use and the number of bytes."""


def new_buffer(_use: str, size: int) -> NDArray[np.uint8]:
    """Allocate new memory: a `Buffer` without reuse."""
    return np.empty(size, np.uint8)


class TensorSource(Protocol):
    """The numbers of a tensor, seen as a matrix of `rows` and `columns`."""

    @property
    def rows(self) -> int:
        """The number of rows."""

    @property
    def columns(self) -> int:
        """The numbers in a row."""

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Write rows `start` to `stop` to `out` `(stop - start, columns)`."""


@dataclass(frozen=True)
class StoredRows:
    """A tensor in a file, `offset` bytes from its beginning."""

    path: Path
    offset: int
    rows: int
    columns: int
    kind: Kind

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read rows and widen them to float32."""
        width = self.kind.row_size(self.columns)
        raw = buffer("raw", (stop - start) * width).reshape(stop - start, width)
        opened.read(self.path, raw, self.offset + start * width)
        self.kind.decode(raw, out)


def read_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with the bytes of a file from `offset` on; FormatError if the file is shorter."""
    filled = 0
    while filled < len(buffer):
        count = _read_some(fd, buffer[filled:], offset + filled)
        if not count:
            raise FormatError("base", f"the file ends at byte {offset + filled}, in the middle of a tensor")
        filled += count


def _read_some(fd: int, buffer: memoryview, offset: int) -> int:
    """Read once at an offset; where the platform has no `preadv`, seek under a lock."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _seek:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` to a file, from byte `offset` on."""
    written = 0
    while written < len(buffer):
        written += _write_some(fd, buffer[written:], offset + written)


def _write_some(fd: int, buffer: memoryview, offset: int) -> int:
    """Write once at an offset; where the platform has no `pwrite`, seek under a lock."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, buffer, offset)
    with _seek:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, buffer)


def copy_range(source: int, target: int, offset: int, size: int, at: int) -> None:
    """Copy `size` bytes from byte `offset` of a file to byte `at` of another, inside the kernel where possible."""
    copied = 0
    while hasattr(os, "copy_file_range") and copied < size:
        try:
            count = os.copy_file_range(source, target, size - copied, offset + copied, at + copied)
        except OSError as error:
            # Another file system, or one without this call: copy the bytes by hand.
            if error.errno in _NO_COPY_RANGE:
                break
            raise
        # The end of the source: `read_at` below finds it too, and names the byte.
        if not count:
            break
        copied += count
    buffer = memoryview(bytearray(min(_CHUNK, size - copied)))
    # What the kernel did not copy goes through memory.
    while copied < size:
        piece = buffer[: min(len(buffer), size - copied)]
        read_at(source, piece, offset + copied)
        write_at(target, piece, at + copied)
        copied += len(piece)
