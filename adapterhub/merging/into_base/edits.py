"""Edits of one tensor of the base, with peft's order of rounding (0.21.2, `tuners/lora/layer.py`).

An edit works on tiles: some rows of the tensor in float32. peft computes a delta in float32 (it keeps 16-bit adapter weights in
float32, `autocast_adapter_dtype`), multiplies it by the scale rounded to float32, adds it in float32 and rounds the sum to the
base's dtype (`Linear.merge`); it rounds the delta of an embedding to the base's dtype before adding it (`Embedding.merge`).
Several adapters are merged one after another, with a rounding after each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.adapter import LowRankConv, LowRankEmbedding, Pair
from adapterhub_converters.lazy_dataclass import dataclass

from .product import product

F32Array = NDArray[np.float32]

Apply = Callable[[F32Array, int, F32Array], None]
"""`(tile, start, scratch)`: changes `tile` `(rows, columns)` in place; its first row is row `start` of the tensor. `scratch` is
flat and has space for one row more than the tile."""


@dataclass(frozen=True)
class TwoPasses:
    """A change that must see all rows, from first to last, before it changes any."""

    look: Apply
    apply: Apply

    def __call__(self, tile: F32Array, start: int, scratch: F32Array) -> None:
        """Apply the change."""
        self.apply(tile, start, scratch)


class Edit(Protocol):
    """One change of one tensor."""

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the change, with its factors prepared for a tensor of `dtype`."""


@dataclass(frozen=True, eq=False, slots=True)
class AddLowRank:
    """Add `scale * lora_B @ lora_A`, or its transpose where the base stores `(in, out)`."""

    delta: Pair
    scale: float
    transposed: bool

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the addition; the delta of an embedding is rounded to `dtype` first."""
        left, right = _factors(self.delta, self.transposed)
        scale = np.float32(self.scale)
        rounds = isinstance(self.delta, LowRankEmbedding)

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            delta = _delta(left, right, tile.shape, start, scratch)
            delta *= scale
            # Only an embedding's delta: peft adds that of a linear layer in float32, and rounds the sum.
            if rounds:
                np.copyto(delta, delta.astype(dtype), casting="safe")
            tile += delta

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class AddDora:
    """Replace W by `m / ||W + delta|| * (W + delta)`, with the norm per output feature (peft, `variants.py`, `merge_unsafe`).

    The norm is summed in float64 here and in float32 in torch, so the last bits may differ from peft's.
    """

    delta: Pair
    scale: float
    transposed: bool
    magnitude: np.ndarray

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the rescaling; a weight stored as `(in, out)` has norms down its columns, which takes two passes."""
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

        # Filled by the first pass over all rows, read by the second.
        squares = np.zeros(magnitude.size if self.transposed else 0, np.float64)

        def look(tile: F32Array, start: int, scratch: F32Array) -> None:
            add(tile, start, scratch)
            tile_squares = np.square(tile, dtype=np.float64)
            # The sums so far join as a row of this tile. Row 0 begins anew: an estimate may have looked at the tensor before.
            tile_squares[:1] += squares if start else 0
            np.sum(tile_squares, axis=0, out=squares)

        def by_column(tile: F32Array, start: int, scratch: F32Array) -> None:
            add(tile, start, scratch)
            norm: F32Array = np.sqrt(squares).astype(np.float32)
            tile *= magnitude / norm

        return TwoPasses(look, by_column) if self.transposed else by_row


@dataclass(frozen=True, eq=False, slots=True)
class ChangeByTuner:
    """Replace W by a tuner's function of it (not LoRA), or of its transpose where the base stores `(in, out)`.

    Every element may depend on all of W, which is kept in memory between the two passes.
    """

    changed: Callable[[F32Array], F32Array]
    transposed: bool = False

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the change, which is computed once all rows were seen."""
        tiles: list[F32Array] = []
        result: list[F32Array] = []

        def look(tile: F32Array, start: int, scratch: F32Array) -> None:
            # The tensor may be looked at again, for an estimate and then for the merge: start over.
            if not start:
                tiles.clear()
                result.clear()
            tiles.append(tile.copy())

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            if not result:
                weight = np.concatenate(tiles)
                tiles.clear()
                result.append(self.changed(weight.T).T if self.transposed else self.changed(weight))
            np.copyto(tile, result[0][start : start + len(tile)])

        return TwoPasses(look, apply)


@dataclass(frozen=True, eq=False, slots=True)
class ChangeBiasByTuner:
    """Replace a bias by a tuner's function of it and of its module's weight.

    Attributes:
        changed: Returns the changed bias of a weight and a bias.
        weight: Returns the base's weight, `(out_features, in_features)`, in float32.
    """

    changed: Callable[[F32Array, F32Array], F32Array]
    weight: Callable[[], F32Array]

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the change, for which the weight is read once."""
        moved: list[F32Array] = []

        def look(tile: F32Array, start: int, scratch: F32Array) -> None:
            if not start:
                moved.clear()
            moved.append(tile.reshape(-1).copy())

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            bias = self.changed(self.weight(), np.concatenate(moved))
            np.copyto(tile, bias[start : start + tile.size].reshape(tile.shape))

        return TwoPasses(look, apply)


