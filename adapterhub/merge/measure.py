"""What a merge will do to a tensor, measured on a sample of its rows before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .running import Made, Opened, Ready, Run, UnfitError, explained

F32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Change:
    """What a tensor goes through, measured on some of its rows (65,536 elements and more).

    `relative` is the delta's norm over the weight's. `kept` is how much of the delta survives the rounding to what it is
    stored as (the projection of what changes on the delta): near 1, or near 0 when steps of the type swallow it. Both
    None when the rows measured don't change.
    """

    relative: float | None
    kept: float | None


SAMPLE = 1 << 16  # elements a tensor's change is measured on
_SPOTS = 4  # places they are taken from


def measured(made: Made, opened: Opened, run: Run) -> Change:
    """The change on rows from a few places: without rounding, and as it comes out."""
    ready = made.ready()
    delta_square = weight_square = projection = 0.0
    for start, stop in spots(made):
        before, exact, after = _before_exact_after(ready, start, stop, opened, run)
        delta = exact - before
        delta_square += float(np.vdot(delta, delta))
        weight_square += float(np.vdot(before, before))
        projection += float(np.vdot(after - before, delta))
    if not delta_square:
        return Change(None, None)
    return Change((delta_square / weight_square) ** 0.5 if weight_square else None, projection / delta_square)


def spots(made: Made) -> list[tuple[int, int]]:
    """Ranges of rows that stand for a tensor: all of a small one."""
    rows, columns = made.source.rows, made.source.columns
    if made.whole or rows * columns <= SAMPLE:
        return [(0, rows)]
    count = min(rows, max(2, SAMPLE // max(1, columns) // _SPOTS // 2 * 2))
    starts = sorted({(rows - count) * (2 * spot + 1) // (2 * _SPOTS) // 2 * 2 for spot in range(_SPOTS)})
    return [(start, start + count) for start in starts]


def _before_exact_after(ready: Ready, start: int, stop: int, opened: Opened, run: Run) -> tuple[F32Array, F32Array, F32Array]:
    made = ready.made
    columns, width = made.source.columns, made.kind.row_size(made.source.columns)
    before = np.empty((stop - start, columns), np.float32)
    made.source.read(opened, start, stop, before, run.buffer)
    exact, after, raw = before.copy(), before.copy(), np.empty((stop - start, width), np.uint8)
    scratch = np.empty(before.size + columns, np.float32)
    try:
        with np.errstate(all="ignore"):
            for apply in ready.applies:
                apply(exact, start, scratch)
            ready.change(after, raw, start, scratch)
            made.kind.decode(raw, after)
    except UnfitError as unfit:
        raise explained(made, before) from unfit
    return before, exact, after
