"""safetensors files: a bounded reader of headers from anywhere, and a writer whose bytes are reproducible.

The header is read through an injected `read_at(offset, n)`, so that a file, bytes in memory and an HTTP range
look the same. Every length is checked against the file's size before anything is allocated, because the
readers in Python at large (huggingface_hub's, gguf's) believe the header. The rules are those of the
safetensors README, "Format", and of its Rust core (`tensor.rs`, `Metadata::validate`); duplicate keys, which
its JSON parser lets pass, are refused too.
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
    """What a safetensors file says of itself; `tensors` in file order."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(read_at: ReadAt, size: int, where: str) -> Header:
    """The checked header of a safetensors file of `size` bytes; FormatError says what is wrong with it."""
    if size < 8:
        raise FormatError(where, f"not a safetensors file: {size} bytes are fewer than its length field has")
    length = int.from_bytes(read_at(0, 8), "little")
    if length > MAX_HEADER:
        raise FormatError(where, f"header of {length} bytes is over the limit of {MAX_HEADER}")
    if length > size - 8:
        raise FormatError(where, f"truncated: the header says {length} bytes, the file has {size - 8} left")
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
    if value is None:  # what mlx writes where there is none, and the Rust core reads
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
        raise FormatError(where, f"{size - position} bytes after the last tensor belong to no tensor")
    return {info.name: info for info in ordered}


# Not the safetensors library (0.8) behind the check of the header: its writer orders `__metadata__` by hashes that differ per
# run, so its files are not reproducible, and takes twice as long (168 MB: 0.17 s); its reader takes as long as this one
# (0.12 s), by default twice the memory, and has no views of the file.
class SafetensorsFile(OpenFile):
    """An open file: its header is checked at once, each tensor is read when asked for. A context manager."""

    header: Header

    def _parse(self, size: int) -> None:
        self._map: mmap.mmap | None = None  # outlives close() for as long as a tensor looks into it
        self.header = read_header(self._read_at, size, self.where)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name to info, in file order."""
        return self.header.tensors

    def tensor(self, name: str) -> np.ndarray:
        """The tensor in its own dtype and shape, read into memory of its own."""
        info = self.header.tensors[name]
        dtype = dtypes.NUMPY.get(info.dtype)
        if dtype is None:
            raise FormatError(self.where, f"tensor {name!r}: {info.dtype} cannot be computed with")
        array = np.empty(info.shape, dtype)
        self.read_into(info, byte_view(array))
        return array

    def mapped(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file, which takes memory while it is looked at (`release`).

        For a file that nobody changes meanwhile: cut short under our eyes, it would end the process.
        """
        info = self.header.tensors[name]
        dtype = dtypes.NUMPY.get(info.dtype)
        if dtype is None or not info.size:
            return self.tensor(name)
        if self._map is None:
            try:
                self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # a file system that cannot
                return self.tensor(name)
        return np.frombuffer(self._map, dtype, info.size // dtype.itemsize, info.offset).reshape(info.shape)

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with the bytes of a tensor from byte `start` of it on."""
        self._fill(buffer, info.offset + start, info.name)


def byte_view(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def release(array: np.ndarray) -> None:
    """Give back the memory of a mapped file of which `array` is a view, until it is looked at again; else nothing."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


Layout = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor to be written."""


def layout(tensors: Iterable[Layout]) -> list[Layout]:
    """The order the safetensors library writes in: widest dtype first, then by name (`tensor.rs`, `prepare`)."""
    return sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0]))


# The library sorts by its enum's order, descending; among the types we write that is this one.
_RANK = {
    name: rank
    for rank, name in enumerate(
        ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
         "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
    )
}  # fmt: skip


def header_bytes(tensors: Iterable[Layout], metadata: Mapping[str, str]) -> bytes:
    """The length field and header of a file that holds `tensors` in the order given, padded to 8 bytes."""
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
    """Write a file, byte for byte as the safetensors library would; `path` must not matter if we are killed."""
    order = layout((name, dtypes.name_of(array.dtype), array.shape) for name, array in tensors.items())
    try:
        with open(path, "wb") as file:
            file.write(header_bytes(order, metadata or {}))
            for name, _, _ in order:
                file.write(byte_view(np.ascontiguousarray(tensors[name])))
                release(tensors[name])
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
