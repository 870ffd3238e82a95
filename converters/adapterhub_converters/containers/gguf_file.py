"""Reader and writer of GGUF files: headers with bounded work from any source, and reproducible bytes.

The header is read through an injected `read_at(offset, n)` in large pieces, so that the source can be a file, bytes in memory,
or an HTTP range. Every count and length is checked against the rest of the file before anything is allocated: the gguf package
(0.19) hangs on a file of 43 bytes whose array claims 2^63 elements. The format is that of ggml's `docs/gguf.md`, and of
llama.cpp's `gguf.cpp` for anything it leaves open.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.errors import FormatError, LocalIOError, MissingExtraError
from adapterhub_converters.lazy_dataclass import dataclass

from .open_file import OpenFile
from .safetensors_file import byte_view, release

ReadAt = Callable[[int, int], bytes]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes; the default of `general.alignment`
MAX_ALIGNMENT = 65_536
MAX_HEADER = 100_000_000  # bytes
MAX_TENSORS = 1_000_000
MAX_KEYS = 100_000  # of metadata; a model has a hundred
MAX_STRINGS = 4_000_000  # in all arrays; the largest vocabularies have under a million, merges included
MAX_NAME = 64  # bytes of a tensor's name
MAX_KEY = 65_535  # bytes
MAX_DIMS = 4
_CHUNK = 1 << 20  # bytes read at once, over HTTP as well: a header of SmolLM2 takes one or two of these

# Value types of metadata (gguf.md, `gguf_metadata_value_type`).
_SCALARS: dict[int, tuple[str, np.dtype]] = {
    0: ("UINT8", np.dtype("u1")),
    1: ("INT8", np.dtype("i1")),
    2: ("UINT16", np.dtype("<u2")),
    3: ("INT16", np.dtype("<i2")),
    4: ("UINT32", np.dtype("<u4")),
    5: ("INT32", np.dtype("<i4")),
    6: ("FLOAT32", np.dtype("<f4")),
    7: ("BOOL", np.dtype("?")),
    10: ("UINT64", np.dtype("<u8")),
    11: ("INT64", np.dtype("<i8")),
    12: ("FLOAT64", np.dtype("<f8")),
}
_STRING, _ARRAY = 8, 9
_VALUE_IDS = {name: number for number, (name, _) in _SCALARS.items()} | {"STRING": _STRING}

# Tensor types: id, then elements and bytes of a block (ggml.c, `type_traits`). Types that ggml uses only in computations (Q8_1,
# Q8_K) or has removed do not occur in files.
TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
}
_TYPE_NAMES = {number: name for name, (number, _, _) in TYPES.items()}
_UNQUANTIZED = {name for name, (_, block, _) in TYPES.items() if block == 1}  # named as in safetensors
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
}  # fmt: skip
"""The type of most tensors in a file, or the name of a mixture, to its number (llama.cpp, include/llama.h, `llama_ftype`)."""


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
    data_start = _align(cursor.position, alignment)
    return GGUFHeader(
        version, metadata, kinds, _place_tensors(infos, data_start, alignment, size, location), alignment, data_start
    )


def _read_value(cursor: _Cursor, item: str) -> tuple[str, Any]:
    """Read a metadata value and its type."""
    value_type = cursor.read_integer(4, item)
    if value_type == _STRING:
        return "STRING", cursor.read_string(MAX_HEADER, item)
    if value_type != _ARRAY:
        kind, array = _read_numbers(cursor, value_type, 1, item)
        return kind, array[0].item()
    item_type, count = cursor.read_integer(4, item), cursor.read_integer(8, item)
    if item_type == _ARRAY:
        raise FormatError(cursor.location, f"{item} is an array of arrays")
    if item_type == _STRING:
        return "[STRING]", cursor.read_strings(count, item)
    kind, array = _read_numbers(cursor, item_type, count, item)
    return f"[{kind}]", array


def _read_numbers(cursor: _Cursor, value_type: int, count: int, item: str) -> tuple[str, np.ndarray]:
    """Read numbers of one type."""
    if value_type not in _SCALARS:
        raise FormatError(cursor.location, f"{item} has the unknown type {value_type}")
    kind, dtype = _SCALARS[value_type]
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
    if type_id not in _TYPE_NAMES:
        raise FormatError(cursor.location, f"{item} has the unknown type {type_id}")
    type_name = _TYPE_NAMES[type_id]
    return GGUFTensor(name, type_name, shape, offset, _tensor_size(item, type_name, shape, cursor.location))


def _tensor_size(item: str, type_name: str, shape: Sequence[int], location: str) -> int:
    """Return the size of a tensor in bytes."""
    _, block, width = TYPES[type_name]
    if block > 1 and (not shape or shape[-1] % block):
        raise FormatError(
            location, f"{item}: rows of {shape[-1] if shape else 1} are not whole blocks of {type_name} ({block})"
        )
    count = 1
    for dim in shape:
        count *= dim
    # ggml counts elements and bytes in signed 64 bits; a dim of 0 must not excuse the others.
    if count // block * width >= 2**63 or any(dim >= 2**63 for dim in shape):
        raise FormatError(location, f"{item} is too large for any file")
    return count // block * width


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


def _align(position: int, alignment: int) -> int:
    return position + -position % alignment


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


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """A metadata value with its type in the file: readers abort on an integer where they expect a float."""

    kind: str
    value: Any


def string_value(value: str) -> MetadataValue:
    """Return a text as a metadata value."""
    return MetadataValue("STRING", value)


def strings_value(values: Sequence[str]) -> MetadataValue:
    """Return a list of texts as a metadata value."""
    return MetadataValue("[STRING]", list(values))


def u32_value(value: int) -> MetadataValue:
    """Return an unsigned 32-bit integer, the usual type of counts, as a metadata value."""
    return MetadataValue("UINT32", value)


def f32_value(value: float) -> MetadataValue:
    """Return a 32-bit float as a metadata value."""
    return MetadataValue("FLOAT32", value)


def bool_value(value: bool) -> MetadataValue:
    """Return a boolean as a metadata value."""
    return MetadataValue("BOOL", value)


def header_bytes(
    metadata: Mapping[str, MetadataValue], tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int = ALIGNMENT
) -> bytes:
    """Return the bytes before the data of a version 3 file with `tensors` (name, type, numpy shape) in the given order.

    An `alignment` other than the default must agree with `metadata`.
    """
    infos: list[bytes] = []
    offset = 0
    for name, type_name, shape in tensors:
        number, _, _ = TYPES[type_name]
        infos.append(_pack_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset))
        offset = _align(offset + _tensor_size(f"tensor {name!r}", type_name, shape, "gguf"), alignment)
    parts = [MAGIC, struct.pack("<IQQ", 3, len(infos), len(metadata))]
    parts += [_pack_string(key) + _pack_value(value) for key, value in metadata.items()]
    head = b"".join(parts + infos)
    return head + b"\0" * (-len(head) % alignment)


def _pack_string(text: str) -> bytes:
    """Return a string with its length before it."""
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def _pack_value(value: MetadataValue) -> bytes:
    if not value.kind.startswith("["):
        return _VALUE_IDS[value.kind].to_bytes(4, "little") + _pack_items(value.kind, [value.value])
    kind = value.kind[1:-1]
    head = struct.pack("<IIQ", _ARRAY, _VALUE_IDS[kind], len(value.value))
    return head + _pack_items(kind, value.value)


def _pack_items(kind: str, items: Sequence[Any]) -> bytes:
    if kind == "STRING":
        return b"".join(map(_pack_string, items))
    return np.asarray(items, _SCALARS[_VALUE_IDS[kind]][1]).tobytes()


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """A quantized tensor: its type, its logical shape in numpy's order, and its blocks."""

    type_name: str
    shape: tuple[int, ...]
    blocks: np.ndarray


