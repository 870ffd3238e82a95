"""Quantize to GGUF's Q4_K, Q5_K and Q6_K, and by an importance matrix, byte for byte as ggml does.

Follows `quantize_row_q4_K_ref`, `quantize_row_q4_K_impl`, their equivalents for the other types, and the functions that they
call (ggml, `ggml-quants.c`; llama.cpp of llama-cpp-python 0.3.36); the gguf package lacks them. A block of 256 numbers has
sub-blocks of 32 (Q6_K: 16), and a scale is searched for each; here for all sub-blocks at once. The order of every sum is
ggml's: one number after another, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]

K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
"""The types that `quantize` writes."""
WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_QUANTS)
"""The types that `quantize_weighted` writes; an importance matrix has no effect on others."""
BLOCK = 256
_LANES = 2**14  # sub-blocks at once: about 2 MB for each array of the search
_F = np.float32
_NEGLIGIBLE = _F(1e-15)  # ggml's GROUP_MAX_EPS


def quantize(wide: F32Array, name: str) -> Bytes:
    """Quantize rows of numbers.

    Args:
        wide: `(rows, columns)`, columns a multiple of BLOCK, finite.
        name: One of K_QUANTS.

    Returns:
        `(rows, bytes)`.
    """
    blocks = np.ascontiguousarray(wide, np.float32).reshape(-1, BLOCK)
    step = _LANES // (16 if name == "Q6_K" else 8)
    with np.errstate(all="ignore"):
        packed = [_SEARCHES[name](blocks[at : at + step]) for at in range(0, len(blocks), step)]
    return np.concatenate(packed).reshape(len(wide), -1)


def quantize_weighted(wide: F32Array, name: str, importance: F32Array) -> Bytes:
    """Quantize rows of numbers whose errors count by the importance of their column.

    Args:
        wide: `(rows, columns)`, columns a multiple of the type's block, finite.
        name: One of WEIGHTED.
        importance: `(columns,)`, not negative.

    Returns:
        `(rows, bytes)`.
    """
    wide = np.ascontiguousarray(wide, np.float32)
    rows, block = len(wide), BLOCK if name in K_QUANTS else 32
    blocks_per_row = wide.shape[1] // block
    step = max(1, _LANES // (16 if name == "Q6_K" else 8) // max(1, blocks_per_row))
    weights = importance.astype(np.float32).reshape(1, blocks_per_row, block)
    with np.errstate(all="ignore"):
        packed = [_quantize_rows(wide[at : at + step], name, weights, block) for at in range(0, rows, step)]
    return np.concatenate(packed).reshape(rows, -1)


def _quantize_rows(wide: F32Array, name: str, importance: F32Array, block: int) -> Bytes:
    """Quantize some rows block by block; `importance` is `(1, blocks in a row, block)`."""
    blocks = wide.reshape(-1, block)
    by_number = np.broadcast_to(importance, (len(wide), *importance.shape[1:])).reshape(-1, block)
    if name == "Q6_K":
        return _pack_signed(blocks, by_number)
    if name in K_QUANTS:
        square = _sum((column * column for column in blocks.T), blocks[:, 0])
        weights = by_number * np.sqrt((_F(2) * square / _F(BLOCK))[:, None] + blocks * blocks)
        return _pack_minimum_weighted(blocks, weights, 4 if name == "Q4_K" else 5)
    # For the types in blocks of 32, ggml takes the mean square of the whole row, not of the block.
    square = _sum((column * column for column in wide.T), wide[:, 0]) / _F(wide.shape[1])
    sigma = np.repeat(square, importance.shape[1])[:, None]
    return _pack_32(blocks, by_number * np.sqrt(sigma + blocks * blocks), name)


def _sum(terms: Iterable[F32Array], like: F32Array) -> F32Array:
    """Return the sum of terms, one after another, beginning with 0."""
    # Not np.sum, whose pairwise order gives other bits than ggml's loop.
    total = np.zeros_like(like)
    for term in terms:
        total += term
    return total


def _nearest(values: F32Array, low: int, high: int) -> F32Array:
    """Return the nearest integers in a range, ties to even, as float32, which is exact."""
    rounded: F32Array = np.clip(np.rint(values), _F(low), _F(high))
    return rounded


def _first(largest: F32Array, values: F32Array) -> F32Array:
    """Return, for each column, the first of `values` whose magnitude is `largest`."""
    first: F32Array = np.take_along_axis(values, np.argmax(np.abs(values) == largest, axis=0)[None], axis=0)[0]
    return first


def _minimum(x: F32Array) -> F32Array:
    """Return the minimum of each column, or 0 if it is greater; of zeros the first, whose sign Q4_1 and Q5_1 keep."""
    low = x.min(axis=0)
    if not low.all():
        low = np.take_along_axis(x, np.argmax(x == low, axis=0)[None], axis=0)[0]
    lowest: F32Array = np.where(low > 0, _F(0), low)
    return lowest


def _default_weights(x: F32Array) -> F32Array:
    """Return the error weights of sub-blocks `(32, n)` without an importance matrix."""
    weights: F32Array = np.sqrt(_sum((row * row for row in x), x[0]) / _F(32)) + np.abs(x)
    return weights


_Search = tuple[float, float, int]
"""The inverse scales to try: the first difference from the number of levels, the step, and the number of steps."""
_BY_IMPORTANCE: _Search = (-0.9, 0.05, 36)


def _fit_with_minimum(x: F32Array, weights: F32Array, levels: int, search: _Search) -> tuple[F32Array, F32Array, F32Array]:
    """Return scale, minimum and levels of sub-blocks `(32, n)`, as ggml's `make_qkx2_quants` and `make_qkx3_quants`."""
    zero, (start, delta, steps) = x[0], search
    low, high = _minimum(x), x.max(axis=0)
    flat = high == low
    sum_w, sum_x = _sum(weights, zero), _sum((w * row for w, row in zip(weights, x, strict=True)), zero)
    inverse = _F(levels) / (high - low)
    scale = _F(1) / inverse
    best_levels = _nearest(inverse * (x - low), 0, levels)
    best = _error(x, weights, best_levels, scale, low)
    for n in range(steps + 1):
        inverse = (_F(start) + _F(delta) * _F(n) + _F(levels)) / (high - low)
        tried = _nearest(inverse * (x - low), 0, levels)
        weighted = weights * tried
        sum_l = _sum(weighted, zero)
        sum_l2 = _sum((weighted_row * level for weighted_row, level in zip(weighted, tried, strict=True)), zero)
        sum_xl = _sum((weighted_row * row for weighted_row, row in zip(weighted, x, strict=True)), zero)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        free_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        free_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        # A minimum above 0 cannot be stored: the scale is then fitted without one.
        own_scale: F32Array = np.where(free_low > 0, sum_xl / sum_l2, free_scale)
        own_low: F32Array = np.where(free_low > 0, _F(0), free_low)
        error = _error(x, weights, tried, own_scale, own_low)
        better = (determinant > 0) & (error < best)
        best_levels = np.where(better, tried, best_levels)
        best, scale, low = (np.where(better, new, old) for new, old in ((error, best), (own_scale, scale), (own_low, low)))
    return np.where(flat, _F(0), scale), -low, np.where(flat, _F(0), best_levels)


