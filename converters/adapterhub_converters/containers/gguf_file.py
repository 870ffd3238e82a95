"""Reader of GGUF files: headers with bounded work from any source, and tensors on demand.

The header is read through an injected `read_at(offset, n)` in large pieces, so that the source can be a file, bytes in memory,
or an HTTP range. Every count and length is checked against the rest of the file before anything is allocated: the gguf package
(0.19) hangs on a file of 43 bytes whose array claims 2^63 elements. The format is that of ggml's `docs/gguf.md`, and of
llama.cpp's `gguf.cpp` for anything it leaves open.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.errors import FormatError, MissingExtraError
from adapterhub_converters.lazy_dataclass import dataclass

from .gguf_types import ALIGNMENT, ARRAY, MAGIC, SCALARS, STRING, TYPE_NAMES, TYPES, VERSIONS, align, tensor_size
from .open_file import OpenFile
from .safetensors_file import byte_view

ReadAt = Callable[[int, int], bytes]

MAX_ALIGNMENT = 65_536
MAX_HEADER = 100_000_000  # bytes
MAX_TENSORS = 1_000_000
MAX_KEYS = 100_000  # of metadata; a model has a hundred
MAX_STRINGS = 4_000_000  # in all arrays; the largest vocabularies have under a million, merges included
MAX_NAME = 64  # bytes of a tensor's name
MAX_KEY = 65_535  # bytes
MAX_DIMS = 4
_CHUNK = 1 << 20  # bytes read at once, over HTTP as well: a header of SmolLM2 takes one or two of these
_UNQUANTIZED = {name for name, (_, block, _) in TYPES.items() if block == 1}  # named as in safetensors


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a header: `shape` in numpy's order, `offset` and `size` in bytes, absolute in the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file.

    Attributes:
        metadata: Key to value: numbers, text, a numpy array (numbers) or a list (text).
        kinds: Key to the type of its value, `UINT32`, `STRING`, `[STRING]`, …
        tensors: Name to tensor, in file order.
        alignment: In bytes.
        data_start: Offset of the first byte of the tensors' data.
    """

    version: int
    metadata: dict[str, Any]
    kinds: dict[str, str]
    tensors: dict[str, GGUFTensor]
    alignment: int
    data_start: int

    def text(self, key: str) -> str:
        """Return the text under `key`; empty if it is missing or not a text."""
        return str(self.metadata[key]) if self.kinds.get(key) == "STRING" else ""


