"""Read and write safetensors files: headers with bounded work from any source, and reproducible bytes.

The header is read through an injected `read_at(offset, n)`, so that the source can be a file, bytes in memory, or an HTTP
range. Every length is checked against the file's size before anything is allocated, unlike in other Python readers
(huggingface_hub, gguf), which trust the header. The rules are those of the safetensors README, "Format", and of its Rust core
(`tensor.rs`, `Metadata::validate`); duplicate keys, which its JSON parser accepts, are refused too.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.errors import FormatError, LocalIOError

from .json_file import parse_object, unique
from .open_file import OpenFile

ReadAt = Callable[[int, int], bytes]

MAX_HEADER = 100_000_000  # bytes; the Rust core's own limit
MAX_TENSORS = 1_000_000
MAX_NAME = 1_024  # characters


class TensorInfo(NamedTuple):  # of which a hostile header may have a million
    """One tensor of a header: `offset` and `size` in bytes, absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file; `tensors` in file order."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(read_at: ReadAt, size: int, where: str) -> Header:
    """Read and check the header of a safetensors file of `size` bytes; FormatError names the first fault."""
    if size < 8:
        raise FormatError(where, f"not a safetensors file: {size} bytes are fewer than its length field needs")
    length = int.from_bytes(read_at(0, 8), "little")
    if length > MAX_HEADER:
        raise FormatError(where, f"header of {length} bytes is over the limit of {MAX_HEADER}")
    if length > size - 8:
        raise FormatError(where, f"truncated: the header takes {length} bytes, the file has {size - 8} left")
    document = _parse(read_at(8, length), where)
    metadata = _metadata(document.pop("__metadata__", {}), where)
    if len(document) > MAX_TENSORS:
        raise FormatError(where, f"{len(document)} tensors are over the limit of {MAX_TENSORS}")
    data_start = 8 + length
    # Each entry is let go as it is read: together they take more memory than what is kept of them.
    infos = [_info(name, document.pop(name), data_start, where) for name in list(document)]
    return Header(_covering(infos, data_start, size, where), metadata, data_start)


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise FormatError(where, "not a safetensors file: the header does not start with {")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(where, "the header is not UTF-8") from error
    del raw
    return parse_object(text, where, pairs=_compact)


_KEYS = {"dtype", "shape", "data_offsets"}


class _Entry(NamedTuple):
    dtype: Any
    shape: Any
    data_offsets: Any


def _compact(pairs: list[tuple[str, Any]]) -> object:
    """Keep what looks like an entry as tuples: a million of them take half the memory of dicts and lists."""
    document = unique(pairs)
    if document.keys() != _KEYS:
        return document
    dtype, shape, offsets = document["dtype"], document["shape"], document["data_offsets"]
    return _Entry(
        sys.intern(dtype) if isinstance(dtype, str) else dtype,
        tuple(shape) if isinstance(shape, list) else shape,
        tuple(offsets) if isinstance(offsets, list) else offsets,
    )


def _metadata(value: object, where: str) -> dict[str, str]:
    if isinstance(value, _Entry):  # metadata with the keys of an entry
        value = value._asdict()
    if value is None:  # written by mlx if there is no metadata, and accepted by the Rust core
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(where, "__metadata__ is not a map of strings to strings")
    return value


_MAX_SIZE = 2**63


