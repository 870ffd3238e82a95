"""Access to the files of a base, in a local folder or anywhere else that can be read at offsets.

The readers of this package use files only through `Files`, so that the same code reads a local folder and one behind HTTP.
Headers are a few kilobytes of many gigabytes.
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
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.containers.safetensors_file import ReadAt
from adapterhub_converters.errors import FormatError, LocalIOError

_FIRST = 1 << 16  # bytes: the whole header of most shards
_AHEAD_GGUF = 1 << 20  # bytes

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Ranged:
    """A file that is read at offsets: its `size` in bytes, and its name in errors (`where`)."""

    size: int
    read_at: ReadAt
    where: str


class Files(Protocol):
    """The files of one folder; names are plain, without a slash.

    Attributes:
        local: The local folder; None for a remote one.
        notes: Things that could not be read, one line each; a reader of a base passes them on.
    """

    local: Path | None
    notes: list[str]

    def label(self, name: str) -> str:
        """The name of a file in errors; of the folder, if `name` is empty."""

    def whole(self, name: str, limit: int) -> bytes | None:
        """Read a small file; None if it is missing, FormatError for more than `limit` bytes."""

    def ranged(self, name: str) -> Ranged | None:
        """A large file, to be read at offsets; None if it is missing."""

    def sha256(self, name: str) -> str | None:
        """The digest of a file's bytes; None if the file is missing or the digest would take too long."""

    def each(self, do: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Apply `do` to every item and return the results in order; concurrently where most of the time is spent waiting."""


def read_object(files: Files, name: str) -> dict[str, Any] | None:
    """Read the JSON object in a file; None if the file is missing."""
    raw = files.whole(name, json_file.MAX_CONFIG)
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
        self._ranged: dict[str, Ranged | None] = {}

    def label(self, name: str) -> str:
        """Return the path."""
        return str(self._folder / name)

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        try:
            with open_regular(self._folder / name, buffering=-1) as file:
                yield file
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LocalIOError(self.label(name), error.strerror or str(error)) from error

    def whole(self, name: str, limit: int) -> bytes | None:
        """Read the whole file."""
        try:
            with self._open(name) as file:
                raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
        except FileNotFoundError:
            return None
        if len(raw) > limit:
            raise FormatError(self.label(name), f"more than {limit} bytes: not a config file")
        return raw

    def ranged(self, name: str) -> Ranged | None:
        """Open a file once for its size and beginning, and again for bytes beyond; never keep it open, as there may be many."""
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
        """Compute the digest."""
        try:
            with self._open(name) as file:
                state = hashlib.sha256()
                while chunk := file.read(1 << 20):
                    state.update(chunk)
                return "sha256:" + state.hexdigest()
        except (FileNotFoundError, LocalIOError):
            return None

    def each(self, do: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Apply `do` to one item after the other."""
        return [do(item) for item in items]
