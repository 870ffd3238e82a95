"""Element-wise rules on dense pieces of all adapters at once: tiles of deltas, cores, factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = TypeVar("Array", NDArray[np.float32], NDArray[np.float64])


def trim(array: Array, least: float, most: float = float("inf")) -> Array:
    """Return `array` with zeros where the magnitude is below `least`, or not below `most`."""
    size = np.abs(array)
    result = array * (size >= least)
    if most != float("inf"):
        result *= size < most
    return result


def weighted_sum(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return `sum(weight * part)`."""
    total = parts[0] * parts[0].dtype.type(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part * part.dtype.type(weight)
    return total


def elect(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    """Elect the sign with more weight for each position, and average the elements that have it.

    `sum(w x) / sum(|w|)` over the adapters whose `w x` has the sign of `sum(w x)` (TIES, steps 2 and 3).
    """
    kind = parts[0].dtype.type
    weighted = [part * kind(weight) for part, weight in zip(parts, weights, strict=True)]
    total = weighted[0].copy()
    for part in weighted[1:]:
        total += part
    positive, negative = total > 0, total < 0
    result, share = np.zeros_like(total), np.zeros_like(total)
    for part, weight in zip(weighted, weights, strict=True):
        agrees = (part > 0) & positive | (part < 0) & negative
        result += part * agrees
        share += kind(abs(weight)) * agrees
    result /= np.where(share > 0, share, kind(1))
    return result


def elect_as_peft(parts: Sequence[Array], weights: Sequence[float], sign: Literal["total", "frequency"]) -> Array:
    """Elect signs as peft does: from the parts without their weights, with zero as plus; divide by the number that agree.

    peft 0.21, `utils/merge_utils.py`, `calculate_majority_sign_mask` and `disjoint_merge`.
    """
    votes = sum(np.sign(part) if sign == "frequency" else part for part in parts)
    wins = np.where(votes >= 0, 1, -1)
    result, count = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agrees = np.sign(part) == wins
        result += part * part.dtype.type(weight) * agrees
        count += agrees
    result /= np.maximum(count, 1)
    return result


def drop(array: Array, keep: NDArray[np.bool_], density: float) -> Array:
    """Return `array` with zeros where not kept, and the rest divided by `density`, which keeps the expectation (DARE)."""
    result = array * keep
    result /= array.dtype.type(density)
    return result


def draw_mask(random: np.random.Generator, shape: tuple[int, ...], density: float) -> NDArray[np.bool_]:
    """Return a mask that keeps each element with a probability of `density`."""
    return random.random(shape, dtype=np.float32) < np.float32(density)


def keep_probabilities(array: Array, density: float, epsilon: float) -> Array:
    """Return the probability to keep each element: `density` -+ `epsilon`, by the rank of its magnitude in its row (DELLA)."""
    wide = array.shape[1]
    steps = np.linspace(density - epsilon, density + epsilon, wide, dtype=array.dtype) if wide > 1 else np.array([density])
    result = np.empty_like(array)
    np.put_along_axis(result, np.argsort(np.abs(array), axis=1), steps[None].astype(array.dtype), axis=1)
    return result
