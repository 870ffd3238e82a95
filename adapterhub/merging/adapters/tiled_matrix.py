"""Dense matrices as tiles of rows: order statistics, and the closest product of thin factors.

Methods that select single elements (TIES, DARE …) need the dense delta, but never all of it at once. A tile is a pure
function of its rows, so it is made again for each pass, or cached if the matrix is small (`_KEEP`), with the same bits. All
numbers are float32, except for sums and bases.

Two threads make tiles, and products are computed in pieces that OpenBLAS gives to one thread: its own threads spin while
they wait for each other, which on a busy machine took eight times as long. Sums over tiles are in the order of the tiles.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import field
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from adapterhub.analysis.low_rank import F64Array, Factors, Spectrum, basis, times
from adapterhub_converters.lazy_dataclass import dataclass

F32Array = NDArray[np.float32]
Item = TypeVar("Item")
Result = TypeVar("Result")

_TILE = 1 << 18  # elements
_KEEP = 1 << 28  # bytes of a matrix up to which its tiles are cached
_OVERSAMPLED = 10  # columns of a sketch beyond the rank (Halko, Martinsson & Tropp, 2011, section 4.2)
_ONE_THREAD = 1 << 18  # multiplications in a product that OpenBLAS does not split (interface/gemm.c)
_THREADS = 2
_HIGH, _LOW = 16, 15  # bits of a float without its sign


@dataclass(frozen=True, eq=False)
class TiledMatrix:
    """An `(m, n)` matrix defined by `make(rows)`, which returns its rows in float32."""

    shape: tuple[int, int]
    make: Callable[[slice], F32Array]
    _cached_tiles: dict[int, F32Array] = field(default_factory=dict, repr=False)

    def tiles(self) -> Iterator[tuple[slice, F32Array]]:
        """Yield all rows, some at a time; do not write to the arrays."""
        yield from self.map_tiles(lambda _rows, tile: tile)

    def map_tiles(self, work: Callable[[slice, F32Array], Result]) -> Iterator[tuple[slice, Result]]:
        """Yield the results of `work` for every tile, in the order of the rows."""
        keep = 4 * self.shape[0] * self.shape[1] <= _KEEP

        def work_on_tile(rows: slice) -> tuple[slice, Result]:
            tile = self._cached_tiles.get(rows.start)
            if tile is None:
                tile = self.make(rows)
                if keep:
                    self._cached_tiles[rows.start] = tile
            return rows, work(rows, tile)

        return map_in_threads(work_on_tile, row_tiles(self.shape))

    @cached_property
    def energy(self) -> float:
        """The sum of all squares."""
        return sum(tile_energy for _, tile_energy in self.map_tiles(lambda _rows, tile: sum_of_squares(tile)))

    def forget(self) -> None:
        """Release the cached tiles."""
        self._cached_tiles.clear()


def sum_of_squares(array: F32Array) -> float:
    """Return the sum of the squares of all elements."""
    flat = array.reshape(-1)
    return float(np.sum(np.square(flat), dtype=np.float64))


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the results of `work` for every item, in order, computed a few ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def product(a: F32Array, b: F32Array) -> F32Array:
    """Compute `a @ b` in pieces that OpenBLAS does not split among threads."""
    (m, k), n = a.shape, b.shape[1]
    if m * k * n <= _ONE_THREAD:
        return a @ b
    # A few rows of the first matrix at a time; at least 16, so that calls stay cheap.
    if 16 * k * n <= _ONE_THREAD:
        step = _ONE_THREAD // (k * n)
        return np.concatenate([a[i : i + step] @ b for i in range(0, m, step)])
    # A few columns of the second matrix at a time.
    if 16 * m * k <= _ONE_THREAD:
        step, out = _ONE_THREAD // (m * k), np.empty((m, n), np.float32)
        for i in range(0, n, step):
            np.matmul(a, b[:, i : i + step], out=out[:, i : i + step])
        return out
    # A few terms of the sum at a time, for a small result of a long sum.
    if 16 * m * n <= _ONE_THREAD:
        step, out = _ONE_THREAD // (m * n), np.zeros((m, n), np.float32)
        for i in range(0, k, step):
            out += a[:, i : i + step] @ b[i : i + step]
        return out
    if m > 1:
        return np.concatenate([product(a[: m // 2], b), product(a[m // 2 :], b)])
    return a @ b


def row_tiles(shape: tuple[int, int]) -> Iterator[slice]:
    """Return the row ranges of a matrix's tiles."""
    step = max(1, _TILE // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def dense_rows(terms: Sequence[Factors]) -> Callable[[slice], list[F32Array]]:
    """Return a function that returns given rows of each term, multiplied out in float32."""
    pairs = [(term.left.astype(np.float32), term.right.astype(np.float32)) for term in terms]
    return lambda rows: [product(left[rows], right) for left, right in pairs]


def magnitude_thresholds(matrix: TiledMatrix, counts: Sequence[int]) -> list[float]:
    """Return, for every count, the largest magnitude that at least that many elements reach; infinity for 0.

    Exact, in two passes, by the bits: floats of one sign are ordered like integers. The first pass counts the high bits, the
    second the low bits of the elements that share the high bits of the result.
    """
    # One counter for each value of the high bits: 512 KiB, whatever the size of the matrix.
    high = np.zeros(1 << _HIGH, np.int64)
    for _, counted in matrix.map_tiles(lambda _rows, tile: np.bincount(_bits(tile) >> _LOW, minlength=1 << _HIGH)):
        high += counted
    falling = np.cumsum(high[::-1])
    places = {count: len(high) - 1 - int(np.searchsorted(falling, count)) for count in counts if count > 0}
    low = {place: np.zeros(1 << _LOW, np.int64) for place in places.values()}

    def count_low(_rows: slice, tile: F32Array) -> list[NDArray[np.intp]]:
        bits = _bits(tile)
        tops = bits >> _LOW
        return [np.bincount(bits[tops == place] & ((1 << _LOW) - 1), minlength=1 << _LOW) for place in low]

    for _, counts_by_place in matrix.map_tiles(count_low):
        for place, added in zip(low, counts_by_place, strict=True):
            low[place] += added
    thresholds = []
    for count in counts:
        if count <= 0:
            thresholds.append(float("inf"))
            continue
        place = places[count]
        above = int(falling[len(high) - 1 - place] - high[place])
        low_from_top = int(np.searchsorted(np.cumsum(low[place][::-1]), count - above))
        value = np.uint32((place << _LOW) + len(low[place]) - 1 - low_from_top)
        thresholds.append(float(value.view(np.float32)))
    return thresholds


def _bits(array: F32Array) -> NDArray[np.uint32]:
    """Return the bits of the magnitudes: all but the sign."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)


def sketch(matrix: TiledMatrix, rank: int, random: np.random.Generator) -> Spectrum:
    """Return the leading singular values and vectors, by two rounds of subspace iteration.

    Randomized SVD (Halko, Martinsson & Tropp, 2011, algorithm 4.4), with both products of a round in one pass over the tiles:
    three passes in all. Exact if `rank` and the extra columns reach the smaller side.
    """
    m, n = matrix.shape
    width = min(rank + _OVERSAMPLED, m, n)
    # The sketch spans the whole row space: the decomposition is exact and needs no iteration.
    if width == n:
        q = np.eye(n)
    elif width == m:
        q, _ = basis(np.concatenate([tile.T for _, tile in matrix.tiles()], axis=1).astype(np.float64))
    else:
        q = _row_space(matrix, random.standard_normal((n, width)))
    q32, image = q.astype(np.float32), np.empty((m, q.shape[1]))
    for rows, part in matrix.map_tiles(lambda _rows, tile: product(tile, q32)):
        image[rows] = part
    left, triangle = basis(image)
    u, s, vt = np.linalg.svd(triangle, full_matrices=False)
    return Spectrum(times(left, u), s, times(q, vt.T).T)


def _row_space(matrix: TiledMatrix, q: F64Array) -> F64Array:
    """Return an orthonormal basis of the leading row space, from random columns `q`."""
    for _ in range(2):
        q32, total = q.astype(np.float32), np.zeros(q.shape)
        for _, part in matrix.map_tiles(lambda _rows, tile: product(tile.T, product(tile, q32))):  # noqa: B023 - used at once
            total += part
        q, _ = basis(total)
    return q


def residual(matrix: TiledMatrix, result: Factors) -> float:
    """Return the norm of `matrix - result`, with the factors of `result` in float32."""
    left, right = result.left.astype(np.float32), result.right.astype(np.float32)
    parts = matrix.map_tiles(lambda rows, tile: sum_of_squares(tile - product(left[rows], right)))
    return math.sqrt(sum(part for _, part in parts))
