"""The encoding of numbers as byte planes that compress.

The bytes of a trained float differ: its exponent takes few values, its mantissa all of them. The bytes of a block are therefore
sorted by their position in the number, one plane per position, and each plane is stored as zstd or, if that saves nothing, as
it is. Before that, the bits are rotated left by one, which leaves the exponent of bfloat16 and float32 alone in the top byte
and moves the sign, which is noise, to the mantissa.

A block may be encoded as a difference instead: its bit patterns minus those of a similar parent, as integers, with the sign in
the lowest bit, so that small differences of either sign have high bytes of zero. Integer differences of bit patterns save more
than XOR, and round nothing.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.errors import FormatError, MissingExtraError

if TYPE_CHECKING:
    import zstandard

Bytes = NDArray[np.uint8]
Words = NDArray[Any]  # unsigned integers, little-endian

WIDTHS = (1, 2, 4, 8)
DEFAULT_LEVEL = 3
_WORDS = {width: np.dtype(f"<u{width}") for width in WIDTHS}
_MAX_COMPRESSED_SHARE = (
    0.97  # a plane that zstd shrinks to no less than this share is stored as it is, which costs nothing to read
)


def encode(block: Bytes, width: int, parent: Bytes | None = None, *, level: int = DEFAULT_LEVEL) -> list[bytes | Bytes]:
    """Return the stored planes of a block, lowest byte first; a plane with one byte per number is uncompressed.

    Args:
        block: A whole number of words of `width` bytes.
        width: 1, 2, 4 or 8.
        parent: As many bytes, to encode the block as a difference from them.
        level: zstd's level for bytes that are not numbers (`width` 1); a higher one saves nothing on planes of numbers.
    """
    words: Words = block.view(_WORDS[width])
    if parent is not None:
        # Unsigned subtraction wraps around, and the addition in `decode` wraps back: nothing is lost.
        words = _zigzag(words - parent.view(_WORDS[width]))
    elif width > 1:
        # The sign, which is noise, becomes the lowest bit. The highest byte of a bfloat16 or float32 is then the exponent, of
        # which weights have few.
        words = _rotate_left(words)
    # Only bytes that are not numbers have repeated sequences for a higher level to find.
    compress = _compressor(level if width == 1 and parent is None else 0).compress
    return [_smaller_form(plane, compress(plane.data)) for plane in _split_planes(words, width)]


def decode(planes: list[bytes], width: int, count: int, parent: Bytes | None = None) -> Bytes:
    """Decode the block of `count` words from its stored planes; FormatError if they are invalid."""
    words = _join([_decompressed(plane, count) for plane in planes], width)
    if parent is not None:
        # The inverse of `_zigzag`; the negative of 1 has all bits set.
        signs = words & 1
        words = words >> 1
        words ^= np.negative(signs, out=signs)
        words += parent.view(_WORDS[width])
    elif width > 1:
        low = words << (8 * width - 1)
        words = words >> 1
        words |= low
    return words.view(np.uint8)


def _rotate_left(words: Words) -> Words:
    rotated = words << 1
    rotated |= words >> (8 * words.itemsize - 1)
    return rotated


def _zigzag(words: Words) -> Words:
    """Map words, as signed numbers, to small ones: 0, -1, 1, -2, 2, … become 0, 1, 2, 3, 4, …"""
    signs = words.view(f"<i{words.itemsize}") >> (8 * words.itemsize - 1)  # all bits set for negative numbers, else none
    doubled = words << 1
    doubled ^= signs.view(words.dtype)
    return doubled


def _split_planes(words: Words, width: int) -> list[Bytes]:
    if width == 1:
        return [words]
    return [(words >> 8 * place).astype(np.uint8) for place in range(width)]


def _join(planes: list[Bytes], width: int) -> Words:
    if width == 1:
        return planes[0]
    words = planes[-1].astype(_WORDS[width])
    for plane in reversed(planes[:-1]):
        words <<= 8
        words |= plane
    return words


def _smaller_form(plane: Bytes, compressed: bytes) -> bytes | Bytes:
    return compressed if len(compressed) < _MAX_COMPRESSED_SHARE * len(plane) else plane


def _decompressed(stored: bytes, count: int) -> Bytes:
    if len(stored) == count:
        return np.frombuffer(stored, np.uint8)
    return np.frombuffer(inflate(stored, count), np.uint8)


def deflate(data: bytes) -> bytes:
    """Compress `data` into one zstd frame that states its content size."""
    frame: bytes = _compressor(DEFAULT_LEVEL).compress(data)
    return frame


def inflate(stored: bytes, count: int) -> bytes:
    """Decompress a zstd frame of `count` bytes; any other frame is a FormatError before memory is allocated for it."""
    zstd = _zstd()
    try:
        # zstd allocates the content size that the frame states, whatever limit is passed: check it first.
        if zstd.frame_content_size(stored) != count:
            raise FormatError("", "a stored plane has the wrong length")
        plain: bytes = _decompressor().decompress(stored)
    except zstd.ZstdError as error:
        raise FormatError("", f"a stored plane cannot be read ({error})") from error
    return plain


class _Contexts(threading.local):
    """zstd's contexts, one set per thread: two threads must not use one at once."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor: zstandard.ZstdDecompressor | None = None


_contexts = _Contexts()


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """Return a compressor with a level; 0 is for planes of numbers.

    Exponents have no repeated sequences, only frequent values, so that only zstd's entropy coding saves space. A match finder
    that finds next to nothing (runs, as of zeros) makes it three times as fast, and the result smaller.
    """
    compressor = _contexts.compressors.get(level)
    if compressor is None:
        zstd = _zstd()
        entropy_only = {"strategy": zstd.STRATEGY_FAST, "min_match": 7, "hash_log": 6, "window_log": 17}
        parameters = zstd.ZstdCompressionParameters.from_level(level or 1, **({} if level else entropy_only))
        compressor = _contexts.compressors[level] = zstd.ZstdCompressor(compression_params=parameters)
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if _contexts.decompressor is None:
        _contexts.decompressor = _zstd().ZstdDecompressor()
    return _contexts.decompressor


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError as error:
        hint = "Run `pip install zstandard`"
        raise MissingExtraError("", "packed blobs need the package zstandard, which is not installed", hint) from error
    return zstandard
