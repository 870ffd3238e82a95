"""What a merge will do to a tensor, measured on a sample of its rows before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .output_files import Made, Ready, Run, UnfitError, explained
from .tensor_io import Opened, Source

F32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Change:
    """What a tensor goes through, measured on some of its rows (65,536 elements and more).

    Attributes:
        relative: The delta's norm over the weight's. This and `kept` are None when the rows measured don't change.
        kept: How much of the delta survives the rounding to what it is stored as (the projection of what changes on the
            delta): near 1, or near 0 when steps of the type swallow it. Of NF4, what changes against the base in NF4.
        doubt: How far off `kept` may be, as what rounding leaves on these rows is partly chance: four standard deviations.
        original: The relative error of the result to the weight that training saw and its delta, when merged into the
            base as it is; for inputs without direction, of the module's output. None when it isn't known what training saw.
        as_trained: The same when the base is first rounded as training saw it.
        quantized: Whether it is stored in blocks.
    """

    relative: float | None
    kept: float | None
    original: float | None = None
    as_trained: float | None = None
    quantized: bool = False
    doubt: float = 0.0


SAMPLE = 1 << 16  # elements a tensor's change is measured on
_SPOTS = 4  # places they are taken from


@dataclass(frozen=True)
class Trained:
    """What training saw of the weights: which tensors it saw rounded, and how."""

    rounded: Callable[[str], bool]
    through: Callable[[F32Array], F32Array]


def measured(made: Made, original: Source, opened: Opened, run: Run, trained: Trained | None) -> Change:
    """The change on rows from a few places: without rounding, and as it comes out. `original` is the base's own weight."""
    sums = _Sums()
    ready = made.ready()
    run.look(ready, opened)
    for start, stop in spots(made):
        before = _read(made.source, start, stop, opened, run)
        exact, after = _outcome(ready, before, start)
        sums.add(before, exact, after, made.packing.through(before) if made.packing else before)
        if trained:
            own = before if original is made.source else _read(original, start, stop, opened, run)
            seen = trained.through(own) if trained.rounded(made.name) else own
            wanted, later = _outcome(ready, seen, start)
            sums.compare(wanted, _outcome(ready, own, start)[1], later)
    return sums.change(quantized=made.kind.quantized or made.packing is not None, trained=trained is not None)


@dataclass
class _Sums:
    """Sums of squares over all rows measured."""

    delta: float = 0.0
    weight: float = 0.0
    projection: float = 0.0
    effect: float = 0.0
    count: int = 0
    wanted: float = 0.0
    original: float = 0.0
    as_trained: float = 0.0

    def add(self, before: F32Array, exact: F32Array, after: F32Array, stored: F32Array) -> None:
        """Rows of the base, merged, merged and as they are stored, and of the base as it would be stored."""
        delta, effect = exact - before, after - stored
        self.delta += float(np.vdot(delta, delta))
        self.weight += float(np.vdot(before, before))
        self.projection += float(np.vdot(effect, delta))
        self.effect += float(np.vdot(effect, effect))
        self.count += delta.size

    def compare(self, wanted: F32Array, original: F32Array, as_trained: F32Array) -> None:
        self.wanted += float(np.vdot(wanted, wanted))
        self.original += float(np.vdot(original - wanted, original - wanted))
        self.as_trained += float(np.vdot(as_trained - wanted, as_trained - wanted))

    def change(self, *, quantized: bool, trained: bool) -> Change:
        errors = (None, None)
        if trained and self.wanted:
            errors = ((self.original / self.wanted) ** 0.5, (self.as_trained / self.wanted) ** 0.5)
        if not self.delta:
            return Change(None, None, *errors, quantized)
        relative = (self.delta / self.weight) ** 0.5 if self.weight else None
        return Change(relative, self.projection / self.delta, *errors, quantized, self._doubt())

    def _doubt(self) -> float:
        chance = max(0.0, self.effect / self.delta - (self.projection / self.delta) ** 2)
        return 4 * math.sqrt(chance / self.count)


def spots(made: Made) -> list[tuple[int, int]]:
    """Ranges of rows that stand for a tensor: all of a small one."""
    rows, columns = made.source.rows, made.source.columns
    if rows * columns <= SAMPLE:
        return [(0, rows)]
    count = min(rows, max(2, SAMPLE // max(1, columns) // _SPOTS // 2 * 2))
    starts = sorted({(rows - count) * (2 * spot + 1) // (2 * _SPOTS) // 2 * 2 for spot in range(_SPOTS)})
    return [(start, start + count) for start in starts]


def _read(source: Source, start: int, stop: int, opened: Opened, run: Run) -> F32Array:
    rows = np.empty((stop - start, source.columns), np.float32)
    source.read(opened, start, stop, rows, run.buffer)
    return rows


def _outcome(ready: Ready, before: F32Array, start: int) -> tuple[F32Array, F32Array]:
    """What the edits make of rows of the base, exactly and as it is stored."""
    made = ready.made
    exact, after = before.copy(), before.copy()
    raw = np.empty((len(before), made.kind.row_size(before.shape[1])), np.uint8)
    scratch = np.empty(before.size + before.shape[1], np.float32)
    try:
        with np.errstate(all="ignore"):
            for apply in ready.applies:
                apply(exact, start, scratch)
            ready.change(after, raw, start, scratch)
            made.kind.decode(raw, after)
            if made.packing:
                after = made.packing.through(after)
    except UnfitError as unfit:
        raise explained(made, before) from unfit
    return exact, after
