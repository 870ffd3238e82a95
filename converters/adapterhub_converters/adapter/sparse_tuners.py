"""PEFT's tuners that train few numbers of a large matrix: elements of the weight itself, or of its spectrum.

Read from peft 0.21.2 (`tuners/*/layer.py`). FourierFT and WaveFT store no places, only the seed that these were drawn with.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapterhub_converters.lazy_imports import np

from .tuner import Numbers, Shape, Tensors, Weight, f32

if TYPE_CHECKING:
    from numpy.typing import NDArray

# For larger ranges, torch draws its random numbers differently.
_MAX_ELEMENTS = (2**32 - 1) // 20
_DAUBECHIES = {"haar": 1, **{f"db{order}": order for order in range(1, 11)}}
"""The wavelets that peft has and that are computed here, to their numbers of vanishing moments."""


def refuse_seed(numbers: Numbers) -> str:
    """Return why the places of a seed cannot be drawn; empty if they can."""
    seed = numbers["random_loc_seed"]
    # torch's generators take 64 bits, with or without a sign (`Generator.manual_seed`).
    is_seed = type(seed) is int and -(2**63) <= seed < 2**64
    return "" if is_seed else f'"random_loc_seed" is {str(seed)[:40]}, which is not a seed of 64 bits'


def refuse_wavelet(numbers: Numbers) -> str:
    """Return why a WaveFT config cannot be merged; empty if it can."""
    family = str(numbers["wavelet_family"])
    if numbers["use_idwt"] and family.lower() not in _DAUBECHIES:
        return f'"wavelet_family" is {family[:40]}: only the wavelets of Daubechies, db1 to db10, are known here'
    return refuse_seed(numbers)


def _places(shape: Shape, count: int, numbers: Numbers) -> NDArray[np.int64]:
    return _permutation(math.prod(shape), count, int(numbers["random_loc_seed"]))


def _permutation(n: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return the first `count` of torch's `randperm(n)`, whose generator is numpy's (aten, `randperm_cpu`)."""
    # The generator uses the low half of its seed (aten, `mt19937`).
    drawn = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, count, dtype=np.uint32)
    # A Fisher-Yates shuffle that keeps only the elements that were moved: `n` may be the size of a weight.
    displaced: dict[int, int] = {}
    permutation = np.empty(count, np.int64)
    for i, number in enumerate(drawn.tolist()):
        index = i + number % (n - i)
        permutation[i] = displaced.get(index, index)
        displaced[index] = displaced.get(i, i)
    return permutation


# ---- FourierFT


def fourier_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether a spectrum is smaller than the weight."""
    spectrum = tensors["fourierft_spectrum"]
    return spectrum.ndim == 1 and 0 < spectrum.size <= math.prod(shape) < _MAX_ELEMENTS


def fourier_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply FourierFT (arXiv 2405.03003): a sum of waves, whose frequencies come from a seed."""
    spectrum = f32(tensors["fourierft_spectrum"])
    dense = np.zeros(weight.size, np.float32)
    dense[_permutation(weight.size, spectrum.size, int(numbers["random_loc_seed"]))] = spectrum
    waves = np.fft.ifft2(dense.reshape(weight.shape)).real
    return weight + (waves * float(numbers["scaling"])).astype(np.float32)


# ---- WaveFT


