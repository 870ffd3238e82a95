"""What an output file is made of: bytes copied from others, text, and tensors that are changed on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.errors import RefusedError

from .edits import Apply, Edit, TwoPasses, Within, look
from .sources import Source
from .stored import Floats, Kind

F32Array = NDArray[np.float32]


class Packing(Protocol):
    """How a tensor is stored that is no rows of bytes."""

    @property
    def size(self) -> int:
        """Bytes of it."""

    def step(self, columns: int) -> int:
        """The number of rows that tiles must have a multiple of; even."""

    def through(self, rows: F32Array) -> F32Array:
        """Rows as they come back."""

    def writer(self, sink: int) -> Callable[[F32Array, int], int]:
        """What writes tiles, given the number of their first element, and says how many bytes."""


@dataclass(frozen=True)
class Copy:
    """`size` bytes of a file from `offset` on, put to byte `at`; `counted` of them are tensors."""

    path: Path
    offset: int
    size: int
    at: int
    counted: int


@dataclass(frozen=True)
class Text:
    """Bytes that are no tensor."""

    data: bytes
    at: int


@dataclass(frozen=True)
class Made:
    """A tensor that is changed on the way, put to byte `at` as `kind`.

    `stepwise` rounds after every edit, as peft does when it merges one adapter after the other. With a `packing` the numbers of
    `kind` are stored so, where that says.
    """

    name: str
    source: Source
    kind: Kind
    at: int
    edits: tuple[Edit, ...]
    stepwise: bool = False
    packing: Packing | None = None

    @property
    def size(self) -> int:
        """Bytes in the output."""
        if self.packing:
            return self.packing.size
        return self.source.rows * self.kind.row_size(self.source.columns)

    def ready(self) -> Ready:
        """The edits, their factors laid out."""
        dtype = self.kind.dtype if self.stepwise and isinstance(self.kind, Floats) else dtypes.F32
        spans = [(edit.first, edit.first + edit.count) if isinstance(edit, Within) else None for edit in self.edits]
        return Ready(self, [edit.ready(dtype) for edit in self.edits], spans)


Part = Copy | Text | Made


@dataclass(frozen=True)
class OutFile:
    """One file to write, its parts in the order of their places."""

    name: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Ready:
    """A tensor that is about to be changed."""

    made: Made
    applies: Sequence[Apply]
    spans: Sequence[tuple[int, int] | None]

    def change(self, wide: F32Array, raw: NDArray[np.uint8], start: int, scratch: F32Array) -> None:
        """All edits on rows `wide`, which then are `raw`; UnfitError when a number isn't one any more."""
        some = self._of(start, start + len(wide))
        for number, apply in enumerate(some):
            if self.made.stepwise and number:
                self.made.kind.decode(raw, wide)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                apply(wide, start, scratch)
            if self.made.stepwise or number == len(some) - 1:
                self._encode(wide, raw)
        if not some:
            self._encode(wide, raw)

    @property
    def twice(self) -> bool:
        """Whether all rows have to be looked at before one is changed."""
        return any(isinstance(apply, TwoPasses) for apply in self.applies)

    def look(self, wide: F32Array, raw: NDArray[np.uint8], start: int, scratch: F32Array) -> None:
        """Look at rows, which are spoilt, as the next of all."""

        def between(tile: F32Array) -> None:
            if self.made.stepwise:
                self._encode(tile, raw)
                self.made.kind.decode(raw, tile)

        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            look(self._of(start, start + len(wide)), wide, start, scratch, between)

    def _of(self, start: int, stop: int) -> list[Apply]:
        """The edits of any of these rows: one of many experts has one of many."""
        return [
            apply
            for apply, span in zip(self.applies, self.spans, strict=True)
            if span is None or (span[0] < stop and start < span[1])
        ]

    def _encode(self, wide: F32Array, raw: NDArray[np.uint8]) -> None:
        if not self.made.kind.fits(wide):
            raise UnfitError(self.made.name)
        self.made.kind.encode(wide, raw)


class UnfitError(Exception):
    """A tile of a tensor has numbers that its type cannot hold; the base is looked at to say why."""


def explained(made: Made, before: F32Array) -> RefusedError:
    """Why, given the rows of the base."""
    if not np.isfinite(before).all():
        return RefusedError(made.name, "the base has NaN or Inf in a tensor that is changed")
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    return RefusedError(
        made.name,
        f"the sum is over {made.kind.largest:g}, the largest {names.get(made.kind.name, made.kind.name)} number",
        "" if made.kind.name in ("BF16", "F32") else "Write bfloat16 instead (--dtype bf16)",
    )
