"""One alpha for a whole file, and the difference multiplied into `lora_B`, recoverably.

Formats with a single scale for all modules (GGUF, MLX) get the one that most modules need. Multiplying by a power of
two is exact in any dtype; otherwise `lora_B` becomes float32, from which a source in 16 bits can still be recovered
bit for bit by dividing, and one in float32 to its last place, which is then noted. All of it is checked on the numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Kept, Loss
from adapterhub_converters.errors import RefusedError

# What stands for a factor of 0 where other modules need a scale: exact in float32, and below the rounding of any sum.
ALMOST_NOTHING = 2.0**-100


@dataclass(frozen=True)
class Plan:
    """The file's number, as the float it is stored as, and what each target's `lora_B` is multiplied by."""

    common: float
    factors: dict[str, float]
    notes: tuple[str, ...] = ()


def plan(needed: Mapping[str, float], dtype: np.dtype, what: str) -> Plan | None:
    """The most common of the numbers that the targets need, stored as `dtype`; None when all are 0."""
    counts = Counter(number for number in needed.values() if number)
    if not counts:
        return None
    most = max(counts, key=lambda number: (counts[number], abs(number), number))
    common = float(np.array(most, dtype))
    if not math.isfinite(common) or abs(common) < 1e-30:
        raise RefusedError("", f"{what} of {most} is no number that a {dtype} can hold")
    notes = [] if common == most else [f"{what} {most} is stored as the {dtype} {common}"]
    factors = {t: 1.0 if n == most else n / common if n else ALMOST_NOTHING for t, n in needed.items()}
    if not all(needed.values()):
        notes.append(f"modules whose {what} is 0 are multiplied by 2^-100, which has no effect beside the others")
    return Plan(common, factors, tuple(notes))


@dataclass(frozen=True, eq=False, slots=True)
class Folded:
    """`lora_B` times a factor, what that kept of it, and, where division alone doesn't give it back, how many units in
    the last place each element is then off: -1, 0 or 1 in int8, in the shape of `lora_B`."""

    lora_B: np.ndarray
    kept: Kept
    ulps: np.ndarray | None = None


def folded(name: str, lora_B: np.ndarray, factor: float) -> Folded:
    """`factor * lora_B`: in its own dtype where that is exact, else in float32."""
    if factor == 1.0:
        return Folded(lora_B, Kept(name, Loss.EXACT))
    own = lora_B.dtype
    for dtype in (own, dtypes.F32) if math.frexp(factor)[0] in (0.5, -0.5) else (dtypes.F32,):
        result = _times(lora_B, factor, dtype)
        back = unfolded(result, factor, own)
        if back.tobytes() == lora_B.tobytes():
            return Folded(result, Kept(name, Loss.EXACT, f"times {factor:.9g}, recoverable bit for bit"))
    if not np.isfinite(result).all():
        raise RefusedError(name, f"times {factor:.9g} does not fit into float32")
    note = f"times {factor:.9g} in float32, each element within 2^-24 of itself"
    if own != dtypes.F32 or np.abs(off := _bits(lora_B).astype(np.int64) - _bits(back)).max() > 1:
        return Folded(result, Kept(name, Loss.ROUNDED, note, 2.0**-24))
    return Folded(result, Kept(name, Loss.EXACT, f"{note}, recoverable bit for bit"), off.astype(np.int8))


def unfolded(array: np.ndarray, factor: float, dtype: np.dtype, ulps: np.ndarray | None = None) -> np.ndarray:
    """The inverse of `folded`, in the source's dtype."""
    result = _times(array, 1.0, dtype, divisor=factor)
    return result if ulps is None else (_bits(result) + ulps).view(dtypes.F32)


def _bits(array: np.ndarray) -> np.ndarray:
    """float32 as the integers whose difference counts the floats between two of the same sign."""
    return np.ascontiguousarray(array).view(np.int32)


def _times(array: np.ndarray, factor: float, dtype: np.dtype, *, divisor: float = 1.0) -> np.ndarray:
    # Through float64: one rounding, whatever the types.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result: np.ndarray = (array.astype(np.float64) * factor / divisor).astype(dtype)
    return result
