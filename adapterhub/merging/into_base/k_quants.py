"""Quantization to GGUF's Q4_K, Q5_K and Q6_K, byte for byte as ggml's reference quantizers without an importance matrix.

Follows `quantize_row_q4_K_ref`, `quantize_row_q5_K_ref`, `quantize_row_q6_K_ref` and what they call (ggml, `ggml-quants.c`;
llama.cpp of llama-cpp-python 0.3.36), which the gguf package lacks. A block of 256 numbers has sub-blocks of 32 (Q6_K: 16), and
for each a scale is searched; here for all sub-blocks at once. The order of every sum is theirs: one number after another, in
float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]

K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
"""The types that `quantize` writes."""
BLOCK = 256
_LANES = 2**14  # sub-blocks at once: about 2 MB for each array of the search
_F = np.float32
_NOTHING = _F(1e-15)  # ggml's GROUP_MAX_EPS


def quantize(wide: F32Array, name: str) -> Bytes:
    """The bytes of rows of numbers.

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


def _sum(terms: Iterable[F32Array], like: F32Array) -> F32Array:
    """The sum of terms, one after another, beginning with 0."""
    total = np.zeros_like(like)
    for term in terms:
        total += term
    return total


def _nearest(values: F32Array, low: int, high: int) -> F32Array:
    """The nearest integers, ties to even, in a range; in float32, which is exact."""
    rounded: F32Array = np.clip(np.rint(values), _F(low), _F(high))
    return rounded


def _first(largest: F32Array, values: F32Array) -> F32Array:
    """Of each column the first of `values` whose magnitude is `largest`."""
    found: F32Array = np.take_along_axis(values, np.argmax(np.abs(values) == largest, axis=0)[None], axis=0)[0]
    return found


def _with_minimum(x: F32Array, levels: int, start: float, steps: int) -> tuple[F32Array, F32Array, F32Array]:
    """Scale, minimum and levels `(32, n)` of sub-blocks `(32, n)`, by ggml's `make_qkx2_quants` and its weights."""
    zero = x[0]
    weights = np.sqrt(_sum((row * row for row in x), zero) / _F(32)) + np.abs(x)
    low, high = np.minimum(x.min(axis=0), _F(0)), x.max(axis=0)
    flat = high == low
    sum_w, sum_x = _sum(weights, zero), _sum((w * row for w, row in zip(weights, x, strict=True)), zero)
    inverse = _F(levels) / (high - low)
    scale = _F(1) / inverse
    found = _nearest(inverse * (x - low), 0, levels)
    best = _error(x, weights, found, scale, low)
    for n in range(steps + 1):
        inverse = (_F(start) + _F(0.1) * _F(n) + _F(levels)) / (high - low)
        tried = _nearest(inverse * (x - low), 0, levels)
        weighted = weights * tried
        sum_l = _sum(weighted, zero)
        sum_l2 = _sum((one * level for one, level in zip(weighted, tried, strict=True)), zero)
        sum_xl = _sum((one * row for one, row in zip(weighted, x, strict=True)), zero)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        free_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        free_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        own_scale: F32Array = np.where(free_low > 0, sum_xl / sum_l2, free_scale)
        own_low: F32Array = np.minimum(free_low, _F(0))
        error = _error(x, weights, tried, own_scale, own_low)
        better = (determinant > 0) & (error < best)
        found = np.where(better, tried, found)
        best, scale, low = (np.where(better, new, old) for new, old in ((error, best), (own_scale, scale), (own_low, low)))
    return np.where(flat, _F(0), scale), -low, np.where(flat, _F(0), found)


def _error(x: F32Array, weights: F32Array, levels: F32Array, scale: F32Array, low: F32Array) -> F32Array:
    differences = scale * levels + low - x
    return _sum((w * (one * one) for w, one in zip(weights, differences, strict=True)), scale)


