"""The files of a whole model among the blobs of a hub, for the reader of bases: configs and headers, never the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from adapterhub.digest import CHUNK, Digest
from adapterhub_converters.errors import FormatError

if TYPE_CHECKING:
    from adapterhub_converters.bases import RangedFile

T = TypeVar("T")
U = TypeVar("U")
_CONFIG = "config.json"


class StoredModel:
    """The files of a model (`bases.Files`).

    Args:
        name: The name of the model, for errors.
        files: Digest and size in bytes by path; those in folders are left out.
        open_file: Opens a file by its path; the caller closes it.
    """

    def __init__(self, name: str, files: Mapping[str, tuple[Digest, int]], open_file: Callable[[str], BinaryIO]) -> None:
        self.local: Path | None = None
        self.notes: list[str] = []
        self._name, self._open_file = name, open_file
        self._files = {path: file for path, file in files.items() if "/" not in path}

    def main_file(self) -> str | None:
        """Return what a reader of bases is to read: an empty text for all of it, a GGUF file, or None if it is no base."""
        weights = [path for path in self._files if path.endswith(".safetensors")]
        ggufs = [path for path in self._files if path.endswith(".gguf")]
        if _CONFIG in self._files and weights:
            return ""
        return ggufs[0] if len(ggufs) == 1 else None

    def label(self, name: str) -> str:
        """Return the name of a file in errors, or of the model if `name` is empty."""
        return f"{self._name}/{name}".rstrip("/")

    def read_whole(self, name: str, limit: int) -> bytes | None:
        """Return the bytes of a small file; None if it is missing. FormatError for more than `limit` bytes."""
        if name not in self._files:
            return None
        size = self._files[name][1]
        if size > limit:
            raise FormatError(self.label(name), f"{size} bytes, more than the {limit} of a small file")
        return self._read_at(name, 0, size)

    def open_ranged(self, name: str) -> RangedFile | None:
        """Return a reader of byte ranges; None if the file is missing."""
        if name not in self._files:
            return None
        from adapterhub_converters.bases import RangedFile  # numpy, which the start of a hub does without

        return RangedFile(self._files[name][1], partial(self._read_at, name), self.label(name))

    def sha256(self, name: str) -> str | None:
        """Return the digest of a file; None if it is missing, or known by another one."""
        return (self._files[name][0] or None) if name in self._files else None

    def map_items(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Apply a function to all items."""
        return [function(item) for item in items]

    def _read_at(self, name: str, offset: int, count: int) -> bytes:
        with self._open_file(name) as file:
            if file.seekable():
                file.seek(offset)
            else:  # compressed: read from its beginning
                while offset and (piece := file.read(min(CHUNK, offset))):
                    offset -= len(piece)
            data = bytearray()
            while count > len(data) and (piece := file.read(count - len(data))):
                data += piece
        return bytes(data)
