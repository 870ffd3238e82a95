"""Where the numbers of a tensor come from: files that are opened once, read a few rows at a time and widened to float32."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.errors import LocalIOError
from adapterhub_converters.files.safetensors_file import byte_view

from .files import read_at
from .stored import Kind

F32Array = NDArray[np.float32]

_HELD = 3  # tensors whose scales are in memory


class Opened:
    """Files opened for reading, each once; a context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Any] = OrderedDict()
        self._holding = threading.RLock()  # what is loaded may ask for what is held

    def held(self, key: str, load: Callable[[], Any]) -> Any:
        """What `load` gives, kept until a few others have been asked for: tensors are worked on one after the other."""
        with self._holding:
            if key not in self._held:
                self._held[key] = load()
                while len(self._held) > _HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]

    def fd(self, path: Path) -> int:
        """The descriptor of a file."""
        with self._lock:
            if path not in self._fds:
                try:
                    self._fds[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                except OSError as error:
                    raise LocalIOError(str(path), error.strerror or str(error)) from error
                self._stack.callback(os.close, self._fds[path])
            return self._fds[path]

    def read(self, path: Path, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` from byte `offset` of a file on."""
        read_at(self.fd(path), byte_view(buffer), offset)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


Buffer = Callable[[str, int], NDArray[np.uint8]]
"""Scratch memory of so many bytes, of the thread that asks, for the use named."""


class Source(Protocol):
    """Where the numbers of a tensor come from; seen as `rows` of `columns`."""

    @property
    def rows(self) -> int:
        """How many rows it has."""

    @property
    def columns(self) -> int:
        """Numbers in a row."""

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Write rows `start` to `stop` into `out` `(stop - start, columns)`."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    path: Path
    offset: int
    rows: int
    columns: int
    kind: Kind

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read and widened."""
        width = self.kind.row_size(self.columns)
        raw = buffer("raw", (stop - start) * width).reshape(stop - start, width)
        opened.read(self.path, raw, self.offset + start * width)
        self.kind.decode(raw, out)
