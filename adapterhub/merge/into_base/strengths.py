"""How much of each adapter is in a tensor of a merged model: least squares over its tiles, and the verdict that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes

from .edits import Apply, TwoPasses, look
from .open_model import is_float

F32Array = NDArray[np.float32]

_FULL = 0.05  # how far from 1 a strength may be that rounding noise alone does not explain
_UNEXPLAINED = 0.1  # of the delta's norm: products in 16 bits, as on a GPU, leave a few hundredths
GRID = {"Q8_0": 0.02, "Q6_K": 0.05, "Q5_K": 0.09, "Q5_0": 0.1, "Q5_1": 0.1, "Q4_K": 0.15, "Q4_0": 0.18, "Q4_1": 0.15}
GRID |= {"nf4": 0.18, "fp4": 0.25}
"""How far a weight may be off on a grid, as a share of its norm: twice what it is on normal numbers, about."""
COARSE = 0.45
"""The same of grids of two or three bits."""


class Sums:
    """Inner products of the deltas and of what came out, added up tile by tile."""

    def __init__(self, applies: Sequence[Apply], stored: np.dtype, dtype: str) -> None:
        count = len(applies)
        self._applies, self._stored, self._dtype = applies, stored, dtype
        self.gram, self.along = np.zeros((count, count)), np.zeros(count)
        self.change = self.delta = self.off = self.noise = self.weight = 0.0
        self.exact, self.size = True, 0

    @property
    def twice(self) -> bool:
        """Whether all tiles have to be looked at first."""
        return any(isinstance(apply, TwoPasses) for apply in self._applies)

    def look(self, base: F32Array, start: int) -> None:
        """The next tile of all, which is spoilt."""

        def between(tile: F32Array) -> None:
            np.copyto(tile, tile.astype(self._stored), casting="unsafe")

        with np.errstate(all="ignore"):
            look(self._applies, base, start, np.empty(base.size + base.shape[1], np.float32), between)

    def replay(self, base: F32Array, start: int) -> F32Array:
        """A tile merged as our own merge does it, rounded after each adapter."""
        replay, scratch = base.copy(), np.empty(base.size + base.shape[1], np.float32)
        with np.errstate(all="ignore"):
            for apply in self._applies:
                apply(replay, start, scratch)
                replay = replay.astype(self._stored).astype(np.float32)
        return replay

    def add(self, base: F32Array, made: F32Array, start: int) -> None:
        """One tile more."""
        scratch = np.empty(base.size + base.shape[1], np.float32)
        total, replay, deltas = base.copy(), self.replay(base, start), []
        with np.errstate(all="ignore"):
            for apply in self._applies:
                alone = base.copy()
                apply(alone, start, scratch)
                deltas.append((alone - base).astype(np.float64))
                apply(total, start, scratch)
            change = made.astype(np.float64) - base
            for i, one in enumerate(deltas):
                self.along[i] += np.vdot(one, change)
                for j, two in enumerate(deltas[: i + 1]):
                    self.gram[i, j] += np.vdot(one, two)
                    self.gram[j, i] = self.gram[i, j]
            self.change += square(change)
            self.delta += square(np.sum(deltas, axis=0))
            self.weight += square(base)
            self.size += base.size
            self.off += square(made - total)
            self.noise += square(rounded(total, self._dtype) - total)
        once = rounded(total, self._dtype)
        self.exact = self.exact and (
            np.array_equal(rounded(replay, self._dtype), made, equal_nan=True) or np.array_equal(once, made, equal_nan=True)
        )

    def strengths(self) -> list[float]:
        """Least squares; of deltas that are one another's multiples, the smallest solution."""
        found = np.linalg.lstsq(self.gram, self.along, rcond=1e-10)[0]
        return [float(value) for value in found]

    def rest(self, strength: Sequence[float]) -> float:
        """The square of what the deltas at these strengths leave."""
        s = np.asarray(strength)
        return float(self.change - 2 * s @ self.along + s @ self.gram @ s)

    @property
    def noise_limit(self) -> float:
        """The square of the distance that rounding after each merge may leave."""
        return 4 * (len(self.along) + 1) * self.noise + 1e-12 * self.weight


def judged(sums: Sums, strength: Sequence[float], rest: float, dtype: str) -> str:
    """The verdict. The estimate of a strength is off by about `rest / sqrt(n)`, as far as what is left is noise."""
    if sums.exact:
        return "exact"
    if is_float(dtype) and sums.off <= sums.noise_limit:
        return "rounded"
    doubt = 4 * rest / math.sqrt(max(1, sums.size))
    worst = max(strength, key=lambda value: abs(value - 1))
    if not math.isfinite(worst):
        return "other"
    if abs(worst - 1) > _FULL + doubt:
        return "absent" if abs(worst) < 0.1 + doubt else "weaker" if worst < 1 else "stronger"
    if is_float(dtype):
        return "near" if rest <= _UNEXPLAINED else "other"
    grid = math.sqrt(sums.off / sums.weight) if sums.weight else math.inf
    return "quantized" if grid <= GRID.get(dtype, COARSE) else "other"


def rounded(values: F32Array, dtype: str) -> F32Array:
    """Through the dtype of the merged model and back, where it has floats."""
    if not is_float(dtype) or dtype in ("F32", "F64"):
        return values
    with np.errstate(over="ignore"):
        return values.astype(dtypes.NUMPY[dtype]).astype(np.float32)


def square(values: np.ndarray) -> float:
    """The sum of squares."""
    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    return float(np.vdot(flat, flat))
