"""Tensor types of safetensors and GGUF: rows of stored bytes to float32 and back.

Floats are rounded as in torch, to nearest with ties to even. GGUF's blocks are quantized by the numpy code of the gguf package,
whose bytes are those of ggml's reference quantizers (`ggml-quants.c`, `quantize_row_q4_0_ref` and the like), and K-quants by
`k_quants`; IQ types are read only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.containers.gguf_types import TYPES
from adapterhub_converters.errors import MissingExtraError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import k_quants
from .k_quants import K_QUANTS, WEIGHTED

F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

QUANTIZERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_QUANTS)
"""GGUF types that can be written, with the bytes of llama.cpp's reference quantizers."""
# What llama-quantize takes for rows that are not whole blocks of a K-quant (llama.cpp, src/llama-quant.cpp).
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FLOATS = {"F32": dtypes.F32, "F16": dtypes.F16, "BF16": dtypes.BF16}
_MAX_VALUES = {dtypes.BF16: 3.3895314e38, dtypes.F16: 65504.0, dtypes.F32: 3.4028235e38}
# The smallest magnitude that rounds to infinity: half a step above the largest finite number.
_OVERFLOW = {dtypes.BF16: (2 - 2**-8) * 2.0**127, dtypes.F16: (2 - 2**-11) * 2.0**15, dtypes.F32: np.inf}
# The scale of a block is a float16, and so is the minimum of Q4_1 and Q5_1.
_MAX_SCALE = 65504.0


class Kind(Protocol):
    """A tensor type."""

    @property
    def name(self) -> str:
        """The name in the file format."""

    @property
    def is_quantized(self) -> bool:
        """Whether a number depends on the others in its block."""

    @property
    def largest(self) -> float:
        """The largest magnitude that the type can hold."""

    def row_size(self, columns: int) -> int:
        """Return the number of bytes of a row."""

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """Write the numbers in `raw` `(rows, row_size)` to `out` `(rows, columns)`."""

    def encode(self, wide: F32Array, raw: Bytes, first: int = 0) -> None:
        """Write `wide` `(rows, columns)`, whose first row is the tensor's row `first`, to `raw`, rounded."""

    def fits(self, wide: F32Array) -> bool:
        """Return whether every number stays finite; False for a NaN."""


@dataclass(frozen=True)
class Floats:
    """bfloat16, float16 or float32."""

    name: str
    dtype: np.dtype
    is_quantized: bool = False

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return _MAX_VALUES[self.dtype]

    def row_size(self, columns: int) -> int:
        """Return the number of bytes of a row."""
        return columns * self.dtype.itemsize

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """Widen to float32; exact."""
        np.copyto(out, raw.view(self.dtype), casting="safe")

    def encode(self, wide: F32Array, raw: Bytes, first: int = 0) -> None:
        """Round to nearest, ties to even."""
        np.copyto(raw.view(self.dtype), wide, casting="unsafe")

    def fits(self, wide: F32Array) -> bool:
        """Return whether every number stays finite."""
        # Sums are in float32, where one that does not fit is infinite already. With a NaN, both comparisons are false.
        limit = _OVERFLOW[self.dtype]
        return not wide.size or bool(wide.max() < limit and wide.min() > -limit)


@dataclass(frozen=True)
class Blocks:
    """A quantized type of GGUF.

    Attributes:
        importance: How much the columns count, `(experts, columns)`; one row for a tensor without experts.
        rows_per_expert: The number of rows of an expert.
    """

    name: str
    is_quantized: bool = True
    largest: float = _MAX_SCALE
    importance: F32Array | None = field(default=None, compare=False)
    rows_per_expert: int = 0

    def row_size(self, columns: int) -> int:
        """Return the number of bytes of a row."""
        _, block, width = TYPES[self.name]
        return columns // block * width

    def decode(self, raw: Bytes, out: F32Array) -> None:
        """Dequantize as ggml does."""
        if out.size:
            dequantize, _, kinds = _quantizers(self.name)
            np.copyto(out, dequantize(raw, kinds[self.name]))

    def encode(self, wide: F32Array, raw: Bytes, first: int = 0) -> None:
        """Quantize as ggml's reference quantizers do, or with importance as its weighted ones do."""
        if wide.size and self.importance is not None and self.name in WEIGHTED:
            # Rows of several experts may come together; each expert has its own importance.
            at = 0
            while at < len(wide):
                expert = (first + at) // self.rows_per_expert
                stop = min(len(wide), (expert + 1) * self.rows_per_expert - first)
                np.copyto(raw[at:stop], k_quants.quantize_weighted(wide[at:stop], self.name, self.importance[expert]))
                at = stop
        elif wide.size and self.name in K_QUANTS:
            np.copyto(raw, k_quants.quantize(wide, self.name))
        elif wide.size:
            _, quantize, kinds = _quantizers(self.name)
            with np.errstate(all="ignore"):
                np.copyto(raw, quantize(wide, kinds[self.name]))

    def fits(self, wide: F32Array) -> bool:
        """Return whether the scales stay finite."""
        return not wide.size or bool(wide.max() <= self.largest and wide.min() >= -self.largest)


_Quantizers = tuple[Callable[..., F32Array], Callable[..., Bytes], Any]
"""`dequantize` and `quantize` of the gguf package, and its enumeration of types."""


@lru_cache(maxsize=1)
def _gguf_package() -> _Quantizers:
    # Imported late: the gguf package is an extra, which only quantized types need.
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize, quants.quantize, GGMLQuantizationType


def _quantizers(name: str) -> _Quantizers:
    try:
        return _gguf_package()
    except ImportError as error:
        raise MissingExtraError(
            name, "reading and writing this type needs the gguf package", "Run `pip install gguf`"
        ) from error


def kind(name: str) -> Kind | None:
    """Return the type of this name in safetensors or GGUF; None for a type without weights to compute with (integers, …)."""
    if name in _FLOATS:
        return Floats(name, _FLOATS[name])
    return Blocks(name) if name in TYPES and TYPES[name][1] > 1 else None


def floats(dtype: str, tensor: str) -> Floats:
    """Return the type `dtype` of a folder's `tensor`; RefusedError if it is not bfloat16, float16 or float32."""
    if dtype not in _FLOATS:
        raise RefusedError(tensor, f"is {dtype}, not bfloat16, float16 or float32", "Dequantize it first")
    return Floats(dtype, _FLOATS[dtype])


def fitting(name: str, columns: int) -> str:
    """Return `name` if rows of `columns` numbers are whole blocks of it; else a type of smaller blocks, or F16."""
    suitable = next(
        (candidate for candidate in (name, _SMALLER_BLOCKS.get(name)) if candidate and columns % TYPES[candidate][1] == 0), None
    )
    return suitable or "F16"


def writable(name: str, columns: int, tensor: str) -> Kind:
    """Return the type `name` for rows of `columns` numbers.

    Raises:
        RefusedError: The type cannot be written, or not for rows of this length.
    """
    tensor_type = kind(name)
    if tensor_type is None or (tensor_type.is_quantized and name not in QUANTIZERS):
        raise RefusedError(
            tensor,
            f"is {name} in the base, a type that cannot be written",
            f"Choose a type for such tensors: {', '.join(QUANTIZERS)} or floats",
            code="type-not-writable",
            types="|".join(quantizer.lower() for quantizer in QUANTIZERS),
        )
    if tensor_type.is_quantized and columns % TYPES[name][1]:
        raise RefusedError(
            tensor, f"rows of {columns} numbers are not whole blocks of {name}", "Write F16", code="rows-not-whole-blocks"
        )
    return tensor_type
