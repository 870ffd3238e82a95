"""One alpha and one rank for all pairs of a file, with differences folded into the factors such that they can be recovered.

Formats with one scale for all modules (GGUF, MLX, the trainers) get the one that most modules need; for the others, the
quotient is multiplied into `lora_B`. Multiplication by a power of two is exact in any dtype. Otherwise `lora_B` becomes
float32, from which a source in 16 bits can be recovered bit for bit by division, and one in float32 up to its last place,
whose difference is then recorded. All of this is checked on the numbers. Smaller ranks are padded with zeros.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Loss, TensorLoss
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.lazy_imports import np

# Replaces a factor of 0 where other modules need a scale: exact in float32, and below the rounding of any sum.
ALMOST_NOTHING = 2.0**-100


@dataclass(frozen=True)
class Plan:
    """The number that the file gets, as the float it is stored as, and the factor of each target's `lora_B`."""

    common: float
    factors: dict[str, float]
    notes: tuple[str, ...] = ()


def plan(numbers: Mapping[str, float], dtype: np.dtype, quantity: str) -> Plan | None:
    """Choose the most common of the numbers that the targets need.

    Args:
        numbers: Target to the number (alpha or scale) that is right for it.
        dtype: The type that the file stores the number as.
        quantity: What errors and notes call the number.

    Returns:
        The plan; None if all numbers are 0.

    Raises:
        RefusedError: `dtype` cannot hold the number.
    """
    counts = Counter(number for number in numbers.values() if number)
    if not counts:
        return None
    # Ties are broken by the numbers themselves, so that the order of the modules does not matter.
    most_common = max(counts, key=lambda number: (counts[number], abs(number), number))
    common = float(np.array(most_common, dtype))
    if not math.isfinite(common) or abs(common) < 1e-30:
        raise RefusedError("", f"a {dtype} cannot hold the {quantity} {most_common}")
    notes = [] if common == most_common else [f"{quantity} {most_common} is stored as the {dtype} {common}"]
    factors = {t: 1.0 if n == most_common else n / common if n else ALMOST_NOTHING for t, n in numbers.items()}
    if not all(numbers.values()):
        notes.append(f"modules with {quantity} 0 are multiplied by 2^-100, which rounds away next to the others")
    return Plan(common, factors, tuple(notes))


@dataclass(frozen=True, eq=False, slots=True)
class FoldedFactor:
    """`lora_B` times a factor, with what is lost by the multiplication.

    Attributes:
        lora_B: The product.
        loss: Its line of the loss report.
        ulps: If division does not recover `lora_B` exactly, by how many units in the last place each element is off: -1, 0
            or 1 in int8, in the shape of `lora_B`; else None.
    """

    lora_B: np.ndarray
    loss: TensorLoss
    ulps: np.ndarray | None = None


def fold(name: str, lora_B: np.ndarray, factor: float) -> FoldedFactor:
    """Return `factor * lora_B`, in its own dtype if that is exact, else in float32; `name` is used in the report."""
    if factor == 1.0:
        return FoldedFactor(lora_B, TensorLoss(name, Loss.EXACT))
    source_dtype = lora_B.dtype
    # A mantissa of one half marks a power of two.
    for dtype in (source_dtype, dtypes.F32) if math.frexp(factor)[0] in (0.5, -0.5) else (dtypes.F32,):
        result = _scale(lora_B, factor, dtype)
        restored = unfold(result, factor, source_dtype)
        if restored.tobytes() == lora_B.tobytes():
            return FoldedFactor(result, TensorLoss(name, Loss.EXACT, f"times {factor:.9g}, recoverable bit for bit"))
    if not np.isfinite(result).all():
        raise RefusedError(name, f"times {factor:.9g} does not fit into float32")
    note = f"times {factor:.9g} in float32, each element within 2^-24 of itself"
    # `source_config` stores a correction of at most one place, in two bits.
    if source_dtype != dtypes.F32 or np.abs(ulps := _float_bits(lora_B).astype(np.int64) - _float_bits(restored)).max() > 1:
        return FoldedFactor(result, TensorLoss(name, Loss.ROUNDED, note, 2.0**-24))
    return FoldedFactor(result, TensorLoss(name, Loss.EXACT, f"{note}, recoverable bit for bit"), ulps.astype(np.int8))


def unfold(array: np.ndarray, factor: float, dtype: np.dtype, ulps: np.ndarray | None = None) -> np.ndarray:
    """Return the inverse of `fold`, in the source's dtype."""
    result = _scale(array, 1.0, dtype, divisor=factor)
    return result if ulps is None else (_float_bits(result) + ulps).view(dtypes.F32)


def pad(array: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Return `array` padded with zeros to `rank` along `axis`; `array` itself, possibly a view, if it has that size."""
    missing = rank - array.shape[axis]
    if not missing:
        return array
    shape = list(array.shape)
    shape[axis] = missing
    return np.concatenate([array, np.zeros(shape, array.dtype)], axis)


def padded_loss(line: TensorLoss, rank: int) -> TensorLoss:
    """Return the report's line of a tensor that was also padded."""
    note = f"padded with zeros to rank {rank}, recoverable bit for bit" + (f"; {line.note}" if line.note else "")
    return TensorLoss(line.name, max(line.loss, Loss.REWRITTEN), note, line.error)


def _float_bits(array: np.ndarray) -> np.ndarray:
    """Return float32 numbers as integers, whose difference counts the floats between two numbers of the same sign."""
    return np.ascontiguousarray(array).view(np.int32)


def _scale(array: np.ndarray, factor: float, dtype: np.dtype, *, divisor: float = 1.0) -> np.ndarray:
    # Through float64: one rounding, whatever the types.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result: np.ndarray = (array.astype(np.float64) * factor / divisor).astype(dtype)
    return result
