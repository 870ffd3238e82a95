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

OpenBLAS, which numpy uses, sums in the same order with its AVX-512 kernels, but not with its Haswell and Zen kernels for r
>= 8 (1.5 to 5 % of the elements differ in the last bit, around the edges of its blocks). A product of *two* rows at a time
uses a simpler kernel that keeps the order, except on older CPUs (Sandybridge, Nehalem). So small matrices are multiplied
two rows at a time; each width and rank is checked once against the chain written out in float64, and where the check fails
that chain is used. Large matrices are multiplied twelve rows at a time, in half the time; the columns that are then summed
in another order are found by the same check and computed again, two rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]

PANEL = 192  # ranks in one sum
_SINGLE_THREAD = 4 * 65536  # multiplications in a product that OpenBLAS does not split over threads (interface/gemm.c)
_PAIR, _DOZEN = 2, 12  # rows at a time
_LARGE = 1 << 17  # elements of a product from which on twelve rows at a time are worth their check
_KERNEL = 320  # columns in a block of OpenBLAS's Haswell and Zen kernels, whose first and last eight are out of order
_BLOCK = 16_384  # elements of the written-out chain at a time: its float64 temporaries then fit in the cache


def product(left: F32Array, right: F32Array, out: F32Array) -> F32Array:
    """Compute `left @ right` in the order that the module defines.

    Args:
        left: `(rows, r)`, C-contiguous; an even number of rows (an odd last row would use another kernel).
        right: `(r, columns)`, C-contiguous.
        out: `(rows, columns)`, C-contiguous; overwritten and returned.
    """
    for number, (start, stop) in enumerate(panels(left.shape[1])):
        part = out if number == 0 else np.empty_like(out)
        _multiply_panel(np.ascontiguousarray(left[:, start:stop]), right[start:stop], part)
        if number:
            out += part
    return out