def waveft_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether a spectrum is smaller than the weight."""
    spectrum = tensors["waveft_spectrum"]
    return spectrum.ndim == 1 and 0 < spectrum.size <= math.prod(shape) < _MAX_ELEMENTS


def waveft_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply WaveFT (arXiv 2505.12532): the inverse wavelet transform of a sparse matrix, or that matrix itself."""
    spectrum, scaling = f32(tensors["waveft_spectrum"]), np.float32(numbers["scaling"])
    rows, columns = np.divmod(_places((weight.shape[0], weight.shape[1]), spectrum.size, numbers), weight.shape[1])
    low = _daubechies(_DAUBECHIES[str(numbers["wavelet_family"]).lower()]) if numbers["use_idwt"] else np.ones(2)
    # peft puts the weight's places into the middle of a matrix that the transform shortens again.
    padded = [size + len(low) - 2 + size % 2 for size in weight.shape] if numbers["use_idwt"] else list(weight.shape)
    margins = [(larger - size) // 2 for larger, size in zip(padded, weight.shape, strict=True)]
    dense = np.zeros(padded, np.float32)
    dense[rows + margins[0], columns + margins[1]] = spectrum
    if not numbers["use_idwt"]:
        return weight + dense * scaling
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    half = padded[0] // 2, padded[1] // 2
    top, bottom = dense[: half[0]], dense[half[0] :]
    # Bands are named by their rows first: the upper right one is high in its rows.
    rows_low = _synthesize(top[:, : half[1]].T, bottom[:, : half[1]].T, low, high).T
    rows_high = _synthesize(top[:, half[1] :].T, bottom[:, half[1] :].T, low, high).T
    delta = _synthesize(rows_low, rows_high, low, high)
    start = [(long - size) // 2 for long, size in zip(delta.shape, weight.shape, strict=True)]
    delta = delta[start[0] : start[0] + weight.shape[0], start[1] : start[1] + weight.shape[1]]
    return weight + delta * scaling


def _synthesize(low_band: Weight, high_band: Weight, low: NDArray[np.float64], high: NDArray[np.float64]) -> Weight:
    """Return the rows whose halved bands are given: each band, spread by 2 and convolved with its filter."""
    taps, count = len(low), len(low_band)
    rows = np.zeros((2 * count + taps - 2, low_band.shape[1]), np.float32)
    for tap in range(taps):
        rows[tap : tap + 2 * count - 1 : 2] += np.float32(low[tap]) * low_band + np.float32(high[tap]) * high_band
    return rows[taps - 2 : len(rows) - (taps - 2)]


def _daubechies(order: int) -> NDArray[np.float64]:
    """Return the scaling filter of Daubechies' wavelet with `order` vanishing moments, `(2 * order,)` (Ten Lectures, 6.1).

    Its polynomial is `(1 + z)^order` times the factors of the roots inside the unit circle.
    """
    roots_of_y = np.roots([math.comb(order - 1 + k, k) for k in range(order - 1, -1, -1)])
    # y = (2 - z - 1 / z) / 4, of whose two solutions one is inside.
    pairs = [np.roots([1, 4 * y - 2, 1]) for y in roots_of_y]
    inside = [min(pair, key=abs) for pair in pairs]
    polynomial = np.poly([-1.0] * order + inside).real
    return np.asarray(polynomial * math.sqrt(2) / polynomial.sum(), np.float64)


# ---- Elements of the weight


def shira_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether all places are inside the weight."""
    places, values = tensors["shira_indices"], tensors["shira_weight"]
    if values.ndim != 1 or places.shape != (2, values.size) or places.dtype.kind not in "iu":
        return False
    return all(not values.size or (axis.min() >= 0 and axis.max() < size) for axis, size in zip(places, shape, strict=True))


def shira_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply SHiRA (arXiv 2406.13175): changes of single elements."""
    result = weight.copy()
    np.add.at(result, tuple(tensors["shira_indices"].astype(np.int64)), f32(tensors["shira_weight"]))
    return result


def supertuning_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether all places are inside the weight, and the factors of the hybrid, if any, have its shape."""
    places, values = tensors["supertuning_indices"], tensors["supertuning_values"]
    if values.ndim != 1 or places.shape != values.shape or places.min() < 0 or places.max() >= math.prod(shape):
        return False
    first, second = (tensors.get(f"supertuning_lora_{half}.weight") for half in "AB")
    if first is None or second is None:
        return first is second
    return first.ndim == second.ndim == 2 and (second.shape, first.shape) == ((shape[0], len(first)), (len(first), shape[1]))


def supertuning_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply Supertuning: changes of the elements that were largest or smallest, and in its hybrid a LoRA."""
    result = np.ascontiguousarray(weight).copy()
    np.add.at(result.reshape(-1), tensors["supertuning_indices"].astype(np.int64), f32(tensors["supertuning_values"]))
    if (first := tensors.get("supertuning_lora_A.weight")) is not None:
        result += np.float32(float(numbers["lora_alpha"] or 0) / len(first)) * (
            f32(tensors["supertuning_lora_B.weight"]) @ f32(first)
        )
    return result
