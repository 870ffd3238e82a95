"""Element types: the names in safetensors and their numpy dtypes.

`ml_dtypes` adds the types that models use and numpy lacks; both are imported when a dtype of theirs is first needed. Types
narrower than a byte (F4, F6) have a width but no numpy dtype: their bytes can be hashed, sized, and copied, but not used in
computations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterhub_converters.lazy_imports import np

if TYPE_CHECKING:
    F64: np.dtype
    F32: np.dtype
    F16: np.dtype
    BF16: np.dtype

# The names and widths of safetensors 0.8, `tensor.rs`, enum Dtype.
_OF_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4",
    "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_OF_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_NAMES = {code: name for name, code in _OF_NUMPY.items()}
_NAMES_OF_ML_DTYPES = {dtype_name: name for name, dtype_name in _OF_ML_DTYPES.items()}


class _NumpyDtypes(Mapping[str, "np.dtype"]):
    """The numpy dtype of each name that has one."""

    def __getitem__(self, name: str) -> np.dtype:
        if name in _OF_NUMPY:
            return np.dtype(_OF_NUMPY[name])
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
BITS: dict[str, int] = {name: int(code[-1]) * 8 for name, code in _OF_NUMPY.items()} | {
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
    if name in FLOATS:
        globals()[name] = dtype = NUMPY[name]
        return dtype
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def name_of(dtype: np.dtype) -> str:
    """Return the safetensors name of a numpy dtype (`BF16` for `ml_dtypes.bfloat16`); KeyError for other dtypes."""
    # The table has little-endian dtypes only.
    code = dtype.newbyteorder("<").str if dtype.byteorder == ">" else dtype.str
    return _NAMES[code] if code in _NAMES else _NAMES_OF_ML_DTYPES[dtype.name]


def name_of_elements(array: np.ndarray | LateZeros) -> str:
    """Return the safetensors name of the dtype of an array; KeyError as `name_of`."""
    return array.dtype_name if isinstance(array, LateZeros) else name_of(array.dtype)


class LateZeros:
    """Zeros that take no memory, and no import of numpy while no more is read of them than their shape and `dtype_name`.

    For everything else they are an array, unless an operator has them on its left.
    """

    def __init__(self, dtype_name: str, shape: tuple[int, ...]) -> None:
        self.dtype_name, self.shape = dtype_name, shape
        self.ndim, self.size = len(shape), math.prod(shape)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        # One number seen through strides of 0, whatever shape a hostile header claims.
        return np.broadcast_to(np.zeros((), NUMPY[self.dtype_name] if dtype is None else dtype), self.shape)

    def __getattr__(self, name: str) -> Any:
        # numpy would prefer `__array_interface__`, which does not know the dtypes of ml_dtypes.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__array__(), name)

    def __getitem__(self, key: Any) -> Any:
        return self.__array__()[key]

    def __len__(self) -> int:
        return self.shape[0]
