"""The pack file: one blob, encoded block by block.

    64 bytes    head: magic, size of the blob, offset, length and entries of the index, digest of the parent or zeros
    …           the stored planes of each block in turn
    …           the index, one entry of 48 bytes per block, compressed with zstd

The head alone has the size of the blob and the parent it needs. Reading streams by `read_at`: one block in memory, and two of
each parent up the chain. A pack is trusted no more than any other file: every length is checked before it is used, at most one
block is allocated at a time, work on parents is bounded by the bytes that come out, and the reader compares their digest.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np

from adapterhub_converters.errors import FormatError, IntegrityError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import byte_planes
from .cutting import MAX_BLOCK, ReadAt, Run
from .pack_chains import MAX_DEPTH

HEAD_SIZE = 64
MAX_BLOCKS = 1 << 20
MAX_SIZE = MAX_BLOCKS * MAX_BLOCK
_MAGIC, _VERSION = b"ahpack\0", 1
_HEAD = struct.Struct("<7sBQQII32s")
_ENTRY = np.dtype(
    [("size", "<u4"), ("width", "u1"), ("delta", "u1"), ("zero", "<u2"), ("parent", "<u8"), ("stored", "<u4", (8,))]
)
_HINT = "Check the registry"
# A block may need two blocks of its parent, each of which needs two of its own: 31 in all along the longest chain that is
# written, if no block is used twice. In a hostile chain, blocks need many more.
_MAX_WORK_RATIO = 1 << (MAX_DEPTH + 1)
_FREE_WORK = 256 << 20  # bytes decoded, by a read of any size
_BLOCK_COST = 1 << 10  # bytes that could be decoded in the time that any block takes
_CLEARLY_LESS = 0.95
_SAMPLES, _SAMPLE = 8, 1 << 16  # blocks, and bytes of each, that show what a parent is worth


@dataclass(frozen=True, slots=True)
class PackHead:
    """The head of a pack: `size` of the blob in bytes; `parent`, the digest of the blob it is a difference from, or empty."""

    size: int
    parent: str
    index_offset: int
    index_size: int
    blocks: int


def read_head(raw: bytes, location: str) -> PackHead:
    """Parse the first 64 bytes of a pack; FormatError for another file, RefusedError for a newer format."""
    if len(raw) < HEAD_SIZE or not raw.startswith(_MAGIC):
        raise FormatError(location, "not a pack", _HINT, code="check-registry")
    _, version, size, offset, length, blocks, parent = _HEAD.unpack(raw[:HEAD_SIZE])
    # The version comes first: in a newer format, the other fields may mean anything.
    if version > _VERSION:
        raise RefusedError(
            location,
            f"pack version {version} is newer than the {_VERSION} known here",
            "Upgrade adapterhub",
            code="newer-version",
        )
    if version != _VERSION or size > MAX_SIZE or blocks > MAX_BLOCKS:
        raise FormatError(location, "the head of the pack is invalid", _HINT, code="check-registry")
    return PackHead(size, f"sha256:{parent.hex()}" if any(parent) else "", offset, length, blocks)


@dataclass(frozen=True, slots=True)
class PackSizes:
    """Sizes of a pack in bytes: the whole file, and the part of the blob that is encoded as a difference."""

    size: int
    delta: int


def write(
    file: Any,
    read_at: ReadAt,
    size: int,
    blocks: Iterable[Run],
    *,
    parent: tuple[str, ReadAt] | None = None,
    level: int = byte_planes.DEFAULT_LEVEL,
) -> PackSizes:
    """Write the pack of a blob of `size` bytes into an empty seekable file.

    Args:
        file: The output; its head is written last.
        read_at: Reads the blob.
        size: Size of the blob in bytes.
        blocks: The blob, as `cutting.blocks` divides it.
        parent: Digest and reader of the parent; the `parent` of each block is an offset into it.
        level: zstd's level for bytes that are not numbers.
    """
    file.write(bytes(HEAD_SIZE))
    position, delta, entries = HEAD_SIZE, 0, []
    smallest = _SmallestEncoding(level)
    for block in blocks:
        raw = _read_exactly(read_at, block.offset, block.size)
        base = _read_exactly(parent[1], block.parent, block.size) if parent and block.parent is not None else None
        stored, is_delta = smallest(raw, block.width, base)
        for plane in stored:
            file.write(plane)
        lengths = [len(plane) for plane in stored]
        is_plain = len(stored) == 1 and lengths[0] == block.size
        entries.append(_entry(block, 1 if is_plain else block.width, lengths, is_delta=is_delta))
        position += sum(lengths)
        delta += block.size if is_delta else 0
    index = byte_planes.deflate(np.array(entries, _ENTRY).tobytes())
    file.write(index)
    # A pack without any difference does not depend on the parent.
    digest = bytes.fromhex(parent[0].removeprefix("sha256:")) if parent and delta else bytes(32)
    # The head comes last: until then the file starts with zeros, and an incomplete pack is not taken for a pack.
    file.seek(0)
    file.write(_HEAD.pack(_MAGIC, _VERSION, size, position, len(index), len(entries), digest))
    return PackSizes(position + len(index), delta)


class _SmallestEncoding:
    """Chooses the shortest form of a block: its planes, its difference from the parent, or the plain bytes.

    If the difference is clearly shorter than the planes of the last block that was tried without the parent, it is taken
    without trying.
    """

    def __init__(self, level: int) -> None:
        self._level = level
        self._alone: dict[int, float] = {}  # width to the share of its size that the last block came to

    def __call__(
        self, raw: byte_planes.Bytes, width: int, parent: byte_planes.Bytes | None
    ) -> tuple[list[bytes | byte_planes.Bytes], bool]:
        """Return the stored planes, and whether they are those of a difference."""
        delta = None if parent is None else byte_planes.encode(raw, width, parent, level=self._level)
        least = len(raw) if delta is None else _length(delta)
        if delta is not None and least < _CLEARLY_LESS * self._alone.get(width, 0.0) * len(raw):
            return delta, True
        alone = byte_planes.encode(raw, width, level=self._level)
        self._alone[width] = _length(alone) / len(raw)
        if delta is not None and least < _length(alone):
            return delta, True
        return ([raw] if _length(alone) >= len(raw) else alone), False


def _length(stored: Sequence[bytes | byte_planes.Bytes]) -> int:
    return sum(map(len, stored))


def _entry(block: Run, width: int, lengths: list[int], *, is_delta: bool) -> tuple[object, ...]:
    return block.size, width, is_delta, 0, block.parent if is_delta else 0, lengths + [0] * (8 - len(lengths))


def _read_exactly(read_at: ReadAt, offset: int, size: int) -> byte_planes.Bytes:
    raw = read_at(offset, size)
    if len(raw) != size:
        raise IntegrityError("", "shorter than before: it changed while it was read", code="changed-meanwhile")
    return np.frombuffer(raw, np.uint8)


@dataclass(slots=True)
class _Work:
    """The work that the readers of one chain share, in bytes.

    Attributes:
        requested: Bytes that were read from the blob at the end of the chain.
        decoded: Bytes that were decoded for them.
    """

    requested: int = 0
    decoded: int = 0

    def is_too_much(self, size: int) -> bool:
        """Count the decoding of a block of `size` bytes; return True if it exceeds what the requested bytes justify."""
        self.decoded += size + _BLOCK_COST
        return self.decoded > _MAX_WORK_RATIO * self.requested + _FREE_WORK


class PackReader(io.RawIOBase):
    """The blob in a pack, as an unbuffered file that decodes its bytes while they are read.

    Args:
        file: The pack; closed with the reader.
        location: Its name in errors.
        parent: The parent that the head names, open for reading, or None without one; closed with the reader.
    """

    def __init__(self, file: BinaryIO, location: str, parent: PackReader | BinaryIO | None = None) -> None:
        self._file, self.name = file, location
        self._parent = io.BytesIO() if parent is None else parent
        self.head = read_head(_read_at(file, 0, HEAD_SIZE), location)
        self._entries = self._index()
        self._starts = _start_offsets(self._entries["size"])
        self._places = _start_offsets(self._entries["stored"].sum(axis=1, dtype=np.int64)) + HEAD_SIZE
        self._cache: dict[int, byte_planes.Bytes] = {}
        self._position = 0
        self._share(_Work())

    def _share(self, work: _Work) -> None:
        """Let the parents, which were opened first, count their work together with this reader."""
        self._work = work
        if isinstance(self._parent, PackReader):
            self._parent._share(work)

    def _index(self) -> Any:
        head = self.head
        self._file.seek(0, io.SEEK_END)
        if head.index_offset + head.index_size != self._file.tell() or head.index_offset < HEAD_SIZE:
            raise self._damaged_pack_error("truncated")
        try:
            raw = byte_planes.inflate(_read_at(self._file, head.index_offset, head.index_size), head.blocks * _ENTRY.itemsize)
        except FormatError as error:
            raise self._damaged_pack_error("its index cannot be read") from error
        entries = np.frombuffer(raw, _ENTRY)
        if not _is_valid_index(entries, head):
            raise self._damaged_pack_error("its index is invalid")
        return entries

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes of the blob; fewer only at its end."""
        self._work.requested += max(0, min(size, self.head.size - offset))
        return self._read_range(offset, size)

    def _read_range(self, offset: int, size: int) -> bytes:
        out = bytearray(max(0, min(size, self.head.size - offset)))
        self._copy(memoryview(out), offset)
        return bytes(out)

    def _copy(self, out: memoryview, offset: int) -> None:
        number = int(np.searchsorted(self._starts, offset, "right")) - 1
        while len(out):
            block = self._block(number)
            start = offset - int(self._starts[number])
            part = block[start : start + len(out)]
            out[: len(part)] = part.data
            out, offset, number = out[len(part) :], offset + len(part), number + 1

    def _block(self, number: int) -> byte_planes.Bytes:
        if number not in self._cache:
            while len(self._cache) >= 2:  # a child's block may begin in one block and end in the next
                del self._cache[next(iter(self._cache))]
            try:
                self._cache[number] = self._decode_block(number)
            except FormatError as error:
                if error.where:  # already names the pack: a parent's
                    raise
                raise self._damaged_pack_error(f"block {number}: {error.what}") from error
        return self._cache[number]

    def _decode_block(self, number: int) -> byte_planes.Bytes:
        entry, place = self._entries[number], int(self._places[number])
        size, width = int(entry["size"]), int(entry["width"])
        if self._work.is_too_much(size):
            raise FormatError("", "it takes more of its parents than its size justifies")
        stored = []
        for length in entry["stored"][:width].tolist():
            stored.append(_read_at(self._file, place, length))
            place += length
        if not entry["delta"]:
            return byte_planes.decode(stored, width, size // width)
        parent = self._read_parent(int(entry["parent"]), size)
        if len(parent) != size:
            raise FormatError("", "its difference needs bytes beyond the end of the parent")
        return byte_planes.decode(stored, width, size // width, np.frombuffer(parent, np.uint8))

    def _read_parent(self, offset: int, size: int) -> bytes:
        if isinstance(self._parent, PackReader):
            return self._parent._read_range(offset, size)
        return _read_at(self._parent, offset, size)

    def _damaged_pack_error(self, problem: str) -> FormatError:
        return FormatError(self.name, f"a damaged pack: {problem}", _HINT, code="check-registry")

    # ---- as a file

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; unlike a pipe, return less only at the end of the blob."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self.head.size - self._position))]
        self._work.requested += len(view)
        self._copy(view, self._position)
        self._position += len(view)
        return len(view)

    def close(self) -> None:
        """Close the pack and its parent."""
        self._cache = {}
        self._file.close()
        self._parent.close()
        super().close()


def offset_reader(file: Any) -> ReadAt:
    """Return a function that reads an open blob, plain or packed, at an offset."""
    return file.read_at if isinstance(file, PackReader) else functools.partial(_read_at, file)


def gain(read_at: ReadAt, blocks: Sequence[Run], parent: ReadAt) -> tuple[int, int]:
    """Estimate from a few blocks how many bytes they take when encoded alone, and as a difference from a parent."""
    shared = [block for block in blocks if block.parent is not None]
    alone = delta = 0
    # Spread over the whole file: its layers may differ.
    for block in shared[:: max(1, len(shared) // _SAMPLES)][:_SAMPLES]:
        size = min(block.size, _SAMPLE)
        raw, base = _read_exactly(read_at, block.offset, size), _read_exactly(parent, block.parent or 0, size)
        alone += _length(byte_planes.encode(raw, block.width))
        delta += _length(byte_planes.encode(raw, block.width, base))
    return alone, delta


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _start_offsets(sizes: Any) -> Any:
    """Return, for each size, the sum of the sizes before it."""
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))[:-1] if len(sizes) else np.zeros(0, np.int64)


def _is_valid_index(entries: Any, head: PackHead) -> bool:
    # All entries are checked at once, before any value is used to read or to allocate.
    size, width, stored = entries["size"], entries["width"], entries["stored"]
    if not np.isin(width, byte_planes.WIDTHS).all() or (entries["delta"] > 1).any() or (entries["parent"] >= 2**62).any():
        return False
    used = np.arange(8) < width[:, None]
    counts = size // width
    return bool(
        ((size > 0) & (size <= MAX_BLOCK) & (size % width == 0)).all()
        and ((stored > 0) & (stored <= counts[:, None]) | ~used).all()
        and not stored[~used].any()
        and not (entries["zero"].any() or (entries["delta"].any() and not head.parent))
        and int(size.sum(dtype=np.int64)) == head.size
        and int(stored.sum(dtype=np.int64)) == head.index_offset - HEAD_SIZE
    )
