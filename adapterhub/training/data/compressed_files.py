"""Compressed data files: gzip and zstd, decompressed within limits, because a small file may be a bomb."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from adapterhub_converters.errors import FormatError

# Limits of what a file decompresses to, as a multiple of its bytes and as a size that is always allowed.
_MAX_RATIO, _ALWAYS_ALLOWED = 64, 256 << 20
# Bytes given to a decompressor at once. zstd writes up to 128 KiB for four bytes, so that a piece may become 128 MiB.
_PIECE = 4096
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": partial(zlib.decompressobj, 16 + zlib.MAX_WBITS),  # zlib's number for a gzip header
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def data_suffix(path: Path) -> str:
    """Return the suffix that tells the format of a data file: of `train.jsonl.gz`, `.jsonl`."""
    return Path(path.stem).suffix if path.suffix in _DECOMPRESSORS else path.suffix


def decompress(raw: bytes, path: Path) -> bytes:
    """Return the contents of a file with the bytes `raw`: decompressed if its suffix is `.gz` or `.zst`, else as they are.

    Raises:
        FormatError: They are damaged, or decompress to more than `max_size`.
    """
    if path.suffix not in _DECOMPRESSORS:
        return raw
    pieces, size = list[bytes](), 0
    try:
        for piece in _pieces(raw, _DECOMPRESSORS[path.suffix]):
            size += len(piece)
            if size > max_size(len(raw)):
                raise too_large_error(path, len(raw))
            pieces.append(piece)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise FormatError(str(path), f"not a whole {path.suffix} file ({' '.join(str(error).split())[:200]})") from error
    return b"".join(pieces)


def max_size(size: int) -> int:
    """Return the number of bytes that a file of `size` bytes may decompress to."""
    return max(_ALWAYS_ALLOWED, _MAX_RATIO * size)


def too_large_error(path: Path, size: int) -> FormatError:
    """Return the error for a file of `size` bytes that decompresses to more than `max_size`."""
    return FormatError(str(path), f"its {size:,} bytes unpack to more than {max_size(size):,}")


def _pieces(raw: bytes, new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the contents of the members or frames that follow each other in `raw`; EOFError if the last one is cut off."""
    file, decompressor, compressed = io.BytesIO(raw), new_decompressor(), b""
    while compressed := compressed or file.read(_PIECE):
        if decompressor.eof:
            decompressor = new_decompressor()
        yield decompressor.decompress(compressed)
        compressed = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise EOFError("its end is missing")