@dataclass(frozen=True, eq=False, slots=True)
class AddVector:
    """Add `scale * values` to a bias (peft's `lora_bias`): a column of numbers or, with `row`, one row."""

    values: np.ndarray
    scale: float
    row: bool = False

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the addition."""
        values = self.values.astype(np.float32).reshape((1, -1) if self.row else (-1, 1)) * np.float32(self.scale)

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            tile += values[start : start + len(tile)]

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class AddConvolution:
    """Add the delta of a convolution, which is held as a whole while its tensor is written.

    With a magnitude, the sum W becomes `m / ||W|| * W`, with a norm for each output (peft, `_DoraConvNdLayer`). The norms are
    summed in float64 here, as in `AddDora`.
    """

    delta: LowRankConv
    scale: float

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the addition; with a magnitude it takes two passes, as a tile may have only some of an output's rows."""
        lora_A, lora_B = (
            factor.astype(np.float32).reshape(len(factor), -1) for factor in (self.delta.lora_A, self.delta.lora_B)
        )
        add = Add((lora_B @ lora_A).reshape(self.delta.shape), self.scale).ready(dtype)
        if self.delta.magnitude is None:
            return add
        magnitude = self.delta.magnitude.astype(np.float32).reshape(-1)
        height = math.prod(self.delta.shape[1:-1])  # rows of one output
        squares = np.zeros(magnitude.size, np.float64)

        def look(tile: F32Array, start: int, scratch: F32Array) -> None:
            if not start:
                squares[:] = 0
            add(tile, start, scratch)
            rows = np.sum(np.square(tile, dtype=np.float64), axis=1)
            # Not `+=`, which would count one row where a tile has several of the same output.
            np.add.at(squares, np.arange(start, start + len(tile)) // height, rows)

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            add(tile, start, scratch)
            norms: F32Array = np.sqrt(squares).astype(np.float32)
            factor: F32Array = (magnitude / norms).reshape(-1, 1)
            tile *= factor[np.arange(start, start + len(tile)) // height]

        return TwoPasses(look, apply)


@dataclass(frozen=True, eq=False, slots=True)
class Add:
    """Add `scale * values` of the tensor's own shape."""

    values: np.ndarray
    scale: float

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the addition."""
        values = _as_matrix(self.values).astype(np.float32) * np.float32(self.scale)

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            tile += values[start : start + len(tile)]

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class Replace:
    """Replace the whole tensor by `values`."""

    values: np.ndarray

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the replacement."""
        values = _as_matrix(self.values)

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            np.copyto(tile, values[start : start + len(tile)], casting="unsafe")

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class SetRows:
    """Replace the rows `ids` by `values` `(len(ids), columns)`."""

    ids: tuple[int, ...]
    values: np.ndarray

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the replacement."""

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            for number, row in enumerate(self.ids):
                if start <= row < start + len(tile):
                    tile[row - start] = self.values[number].astype(np.float32)

        return apply


@dataclass(frozen=True, eq=False, slots=True)
class Within:
    """An edit of `count` rows, from row `first` on."""

    edit: Edit
    first: int
    count: int

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the edit, moved to its rows."""
        inner = self.edit.ready(dtype)
        if isinstance(inner, TwoPasses):
            return TwoPasses(self._shift(inner.look), self._shift(inner.apply))
        return self._shift(inner)

    def _shift(self, inner: Apply) -> Apply:
        """Return a change of the rows that a tile and the range share, numbered from `first` on."""

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            begin, end = max(start, self.first), min(start + len(tile), self.first + self.count)
            if begin < end:
                inner(tile[begin - start : end - start], begin - self.first, scratch)

        return apply


def look_before_change(
    applies: Sequence[Apply], tile: F32Array, start: int, scratch: F32Array, round_tile: Callable[[F32Array], None]
) -> None:
    """Show a tile to the change that takes two passes, after applying those before it; overwrites the tile.

    Args:
        round_tile: Called with the tile after each change, to round it.
    """
    for apply in applies:
        if isinstance(apply, TwoPasses):
            apply.look(tile, start, scratch)
            return
        apply(tile, start, scratch)
        round_tile(tile)


def _as_matrix(values: np.ndarray) -> np.ndarray:
    """Return a tensor as the matrix whose rows make up tiles."""
    return values.reshape((-1, values.shape[-1]) if values.ndim > 1 else (-1, 1))


def _factors(delta: Pair, transposed: bool) -> tuple[F32Array, F32Array]:
    """Return `(rows, r)` with an even number of rows, and `(r, columns)`; their product is the delta as the base stores it.

    The factors of each term commute, so the product of the transposes has the bits of the transpose of the product.
    """
    swap = transposed or isinstance(delta, LowRankEmbedding)
    left, right = (delta.lora_A.T, delta.lora_B.T) if swap else (delta.lora_B, delta.lora_A)
    even = np.zeros((len(left) + len(left) % 2, left.shape[1]), np.float32)
    even[: len(left)] = left
    return even, np.ascontiguousarray(right, np.float32)


def _delta(left: F32Array, right: F32Array, shape: tuple[int, ...], start: int, scratch: F32Array) -> F32Array:
    """Return rows of the delta from row `start` on, computed in `scratch`."""
    rows, columns = shape
    even = rows + rows % 2
    out = scratch[: even * columns].reshape(even, columns)
    tile_rows = left[start : start + even]
    if len(tile_rows) < even:  # the last tile of an odd number of rows
        tile_rows = np.concatenate([tile_rows, np.zeros((even - len(tile_rows), left.shape[1]), np.float32)])
    return product(tile_rows, right, out)[:rows]
