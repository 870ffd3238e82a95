"""Numbers as bytes: rows of a tensor in one of the types of safetensors or GGUF, to float32 and back.

GGUF's blocks go through the numpy code of the gguf package, which gives the bytes of ggml's reference quantizers
(`ggml-quants.c`, `quantize_row_q4_0_ref` and the like); of K-quants and IQ types it can only read.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.containers.gguf_file import TYPES
from adapterhub_converters.containers.safetensors_file import byte_view
from adapterhub_converters.errors import FormatError, LocalIOError, MissingExtraError, RefusedError

from .arithmetic import LARGEST, fits, narrow, widen

F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

QUANTIZERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""What a tensor can be quantized to here, byte for byte as llama.cpp's own reference quantizers do it."""
_FLOATS = {"F32": dtypes.F32, "F16": dtypes.F16, "BF16": dtypes.BF16}
# The scale of a block is a float16, and so is the minimum of Q4_1 and Q5_1.
_LARGEST_SCALE = 65504.0


class Kind(Protocol):
    """A type of tensors."""

    @property
    def name(self) -> str:
        """As the file's format spells it."""

    @property
    def quantized(self) -> bool:
        """Whether a number depends on others in its block."""

    @property
    def largest(self) -> float:
        """The largest magnitude it holds."""

    def row_size(self, columns: int) -> int:
        """Bytes of a row."""

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """Write the numbers of `raw` `(rows, row_size)` into `out` `(rows, columns)`."""

    def encode(self, wide: F32Array, raw: Bytes) -> None:
        """The inverse; rounds."""

    def fits(self, wide: F32Array) -> bool:
        """Whether every number stays finite in it; a NaN does not."""


@dataclass(frozen=True)
class Floats:
    """bfloat16, float16 or float32."""

    name: str
    dtype: np.dtype
    quantized: bool = False

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return LARGEST[self.dtype]

    def row_size(self, columns: int) -> int:
        """Bytes of a row."""
        return columns * self.dtype.itemsize

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """Exact."""
        widen(raw.view(self.dtype), out)

    def encode(self, wide: F32Array, raw: Bytes) -> None:
        """To nearest, ties to even."""
        narrow(wide, raw.view(self.dtype))

    def fits(self, wide: F32Array) -> bool:
        """Whether every number stays finite in it."""
        return fits(wide, self.dtype)


@dataclass(frozen=True)
class Blocks:
    """A quantized type of GGUF."""

    name: str
    quantized: bool = True
    largest: float = _LARGEST_SCALE

    def row_size(self, columns: int) -> int:
        """Bytes of a row."""
        _, block, width = TYPES[self.name]
        return columns // block * width

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """As ggml dequantizes."""
        if not out.size:
            return
        dequantize, _, kinds = _quants(self.name)
        np.copyto(out, dequantize(raw, kinds[self.name]))

    def encode(self, wide: F32Array, raw: Bytes) -> None:
        """As ggml's reference quantizes."""
        if not wide.size:
            return
        _, quantize, kinds = _quants(self.name)
        with np.errstate(all="ignore"):
            np.copyto(raw, quantize(wide, kinds[self.name]))

    def fits(self, wide: F32Array) -> bool:
        """Whether the scales stay finite."""
        return not wide.size or bool(wide.max() <= self.largest and wide.min() >= -self.largest)


@lru_cache(maxsize=1)
def _package() -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize, quants.quantize, GGMLQuantizationType


def _quants(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    try:
        return _package()
    except ImportError as error:
        raise MissingExtraError(name, "reading and writing this type needs the gguf package", "pip install gguf") from error


def kind(name: str) -> Kind | None:
    """The type of this name, of safetensors or GGUF; None when it is no type of weights to compute with."""
    if name in _FLOATS:
        return Floats(name, _FLOATS[name])
    return Blocks(name) if name in TYPES and TYPES[name][1] > 1 else None


def writable(name: str, columns: int, where: str) -> Kind:
    """The type of this name for rows of `columns`; RefusedError when it cannot be written, or not for such rows."""
    found = kind(name)
    if found is None or (found.quantized and name not in QUANTIZERS):
        can = ", ".join(one.lower() for one in QUANTIZERS)
        raise RefusedError(
            where,
            f"is {name} in the base, to which nothing here can quantize",
            f"Choose what becomes of such tensors: --requantize {can.replace(', ', '|')} or --dtype bf16|f16|f32",
        )
    if found.quantized and columns % TYPES[name][1]:
        raise RefusedError(where, f"rows of {columns} numbers are no whole blocks of {name}", "Choose --dtype f16")
    return found


# ---- Where the numbers of a tensor come from: files that are opened once, read a few rows at a time and widened to


_HELD = 3  # tensors whose scales are in memory


class Opened:
    """Files opened for reading, each once; a context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Any] = OrderedDict()
        self._holding = threading.RLock()  # what is loaded may ask for what is held

    def held(self, key: str, load: Callable[[], Any]) -> Any:
        """What `load` gives, kept until a few others have been asked for: tensors are worked on one after the other."""
        with self._holding:
            if key not in self._held:
                self._held[key] = load()
                while len(self._held) > _HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]

    def fd(self, path: Path) -> int:
        """The descriptor of a file."""
        with self._lock:
            if path not in self._fds:
                try:
                    self._fds[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                except OSError as error:
                    raise LocalIOError(str(path), error.strerror or str(error)) from error
                self._stack.callback(os.close, self._fds[path])
            return self._fds[path]

    def read(self, path: Path, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` from byte `offset` of a file on."""
        read_at(self.fd(path), byte_view(buffer), offset)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


Buffer = Callable[[str, int], NDArray[np.uint8]]
"""Scratch memory of so many bytes, of the thread that asks, for the use named."""


class Source(Protocol):
    """Where the numbers of a tensor come from; seen as `rows` of `columns`."""

    @property
    def rows(self) -> int:
        """How many rows it has."""

    @property
    def columns(self) -> int:
        """Numbers in a row."""

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Write rows `start` to `stop` into `out` `(stop - start, columns)`."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    path: Path
    offset: int
    rows: int
    columns: int
    kind: Kind

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read and widened."""
        width = self.kind.row_size(self.columns)
        raw = buffer("raw", (stop - start) * width).reshape(stop - start, width)
        opened.read(self.path, raw, self.offset + start * width)
        self.kind.decode(raw, out)


# ---- Moving bytes between files at given offsets


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