class _Cursor:
    """A forward reader, a chunk at a time, which reads and allocates nothing that the file could not contain."""

    def __init__(self, read_at: ReadAt, size: int, location: str) -> None:
        self.location = location
        self._read_at = read_at
        self._limit = min(size, MAX_HEADER)
        self._exceeds_limit = size > MAX_HEADER
        self._buffer = b""
        self._buffer_start = 0  # offset of the buffer in the file
        self._buffer_position = 0  # position in the buffer
        self._string_count = 0  # in arrays, so far

    @property
    def position(self) -> int:
        return self._buffer_start + self._buffer_position

    def check_remaining(self, count: int, item: str) -> None:
        """Raise a FormatError if fewer than `count` bytes are left."""
        bytes_left = self._limit - self.position
        if count > bytes_left and self._exceeds_limit:
            raise FormatError(self.location, f"{item} ends beyond the limit of {MAX_HEADER} bytes for a header")
        if count > bytes_left:
            raise FormatError(self.location, f"truncated: {item} takes {count} bytes, the file has {bytes_left} left")

    def _fill(self, count: int, item: str) -> None:
        """Fill the buffer with at least `count` bytes from the position on."""
        self.check_remaining(count, item)
        unread = self._buffer[self._buffer_position :]
        end = self.position + len(unread)
        chunk = self._read_at(end, min(max(count, _CHUNK), self._limit - end))
        self._buffer_start, self._buffer_position, self._buffer = self.position, 0, unread + chunk
        if len(self._buffer) < count:
            raise FormatError(self.location, f"truncated: the file ended while {item} was read")

    def take_bytes(self, count: int, item: str) -> bytes:
        """Read `count` bytes."""
        if count > len(self._buffer) - self._buffer_position:
            self._fill(count, item)
        self._buffer_position += count
        return self._buffer[self._buffer_position - count : self._buffer_position]

    def read_integer(self, size: int, item: str) -> int:
        """Read an unsigned integer of `size` bytes."""
        return int.from_bytes(self.take_bytes(size, item), "little")

    def read_string(self, limit: int, item: str) -> str:
        """Read a string of at most `limit` bytes."""
        length = self.read_integer(8, item)
        if length > limit:
            raise FormatError(self.location, f"{item} of {length} bytes is over the limit of {limit}")
        return self._decode(self.take_bytes(length, item), item)

    def _decode(self, raw: bytes, item: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise FormatError(self.location, f"{item} is not UTF-8") from error

    def read_strings(self, count: int, item: str) -> list[str]:
        """Read `count` strings; those that are complete in the buffer are cut out of it without a call each."""
        self.check_remaining(count * 8, item)
        self._string_count += count
        if self._string_count > MAX_STRINGS:
            raise FormatError(
                self.location, f"{item}: {self._string_count} texts in arrays are over the limit of {MAX_STRINGS}"
            )
        strings: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        # A vocabulary has hundreds of thousands of strings: the inner loop only slices the buffer.
        while len(strings) < count:
            buffer, position, end = self._buffer, self._buffer_position, len(self._buffer)
            raw: list[bytes] = []
            for _ in range(count - len(strings)):
                if position + 8 > end:
                    break
                stop = position + 8 + length_at(buffer, position)[0]
                if stop > end:
                    break
                raw.append(buffer[position + 8 : stop])
                position = stop
            self._buffer_position = position
            try:
                strings += [item.decode() for item in raw]
            except UnicodeDecodeError as error:
                raise FormatError(self.location, f"{item} is not UTF-8") from error
            if len(strings) < count:
                strings.append(self.read_string(MAX_HEADER, item))
        return strings


def read_header(read_at: ReadAt, size: int, location: str) -> GGUFHeader:
    """Read and check the header of a GGUF file of `size` bytes; FormatError names the first fault."""
    cursor = _Cursor(read_at, size, location)
    if size < 24 or cursor.take_bytes(4, "the magic") != MAGIC:
        raise FormatError(location, "not a GGUF file")
    version = cursor.read_integer(4, "the version")
    if version not in VERSIONS:
        description = "big-endian" if version >> 24 in VERSIONS and version & 0xFFFFFF == 0 else f"version {version}"
        raise FormatError(location, f"GGUF {description} is not read, only little-endian versions 2 and 3")
    n_tensors, n_keys = cursor.read_integer(8, "the counts"), cursor.read_integer(8, "the counts")
    if n_tensors > MAX_TENSORS:
        raise FormatError(location, f"{n_tensors} tensors are over the limit of {MAX_TENSORS}")
    # A key takes at least 13 bytes, a tensor at least 24: the counts must fit the file before anything is read.
    cursor.check_remaining(n_keys * 13 + n_tensors * 24, f"a header of {n_keys} keys and {n_tensors} tensors")
    if n_keys > MAX_KEYS:
        raise FormatError(location, f"{n_keys} keys are over the limit of {MAX_KEYS}")
    metadata: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for _ in range(n_keys):
        key = cursor.read_string(MAX_KEY, "a key")
        if key in metadata or not key:
            raise FormatError(location, f"key {key[:80]!r} is empty or duplicate")
        kinds[key], metadata[key] = _read_value(cursor, f"key {key[:80]!r}")
    alignment = _alignment(metadata, kinds, location)
    infos = [_read_tensor_info(cursor) for _ in range(n_tensors)]
    data_start = align(cursor.position, alignment)
    return GGUFHeader(
        version, metadata, kinds, _place_tensors(infos, data_start, alignment, size, location), alignment, data_start
    )


def _read_value(cursor: _Cursor, item: str) -> tuple[str, Any]:
    """Read a metadata value and its type."""
    value_type = cursor.read_integer(4, item)
    if value_type == STRING:
        return "STRING", cursor.read_string(MAX_HEADER, item)
    if value_type != ARRAY:
        kind, array = _read_numbers(cursor, value_type, 1, item)
        return kind, array[0].item()
    item_type, count = cursor.read_integer(4, item), cursor.read_integer(8, item)
    if item_type == ARRAY:
        raise FormatError(cursor.location, f"{item} is an array of arrays")
    if item_type == STRING:
        return "[STRING]", cursor.read_strings(count, item)
    kind, array = _read_numbers(cursor, item_type, count, item)
    return f"[{kind}]", array


def _read_numbers(cursor: _Cursor, value_type: int, count: int, item: str) -> tuple[str, np.ndarray]:
    """Read numbers of one type."""
    if value_type not in SCALARS:
        raise FormatError(cursor.location, f"{item} has the unknown type {value_type}")
    kind, dtype = SCALARS[value_type]
    # `take_bytes` compares the size with the rest of the file before it allocates anything.
    raw = cursor.take_bytes(count * dtype.itemsize, item)
    if kind == "BOOL" and raw.strip(b"\0\1"):
        raise FormatError(cursor.location, f"{item} is a boolean that is neither 0 nor 1")
    return kind, np.frombuffer(raw, dtype)


def _alignment(metadata: Mapping[str, Any], kinds: Mapping[str, str], location: str) -> int:
    """Return the alignment that the metadata sets, in bytes."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if kinds.get("general.alignment", "UINT32") != "UINT32":
        raise FormatError(location, "general.alignment is not a UINT32")
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise FormatError(location, f"general.alignment {alignment} is not a power of two up to {MAX_ALIGNMENT}")
    return int(alignment)


def _read_tensor_info(cursor: _Cursor) -> GGUFTensor:
    """Read a tensor's entry, whose offset is still relative to the data."""
    name = cursor.read_string(MAX_NAME, "a tensor's name")
    item = f"tensor {name!r}"
    if not name or not name.isprintable():
        raise FormatError(cursor.location, f"tensor name {name!r} is empty or unprintable")
    n_dims = cursor.read_integer(4, item)
    if n_dims > MAX_DIMS:
        raise FormatError(cursor.location, f"{item} has {n_dims} dimensions, more than {MAX_DIMS}")
    shape = struct.unpack(f"<{n_dims}Q", cursor.take_bytes(8 * n_dims, item))[::-1]
    type_id, offset = struct.unpack("<IQ", cursor.take_bytes(12, item))
    if type_id not in TYPE_NAMES:
        raise FormatError(cursor.location, f"{item} has the unknown type {type_id}")
    type_name = TYPE_NAMES[type_id]
    return GGUFTensor(name, type_name, shape, offset, tensor_size(item, type_name, shape, cursor.location))


def _place_tensors(infos: list[GGUFTensor], data_start: int, alignment: int, size: int, location: str) -> dict[str, GGUFTensor]:
    """Return the tensors by name with absolute offsets, after checking that they do not overlap and are inside the file."""
    tensors: dict[str, GGUFTensor] = {}
    position = data_start
    # In the order of their data, to find overlaps by comparing neighbors.
    for info in sorted(infos, key=lambda info: (info.offset, info.size)):
        offset = data_start + info.offset
        if info.offset % alignment:
            raise FormatError(location, f"tensor {info.name!r} does not begin at a multiple of {alignment}")
        if offset < position:
            raise FormatError(location, f"tensor {info.name!r} overlaps the one before it")
        position = offset + info.size
        if position > size:
            raise FormatError(location, f"truncated: tensor {info.name!r} ends at byte {position}, the file at {size}")
    infos.reverse()
    while infos:  # each one is freed when its replacement exists
        info = infos.pop()
        if info.name in tensors:
            raise FormatError(location, f"tensor {info.name!r} is duplicate")
        tensors[info.name] = GGUFTensor(info.name, info.type_name, info.shape, data_start + info.offset, info.size)
    return tensors


class GGUFFile(OpenFile):
    """An open file, whose header is checked at once and whose tensors are read on demand. A context manager."""

    header: GGUFHeader

    def _parse(self, size: int) -> None:
        self.header = read_header(self._read_at, size, self.location)

    @property
    def tensors(self) -> dict[str, GGUFTensor]:
        """Name to tensor, in file order."""
        return self.header.tensors

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor in its own dtype, or dequantized to float32 (which needs the gguf package), in numpy's order."""
        info = self.header.tensors[name]
        if info.type_name not in _UNQUANTIZED:
            return _dequantize(self.raw(name), info, self.location)
        array = np.empty(info.shape, dtypes.NUMPY[info.type_name])
        self._fill(byte_view(array), info.offset, name)
        return array

    def raw(self, name: str) -> np.ndarray:
        """Read the bytes of a tensor as stored: `(size,)`, uint8."""
        info = self.header.tensors[name]
        array = np.empty(info.size, np.uint8)
        self._fill(array.data, info.offset, name)
        return array


def _dequantize(raw: np.ndarray, info: GGUFTensor, location: str) -> np.ndarray:
    """Return a quantized tensor as float32, by the gguf package."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise MissingExtraError(
            location, f"reading {info.type_name} needs the gguf package", "Run `pip install gguf`"
        ) from error
    _, block, width = TYPES[info.type_name]
    rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block * width)
    result: np.ndarray = quants.dequantize(rows, GGMLQuantizationType[info.type_name])
    return result
