"""Numbers as bytes: rows of a tensor in one of the types of safetensors or GGUF, to float32 and back.

GGUF's blocks go through the numpy code of the gguf package, which gives the bytes of ggml's reference quantisers
(`ggml-quants.c`, `quantize_row_q4_0_ref` and the like); of K-quants and IQ types it can only read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.errors import MissingExtraError, RefusedError
from adapterhub_converters.files.gguf_file import TYPES

from .rounding import LARGEST, fits, narrow, widen

F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

QUANTISERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""What a tensor can be quantised to here, byte for byte as llama.cpp's own reference quantisers do it."""
_FLOATS = {"F32": dtypes.F32, "F16": dtypes.F16, "BF16": dtypes.BF16}
# The scale of a block is a float16, and so is the minimum of Q4_1 and Q5_1.
_LARGEST_SCALE = 65504.0


class Kind(Protocol):
    """A type of tensors."""

    @property
    def name(self) -> str:
        """As the file's format spells it."""

    @property
    def quantised(self) -> bool:
        """Whether a number depends on others in its block."""

    @property
    def largest(self) -> float:
        """The largest magnitude it holds."""

    def row_size(self, columns: int) -> int:
        """Bytes of a row."""

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """Write the numbers of `raw` `(rows, row_size)` into `out` `(rows, columns)`."""

    def encode(self, wide: F32Array, raw: Bytes) -> None:
        """The inverse; rounds."""

    def fits(self, wide: F32Array) -> bool:
        """Whether every number stays finite in it; a NaN does not."""


@dataclass(frozen=True)
class Floats:
    """bfloat16, float16 or float32."""

    name: str
    dtype: np.dtype
    quantised: bool = False

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return LARGEST[self.dtype]

    def row_size(self, columns: int) -> int:
        """Bytes of a row."""
        return columns * self.dtype.itemsize

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """Exact."""
        widen(raw.view(self.dtype), out)

    def encode(self, wide: F32Array, raw: Bytes) -> None:
        """To nearest, ties to even."""
        narrow(wide, raw.view(self.dtype))

    def fits(self, wide: F32Array) -> bool:
        """Whether every number stays finite in it."""
        return fits(wide, self.dtype)


@dataclass(frozen=True)
class Blocks:
    """A quantised type of GGUF."""

    name: str
    quantised: bool = True
    largest: float = _LARGEST_SCALE

    def row_size(self, columns: int) -> int:
        """Bytes of a row."""
        _, block, width = TYPES[self.name]
        return columns // block * width

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """As ggml dequantises."""
        if not out.size:
            return
        dequantise, _, kinds = _quants(self.name)
        np.copyto(out, dequantise(raw, kinds[self.name]))

    def encode(self, wide: F32Array, raw: Bytes) -> None:
        """As ggml's reference quantises."""
        if not wide.size:
            return
        _, quantise, kinds = _quants(self.name)
        with np.errstate(all="ignore"):
            np.copyto(raw, quantise(wide, kinds[self.name]))

    def fits(self, wide: F32Array) -> bool:
        """Whether the scales stay finite."""
        return not wide.size or bool(wide.max() <= self.largest and wide.min() >= -self.largest)


@lru_cache(maxsize=1)
def _package() -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize, quants.quantize, GGMLQuantizationType


def _quants(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    try:
        return _package()
    except ImportError as error:
        raise MissingExtraError(name, "reading and writing this type needs the gguf package", "pip install gguf") from error


def kind(name: str) -> Kind | None:
    """The type of this name, of safetensors or GGUF; None when it is no type of weights to compute with."""
    if name in _FLOATS:
        return Floats(name, _FLOATS[name])
    return Blocks(name) if name in TYPES and TYPES[name][1] > 1 else None


def writable(name: str, columns: int, where: str) -> Kind:
    """The type of this name for rows of `columns`; RefusedError when it cannot be written, or not for such rows."""
    found = kind(name)
    if found is None or (found.quantised and name not in QUANTISERS):
        can = ", ".join(one.lower() for one in QUANTISERS)
        raise RefusedError(
            where,
            f"is {name} in the base, to which nothing here can quantise",
            f"Choose what becomes of such tensors: --requantise {can.replace(', ', '|')} or --dtype bf16|f16|f32",
        )
    if found.quantised and columns % TYPES[name][1]:
        raise RefusedError(where, f"rows of {columns} numbers are no whole blocks of {name}", "Choose --dtype f16")
    return found
