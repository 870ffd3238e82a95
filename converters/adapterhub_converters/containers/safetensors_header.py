"""The headers of safetensors files: read with bounded work from any source, and written as the safetensors library would.

A header is read through an injected `read_at(offset, n)`, so that the source can be a file, bytes in memory, or an HTTP
range. Every length is checked against the file's size before anything is allocated, unlike in other Python readers
(huggingface_hub, gguf), which trust the header. The rules are those of the safetensors README, "Format", and of its Rust core
(`tensor.rs`, `Metadata::validate`); duplicate keys, which its JSON parser accepts, are refused too.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from adapterhub_converters import dtypes
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

ReadAt = Callable[[int, int], bytes]
MAX_HEADER = 100_000_000  # bytes; the Rust core's own limit
MAX_TENSORS = 500_000  # over twice the largest adapter known: both factors of three modules of 512 experts in 60 layers
MAX_NAME = 1_024  # characters
MAX_SHAPES = 65_536  # different pairs of dtype and shape
MAX_METADATA = 65_536  # keys
_READ_SIZE = 16_000_000  # bytes of a header to read at once; nearly all headers are shorter
_BATCH_SIZE = 500_000  # bytes of a header to match at once; the matches take seven times as much memory
_MAX_DIM = 2**63
_METADATA = "__metadata__"


class TensorKind(NamedTuple):
    """The properties that most tensors of a header share with others; `size` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


