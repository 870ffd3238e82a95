"""Access to the files of a base, in a local folder or anywhere else that can be read at offsets.

The readers of this package use files only through `Files`, so that the same code reads a local folder and one behind HTTP. They
need only headers: a few kilobytes of many gigabytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.containers.safetensors_header import ReadAt
from adapterhub_converters.errors import FormatError, LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

_FIRST_READ = 1 << 16  # bytes: the complete header of most shards
_GGUF_READ_AHEAD = 1 << 20  # bytes

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class RangedFile:
    """A file that is read at offsets: its `size` in bytes, and its name in errors (`location`)."""

    size: int
    read_at: ReadAt
    location: str


class Files(Protocol):
    """The files of one folder; names are plain, without a slash.

    Attributes:
        local: The local folder; None for a remote one.
        notes: What could not be read, one line each; a reader of a base passes them on.
    """

    local: Path | None
    notes: list[str]

    def label(self, name: str) -> str:
        """Return the name of a file in errors, or of the folder if `name` is empty."""

    def read_whole(self, name: str, limit: int) -> bytes | None:
        """Read a small file; return None if it is missing, raise a FormatError for more than `limit` bytes."""

    def open_ranged(self, name: str) -> RangedFile | None:
        """Open a large file for reading at offsets; return None if it is missing."""

    def sha256(self, name: str) -> str | None:
        """Return the digest of a file's bytes; None if the file is missing or the digest would take too long."""

    def map_items(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Apply `function` to every item and return the results in order; concurrently if they mostly wait."""


def read_object(files: Files, name: str) -> dict[str, Any] | None:
    """Read the JSON object in a file; return None if the file is missing."""
    raw = files.read_whole(name, json_file.MAX_CONFIG)
    if raw is None:
        return None
    try:
        return json_file.parse_object(raw.decode(), files.label(name))
    except UnicodeDecodeError as error:
        raise FormatError(files.label(name), "not UTF-8 text") from error


class LocalFiles:
    """The files of a local folder."""

    def __init__(self, folder: Path) -> None:
        self.local: Path | None = folder
        self.notes: list[str] = []
        self._folder = folder
        self._ranged_files: dict[str, RangedFile | None] = {}

    def label(self, name: str) -> str:
        """Return the path."""
        return str(self._folder / name)

    @contextmanager
    def open_file(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for the duration of the block; raise FileNotFoundError if it is missing."""
        try:
            with open_regular(self._folder / name, buffering=-1) as file:
                yield file
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LocalIOError(self.label(name), error.strerror or str(error)) from error

    def read_whole(self, name: str, limit: int) -> bytes | None:
        """Read the complete file."""
        try:
            with self.open_file(name) as file:
                raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
        except FileNotFoundError:
            return None
        # One byte beyond the limit is requested, which tells whether there is more.
        if len(raw) > limit:
            raise FormatError(self.label(name), f"more than {limit} bytes: not a config file")
        return raw

    def open_ranged(self, name: str) -> RangedFile | None:
        """Open a file once for its size and beginning, and again for bytes beyond; keep none open, since there may be many."""
        if name not in self._ranged_files:
            self._ranged_files[name] = self._open_ranged_file(name)
        return self._ranged_files[name]

    def _open_ranged_file(self, name: str) -> RangedFile | None:
        """Read the size and the beginning of a file."""
        read_ahead = _GGUF_READ_AHEAD if name.endswith(".gguf") else 0  # its header is read piece by piece
        block_start, block = 0, b""

        def read_at(offset: int, count: int) -> bytes:
            nonlocal block_start, block
            if not block_start <= offset <= offset + count <= block_start + len(block):
                # Reopened for each read: a model may have hundreds of shards, more than a process may hold open.
                with self.open_file(name) as file:
                    file.seek(offset)
                    block_start, block = offset, file.read(max(count, read_ahead))
            return block[offset - block_start : offset - block_start + count]

        try:
            with self.open_file(name) as file:
                block = file.read(max(_FIRST_READ, read_ahead))
                return RangedFile(os.fstat(file.fileno()).st_size, read_at, self.label(name))
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str | None:
        """Compute the digest."""
        try:
            with self.open_file(name) as file:
                state = hashlib.sha256()
                while chunk := file.read(1 << 20):
                    state.update(chunk)
                return "sha256:" + state.hexdigest()
        except (FileNotFoundError, LocalIOError):
            return None

    def map_items(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Apply `function` to one item after the other."""
        return [function(item) for item in items]
