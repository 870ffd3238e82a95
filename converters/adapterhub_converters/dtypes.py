"""Element types: the names in safetensors and their numpy dtypes.

`ml_dtypes` adds the types that models use and numpy lacks; it is imported when the first of them is needed. Types narrower than
a byte (F4, F6) have a width but no numpy dtype: their bytes can be hashed, sized, and copied, but not used in computations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

F64: np.dtype = np.dtype("<f8")
F32: np.dtype = np.dtype("<f4")
F16: np.dtype = np.dtype("<f2")
if TYPE_CHECKING:
    BF16: np.dtype

# The names and widths of safetensors 0.8, `tensor.rs`, enum Dtype.
_OF_NUMPY: dict[str, np.dtype] = {
    "F64": F64,
    "F32": F32,
    "F16": F16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_OF_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_NAMES = {dtype: name for name, dtype in _OF_NUMPY.items()}
_NAMES_OF_ML_DTYPES = {dtype_name: name for name, dtype_name in _OF_ML_DTYPES.items()}


class _NumpyDtypes(Mapping[str, np.dtype]):
    """The numpy dtype of each name that has one."""

    def __getitem__(self, name: str) -> np.dtype:
        if name in _OF_NUMPY:
            return _OF_NUMPY[name]
        added_name = _OF_ML_DTYPES[name]
        import ml_dtypes

        dtype: np.dtype = np.dtype(getattr(ml_dtypes, added_name))
        return dtype

    def __contains__(self, name: object) -> bool:
        return name in _OF_NUMPY or name in _OF_ML_DTYPES

    def __iter__(self) -> Iterator[str]:
        return iter((*_OF_NUMPY, *_OF_ML_DTYPES))

    def __len__(self) -> int:
        return len(_OF_NUMPY) + len(_OF_ML_DTYPES)


NUMPY: Mapping[str, np.dtype] = _NumpyDtypes()
BITS: dict[str, int] = {name: dtype.itemsize * 8 for name, dtype in _OF_NUMPY.items()} | {
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "C64": 64,  # no numpy dtype: converted to real numbers, half of each would be lost
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}

FLOATS = ("F64", "F32", "F16", "BF16")


def __getattr__(name: str) -> np.dtype:
    if name == "BF16":
        return NUMPY[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def name_of(dtype: np.dtype) -> str:
    """Return the safetensors name of a numpy dtype (`BF16` for `ml_dtypes.bfloat16`); KeyError for other dtypes."""
    # The table has little-endian dtypes only.
    dtype = dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype
    return _NAMES[dtype] if dtype in _NAMES else _NAMES_OF_ML_DTYPES[dtype.name]
