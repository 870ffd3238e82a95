"""Xorbs and shards as bytes (hub-docs, `docs/xet/xorb.md` and `shard.md`), of clients that are not trusted.

A hash is printed as four little-endian numbers of 8 bytes. None is computed here: a file is kept, and its sha256 decides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lz4.frame

from adapterhub.digest import Digest
from adapterhub_converters.errors import FormatError

MAX_XORB = 64 << 20
"""Bytes of a xorb."""
MAX_CHUNKS = 8192
"""Chunks of a xorb."""
MAX_CHUNK = 128 << 10
"""Bytes of a chunk, as it is sent and as it was."""
MAX_SHARD = 64 << 20
"""Bytes of a shard."""
_CHUNK = struct.Struct("<I I")  # version and compressed size, scheme and size; each a byte and three
_HEADER = struct.Struct("<32s Q Q")
_RECORD = struct.Struct("<32s I I 8s")
_TERM = struct.Struct("<32s I I I I")
_END = b"\xff" * 32
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30
_FOOTER = b"XETBLOB"
_PLAIN, _LZ4, _GROUPED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a xorb: where its bytes are, how they are compressed, and how many they become."""

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
        """Bytes of the file."""
        return sum(term.size for term in self.terms)


def hex_of(raw: bytes) -> str:
    """A hash of 32 bytes as it is printed."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


# ---- xorbs


def chunks(read_at: Any, size: int, where: str) -> list[Chunk]:
    """The chunks of a xorb of `size` bytes, by their headers; `read_at(offset, n)` returns bytes of it.

    Raises:
        FormatError: They do not fill the xorb up to its footer, or are larger, or more, than they may be.
    """
    found: list[Chunk] = []
    at = 0
    while at < size:
        head = read_at(at, _CHUNK.size)
        if head[:1] != b"\0":
            if not _FOOTER.startswith(head[: len(_FOOTER)]):
                raise FormatError(where, f"no chunk begins at byte {at}")
            break
        if len(head) < _CHUNK.size:
            raise FormatError(where, f"ends within the header of the chunk at byte {at}")
        first, second = _CHUNK.unpack(head)
        chunk = Chunk(at + _CHUNK.size, first >> 8, second & 0xFF, second >> 8)
        at = chunk.start + chunk.stored
        if at > size or chunk.size > MAX_CHUNK or chunk.stored > MAX_CHUNK + 4096 or chunk.scheme > _GROUPED:
            raise FormatError(where, f"chunk {len(found)} is larger than a chunk may be, or compressed in an unknown way")
        # Headers alone would fill a xorb with eight million chunks, each of which costs a hundred bytes.
        if not chunk.size or len(found) == MAX_CHUNKS:
            raise FormatError(where, f"chunk {len(found)} is empty, or the xorb has more than {MAX_CHUNKS} chunks")
        found.append(chunk)
    return found


def unpacked(chunk: Chunk, raw: bytes, where: str) -> bytes:
    """The bytes of a chunk from those that were sent; FormatError if they are not as many as it says."""
    if chunk.scheme == _PLAIN:
        data = raw
    else:
        try:
            data = lz4.frame.LZ4FrameDecompressor().decompress(raw, max_length=chunk.size + 1)
        except RuntimeError as error:
            raise FormatError(where, f"a chunk is not LZ4, as it is declared to be ({error})") from error
    if len(data) != chunk.size:
        raise FormatError(where, f"a chunk has {len(data)} bytes or more instead of {chunk.size}")
    return _ungrouped(data) if chunk.scheme == _GROUPED else data


def _ungrouped(data: bytes) -> bytes:
    """Bytes of which all first ones of four came first, then all second ones, and so on."""
    out, at = bytearray(len(data)), 0
    for lane in range(4):
        count = (len(data) - lane + 3) // 4
        out[lane::4] = data[at : at + count]
        at += count
    return bytes(out)


# ---- shards


def files(raw: bytes, where: str) -> Iterator[File]:
    """The files of a shard; FormatError for one that is malformed, or without a sha256."""
    if len(raw) < _HEADER.size or _HEADER.unpack_from(raw)[1] != 2:
        raise FormatError(where, "not a shard of version 2")
    at = _HEADER.size
    while True:
        name, flags, count, _ = _record(raw, at, where)
        if name == _END:
            return
        at += _RECORD.size
        verified = count if flags & _VERIFIED else 0
        after = at + (count + verified) * _TERM.size
        if after > len(raw):
            raise FormatError(where, "ends within the terms of a file")
        terms = tuple(
            Term(hex_of(xorb), size, first, end)
            for xorb, _, size, first, end in _TERM.iter_unpack(raw[at : at + count * _TERM.size])
        )
        if not flags & _WITH_SHA256:
            raise FormatError(where, "a file without its sha256")
        yield File(f"sha256:{hex_of(_record(raw, after, where)[0])}", terms)
        at = after + _RECORD.size


def _record(raw: bytes, at: int, where: str) -> tuple[bytes, int, int, bytes]:
    if at + _RECORD.size > len(raw):
        raise FormatError(where, "ends before the mark of its end")
    name, flags, count, unused = _RECORD.unpack_from(raw, at)
    return name, flags, count, unused