def _info(name: str, entry: object, data_start: int, where: str) -> TensorInfo:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise FormatError(where, f"tensor name {name[:80]!r} is empty, too long or unprintable")
    if not isinstance(entry, _Entry):
        raise FormatError(where, f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        raise FormatError(where, f"tensor {name!r} has an unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, tuple) or len(shape) > 16 or not _are_sizes(shape):
        raise FormatError(where, f"tensor {name!r} has a malformed shape")
    if not isinstance(offsets, tuple) or len(offsets) != 2 or not _are_sizes(offsets):
        raise FormatError(where, f"tensor {name!r} has malformed data_offsets")
    start, end = offsets
    bits = dtypes.BITS[dtype] * math.prod(shape)
    if bits != (end - start) * 8:
        raise FormatError(where, f"tensor {name!r}: {dtype} {list(shape)} is not the {end - start} bytes of its offsets")
    if not bits and dtypes.BITS[dtype] * math.prod(dim or 1 for dim in shape) >= 2**66:  # as an empty one may claim
        raise FormatError(where, f"tensor {name!r} has a shape that is too large")
    return TensorInfo(name, dtype, shape, data_start + start, end - start)


def _are_sizes(values: tuple[object, ...]) -> bool:
    for value in values:  # noqa: SIM110 - a loop, for a million tensors
        if type(value) is not int or not 0 <= value < _MAX_SIZE:  # a bool is an int, too
            return False
    return True


def _covering(infos: list[TensorInfo], data_start: int, size: int, where: str) -> dict[str, TensorInfo]:
    # No holes between tensors: a hole could hide a second file (safetensors README, "Format").
    ordered = sorted(infos, key=lambda info: (info.offset, info.size))
    position = data_start
    for info in ordered:
        if info.offset != position:
            kind = "overlaps the one before it" if info.offset < position else "leaves a hole before it"
            raise FormatError(where, f"tensor {info.name!r} {kind}")
        position += info.size
    if position > size:
        raise FormatError(where, f"truncated: the tensors end at byte {position}, the file at {size}")
    if position < size:
        raise FormatError(where, f"{size - position} bytes follow the last tensor")
    return {info.name: info for info in ordered}


# Not the safetensors library (0.8) behind the check of the header: its writer orders `__metadata__` by hashes that differ per
# run, so its files are not reproducible, and takes twice as long (168 MB: 0.17 s); its reader takes as long as this one
# (0.12 s), by default twice the memory, and has no views of the file.
class SafetensorsFile(OpenFile):
    """An open file: its header is checked at once, tensors are read on demand. A context manager."""

    header: Header

    def _parse(self, size: int) -> None:
        self._map: mmap.mmap | None = None  # outlives close() while a tensor is a view of it
        self.header = read_header(self._read_at, size, self.where)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name to info, in file order."""
        return self.header.tensors

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor in its own dtype and shape into new memory."""
        info = self.header.tensors[name]
        dtype = dtypes.NUMPY.get(info.dtype)
        if dtype is None:
            raise FormatError(self.where, f"tensor {name!r}: {info.dtype} is not supported in computations")
        array = np.empty(info.shape, dtype)
        self.read_into(info, byte_view(array))
        return array

    def mapped(self, name: str) -> np.ndarray:
        """Map a tensor as a read-only view of the file, which uses memory once it is read (`release`).

        Only for files that nobody changes meanwhile: truncation would crash the process.
        """
        info = self.header.tensors[name]
        dtype = dtypes.NUMPY.get(info.dtype)
        if dtype is None or not info.size:
            return self.tensor(name)
        if self._map is None:
            try:
                self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # a file system without mmap
                return self.tensor(name)
        return np.frombuffer(self._map, dtype, info.size // dtype.itemsize, info.offset).reshape(info.shape)

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with the bytes of a tensor from byte `start` of it on."""
        self._fill(buffer, info.offset + start, info.name)


def byte_view(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def release(array: np.ndarray) -> None:
    """Free the memory of the mapped file of which `array` is a view, until it is read again; do nothing for other arrays."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


Layout = tuple[str, str, tuple[int, ...]]
"""Name, dtype, and shape of a tensor to write."""


def layout(tensors: Iterable[Layout]) -> list[Layout]:
    """Sort tensors as the safetensors library does: widest dtype first, then by name (`tensor.rs`, `prepare`)."""
    return sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0]))


# The library sorts by its enum, descending; this is the ascending order of the types written here.
_RANK = {
    name: rank
    for rank, name in enumerate(
        ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
         "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
    )
}  # fmt: skip


def header_bytes(tensors: Iterable[Layout], metadata: Mapping[str, str]) -> bytes:
    """Return the length field and header of a file with `tensors` in the given order, padded to 8 bytes."""
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        bits = dtypes.BITS[dtype]
        for dim in shape:
            bits *= dim
        end = position + bits // 8
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, byte for byte as the safetensors library would. If the process is killed, `path` is incomplete."""
    order = layout((name, dtypes.name_of(array.dtype), array.shape) for name, array in tensors.items())
    try:
        with open(path, "wb") as file:
            file.write(header_bytes(order, metadata or {}))
            for name, _, _ in order:
                file.write(byte_view(np.ascontiguousarray(tensors[name])))
                release(tensors[name])
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
