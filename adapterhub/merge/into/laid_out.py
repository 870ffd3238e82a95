"""A tensor of a GGUF model read out of those of a Hugging Face folder, some rows at a time, with the adapters in it.

What a row is made of is said by `to_gguf.arrangement`. Only a matrix that has to be turned is held whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.to_gguf.arrangement import Part

from .parts import Made, Ready, UnfitError, explained
from .running import Run
from .sources import Buffer, Opened, Source

F32Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Merged:
    """A tensor of the folder with its edits, in the type that they leave it in."""

    made: Made

    @property
    def rows(self) -> int:
        """As many as the tensor has."""
        return self.made.source.rows

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.made.source.columns

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """The rows as a merged folder has them; RefusedError for a number that its type cannot hold."""
        # Two rows at a time, as a merge into a folder takes them (`product`).
        first, last = start // 2 * 2, min(self.rows, stop + stop % 2)
        np.copyto(out, self._changed(opened, first, last, buffer)[start - first : stop - first])

    def _changed(self, opened: Opened, start: int, stop: int, buffer: Buffer) -> F32Array:
        made, count = self.made, (stop - start) * self.columns
        ready: Ready = opened.held(f"ready {made.name}", lambda: self._ready(opened))
        wide = buffer("merged", 4 * count).view(np.float32).reshape(stop - start, self.columns)
        width = made.kind.row_size(self.columns)
        raw = buffer("merged raw", (stop - start) * width).reshape(stop - start, width)
        made.source.read(opened, start, stop, wide, buffer)
        try:
            ready.change(wide, raw, start, buffer("merged scratch", 4 * (count + self.columns)).view(np.float32))
        except UnfitError as unfit:
            made.source.read(opened, start, stop, wide, buffer)
            raise explained(made, wide) from unfit
        made.kind.decode(raw, wide)
        return wide

    def _ready(self, opened: Opened) -> Ready:
        """The edits, all rows having been looked at by those that need it."""
        ready = self.made.ready()
        Run(None, 0).look(ready, opened)
        return ready


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a tensor, and where its numbers are."""

    part: Part
    source: Source

    @property
    def rows(self) -> int:
        """Rows of the result."""
        if self.part.picks is not None:
            return len(self.part.picks)
        return self.source.columns if self.part.transposed else self.part.height

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Rows `start` to `stop` of the part."""
        if self.part.transposed:
            self._turned(opened, start, stop, out, buffer)
        elif self.part.picks is not None:
            self._picked(opened, self.part.picks[start:stop], out, buffer)
        else:
            self._straight(opened, self.part.first + start, self.part.first + stop, out, buffer)

    def _straight(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        if self.part.columns is None:
            self.source.read(opened, start, stop, out, buffer)
            return
        rows = np.empty((stop - start, self.source.columns), np.float32)
        self.source.read(opened, start, stop, rows, buffer)
        np.copyto(out, rows[:, self.part.columns])

    def _picked(self, opened: Opened, wanted: NDArray[np.int64], out: F32Array, buffer: Buffer) -> None:
        """Rows that follow one another in the file are read together, whatever order they are wanted in."""
        order = np.argsort(wanted, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(wanted[order]) != 1) + 1):
            first, count = int(wanted[run[0]]), len(run)
            rows = buffer("picked", 4 * count * self.source.columns).view(np.float32).reshape(count, self.source.columns)
            self.source.read(opened, self.part.first + first, self.part.first + first + count, rows, buffer)
            out[run] = rows

    def _turned(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        def load() -> F32Array:
            slab = np.empty((self.part.height, self.source.columns), np.float32)
            self.source.read(opened, self.part.first, self.part.first + self.part.height, slab, buffer)
            return slab

        slab = opened.held(f"turned {self.part.source} {self.part.first}", load)
        picks = self.part.picks
        np.copyto(out, (slab[:, start:stop] if picks is None else slab[:, picks[start:stop]]).T)


@dataclass(frozen=True, eq=False)
class LaidOut:
    """Pieces one below the other, with `shift` added to every number."""

    pieces: Sequence[Piece]
    rows: int
    columns: int
    shift: float = 0.0

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Rows `start` to `stop` of the whole."""
        at = 0
        for piece in self.pieces:
            begin, end = max(start, at), min(stop, at + piece.rows)
            if begin < end:
                piece.read(opened, begin - at, end - at, out[begin - start : end - start], buffer)
            at += piece.rows
        if self.shift:
            out += np.float32(self.shift)