def _with_signs(x: F32Array) -> tuple[F32Array, F32Array]:
    """Scale and levels from 0 to 63 `(16, n)` of sub-blocks `(16, n)`, by ggml's `make_qx_quants`."""
    largest = np.abs(x).max(axis=0)
    top = _first(largest, x)
    squares = x * x
    cubes = squares * x
    scale, found, best = np.zeros_like(top), np.zeros_like(x), np.zeros_like(top)
    for n in (0, *range(-9, 0), *range(1, 10)):
        tried = _nearest(-(_F(32) + _F(0.1) * _F(n)) / top * x, -32, 31)
        sum_xl = _sum((one * level for one, level in zip(cubes, tried, strict=True)), top)
        sum_l2 = _sum((one * level * level for one, level in zip(squares, tried, strict=True)), top)
        if n == 0:
            found, scale = tried, np.where(sum_l2 != 0, sum_xl / sum_l2, _F(0))
            best = scale * sum_xl
            continue
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        found = np.where(better, tried, found)
        scale = np.where(better, sum_xl / sum_l2, scale)
        best = np.where(better, scale * sum_xl, best)
    nothing = largest < _NOTHING
    return np.where(nothing, _F(0), scale), np.where(nothing, _F(0), found + _F(32))


def _of_minimum(blocks: F32Array, bits: int) -> Bytes:
    """Q4_K and Q5_K: scales and minima of 6 bits, of 8 sub-blocks each."""
    count, levels = len(blocks), 2**bits - 1
    x = np.ascontiguousarray(blocks.reshape(-1, 32).T)
    scale, low, found = _with_minimum(x, levels, *((-1.0, 20) if bits == 4 else (-0.5, 15)))
    scales, lows = scale.reshape(count, 8), low.reshape(count, 8)
    largest = [np.maximum(one.max(axis=1, keepdims=True), _F(0)) for one in (scales, lows)]
    codes = [
        np.minimum(np.rint(np.where(top > 0, _F(63) / top, _F(0)) * one).astype(np.int32) & 255, 63)
        for one, top in zip((scales, lows), largest, strict=True)
    ]
    halves = [(top / _F(63)).astype(np.float16) for top in largest]
    d, dm = ((half.astype(np.float32) * code).reshape(-1) for half, code in zip(halves, codes, strict=True))
    found = np.where(d != 0, _nearest((x + dm) / d, 0, levels), found)
    quants = np.ascontiguousarray(found.T).astype(np.uint8).reshape(count, 4, 2, 32)
    high = np.zeros((count, 0), np.uint8)
    if bits == 5:
        shifts = np.arange(8, dtype=np.uint8).reshape(4, 2, 1)
        high = np.bitwise_or.reduce((quants >> 4) << shifts, axis=(1, 2))
        quants &= np.uint8(15)
    low_bits = (quants[:, :, 0] | quants[:, :, 1] << 4).reshape(count, 128)
    return np.concatenate([*(half.view(np.uint8) for half in halves), _packed_scales(*codes), high, low_bits], axis=1)


def _packed_scales(scales: Ints, lows: Ints) -> Bytes:
    """8 scales and 8 minima of 6 bits in 12 bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = lows[:, :4] | (lows[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (lows[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1).astype(np.uint8)


def _of_signs(blocks: F32Array) -> Bytes:
    """Q6_K: scales of 8 bits, of 16 sub-blocks."""
    count = len(blocks)
    x = np.ascontiguousarray(blocks.reshape(-1, 16).T)
    scale, found = _with_signs(x)
    scales = scale.reshape(count, 16)
    largest = np.abs(scales).max(axis=1)
    nothing = largest < _NOTHING
    inverse = (_F(-128) / _first(largest, np.ascontiguousarray(scales.T)))[:, None]
    half = np.where(nothing[:, None], _F(0), _F(1) / inverse).astype(np.float16)
    codes = np.minimum(np.rint(inverse * scales), _F(127))
    codes = np.where(nothing[:, None], _F(0), codes)
    d = (half.astype(np.float32) * codes).reshape(-1)
    found = np.where(d != 0, _nearest(x / d, -32, 31) + _F(32), found)
    quants = np.ascontiguousarray(found.T).astype(np.uint8).reshape(count, 2, 4, 32)
    quants[nothing] = 0
    low = quants & 15
    low_bits = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    high = np.bitwise_or.reduce((quants >> 4) << shifts, axis=2)
    parts = (low_bits.reshape(count, 128), high.reshape(count, 64), codes.astype(np.int8).view(np.uint8), half.view(np.uint8))
    return np.concatenate(parts, axis=1)


_SEARCHES = {
    "Q4_K": lambda blocks: _of_minimum(blocks, 4),
    "Q5_K": lambda blocks: _of_minimum(blocks, 5),
    "Q6_K": _of_signs,
}
