"""From the dtype of a base to float32 and back, as torch rounds: to nearest, ties to even."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes

F32Array = NDArray[np.float32]

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
