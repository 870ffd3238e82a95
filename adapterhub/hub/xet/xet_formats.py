"""Parse xorbs and shards (hub-docs, `docs/xet/xorb.md` and `shard.md`) sent by clients that are not trusted.

A hash is printed as four little-endian numbers of 8 bytes. None is computed here: a file is rebuilt, and its sha256 decides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import lz4.frame

from adapterhub.digest import Digest
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

MAX_XORB = 64 << 20
"""Limit in bytes of a xorb."""
MAX_CHUNKS = 8192
"""Limit of the chunks of a xorb."""
MAX_CHUNK = 128 << 10
"""Limit in bytes of a chunk, compressed or not."""
MAX_SHARD = 64 << 20
"""Limit in bytes of a shard."""
_CHUNK = struct.Struct("<I I")  # version (1 byte) and compressed size (3 bytes), scheme (1) and size (3)
_HEADER = struct.Struct("<32s Q Q")
_RECORD = struct.Struct("<32s I I 8s")
_TERM = struct.Struct("<32s I I I I")
_END = b"\xff" * 32
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30
_FOOTER = b"XETBLOB"
_PLAIN, _LZ4, _GROUPED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a xorb: the position and size of its compressed bytes, their compression scheme, and the size uncompressed."""

    start: int
    stored: int
    scheme: int
    size: int


@dataclass(frozen=True, slots=True)
class Term:
    """A run of chunks `first` to `end` (exclusive) of a xorb, `size` bytes in all."""

    xorb: str
    size: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class File:
    """A file as a sequence of terms."""

    digest: Digest
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return sum(term.size for term in self.terms)


def hex_of(raw: bytes) -> str:
    """Return the printed form of a 32-byte hash."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


# ---- xorbs


def chunks(read_at: Any, size: int, location: str) -> list[Chunk]:
    """Return the chunks of a xorb of `size` bytes, by their headers; `read_at(offset, n)` returns bytes of it.

    Raises:
        FormatError: They do not fill the xorb up to its footer, or are too large or too many.
    """
    parsed: list[Chunk] = []
    offset = 0
    while offset < size:
        head = read_at(offset, _CHUNK.size)
        if head[:1] != b"\0":
            if not _FOOTER.startswith(head[: len(_FOOTER)]):
                raise FormatError(location, f"no chunk begins at byte {offset}")
            break
        if len(head) < _CHUNK.size:
            raise FormatError(location, f"ends within the header of the chunk at byte {offset}")
        first, second = _CHUNK.unpack(head)
        chunk = Chunk(offset + _CHUNK.size, first >> 8, second & 0xFF, second >> 8)
        offset = chunk.start + chunk.stored
        if offset > size or chunk.size > MAX_CHUNK or chunk.stored > MAX_CHUNK + 4096 or chunk.scheme > _GROUPED:
            raise FormatError(location, f"chunk {len(parsed)} is larger than a chunk may be, or compressed in an unknown way")
        # Without this limit, a xorb of nothing but headers would have eight million chunks, at a hundred bytes of memory each.
        if not chunk.size or len(parsed) == MAX_CHUNKS:
            raise FormatError(location, f"chunk {len(parsed)} is empty, or the xorb has more than {MAX_CHUNKS} chunks")
        parsed.append(chunk)
    return parsed


def decompress(chunk: Chunk, raw: bytes, location: str) -> bytes:
    """Return the decompressed bytes of a chunk.

    Raises:
        FormatError: They are not as many as its header says.
    """
    if chunk.scheme == _PLAIN:
        data = raw
    else:
        try:
            data = lz4.frame.LZ4FrameDecompressor().decompress(raw, max_length=chunk.size + 1)
        except RuntimeError as error:
            raise FormatError(location, f"a chunk is not LZ4, as it is declared to be ({error})") from error
    if len(data) != chunk.size:
        raise FormatError(location, f"a chunk has {len(data)} bytes or more instead of {chunk.size}")
    return _interleave(data) if chunk.scheme == _GROUPED else data


def _interleave(data: bytes) -> bytes:
    """Return bytes in their original order, from a form with all first bytes of four first, then all second ones, and so on."""
    out, offset = bytearray(len(data)), 0
    for lane in range(4):
        count = (len(data) - lane + 3) // 4
        out[lane::4] = data[offset : offset + count]
        offset += count
    return bytes(out)


# ---- shards


def files(raw: bytes, location: str) -> Iterator[File]:
    """Yield the files of a shard.

    Raises:
        FormatError: The shard is malformed, or a file has no sha256.
    """
    if len(raw) < _HEADER.size or _HEADER.unpack_from(raw)[1] != 2:
        raise FormatError(location, "not a shard of version 2")
    offset = _HEADER.size
    while True:
        name, flags, count, _ = _record(raw, offset, location)
        if name == _END:
            return
        offset += _RECORD.size
        verified = count if flags & _VERIFIED else 0
        after = offset + (count + verified) * _TERM.size
        if after > len(raw):
            raise FormatError(location, "ends within the terms of a file")
        terms = tuple(
            Term(hex_of(xorb), size, first, end)
            for xorb, _, size, first, end in _TERM.iter_unpack(raw[offset : offset + count * _TERM.size])
        )
        if not flags & _WITH_SHA256:
            raise FormatError(location, "a file without its sha256")
        yield File(f"sha256:{hex_of(_record(raw, after, location)[0])}", terms)
        offset = after + _RECORD.size


def _record(raw: bytes, offset: int, location: str) -> tuple[bytes, int, int, bytes]:
    if offset + _RECORD.size > len(raw):
        raise FormatError(location, "ends before the mark of its end")
    name, flags, count, unused = _RECORD.unpack_from(raw, offset)
    return name, flags, count, unused