def write(
    path: Path,
    metadata: Mapping[str, MetadataValue],
    tensors: Mapping[str, np.ndarray | QuantizedTensor],
    final_values: Callable[[], Mapping[str, MetadataValue]] | None = None,
) -> None:
    """Write a version 3 file with just these keys and tensors, in the given order; incomplete if the process is killed.

    Tensors are floats or integers of a dtype that GGUF supports, or already quantized. `final_values` is called once the
    tensors are written: it returns the final values of keys in `metadata` that had placeholders of the same size.
    """
    entries = [
        (name, tensor.type_name if isinstance(tensor, QuantizedTensor) else dtypes.name_of(tensor.dtype), tensor.shape)
        for name, tensor in tensors.items()
    ]
    try:
        with open(path, "wb") as file:
            header = header_bytes(metadata, entries)
            file.write(header)
            for tensor in tensors.values():
                array = tensor.blocks if isinstance(tensor, QuantizedTensor) else tensor
                data = byte_view(np.ascontiguousarray(array))
                file.write(data)
                file.write(b"\0" * (-len(data) % ALIGNMENT))
                release(array)
            # The header has the same size, so only its bytes are replaced.
            complete = header_bytes({**metadata, **final_values()}, entries) if final_values else header
            if complete != header:
                if len(complete) != len(header):
                    raise ValueError("a late value differs in size from its placeholder")
                file.seek(0)
                file.write(complete)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