def _error(x: F32Array, weights: F32Array, levels: F32Array, scale: F32Array, low: F32Array) -> F32Array:
    """Return the weighted squared error of each sub-block."""
    differences = scale * levels + low - x
    return _sum((w * (difference * difference) for w, difference in zip(weights, differences, strict=True)), scale)


def _fit_signed(x: F32Array, squares: F32Array, half: int) -> tuple[F32Array, F32Array]:
    """Return scale and levels from 0 to 2 `half` - 1 of sub-blocks `(size, n)`, as ggml's `make_qx_quants`.

    Args:
        squares: The weights of the errors, usually the squares of the numbers.
    """
    largest = np.abs(x).max(axis=0)
    # With its sign: dividing a negative number by it gives the largest the level -half, which has no positive counterpart.
    top = _first(largest, x)
    cubes = squares * x
    scale, best_levels, best = np.zeros_like(top), np.zeros_like(x), np.zeros_like(top)
    for n in (0, *range(-9, 0), *range(1, 10)):
        tried = _nearest(-(_F(half) + _F(0.1) * _F(n)) / top * x, -half, half - 1)
        sum_xl = _sum((cube * level for cube, level in zip(cubes, tried, strict=True)), top)
        sum_l2 = _sum((square * level * level for square, level in zip(squares, tried, strict=True)), top)
        if n == 0:
            best_levels, scale = tried, np.where(sum_l2 != 0, sum_xl / sum_l2, _F(0))
            best = scale * sum_xl
            continue
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        best_levels = np.where(better, tried, best_levels)
        scale = np.where(better, sum_xl / sum_l2, scale)
        best = np.where(better, scale * sum_xl, best)
    negligible = largest < _NEGLIGIBLE
    return np.where(negligible, _F(0), scale), np.where(negligible, _F(0), best_levels + _F(half))


