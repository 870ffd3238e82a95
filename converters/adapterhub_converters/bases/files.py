"""Where the files of a base lie: side by side in a folder, or anywhere else that can be read at offsets.

The readers of this package see files only through `Files`, so that a folder on the disk and one behind HTTP are read
by the same code; headers are a few kilobytes of many gigabytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import ReadAt
from adapterhub_converters.errors import FormatError, LocalIOError

_FIRST = 1 << 16  # bytes: the whole header of most shards
_AHEAD_GGUF = 1 << 20  # bytes

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Ranged:
    """A file that is read at offsets: its `size` in bytes, and what errors call it."""

    size: int
    read_at: ReadAt
    where: str


class Files(Protocol):
    """Files beside each other; names are plain, without a slash.

    Attributes:
        local: The folder on this machine's disk; None when there is none.
        notes: What could not be read, one line each; a reader of a base passes them on.
    """

    local: Path | None
    notes: list[str]

    def label(self, name: str) -> str:
        """What errors call a file; the folder, if `name` is empty."""

    def whole(self, name: str, limit: int) -> bytes | None:
        """The bytes of a small file; None without one, FormatError for more than `limit` bytes."""

    def ranged(self, name: str) -> Ranged | None:
        """A large file; None without one."""

    def sha256(self, name: str) -> str | None:
        """The digest of a file's bytes; None when there is no such file or it takes too long to tell."""

    def each(self, do: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """What `do` makes of every item, in order; at once where waiting is what takes the time."""


def read_object(files: Files, name: str) -> dict[str, Any] | None:
    """The JSON object in a file; None without one."""
    raw = files.whole(name, json_file.MAX_CONFIG)
    if raw is None:
        return None
    try:
        return json_file.parse_object(raw.decode(), files.label(name))
    except UnicodeDecodeError as error:
        raise FormatError(files.label(name), "not UTF-8 text") from error


class LocalFiles:
    """The files of a folder on the disk."""

    def __init__(self, folder: Path) -> None:
        self.local: Path | None = folder
        self.notes: list[str] = []
        self._folder = folder
        self._ranged: dict[str, Ranged | None] = {}

    def label(self, name: str) -> str:
        """The path."""
        return str(self._folder / name)

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        try:
            with open(self._folder / name, "rb") as file:
                yield file
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LocalIOError(self.label(name), error.strerror or str(error)) from error

    def whole(self, name: str, limit: int) -> bytes | None:
        """Read at once."""
        try:
            with self._open(name) as file:
                raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
        except FileNotFoundError:
            return None
        if len(raw) > limit:
            raise FormatError(self.label(name), f"more than {limit} bytes: not a config file")
        return raw

    def ranged(self, name: str) -> Ranged | None:
        """Opened once for its size and its beginning, and again for what lies beyond; never kept open, as there may be many."""
        if name not in self._ranged:
            self._ranged[name] = self._begin(name)
        return self._ranged[name]

    def _begin(self, name: str) -> Ranged | None:
        ahead = _AHEAD_GGUF if name.endswith(".gguf") else 0  # its header is read piece by piece
        at, block = 0, b""

        def read_at(offset: int, n: int) -> bytes:
            nonlocal at, block
            if not at <= offset <= offset + n <= at + len(block):
                with self._open(name) as file:
                    file.seek(offset)
                    at, block = offset, file.read(max(n, ahead))
            return block[offset - at : offset - at + n]

        try:
            with self._open(name) as file:
                block = file.read(max(_FIRST, ahead))
                return Ranged(os.fstat(file.fileno()).st_size, read_at, self.label(name))
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str | None:
        """Computed."""
        try:
            with self._open(name) as file:
                state = hashlib.sha256()
                while chunk := file.read(1 << 20):
                    state.update(chunk)
                return "sha256:" + state.hexdigest()
        except (FileNotFoundError, LocalIOError):
            return None

    def each(self, do: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """One after the other."""
        return [do(item) for item in items]
