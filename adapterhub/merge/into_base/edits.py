"""What is done to one tensor of the base, in peft's own order of rounding (0.21.2, `tuners/lora/layer.py`).

An edit gets tiles: some rows of the tensor, widened to float32. peft computes a delta in float32 (it keeps 16-bit
adapter weights in float32, `autocast_adapter_dtype`), multiplies it by the scale rounded to float32, adds it in
float32 and rounds the sum to the base's dtype (`Linear.merge`); an embedding's delta is rounded to the base's dtype
before it is added (`Embedding.merge`). Several adapters are merged one after the other, with a rounding in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.adapter import LowRankEmbedding, Pair

from .arithmetic import narrow, product, widen

F32Array = NDArray[np.float32]

Apply = Callable[[F32Array, int, F32Array], None]
"""Changes `tile` `(rows, columns)` in place, whose first row is row `start` of the tensor; `scratch` is flat, with room
for one more row than the tile has."""


@dataclass(frozen=True)
class TwoPasses:
    """A change for which all rows have to be looked at, from the first to the last, before any is changed."""

    look: Apply
    apply: Apply

    def __call__(self, tile: F32Array, start: int, scratch: F32Array) -> None:
        """The change."""
        self.apply(tile, start, scratch)


class Edit(Protocol):
    """One change of one tensor."""

    def ready(self, dtype: np.dtype) -> Apply:
        """The change, its factors laid out for a tensor of `dtype`."""


@dataclass(frozen=True, eq=False, slots=True)
class AddLowRank:
    """Add `scale * lora_B @ lora_A`, or its transpose where the base stores `(in, out)`."""

    delta: Pair
    scale: float
    transposed: bool

    def ready(self, dtype: np.dtype) -> Apply:
        """The sum, with an embedding's delta rounded first."""
        left, right = _factors(self.delta, self.transposed)
        scale = np.float32(self.scale)
        rounded = np.empty(0, dtype) if isinstance(self.delta, LowRankEmbedding) else None

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            delta = _delta(left, right, tile.shape, start, scratch)
            delta *= scale
            if rounded is not None:
                low = np.empty(delta.shape, rounded.dtype)
                narrow(delta, low)
                widen(low, delta)
            tile += delta

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class AddDora:
    """`m / ||W + delta|| * (W + delta)`, the norm taken per output feature (peft, `variants.py`, `merge_unsafe`).

    The norm is summed in float64 here and in an order of its own in torch, so the last bit may differ from peft's.
    """

    delta: Pair
    scale: float
    transposed: bool
    magnitude: np.ndarray

    def ready(self, dtype: np.dtype) -> Apply:
        """The rescaled sum; a stored `(in, out)` has its norms down the columns, so that its rows are gone over twice."""
        left, right = _factors(self.delta, self.transposed)
        scale, magnitude = np.float32(self.scale), self.magnitude.astype(np.float32).reshape(-1)

        def add(tile: F32Array, start: int, scratch: F32Array) -> None:
            delta = _delta(left, right, tile.shape, start, scratch)
            delta *= scale
            tile += delta

        def by_row(tile: F32Array, start: int, scratch: F32Array) -> None:
            add(tile, start, scratch)
            norm = np.sqrt(np.sum(np.square(tile, dtype=np.float64), axis=1)).astype(np.float32)
            tile *= (magnitude[start : start + len(tile)] / norm)[:, None]

        squares = np.zeros(magnitude.size if self.transposed else 0, np.float64)

        def look(tile: F32Array, start: int, scratch: F32Array) -> None:
            add(tile, start, scratch)
            more = np.square(tile, dtype=np.float64)
            more[:1] += squares if start else 0
            np.sum(more, axis=0, out=squares)

        def by_column(tile: F32Array, start: int, scratch: F32Array) -> None:
            add(tile, start, scratch)
            norm: F32Array = np.sqrt(squares).astype(np.float32)
            tile *= magnitude / norm

        return TwoPasses(look, by_column) if self.transposed else by_row


@dataclass(frozen=True, eq=False, slots=True)
class AddVector:
    """Add `scale * values` to a bias (peft's `lora_bias`), which is seen as a column, or as one `row`."""

    values: np.ndarray
    scale: float
    row: bool = False

    def ready(self, dtype: np.dtype) -> Apply:
        """The sum."""
        values = self.values.astype(np.float32).reshape((1, -1) if self.row else (-1, 1)) * np.float32(self.scale)

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            tile += values[start : start + len(tile)]

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class Replace:
    """Take `values` in place of the tensor."""

    values: np.ndarray

    def ready(self, dtype: np.dtype) -> Apply:
        """The replacement."""
        values = self.values.reshape((-1, self.values.shape[-1]) if self.values.ndim > 1 else (-1, 1))

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            np.copyto(tile, values[start : start + len(tile)], casting="unsafe")

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class SetRows:
    """Take `values` in place of the rows `ids`."""

    ids: tuple[int, ...]
    values: np.ndarray

    def ready(self, dtype: np.dtype) -> Apply:
        """The replacement."""

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            for number, row in enumerate(self.ids):
                if start <= row < start + len(tile):
                    tile[row - start] = self.values[number].astype(np.float32)

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class Within:
    """An edit of `count` rows from row `first` on, and of no other."""

    edit: Edit
    first: int
    count: int

    def ready(self, dtype: np.dtype) -> Apply:
        """The edit, moved."""
        inner = self.edit.ready(dtype)
        return (
            TwoPasses(self._moved(inner.look), self._moved(inner.apply)) if isinstance(inner, TwoPasses) else self._moved(inner)
        )

    def _moved(self, inner: Apply) -> Apply:
        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            begin, end = max(start, self.first), min(start + len(tile), self.first + self.count)
            if begin < end:
                inner(tile[begin - start : end - start], begin - self.first, scratch)

        return apply


def look(applies: Sequence[Apply], tile: F32Array, start: int, scratch: F32Array, between: Callable[[F32Array], None]) -> None:
    """Show a tile, which is spoilt, to the one of the changes that takes two passes, after those before it.

    `between` rounds after each.
    """
    for apply in applies:
        if isinstance(apply, TwoPasses):
            apply.look(tile, start, scratch)
            return
        apply(tile, start, scratch)
        between(tile)


def _factors(delta: Pair, transposed: bool) -> tuple[F32Array, F32Array]:
    """`(rows, r)` with an even number of rows, and `(r, columns)`, whose product is the delta as the base stores it.

    A product's terms commute, so that the chain of the transpose is the transpose of the chain.
    """
    swap = transposed or isinstance(delta, LowRankEmbedding)
    left, right = (delta.lora_A.T, delta.lora_B.T) if swap else (delta.lora_B, delta.lora_A)
    even = np.zeros((len(left) + len(left) % 2, left.shape[1]), np.float32)
    even[: len(left)] = left
    return even, np.ascontiguousarray(right, np.float32)


def _delta(left: F32Array, right: F32Array, shape: tuple[int, ...], start: int, scratch: F32Array) -> F32Array:
    rows, columns = shape
    even = rows + rows % 2
    out = scratch[: even * columns].reshape(even, columns)
    some = left[start : start + even]
    if len(some) < even:  # an odd row on its own at the end
        some = np.concatenate([some, np.zeros((even - len(some), left.shape[1]), np.float32)])
    return product(some, right, out)[:rows]