def _fit_positive(x: F32Array, weights: F32Array, levels: int) -> tuple[F32Array, Ints]:
    """Return scale, and levels as bytes `(8, n)`, of seldom negative numbers `(8, n)`, as ggml's `make_qp_quants`."""
    top = np.maximum(x.max(axis=0), _F(0))
    inverse = _F(levels) / top

    def levels_at(inverse: F32Array) -> Ints:
        return np.minimum(_nearest_int(inverse * x), levels)

    def error(inverse: F32Array, codes: Ints) -> F32Array:
        differences = x - _F(1) / inverse * codes.astype(np.float32)
        return _sum((w * difference * difference for w, difference in zip(weights, differences, strict=True)), top)

    # ggml compares the first try without a limit on its levels, which are bytes there.
    best = error(inverse, _nearest_int(inverse * x) & 255)
    for n in (*range(-4, 0), *range(1, 5)):
        tried_inverse = (_F(0.1) * _F(n) + _F(levels)) / top
        tried_error = error(tried_inverse, levels_at(tried_inverse))
        better = tried_error < best
        best, inverse = np.where(better, tried_error, best), np.where(better, tried_inverse, inverse)
    level = levels_at(inverse)
    sum_lx = _sum((w * row * codes for w, row, codes in zip(weights, x, level.astype(np.float32), strict=True)), top)
    sum_l2 = _sum((w * codes * codes for w, codes in zip(weights, level.astype(np.float32), strict=True)), top)
    level &= 255
    # At most five rounds of moving single levels, as ggml does.
    for _ in range(5):
        for i, (w, row) in enumerate(zip(weights, x, strict=True)):
            old = level[i].astype(np.float32)
            lx, l2 = sum_lx - w * row * old, sum_l2 - w * old * old
            new = np.minimum(_nearest_int(row * l2 / lx), levels)
            wide = new.astype(np.float32)
            new_lx, new_l2 = lx + w * row * wide, l2 + w * wide * wide
            better = (lx > 0) & (l2 > 0) & (new != level[i]) & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            level[i] = np.where(better, new & 255, level[i])
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
    negligible = top < _NEGLIGIBLE
    return np.where(negligible | ~(sum_l2 > 0), _F(0), sum_lx / sum_l2), np.where(negligible, 0, level)


def _nearest_int(values: F32Array) -> Ints:
    """Return what ggml's `nearest_int` returns, also for numbers that are too large for it."""
    # 1.5 * 2^23: float32 has no fraction there, so the addition rounds, and the integer is in the low bits.
    bits = (values + _F(12582912)).view(np.int32)
    integers: Ints = (bits & 0x007FFFFF) - 0x00400000
    return integers


def _pack_minimum_weighted(blocks: F32Array, weights: F32Array, bits: int) -> Bytes:
    """Quantize blocks to Q4_K or Q5_K with weighted errors."""
    count, levels = len(blocks), 2**bits - 1
    x, w = (np.ascontiguousarray(array.reshape(-1, 32).T) for array in (blocks, weights))
    scale, low, best_levels = _fit_with_minimum(x, w, levels, _BY_IMPORTANCE)
    sums = np.ascontiguousarray(_sum(w, x[0]).reshape(count, 8).T)
    fits = [_fit_positive(np.ascontiguousarray(array.reshape(count, 8).T), sums, 63) for array in (scale, low)]
    codes = [level.T if bits == 4 else np.minimum(level.T, 63) for _, level in fits]
    packed = _pack_scales(codes[0], codes[1])
    # Unpack the codes again: ggml reads the 6-bit scales back from their packed form before it chooses the levels.
    first, second, third = (packed[:, at : at + 4].astype(np.int32) for at in (0, 4, 8))
    stored = (
        np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1),
        np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1),
    )
    halves = [super_scale.astype(np.float16)[:, None] for super_scale, _ in fits]
    return _pack_blocks(x, best_levels, (halves, stored, packed), bits)


