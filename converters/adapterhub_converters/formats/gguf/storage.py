"""A tensor in the type that was asked for, with the largest error that this made.

llama.cpp multiplies factors of any type whose blocks divide a row (`src/llama-adapter.cpp` checks none); a row that they
don't divide stays in float16, as in its own `convert_lora_to_gguf.py`, or in float32 where float16 would overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.containers import gguf_file
from adapterhub_converters.errors import MissingExtraError, RefusedError, UsageError

CHOICES = ("source", "f32", "f16", "bf16", "q8_0", "q4_0")
_BLOCK = 32  # elements; of Q8_0 and Q4_0


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """A tensor as the file has it, the floats a reader sees, and the largest absolute error of any element."""

    data: np.ndarray | gguf_file.Packed
    seen: np.ndarray
    error: float
    note: str = ""


def stored(name: str, array: np.ndarray, dtype: str) -> Stored:
    """`array` as `dtype`, one of CHOICES; RefusedError where a number would become infinite."""
    if dtype not in CHOICES:
        raise UsageError("", f"no dtype {dtype!r} for GGUF", f"One of {', '.join(CHOICES)}")
    if dtype == "source" or dtypes.name_of(array.dtype) == dtype.upper():
        return Stored(array, array, 0.0)
    if dtype in ("q8_0", "q4_0"):
        if array.shape[-1] % _BLOCK == 0:
            return _quantized(name, array, dtype.upper())
        why = f"rows of {array.shape[-1]} are no whole blocks of {dtype.upper()} ({_BLOCK}): "
        try:
            found = stored(name, array, "f16")
        except RefusedError:
            found = stored(name, array, "f32")
        return Stored(found.data, found.seen, found.error, why + (found.note or f"stays {dtypes.name_of(array.dtype)}"))
    with np.errstate(over="ignore", under="ignore"):
        result = array.astype(dtypes.NUMPY[dtype.upper()])
    return _measured(name, array, result, result, dtype.upper())


def _measured(name: str, array: np.ndarray, data: np.ndarray | gguf_file.Packed, seen: np.ndarray, kind: str) -> Stored:
    exact, found = array.astype(np.float64), seen.astype(np.float64)
    finite = np.isfinite(exact)
    if not np.isfinite(found[finite]).all():
        largest = float(np.abs(exact[finite]).max())
        raise RefusedError(name, f"{largest:g} does not fit into {kind}", "Choose another dtype, such as bf16 or f32")
    error = float(np.abs(exact[finite] - found[finite]).max(initial=0.0))
    return Stored(data, seen, error, f"as {kind}" + (f", no element off by more than {error:.3g}" if error else ", exactly"))


def _quantized(name: str, array: np.ndarray, kind: str) -> Stored:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise MissingExtraError(name, f"writing {kind} needs the gguf package", "pip install gguf") from error
    if not np.isfinite(array).all():
        raise RefusedError(name, f"{kind} cannot hold numbers that are not finite")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        raw = quants.quantize(np.ascontiguousarray(array, np.float32), GGMLQuantizationType[kind])
        seen = quants.dequantize(raw, GGMLQuantizationType[kind])
    return _measured(name, array, gguf_file.Packed(kind, array.shape, raw), seen, kind)