class TensorInfo(NamedTuple):
    """One tensor of a header: `offset` and `size` in bytes, absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file, in columns, since a hostile one may have very many tensors.

    Attributes:
        names: The tensors in file order, without holes between them.
        kinds: The kind of each; all tensors of a kind share one object.
    """

    names: Sequence[str]
    kinds: Sequence[TensorKind]
    metadata: dict[str, str]
    data_start: int

    def offsets(self) -> Iterator[int]:
        """Return an iterator over the offset of each tensor and the end of the last, absolute in the file."""
        return itertools.accumulate([kind.size for kind in self.kinds], initial=self.data_start)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name to info, in file order."""
        entries = zip(self.names, self.kinds, self.offsets(), strict=False)
        return {name: TensorInfo(name, kind.dtype, kind.shape, offset, kind.size) for name, kind, offset in entries}


def read_header(read_at: ReadAt, size: int, location: str) -> SafetensorsHeader:
    """Read and check the header of a safetensors file of `size` bytes; FormatError names the first fault."""
    if size < 8:
        raise FormatError(location, f"not a safetensors file: {size} bytes are fewer than its length field needs")
    length = int.from_bytes(read_at(0, 8), "little")
    if length > MAX_HEADER:
        raise FormatError(location, f"header of {length} bytes is over the limit of {MAX_HEADER}")
    # Compare before reading: the length is the file's own claim.
    if length > size - 8:
        raise FormatError(location, f"truncated: the header takes {length} bytes, the file has {size - 8} left")
    scanner = _Scanner(read_at, 8 + length, location)
    scanner.read()
    return _checked_header(scanner, 8 + length, size, location)


_WHITESPACE = rb"[ \t\n\r]*+"


def _tokens(*tokens: bytes) -> bytes:
    """Return a pattern of tokens with whitespace allowed before and between them."""
    return _WHITESPACE.join((b"", *tokens))


# The only JSON that a header may contain. All quantifiers are possessive (`++`): no byte is tried twice. Every pattern ends
# with a character, so that none matches a part of something that the buffer cuts off.
_TEXT = rb'"((?:[^"\\\x00-\x1f]++|\\.)*+)"'
_SIZE = rb"(0|[1-9][0-9]{0,18}+)"
_DTYPE = _tokens(rb'"dtype"', rb":", rb'("[^"\\\x00-\x1f]{0,40}+")')
_SHAPE = _tokens(rb'"shape"', rb":", rb"(\[[0-9, \t\n\r]{0,1000}+\])")
_OFFSETS = _tokens(rb'"data_offsets"', rb":", rb"\[", _SIZE, rb",", _SIZE, rb"\]")
_FIELD = b"(?:" + b"|".join((_DTYPE, _SHAPE, _OFFSETS)) + b")" + _tokens(rb'(?:,(?=[ \t\n\r"])|(?=\}))')
_ENTRY = _tokens(_TEXT, rb":", rb"\{(?:" + _FIELD + rb"){3}\}", b"")
_TENSOR = re.compile(_ENTRY + rb"([,}])")
_TENSORS = re.compile(_ENTRY + rb",|(?s:(.+))")  # for `findall`: many tensors, and as the last match everything after them
_KEY = re.compile(_tokens(_TEXT, rb":"))
_OPENING = re.compile(_tokens(rb"\{", rb'(?:(\})|(?="))'))
_PAIR = re.compile(_tokens(_TEXT, rb":", _TEXT, rb"([,}])"))
_NULL = re.compile(_tokens(rb"null", rb"(?=[,}])"))
_SEPARATOR = re.compile(_tokens(rb"([,}])"))
# Pieces of a text with escapes, since json needs memory for a string for each escape; both halves of a surrogate pair stay
# together.
_ESCAPED = re.compile(r"(?:[^\\]++|\\u[dD][89abAB]..\\u....|\\u....|\\.){1,100000}+")
_ANYTHING = re.compile(_tokens(rb"[^ \t\n\r]"))


class _Scanner:
    """A scanner of a header's JSON, which reads a piece at a time and keeps only tensors and metadata.

    A parser for all of JSON needs 25 times the size of a hostile header in memory, and several times that of a good one.
    """

    def __init__(self, read_at: ReadAt, end: int, location: str) -> None:
        self.names: list[str] = []
        self.kinds: list[TensorKind] = []
        self.starts = array("Q")  # offsets in the data
        self.metadata: dict[str, str] = {}
        self._read_at = read_at
        self._label = location
        self._end = end  # offset in the file at which the header ends and the data begins
        self._offset = 8  # of the next byte in the file that is not in the buffer yet
        self._buffer = b""
        self._position = 0  # position in the buffer
        self._kinds_by_text: dict[tuple[bytes, bytes], TensorKind] = {}  # by the texts of dtype and shape

    def read(self) -> None:
        """Read the complete header."""
        opening, keys = self._match(_OPENING), set[str]()
        if self._buffer[:1] != b"{":
            raise self._error("not a safetensors file: the header does not start with {")
        if opening is None:
            raise self._json_error()
        has_more = not opening[1]
        while has_more and self._read_tensors():
            key = self._match(_KEY)
            if key is None:
                raise self._json_error()
            [name] = self._parse_names([key[1]])
            if name in keys or name in self.names:
                raise self._error(f"duplicate key {name[:80]!r}")
            if name != _METADATA:
                problem = f"does not have exactly dtype, shape and data_offsets, but {self._excerpt()}"
                raise self._error(f"tensor {name!r} {problem}")
            keys.add(name)
            has_more = self._read_metadata()
        if self._match(_ANYTHING):
            raise self._error("not valid JSON: something follows the object")
        if len(set(self.names)) != len(self.names):
            visited = set[str]()
            name = next(name for name in self.names if name in visited or visited.add(name))  # type: ignore[func-returns-value]
            raise self._error(f"duplicate key {name!r}")

    def _match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Match a pattern at the position and move past it; read on if that takes more than the buffer has."""
        while (match := pattern.match(self._buffer, self._position)) is None and self._offset < self._end:
            count = max(_READ_SIZE, len(self._buffer) - self._position)  # doubled each time, since the match starts over
            chunk = self._read_at(self._offset, min(count, self._end - self._offset))
            if not chunk:
                raise self._error("truncated: the file ended while its header was read")
            self._offset += len(chunk)
            self._buffer, self._position = self._buffer[self._position :] + chunk, 0
        if match is not None:
            self._position = match.end()
        return match

    def _read_tensors(self) -> bool:
        """Read tensors up to something else; return False if the object ends with them."""
        while True:
            batch_end = min(self._position + _BATCH_SIZE, len(self._buffer))
            rows = _TENSORS.findall(self._buffer, self._position, batch_end)
            unmatched = rows.pop()[-1] if rows and rows[-1][-1] else b""
            self._position = batch_end - len(unmatched)
            self._add_tensors(rows)
            match = self._match(_TENSOR)  # a tensor that the batch or the buffer cut off, or the last one
            if match is None:
                return True
            self._add_tensors([match.groups(b"")])
            if match[6] == b"}":
                return False

    def _add_tensors(self, rows: Sequence[tuple[bytes, ...]]) -> None:
        """Check tensors, given by the groups of `_ENTRY`, and keep them: column by column, since there may be a million."""
        if not rows:
            return
        raw, *texts, starts, ends, _ = zip(*rows, strict=True)
        names = self._parse_names(raw)
        for column in (*texts, starts):
            if b"" in column:  # then another field occurs twice
                name = names[column.index(b"")]
                raise self._error(f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
        pairs = list(zip(*texts, strict=True))
        # A header has few kinds of tensors: parse each dtype and shape once.
        if not self._kinds_by_text.keys() >= {*pairs}:
            for name, pair in zip(names, pairs, strict=True):
                if pair not in self._kinds_by_text:
                    self._kinds_by_text[pair] = self._parse_kind(name, *pair)
        kinds, offsets = list(map(self._kinds_by_text.__getitem__, pairs)), list(map(int, starts))
        for name, kind, size in zip(names, kinds, map(operator.sub, map(int, ends), offsets), strict=True):
            if kind.size != size:
                problem = f"{kind.dtype} {list(kind.shape)} is not the {size} bytes of its offsets"
                raise self._error(f"tensor {name!r}: {problem}")
        self.names += names
        self.kinds += kinds
        self.starts.extend(offsets)
        if len(self.names) > MAX_TENSORS:
            raise self._error(f"more than {MAX_TENSORS} tensors, which is the limit")

    def _parse_names(self, raw: Sequence[bytes]) -> list[str]:
        """Return the names of tensors, given as JSON texts."""
        invalid: bytes | str = max(raw, key=len)
        if len(invalid) <= 12 * MAX_NAME:  # JSON has at most 12 bytes for a character
            try:
                names: list[str] = json.loads((b'["' + b'","'.join(raw) + b'"]').decode())
                text = "".join(names)
                text.encode()  # half of a surrogate pair is not text
            except UnicodeDecodeError as error:
                raise self._error("the header is not UTF-8") from error
            except ValueError as error:
                raise self._error(f"not valid JSON ({str(error)[:200]})") from error
            if "" not in names and len(max(names, key=len)) <= MAX_NAME and text.isprintable():
                return names
            invalid = next(name for name in names if not (0 < len(name) <= MAX_NAME and name.isprintable()))
        raise self._error(f"tensor name {invalid[:80]!r} is empty, too long or unprintable")

    def _parse_kind(self, name: str, dtype_text: bytes, shape_text: bytes) -> TensorKind:
        """Return the kind with this dtype and shape, given as JSON texts."""
        dtype = dtype_text[1:-1].decode(errors="replace")
        if dtype not in dtypes.BITS:
            raise self._error(f"tensor {name!r} has an unknown dtype {dtype!r}")
        try:
            shape = tuple(json.loads(shape_text))
        except ValueError:
            shape = (-1,)
        if len(shape) > 16 or any(not 0 <= dim < _MAX_DIM for dim in shape):
            raise self._error(f"tensor {name!r} has a malformed shape")
        bits = dtypes.BITS[dtype] * math.prod(shape)
        if (
            not bits and dtypes.BITS[dtype] * math.prod(dim or 1 for dim in shape) >= 2**66
        ):  # an empty tensor may claim any other dimensions
            raise self._error(f"tensor {name!r} has a shape that is too large")
        if bits % 8:
            raise self._error(f"tensor {name!r}: {dtype} {list(shape)} does not end with a whole byte")
        if len(self._kinds_by_text) == MAX_SHAPES:
            raise self._error(f"more than {MAX_SHAPES} different shapes, which is the limit")
        return TensorKind(dtype, shape, bits // 8)

    def _read_metadata(self) -> bool:
        """Read the map of `__metadata__`; return False if the header's object ends after it."""
        problem = f"{_METADATA} is not a map of strings to strings"
        # mlx writes null if there is no metadata, and the Rust core accepts it.
        if self._match(_NULL) is None:
            opening = self._match(_OPENING)
            has_more = opening is not None and not opening[1]
            while has_more:
                pair = self._match(_PAIR)
                if pair is None:
                    raise self._error(problem)
                key = self._parse_text(pair[1])
                if key in self.metadata:
                    raise self._error(f"duplicate key {key[:80]!r}")
                if len(self.metadata) == MAX_METADATA:
                    raise self._error(f"more than {MAX_METADATA} keys in {_METADATA}, which is the limit")
                self.metadata[key] = self._parse_text(pair[2])
                has_more = pair[3] == b","
            if opening is None:
                raise self._error(problem)
        separator = self._match(_SEPARATOR)
        if separator is None:
            raise self._json_error()
        return separator[1] == b","

    def _parse_text(self, raw: bytes) -> str:
        """Return a JSON string's value."""
        try:
            text = raw.decode()
            if "\\" in text:
                text = "".join([json.loads(f'"{piece[0]}"') for piece in _ESCAPED.finditer(text)])
                text.encode()  # half of a surrogate pair is not text
        except UnicodeDecodeError as error:
            raise self._error("the header is not UTF-8") from error
        except ValueError as error:
            raise self._error(f"not valid JSON ({str(error)[:200]})") from error
        return text

    def _excerpt(self) -> str:
        return repr(self._buffer[self._position : self._position + 60].decode(errors="replace").lstrip())

    def _json_error(self) -> FormatError:
        position = self._offset - len(self._buffer) + self._position - 8
        return self._error(f"not valid JSON at byte {position} of the header: {self._excerpt()}")

    def _error(self, problem: str) -> FormatError:
        return FormatError(self._label, problem)


def _checked_header(scanner: _Scanner, data_start: int, size: int, location: str) -> SafetensorsHeader:
    """Return the header with its tensors in file order, after checking that they cover the data without a gap."""
    # No holes between tensors: a hole could hide a second file (safetensors README, "Format"). An empty tensor precedes the one
    # at the same offset.
    header = SafetensorsHeader(scanner.names, scanner.kinds, scanner.metadata, data_start)
    if any(map(operator.ne, header.offsets(), map(data_start.__add__, scanner.starts))):
        ordered = sorted(zip(scanner.starts, header.kinds, header.names, strict=True), key=lambda row: (row[0], row[1].size))
        position = 0
        for start, kind, name in ordered:
            if start != position:
                problem = "overlaps the one before it" if start < position else "leaves a hole before it"
                raise FormatError(location, f"tensor {name!r} {problem}", code="hole" if start > position else "")
            position += kind.size
        header = replace(header, names=[row[2] for row in ordered], kinds=[row[1] for row in ordered])
    *_, position = header.offsets()
    if position > size:
        raise FormatError(location, f"truncated: the tensors end at byte {position}, the file at {size}")
    if position < size:
        raise FormatError(location, f"{size - position} bytes follow the last tensor", code="trailing")
    return header


TensorEntry = tuple[str, str, tuple[int, ...]]
"""Name, dtype, and shape of a tensor to write."""


def sorted_entries(tensors: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Return tensors in the order of the safetensors library: widest dtype first, then by name (`tensor.rs`, `prepare`)."""
    # The same order gives the same bytes as the library's writer.
    return sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0]))


# The library sorts by its enum, descending; this is the ascending order of the types written here.
_RANK = {
    name: rank
    for rank, name in enumerate(
        ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
         "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
    )
}  # fmt: skip


def header_bytes(tensors: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
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