def panels(r: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of ranks.

    One panel up to 192, two halves up to 384 (and a third panel of one if r is odd), else panels of 192.
    """
    step = r // 2 if PANEL < r <= 2 * PANEL else PANEL
    yield from ((start, min(start + step, r)) for start in range(0, r, step))


def _multiply_panel(left: F32Array, right: F32Array, out: F32Array) -> None:
    """Compute the product of one panel: tall matrices by dozens of rows, the rest by pairs."""
    r, columns = right.shape
    if r == 1:
        np.multiply(left, right, out=out)  # not added to zero: a product of -0 stays -0, as in oneMKL
        return
    dozen_rows = len(left) // _DOZEN * _DOZEN if out.size >= _LARGE else 0
    if dozen_rows:
        _multiply_dozens(left[:dozen_rows], right, out[:dozen_rows])
    for piece in _pieces(columns, _SINGLE_THREAD // (_PAIR * r)):
        _multiply_in_order(left[dozen_rows:], right[:, piece], out[dozen_rows:, piece])


def _pieces(columns: int, width: int) -> Iterator[slice]:
    """Yield ranges of columns, narrow enough for OpenBLAS to stay in one thread."""
    width = max(16, width)
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def _multiply_dozens(left: F32Array, right: F32Array, out: F32Array) -> None:
    """Compute the product twelve rows at a time, and again by pairs where the columns come out of order."""
    r, columns = right.shape
    width = _SINGLE_THREAD // (_DOZEN * r)
    for piece in _pieces(columns, width // _KERNEL * _KERNEL or width):
        piece_right, target = right[:, piece], out[:, piece]
        runs = out_of_order(piece_right.shape[1], r)
        if runs is None:
            _multiply_in_order(left, piece_right, target)
            continue
        _multiply_stack(left, piece_right, target, _DOZEN)
        if runs:
            columns_again = np.concatenate([piece_right[:, run] for run in runs], axis=1)
            fixed = np.empty((len(left), columns_again.shape[1]), np.float32)
            _multiply_in_order(left, columns_again, fixed)
            ends = np.cumsum([run.stop - run.start for run in runs])
            for run, part in zip(runs, np.split(fixed, ends[:-1], axis=1), strict=True):
                target[:, run] = part


def _multiply_in_order(left: F32Array, right: F32Array, out: F32Array) -> None:
    """Compute the product by pairs of rows if this BLAS keeps the order, else by the written-out chain."""
    if keeps_order(right.shape[1], right.shape[0]):
        _multiply_stack(left, right, out, _PAIR)
    else:
        _multiply_chained(left, right, out)


def _multiply_stack(left: F32Array, right: F32Array, out: F32Array, height: int) -> None:
    """Compute `height` rows at a time: a stack of products `(height, r) @ (r, columns)`."""
    rows, r = left.shape
    # A strided view, so that numpy calls BLAS once for each group of rows and writes into `out` directly.
    down, along = out.strides
    stack = np.lib.stride_tricks.as_strided(out, (rows // height, height, out.shape[1]), (height * down, down, along))
    np.matmul(left.reshape(rows // height, height, r), right, out=stack)


@lru_cache(maxsize=1024)
def keeps_order(columns: int, r: int) -> bool:
    """Return whether this numpy's BLAS sums products of two rows in order, by a test on 12 rows of random numbers.

    All pairs of rows use the same kernel, and another order changes a quarter to nine tenths of the elements, so that twelve
    rows cannot agree by chance.
    """
    computed, expected = _trial(columns, r, _PAIR, 12)
    return np.array_equal(computed, expected)


@lru_cache(maxsize=1024)
def out_of_order(columns: int, r: int) -> list[slice] | None:
    """Return the columns that this numpy's BLAS sums in another order, twelve rows at a time; None if too many to be a gain.

    In such a column at least half of the rows are out of order, and at least a quarter of these elements differ: that all of 48
    rows agree by chance happens in less than one column of a thousand. Such columns come in groups of eight, which are found
    together.
    """
    computed, expected = _trial(columns, r, _DOZEN, 48)
    eights = np.unique(np.flatnonzero((computed != expected).any(axis=0)) // 8)
    columns_out_of_order = (8 * eights[:, None] + np.arange(8)).reshape(-1)
    columns_out_of_order = columns_out_of_order[columns_out_of_order < columns]
    if len(columns_out_of_order) > columns // 4:
        return None
    runs = (
        np.split(columns_out_of_order, np.flatnonzero(np.diff(columns_out_of_order) > 1) + 1)
        if len(columns_out_of_order)
        else []
    )
    return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]


def _trial(columns: int, r: int, height: int, rows: int) -> tuple[F32Array, F32Array]:
    """Return a product of random numbers computed `height` rows at a time, and the same product by the chain."""
    rng = np.random.default_rng(r)
    left = rng.standard_normal((rows, r), dtype=np.float32)
    right = rng.standard_normal((r, columns), dtype=np.float32)
    computed = np.empty((rows, columns), np.float32)
    _multiply_stack(left, right, computed, height)
    return computed, chain(left, right)


def _multiply_chained(left: F32Array, right: F32Array, out: F32Array) -> None:
    """Compute the product by the written-out chain, some rows at a time."""
    step = max(1, _BLOCK // right.shape[1])
    for start in range(0, len(left), step):
        out[start : start + step] = chain(left[start : start + step], right)


def chain(left: F32Array, right: F32Array) -> F32Array:
    """Compute the chain of fused multiply-adds without FMA instructions: slow, and right on every CPU.

    float64 holds a product of two float32 exactly. The sum rounds once and the conversion to float32 a second time; rounding
    the sum to odd (Boldo & Melquiond, "Emulation of FMA and correctly rounded sums", 2008) makes the two equal to rounding
    once.
    """
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for rank in range(left.shape[1]):
        term = wide_left[:, rank : rank + 1] * wide_right[rank]
        total = _sum_to_odd(term, total.astype(np.float64)).astype(np.float32)
    return total


def _sum_to_odd(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum rounded to odd: of the two nearest numbers, the one with an odd last bit, unless the sum is exact."""
    rounded = a + b
    back = rounded - a
    error = (a - (rounded - back)) + (b - back)  # exact (Knuth, TwoSum)
    bits = rounded.view(np.int64)
    inexact_and_even = (error != 0) & ((bits & 1) == 0)
    # Toward the exact sum: a step away from zero if the error has the sign of the sum, else a step to zero.
    step = np.where((error > 0) == (rounded > 0), 1, -1)
    return (bits + np.where(inexact_and_even, step, 0)).view(np.float64)
