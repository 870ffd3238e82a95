"""`B @ A` in float32 with every bit defined, independent of the CPU and of the BLAS that numpy was built with.

A merge that is bit-identical to peft's needs the product that torch computes, and a float32 sum depends on its order. torch's
product on x86 (oneMKL 2024.2, in the wheels of torch 2.13) is one chain of fused multiply-adds per element, in the order of the
rank, from zero:

    acc = fma(B[i, 0], A[0, j], 0); acc = fma(B[i, 1], A[1, j], acc); ...

in panels of at most `PANEL` ranks, whose sums are added in turn. Measured on an AMD EPYC and an Intel Xeon (Sapphire
Rapids), both with AVX-512, with one and two threads, shapes up to 5632 x 2048: equal in every bit as soon as the result has
at least 4 rows and 12 columns, except on the EPYC for 7 or 9 rows. Below that oneMKL uses other kernels.

The length of a panel depends on the CPU: oneMKL sums at most 192 ranks at once on the EPYC (r = 193 to 384: two halves),
and 384 on the Xeon (r = 385 to 768: two halves). The order defined here has 192, on every CPU, so that a merge has the same
bits wherever it runs. Up to rank 192 these are peft's bits on both CPUs. Above, they are peft's on the EPYC; on the Xeon
last bits differ, and the sum here is the more accurate one because its chains are shorter (r = 200: 0.7 of the error of
peft's).

OpenBLAS, which numpy uses, keeps the same chain with its AVX-512 kernels, but not with its Haswell and Zen kernels
for r >= 8 (1.5 to 5 % of the elements differ in the last bit, around the edges of its blocks). A product of *two*
rows at a time goes through a simpler kernel that keeps it; older ones (Sandybridge, Nehalem) do not even then. So small
matrices are multiplied two rows at a time, checked once per width and rank against the chain spelled out in float64, and
where the check fails the chain spelled out is what runs. Large ones are multiplied twelve rows at a time, in half the time:
which columns that sums in another order is found by the same check, and those are made anew, two rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes

F32Array = NDArray[np.float32]

PANEL = 192  # ranks summed before the next sum is started
_SINGLE_THREAD = 4 * 65536  # multiplications in a product that OpenBLAS does not split over threads (interface/gemm.c)
_PAIR, _DOZEN = 2, 12  # rows at a time
_LARGE = 1 << 18  # elements of a product that twelve rows at a time are worth their check for
_KERNEL = 320  # columns in a block of OpenBLAS's Haswell and Zen kernels, whose first and last eight are out of order
_BLOCK = 16_384  # elements of the spelled-out chain at a time: its float64 temporaries then fit in the cache


def product(left: F32Array, right: F32Array, out: F32Array) -> F32Array:
    """`left @ right` in the order above.

    Args:
        left: `(rows, r)`, C-contiguous; rows even (an odd last row would go through another kernel).
        right: `(r, columns)`, C-contiguous.
        out: `(rows, columns)`, C-contiguous; overwritten and returned.
    """
    for number, (start, stop) in enumerate(panels(left.shape[1])):
        part = out if number == 0 else np.empty_like(out)
        _panel(np.ascontiguousarray(left[:, start:stop]), right[start:stop], part)
        if number:
            out += part
    return out


def panels(r: int) -> Iterator[tuple[int, int]]:
    """Where the ranks are split: one panel up to 192, halves up to 384 (an odd one left over), else panels of 192."""
    step = r // 2 if PANEL < r <= 2 * PANEL else PANEL
    yield from ((start, min(start + step, r)) for start in range(0, r, step))


def _panel(left: F32Array, right: F32Array, out: F32Array) -> None:
    r, columns = right.shape
    if r == 1:
        np.multiply(left, right, out=out)  # not started from zero: a product of -0 stays -0, as in oneMKL
        return
    tall = len(left) // _DOZEN * _DOZEN if out.size >= _LARGE else 0
    if tall:
        _dozens(left[:tall], right, out[:tall])
    for piece in _pieces(columns, _SINGLE_THREAD // (_PAIR * r)):
        _in_order(left[tall:], right[:, piece], out[tall:, piece])


def _pieces(columns: int, width: int) -> Iterator[slice]:
    width = max(16, width)
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def _dozens(left: F32Array, right: F32Array, out: F32Array) -> None:
    r, columns = right.shape
    width = _SINGLE_THREAD // (_DOZEN * r)
    for piece in _pieces(columns, width // _KERNEL * _KERNEL or width):
        some, target = right[:, piece], out[:, piece]
        again = out_of_order(some.shape[1], r)
        if again is None:
            _in_order(left, some, target)
            continue
        _stacked(left, some, target, _DOZEN)
        if again:
            anew = np.concatenate([some[:, run] for run in again], axis=1)
            fixed = np.empty((len(left), anew.shape[1]), np.float32)
            _in_order(left, anew, fixed)
            ends = np.cumsum([run.stop - run.start for run in again])
            for run, columns_of in zip(again, np.split(fixed, ends[:-1], axis=1), strict=True):
                target[:, run] = columns_of


def _in_order(left: F32Array, right: F32Array, out: F32Array) -> None:
    if keeps_order(right.shape[1], right.shape[0]):
        _stacked(left, right, out, _PAIR)
    else:
        _chained(left, right, out)


def _stacked(left: F32Array, right: F32Array, out: F32Array, height: int) -> None:
    """`height` rows at a time: a stack of products `(height, r) @ (r, columns)`."""
    rows, r = left.shape
    down, along = out.strides
    stack = np.lib.stride_tricks.as_strided(out, (rows // height, height, out.shape[1]), (height * down, down, along))
    np.matmul(left.reshape(rows // height, height, r), right, out=stack)


@lru_cache(maxsize=1024)
def keeps_order(columns: int, r: int) -> bool:
    """Whether this numpy's BLAS sums products of two rows in order: tried on 12 rows of random numbers.

    All pairs of rows take the same way through the BLAS, and another order shows in a quarter to nine tenths of the
    elements, so that twelve full rows leave no room for luck.
    """
    got, wanted = _tried(columns, r, _PAIR, 12)
    return np.array_equal(got, wanted)


@lru_cache(maxsize=1024)
def out_of_order(columns: int, r: int) -> list[slice] | None:
    """The columns that this numpy's BLAS sums in another order, twelve rows at a time; None when making them anew is no gain.

    In such a column at least half of the rows are out of order, and of those at least a quarter of the elements show it: all
    of 48 rows in order by luck is less than one column in a thousand. They come in eights, so that one tells of its neighbors.
    """
    got, wanted = _tried(columns, r, _DOZEN, 48)
    eights = np.unique(np.flatnonzero((got != wanted).any(axis=0)) // 8)
    found = (8 * eights[:, None] + np.arange(8)).reshape(-1)
    found = found[found < columns]
    if len(found) > columns // 4:
        return None
    runs = np.split(found, np.flatnonzero(np.diff(found) > 1) + 1) if len(found) else []
    return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]


def _tried(columns: int, r: int, height: int, rows: int) -> tuple[F32Array, F32Array]:
    """A product of random numbers, so many rows at a time, and as it should be."""
    rng = np.random.default_rng(r)
    left = rng.standard_normal((rows, r), dtype=np.float32)
    right = rng.standard_normal((r, columns), dtype=np.float32)
    got = np.empty((rows, columns), np.float32)
    _stacked(left, right, got, height)
    return got, chained(left, right)


def _chained(left: F32Array, right: F32Array, out: F32Array) -> None:
    step = max(1, _BLOCK // right.shape[1])
    for start in range(0, len(left), step):
        out[start : start + step] = chained(left[start : start + step], right)


def chained(left: F32Array, right: F32Array) -> F32Array:
    """The chain of fused multiply-adds spelled out, without FMA in the processor: slow, and right everywhere.

    float64 holds a product of two float32 exactly. Adding to it rounds once and the conversion to float32 a second
    time; rounding the sum to odd (Boldo & Melquiond, "Emulation of FMA and correctly rounded sums", 2008) makes the
    two the same as rounding once.
    """
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for rank in range(left.shape[1]):
        term = wide_left[:, rank : rank + 1] * wide_right[rank]
        total = _sum_to_odd(term, total.astype(np.float64)).astype(np.float32)
    return total


def _sum_to_odd(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    rounded = a + b
    back = rounded - a
    error = (a - (rounded - back)) + (b - back)  # exact (Knuth, TwoSum)
    bits = rounded.view(np.int64)
    inexact_and_even = (error != 0) & ((bits & 1) == 0)
    # Toward the exact sum: one step away from zero when the error has the sum's sign, else one step to zero.
    step = np.where((error > 0) == (rounded > 0), 1, -1)
    return (bits + np.where(inexact_and_even, step, 0)).view(np.float64)


# ---- From the dtype of a base to float32 and back, as torch rounds: to nearest, ties to even


# The smallest magnitude that rounds to infinity: half a step over the largest finite number.
_OVERFLOW = {
    dtypes.BF16: (2 - 2**-8) * 2.0**127,
    dtypes.F16: (2 - 2**-11) * 2.0**15,
    dtypes.F32: np.inf,
}
LARGEST = {dtypes.BF16: 3.3895314e38, dtypes.F16: 65504.0, dtypes.F32: 3.4028235e38}


def computable(dtype: np.dtype | None) -> bool:
    """Whether a base of this dtype can be merged into without a scale of its own."""
    return dtype in _OVERFLOW


def fits(tile: F32Array, dtype: np.dtype) -> bool:
    """Whether every number stays finite in `dtype`; a NaN does not."""
    limit = _OVERFLOW[dtype]
    return not tile.size or bool(tile.max() < limit and tile.min() > -limit)


def narrow(tile: F32Array, out: np.ndarray) -> None:
    """Write `tile` into `out`, rounded to its dtype."""
    np.copyto(out, tile, casting="unsafe")


def widen(raw: np.ndarray, out: F32Array) -> None:
    """Write `raw` into `out`; exact."""
    np.copyto(out, raw, casting="safe")


# ---- The mean of float32 numbers with torch's every bit, in numpy


_LANES = 8  # float32 numbers in a vector
_CHAINS = 4  # vectors that are added up side by side
_LEAST = 4  # the logarithm of the shortest block


def mean(values: F32Array) -> np.float32:
    """The mean of `values`, flat and not empty."""
    return np.float32(_total(values) / np.float32(values.size))


def _total(values: F32Array) -> np.float32:
    if values.size < _LANES:
        return np.float32(_in_chains(values.reshape(-1, 1))[0])
    whole = values.size // _LANES * _LANES
    lanes = _in_chains(values[:whole].reshape(-1, _LANES))
    return np.float32(_one_by_one(np.concatenate([values[whole:], lanes])))


def _in_chains(vectors: F32Array) -> F32Array:
    """The sum of `(n, width)` over n."""
    count = len(vectors) // _CHAINS
    first, *others = _cascade(vectors[: count * _CHAINS].reshape(count, _CHAINS, vectors.shape[1]))
    return _one_by_one(np.stack([first, *vectors[count * _CHAINS :], *others]))


def _cascade(rows: F32Array) -> F32Array:
    """The sum over rows, in blocks of blocks of blocks; what fills no block is added up on its own on every level."""
    step = 1 << max(_LEAST, (len(rows) - 1).bit_length() // 4)
    rests = []
    for _ in range(3):
        whole = len(rows) // step * step
        rests.append(_one_by_one(rows[whole:]))
        rows = _one_by_one(np.moveaxis(rows[:whole].reshape(-1, step, *rows.shape[1:]), 1, 0))
    return _one_by_one(np.stack([*rests, _one_by_one(rows)]))


def _one_by_one(rows: F32Array) -> F32Array:
    """The sum over the first axis from its first row to its last; zeros where there is none."""
    total: F32Array = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total = total + row
    return total
