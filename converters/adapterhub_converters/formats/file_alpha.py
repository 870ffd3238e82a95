"""One alpha and one rank for all pairs of a file, with the differences moved into the factors so that they can be recovered.

Formats with one scale for all modules (GGUF, MLX, the trainers) get the one that most modules need; the others have
the quotient multiplied into `lora_B`. Multiplication by a power of two is exact in any dtype. Otherwise `lora_B`
becomes float32, from which a source in 16 bits can be recovered bit for bit by division, and one in float32 up to its
last place, which is then recorded. All of it is checked on the numbers. Smaller ranks are padded with zeros.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Loss, TensorLoss
from adapterhub_converters.errors import RefusedError

# Replaces a factor of 0 where other modules need a scale: exact in float32, and below the rounding of any sum.
ALMOST_NOTHING = 2.0**-100


@dataclass(frozen=True)
class Plan:
    """The number that the file gets, as the float it is stored as, and the factor of each target's `lora_B`."""

    common: float
    factors: dict[str, float]
    notes: tuple[str, ...] = ()


def plan(needed: Mapping[str, float], dtype: np.dtype, what: str) -> Plan | None:
    """Choose the most common of the numbers that the targets need.

    Args:
        needed: Target to the number (alpha or scale) that is right for it.
        dtype: The type that the file stores the number as.
        what: What errors and notes call the number.

    Returns:
        The plan; None if all numbers are 0.

    Raises:
        RefusedError: `dtype` cannot hold the number.
    """
    counts = Counter(number for number in needed.values() if number)
    if not counts:
        return None
    most = max(counts, key=lambda number: (counts[number], abs(number), number))
    common = float(np.array(most, dtype))
    if not math.isfinite(common) or abs(common) < 1e-30:
        raise RefusedError("", f"a {dtype} cannot hold the {what} {most}")
    notes = [] if common == most else [f"{what} {most} is stored as the {dtype} {common}"]
    factors = {t: 1.0 if n == most else n / common if n else ALMOST_NOTHING for t, n in needed.items()}
    if not all(needed.values()):
        notes.append(f"modules with {what} 0 are multiplied by 2^-100, which rounds away next to the others")
    return Plan(common, factors, tuple(notes))


@dataclass(frozen=True, eq=False, slots=True)
class Folded:
    """`lora_B` times a factor, and what that does to it.

    Attributes:
        lora_B: The product.
        loss: Its line of the loss report.
        ulps: If division does not recover `lora_B` exactly, how many units in the last place each element is then off: -1, 0
            or 1 in int8, in the shape of `lora_B`.
    """

    lora_B: np.ndarray
    loss: TensorLoss
    ulps: np.ndarray | None = None


def folded(name: str, lora_B: np.ndarray, factor: float) -> Folded:
    """`factor * lora_B`: in its own dtype if that is exact, else in float32. `name` is what the report calls it."""
    if factor == 1.0:
        return Folded(lora_B, TensorLoss(name, Loss.EXACT))
    own = lora_B.dtype
    for dtype in (own, dtypes.F32) if math.frexp(factor)[0] in (0.5, -0.5) else (dtypes.F32,):
        result = _times(lora_B, factor, dtype)
        back = unfolded(result, factor, own)
        if back.tobytes() == lora_B.tobytes():
            return Folded(result, TensorLoss(name, Loss.EXACT, f"times {factor:.9g}, recoverable bit for bit"))
    if not np.isfinite(result).all():
        raise RefusedError(name, f"times {factor:.9g} does not fit into float32")
    note = f"times {factor:.9g} in float32, each element within 2^-24 of itself"
    if own != dtypes.F32 or np.abs(off := _bits(lora_B).astype(np.int64) - _bits(back)).max() > 1:
        return Folded(result, TensorLoss(name, Loss.ROUNDED, note, 2.0**-24))
    return Folded(result, TensorLoss(name, Loss.EXACT, f"{note}, recoverable bit for bit"), off.astype(np.int8))


def unfolded(array: np.ndarray, factor: float, dtype: np.dtype, ulps: np.ndarray | None = None) -> np.ndarray:
    """The inverse of `folded`, in the source's dtype."""
    result = _times(array, 1.0, dtype, divisor=factor)
    return result if ulps is None else (_bits(result) + ulps).view(dtypes.F32)


def padded(array: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """`array` with zeros up to `rank` along `axis`; `array` itself, a view perhaps, if it has that size."""
    missing = rank - array.shape[axis]
    if not missing:
        return array
    shape = list(array.shape)
    shape[axis] = missing
    return np.concatenate([array, np.zeros(shape, array.dtype)], axis)


def padded_line(line: TensorLoss, rank: int) -> TensorLoss:
    """The report's line of a tensor that was `padded` as well."""
    note = f"padded with zeros to rank {rank}, recoverable bit for bit" + (f"; {line.note}" if line.note else "")
    return TensorLoss(line.name, max(line.loss, Loss.REWRITTEN), note, line.error)


def _bits(array: np.ndarray) -> np.ndarray:
    """float32 as integers, whose difference is the number of floats between two of the same sign."""
    return np.ascontiguousarray(array).view(np.int32)


def _times(array: np.ndarray, factor: float, dtype: np.dtype, *, divisor: float = 1.0) -> np.ndarray:
    # Through float64: one rounding, whatever the types.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result: np.ndarray = (array.astype(np.float64) * factor / divisor).astype(dtype)
    return result
