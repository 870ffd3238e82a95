"""Matrices that are no product of thin factors, row tile by row tile: order statistics and the closest thin product.

What picks single elements (TIES, DARE …) needs the dense delta, but never the whole of it at once. A tile is a pure
function of its rows, so it is made again for each pass, or kept where all of them are small (`_KEEP`): the same bits
either way. All in float32 but for sums and bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adapterhub.factors import Factors, Spectrum, basis

F32Array = NDArray[np.float32]

_TILE = 1 << 18  # elements
_KEEP = 1 << 28  # bytes of a whole matrix that is kept instead of made for each pass
_OVERSAMPLED = 10  # columns of a sketch beyond the rank (Halko, Martinsson & Tropp, 2011, section 4.2)
_HIGH, _LOW = 16, 15  # bits of a float without its sign


@dataclass(frozen=True, eq=False)
class Tiled:
    """An `(m, n)` matrix given by `make(rows)`, its rows as float32."""

    shape: tuple[int, int]
    make: Callable[[slice], F32Array]
    _kept: dict[int, F32Array] = field(default_factory=dict, repr=False)

    def tiles(self) -> Iterator[tuple[slice, F32Array]]:
        """All rows, some at a time; the arrays are not to be written to."""
        keep = 4 * self.shape[0] * self.shape[1] <= _KEEP
        for rows in row_tiles(self.shape):
            tile = self._kept.get(rows.start)
            if tile is None:
                tile = self.make(rows)
                if keep:
                    self._kept[rows.start] = tile
            yield rows, tile

    @cached_property
    def energy(self) -> float:
        """The sum of all squares."""
        return sum(float(np.sum(np.square(tile), dtype=np.float64)) for _, tile in self.tiles())

    def forget(self) -> None:
        """Give back the memory of the tiles that were kept."""
        self._kept.clear()


def row_tiles(shape: tuple[int, int]) -> Iterator[slice]:
    """The rows of a matrix, so many at a time as its width says."""
    step = max(1, _TILE // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def dense_rows(terms: Sequence[Factors]) -> Callable[[slice], list[F32Array]]:
    """Each term's rows, multiplied out in float32."""
    pairs = [(term.left.astype(np.float32), term.right.astype(np.float32)) for term in terms]
    return lambda rows: [left[rows] @ right for left, right in pairs]


def largest(arrays: Callable[[], Iterable[F32Array]], counts: Sequence[int]) -> list[float]:
    """For every count, the magnitude that so many elements reach; infinity for a count of 0. Exact, in two passes.

    By the bits: floats of one sign are ordered as whole numbers are. The high bits are counted first, and then the
    low ones of those that share the high bits of the one that is sought.
    """
    high = np.zeros(1 << _HIGH, np.int64)
    for array in arrays():
        high += np.bincount(_bits(array) >> _LOW, minlength=len(high))
    falling = np.cumsum(high[::-1])
    places = {count: len(high) - 1 - int(np.searchsorted(falling, count)) for count in counts if count > 0}
    low = {place: np.zeros(1 << _LOW, np.int64) for place in places.values()}
    for array in arrays():
        bits = _bits(array)
        tops = bits >> _LOW
        for place, histogram in low.items():
            np.add(histogram, np.bincount(bits[tops == place] & ((1 << _LOW) - 1), minlength=len(histogram)), out=histogram)
    found = []
    for count in counts:
        if count <= 0:
            found.append(float("inf"))
            continue
        place = places[count]
        above = int(falling[len(high) - 1 - place] - high[place])
        rest = int(np.searchsorted(np.cumsum(low[place][::-1]), count - above))
        value = np.uint32((place << _LOW) + len(low[place]) - 1 - rest)
        found.append(float(value.view(np.float32)))
    return found


def _bits(array: F32Array) -> NDArray[np.uint32]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)


def sketched(matrix: Tiled, rank: int, random: np.random.Generator) -> Spectrum:
    """The first singular values and vectors, as near to the true ones as two rounds of subspace iteration bring them.

    Randomised SVD (Halko, Martinsson & Tropp, 2011, algorithm 4.4), with both products of a round in one pass over the
    tiles: three passes in all. Exact where `rank` and the columns beyond it reach the smaller side.
    """
    m, n = matrix.shape
    width = min(rank + _OVERSAMPLED, m, n)
    q = random.standard_normal((n, width))
    for _ in range(2):
        product = np.zeros((n, q.shape[1]))
        narrow = q.astype(np.float32)
        for _, tile in matrix.tiles():
            product += tile.T @ (tile @ narrow)
        q, _ = basis(product)
    image = np.empty((m, q.shape[1]))
    narrow = q.astype(np.float32)
    for rows, tile in matrix.tiles():
        image[rows] = tile @ narrow
    left, triangle = basis(image)
    u, s, vt = np.linalg.svd(triangle, full_matrices=False)
    return Spectrum(left @ u, s, vt @ q.T)


def residual(matrix: Tiled, result: Factors) -> float:
    """The norm of `matrix - result`, as float32 factors have it."""
    left, right = result.left.astype(np.float32), result.right.astype(np.float32)
    total = 0.0
    for rows, tile in matrix.tiles():
        difference = tile - left[rows] @ right
        total += float(np.sum(np.square(difference), dtype=np.float64))
    return float(np.sqrt(total))
