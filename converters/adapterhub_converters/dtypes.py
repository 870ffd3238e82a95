"""Element types: the names in safetensors and their numpy dtypes.

`ml_dtypes` adds the types that models use and numpy lacks. Types narrower than a byte (F4, F6) have a width but no numpy dtype:
their bytes can be hashed, sized, and copied, but not used in computations.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

F64 = np.dtype("<f8")
F32 = np.dtype("<f4")
F16 = np.dtype("<f2")
BF16 = np.dtype(ml_dtypes.bfloat16)

# The names and widths of safetensors 0.8, `tensor.rs`, enum Dtype.
NUMPY: dict[str, np.dtype] = {
    "F64": F64,
    "F32": F32,
    "F16": F16,
    "BF16": BF16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
BITS: dict[str, int] = {name: dtype.itemsize * 8 for name, dtype in NUMPY.items()} | {
    "C64": 64,  # no numpy dtype: converted to real numbers, half of each would be lost
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_NAMES = {dtype: name for name, dtype in NUMPY.items()}

FLOATS = ("F64", "F32", "F16", "BF16")


def name_of(dtype: np.dtype) -> str:
    """Return the safetensors name of a numpy dtype (`BF16` for `ml_dtypes.bfloat16`); KeyError for other dtypes."""
    # The table has little-endian dtypes only.
    return _NAMES[dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype]
