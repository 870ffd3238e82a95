"""A file of a stranger, opened once for everything that a scan looks for in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

_PIECE = 4 << 20  # bytes that are read at once


class ScannedFile(NamedTuple):
    """A file: its path in the adapter with forward slashes, its size in bytes, and its bytes from an offset on."""

    path: str
    size: int
    read_at: Callable[[int, int], bytes]

    @property
    def suffix(self) -> str:
        """The suffix of its name, in lower case."""
        return os.path.splitext(self.path)[1].lower()

    def pieces(self, overlap: int) -> Iterator[tuple[int, bytes]]:
        """Yield offsets and bytes of the whole file; each piece begins with the last `overlap` bytes of the one before."""
        at = 0
        while at < self.size and (piece := self.read_at(at, _PIECE)):
            yield at, piece
            if at + len(piece) >= self.size or len(piece) <= overlap:
                return
            # The overlap keeps a signature from being cut in two.
            at += len(piece) - overlap


def wrap_file(file: BinaryIO, path: str, size: int | None = None) -> ScannedFile:
    """Wrap an open file, which the caller still has to close, with its size if that is known."""

    def read_at(offset: int, n: int) -> bytes:
        file.seek(offset)
        parts, remaining = [], n
        while remaining and (part := file.read(remaining)):  # an unbuffered file may return less than was asked for
            parts.append(part)
            remaining -= len(part)
        return b"".join(parts)

    return ScannedFile(path, os.fstat(file.fileno()).st_size if size is None else size, read_at)