def _pack_32(blocks: F32Array, weights: F32Array, name: str) -> Bytes:
    """Quantize blocks of 32 to Q4_0, Q4_1, Q5_0 or Q5_1 with weighted errors."""
    x, w = np.ascontiguousarray(blocks.T), np.ascontiguousarray(weights.T)
    levels = 16 if name.startswith("Q4") else 32
    if name.endswith("0"):
        scale, best_levels = _fit_signed(x, w, levels // 2)
        heads = [scale]
    else:
        scale, low, best_levels = _fit_with_minimum(x, w, levels - 1, _BY_IMPORTANCE)
        heads = [scale, -low]
    quants = np.ascontiguousarray(best_levels.T).astype(np.uint8)
    low_bits = quants[:, :16] & 15 | (quants[:, 16:] & 15) << 4
    high = np.zeros((len(blocks), 0), np.uint8)
    if levels == 32:
        high = np.packbits(quants >> 4, axis=1, bitorder="little")
    return np.concatenate([*(head.astype(np.float16).view(np.uint8).reshape(-1, 2) for head in heads), high, low_bits], axis=1)


def _pack_minimum(blocks: F32Array, bits: int) -> Bytes:
    """Quantize blocks to Q4_K or Q5_K: 6-bit scales and minima of 8 sub-blocks each."""
    count, levels = len(blocks), 2**bits - 1
    x = np.ascontiguousarray(blocks.reshape(-1, 32).T)
    search = (-1.0, 0.1, 20) if bits == 4 else (-0.5, 0.1, 15)
    scale, low, best_levels = _fit_with_minimum(x, _default_weights(x), levels, search)
    scales, lows = scale.reshape(count, 8), low.reshape(count, 8)
    largest = [np.maximum(values.max(axis=1, keepdims=True), _F(0)) for values in (scales, lows)]
    codes = [
        np.minimum(np.rint(np.where(top > 0, _F(63) / top, _F(0)) * values).astype(np.int32) & 255, 63)
        for values, top in zip((scales, lows), largest, strict=True)
    ]
    halves = [(top / _F(63)).astype(np.float16) for top in largest]
    return _pack_blocks(x, best_levels, (halves, codes, _pack_scales(*codes)), bits)


_Scales = tuple[Sequence[NDArray[np.float16]], Sequence[Ints], Bytes]
"""The scales of blocks: scale and minimum in float16, their codes for each sub-block, and these codes packed."""


def _pack_blocks(x: F32Array, fallback_levels: F32Array, scales: _Scales, bits: int) -> Bytes:
    """Return the bytes of Q4_K or Q5_K blocks: levels for the rounded scales, `fallback_levels` where a scale is 0."""
    halves, codes, packed = scales
    count, levels = len(packed), 2**bits - 1
    d, dm = ((half.astype(np.float32) * code).reshape(-1) for half, code in zip(halves, codes, strict=True))
    fallback_levels = np.where(d != 0, _nearest((x + dm) / d, 0, levels), fallback_levels)
    quants = np.ascontiguousarray(fallback_levels.T).astype(np.uint8).reshape(count, 4, 2, 32)
    high = np.zeros((count, 0), np.uint8)
    if bits == 5:
        shifts = np.arange(8, dtype=np.uint8).reshape(4, 2, 1)
        high = np.bitwise_or.reduce((quants >> 4) << shifts, axis=(1, 2))
        quants &= np.uint8(15)
    low_bits = (quants[:, :, 0] | quants[:, :, 1] << 4).reshape(count, 128)
    return np.concatenate([*(half.view(np.uint8) for half in halves), packed, high, low_bits], axis=1)


def _pack_scales(scales: Ints, lows: Ints) -> Bytes:
    """Pack 8 scales and 8 minima of 6 bits into 12 bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = lows[:, :4] | (lows[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (lows[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1).astype(np.uint8)


def _pack_signed(blocks: F32Array, weights: F32Array | None = None) -> Bytes:
    """Quantize blocks to Q6_K: 8-bit scales of 16 sub-blocks."""
    count = len(blocks)
    x = np.ascontiguousarray(blocks.reshape(-1, 16).T)
    w = x * x if weights is None else np.ascontiguousarray(weights.reshape(-1, 16).T)
    scale, best_levels = _fit_signed(x, w, 32)
    scales = scale.reshape(count, 16)
    largest = np.abs(scales).max(axis=1)
    negligible = largest < _NEGLIGIBLE
    inverse = (_F(-128) / _first(largest, np.ascontiguousarray(scales.T)))[:, None]
    half = np.where(negligible[:, None], _F(0), _F(1) / inverse).astype(np.float16)
    codes = np.minimum(np.rint(inverse * scales), _F(127))
    codes = np.where(negligible[:, None], _F(0), codes)
    d = (half.astype(np.float32) * codes).reshape(-1)
    best_levels = np.where(d != 0, _nearest(x / d, -32, 31) + _F(32), best_levels)
    quants = np.ascontiguousarray(best_levels.T).astype(np.uint8).reshape(count, 2, 4, 32)
    quants[negligible] = 0
    low = quants & 15
    low_bits = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    high = np.bitwise_or.reduce((quants >> 4) << shifts, axis=2)
    parts = (low_bits.reshape(count, 128), high.reshape(count, 64), codes.astype(np.int8).view(np.uint8), half.view(np.uint8))
    return np.concatenate(parts, axis=1)


_SEARCHES: dict[str, Callable[[F32Array], Bytes]] = {
    "Q4_K": lambda blocks: _pack_minimum(blocks, 4),
    "Q5_K": lambda blocks: _pack_minimum(blocks, 5),
    "Q6_K": _pack_signed,
}
