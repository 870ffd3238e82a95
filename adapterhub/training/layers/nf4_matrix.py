"""NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3), byte for byte as bitsandbytes stores it.

A block of 64 weights is divided by its largest magnitude, and each quotient is replaced by the nearest of 16 codes, two to a
byte, the first in the high half. The magnitudes, less their mean, are themselves quantized to 8 bits in blocks of 256. That is
4.127 bits per weight. The reference uses torch alone and works everywhere; `dequantize` uses whatever gives the same numbers
faster: on CUDA one kernel compiled by torch, elsewhere the kernel of bitsandbytes if it is installed.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapterhub_converters.bases.bitsandbytes_state import BLOCK, NESTED_BLOCK, NF4_CODE
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

_CHUNK_WEIGHTS = 1 << 18  # weights at a time, so that intermediates stay in the processor's cache
# For more, glibc asks the system each time, which zeroes every page (mallopt(3), M_MMAP_THRESHOLD).
MAX_NEW_BYTES = 32 << 20
_buffers = threading.local()  # by dtype; of each thread its own, as several may multiply at once

CODE = torch.tensor(NF4_CODE)
_MIDPOINTS = tuple(((CODE[:-1] + CODE[1:]) / 2).tolist())


@dataclass(frozen=True, eq=False)
class NF4:
    """A quantized matrix.

    Attributes:
        packed: uint8 `(ceil(n / 2),)`, two codes per byte.
        absmax: uint8 `(ceil(n / 64),)`, each block's magnitude as an index into the 8-bit map; without double quantization
            float32, the magnitude itself.
        nested: float32 `(ceil(n / 64 / 256),)`, factors of the 8-bit values; None without double quantization.
        offset: float32 scalar, the mean magnitude; None without double quantization.
        shape: `(out_features, in_features)`, whose product is n.
    """

    packed: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The bytes in memory."""
        tensors = (self.packed, self.absmax, self.nested, self.offset)
        return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors if tensor is not None)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.packed.device

    def to(self, device: torch.device) -> NF4:
        """Return a copy on another device."""
        packed, absmax, nested, offset = (
            tensor if tensor is None else tensor.to(device) for tensor in (self.packed, self.absmax, self.nested, self.offset)
        )
        return NF4(packed, absmax, nested, offset, self.shape)


def quantize(weight: Tensor, location: str = "weight") -> NF4:
    """Quantize `weight` (float32, float16 or bfloat16, any shape).

    Raises:
        RefusedError: A value is not finite.
    """
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    magnitudes = torch.empty(-(count // -BLOCK), dtype=torch.float32)
    for start in range(0, count, _CHUNK_WEIGHTS):
        chunk = flat[start : start + _CHUNK_WEIGHTS].float()
        if chunk.numel() % BLOCK:
            # Zeros after the last weight change neither its block's magnitude nor its codes.
            chunk = torch.nn.functional.pad(chunk, (0, -chunk.numel() % BLOCK))
        blocks = chunk.view(-1, BLOCK)
        block_magnitudes = blocks.abs().amax(dim=1)
        codes = _nearest_codes(
            _quotients(blocks, block_magnitudes, last_block_size=min(count - start, _CHUNK_WEIGHTS) % BLOCK)
        ).view(-1, 2)
        pairs = (codes[:, 0] << 4) | codes[:, 1]
        first_byte = start // 2
        packed[first_byte : first_byte + pairs.numel()] = pairs[: packed.numel() - first_byte]
        magnitudes[start // BLOCK : start // BLOCK + block_magnitudes.numel()] = block_magnitudes
    if not bool(torch.isfinite(magnitudes).all()):
        raise RefusedError(location, "contains a value that is not finite, which NF4 cannot represent", code="non-finite")
    # Magnitudes are positive and the 8-bit type is symmetric: without their mean, they use all of it (section 3).
    offset = magnitudes.mean()
    absmax, nested = _quantize_8bit(magnitudes - offset)
    return NF4(packed, absmax, nested, offset, tuple(weight.shape))


def _quotients(blocks: Tensor, block_magnitudes: Tensor, last_block_size: int) -> Tensor:
    """Divide weights by their block's magnitude in bitsandbytes' own arithmetic; a block of zeros gives zeros.

    It multiplies by the reciprocal, but divides a last block that is not full (`backends/default/ops.py`, `quantize_4bit`).
    """
    divisors = block_magnitudes.clamp(min=1e-38).unsqueeze(1)
    quotients = blocks * (1.0 / divisors)
    if last_block_size:
        quotients[-1] = blocks[-1] / divisors[-1]
    return quotients.clamp_(-1, 1)


def _nearest_codes(quotients: Tensor) -> Tensor:
    """Return the index of the nearest code, uint8: the number of midpoints below. Fifteen comparisons beat a search here."""
    codes = torch.zeros(quotients.shape, dtype=torch.uint8)
    for bound in _MIDPOINTS:
        codes += quotients > bound
    return codes


@cache
def dynamic_map() -> Tensor:
    """Return the 256 values of the 8-bit dynamic type, ascending (arXiv 2110.02861; bitsandbytes' `create_dynamic_map`)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        values += (10 ** (exponent - 6) * means).tolist() + (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize_8bit(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (float32, flat) as indices into the 8-bit map, and the largest magnitude of every block of 256.

    bitsandbytes' CPU kernel looks up the index in a table of 65536 steps over [-1, 1], so very small values may get a neighbor
    of the nearest; this does the same, because those are the bytes that others store. A block of zeros is 0.
    """
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(dim=1)
    quotients = (blocks * (1.0 / largest.clamp(min=1e-38).unsqueeze(1))).clamp_(-1, 1)
    steps = ((quotients + 1) * (0.5 * 65535) + 0.5).int()
    codes = torch.where(largest.unsqueeze(1) > 0, _nearest_index_table()[steps], 0)
    return codes.view(-1)[:count], largest


@cache
def _nearest_index_table() -> Tensor:
    """Return the index of the nearest of the 256 values for each of the 65536 steps, uint8."""
    steps = torch.arange(65536, dtype=torch.float64).mul_(2 / 65535).sub_(1).float()
    codes = dynamic_map()
    above = torch.bucketize(steps, codes).clamp_(1, 255)
    nearer_below = (steps - codes[above - 1]).abs() <= (codes[above] - steps).abs()
    return (above - nearer_below.long()).to(torch.uint8)


def magnitudes(matrix: NF4) -> Tensor:
    """Return the block magnitudes, float32 `(ceil(n / 64),)`, decoded from their 8-bit form."""
    if matrix.nested is None:
        return matrix.absmax
    # An `index_select` takes a quarter of the time of `table[…]`, and nothing is copied to multiply whole blocks in place.
    values = torch.index_select(_table_on(dynamic_map, matrix.absmax.device), 0, matrix.absmax.int())
    whole_blocks = values.numel() // NESTED_BLOCK
    in_whole_blocks = whole_blocks * NESTED_BLOCK
    values[:in_whole_blocks].view(-1, NESTED_BLOCK).mul_(matrix.nested[:whole_blocks, None])
    values[in_whole_blocks:].mul_(matrix.nested[whole_blocks:])
    return values.add_(matrix.offset)


def dequantize(matrix: NF4, dtype: torch.dtype) -> Tensor:
    """Return the matrix in `dtype` (bfloat16, float16 or float32), using a kernel if there is one."""
    if matrix.device.type == "cuda" and fits_fused(matrix) and (fused := _fused_kernel(matrix.device)):
        return fused(matrix, dtype)
    kernel = _bitsandbytes_kernel()
    # If a block spans two rows, bitsandbytes' CPU kernel (0.50.2) multiplies by the magnitudes of other blocks.
    if kernel is None or matrix.shape[-1] % BLOCK:
        return dequantize_reference(matrix, dtype)
    return kernel(matrix, dtype)


def dequantize_reference(matrix: NF4, dtype: torch.dtype, buffer: Tensor | None = None) -> Tensor:
    """Return the same as `dequantize` with torch alone.

    It looks up two codes per byte in a table of 256 pairs, and multiplies by the magnitude in float32.

    Args:
        buffer: Memory for the result, `(n,)` in `dtype` for whole blocks; None for new memory.
    """
    packed, scales = matrix.packed, magnitudes(matrix)
    dense = torch.empty(len(scales) * BLOCK, dtype=dtype, device=packed.device) if buffer is None else buffer
    # On a CPU, chunks keep the intermediates in the cache.
    size = _CHUNK_WEIGHTS if packed.device.type == "cpu" else max(1, packed.numel())
    for start in range(0, packed.numel(), size):
        values = torch.index_select(_table_on(_pairs, packed.device), 0, packed[start : start + size].int()).view(torch.float32)
        if values.numel() % BLOCK:
            values = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK))
        blocks, first = values.view(-1, BLOCK), 2 * start // BLOCK
        torch.mul(
            blocks, scales[first : first + len(blocks), None], out=dense[2 * start : 2 * start + values.numel()].view_as(blocks)
        )
    return dense[: math.prod(matrix.shape)].view(matrix.shape)


@cache
def _pairs() -> Tensor:
    """Return the two codes of every byte as one 64-bit number, int64 `(256,)`; one lookup is several times faster than two."""
    byte = torch.arange(256)
    return torch.stack([CODE[byte >> 4], CODE[byte & 15]], dim=1).view(torch.int64).view(-1)


@cache
def _table_on(table: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Return a table of constants, copied once to each device."""
    return table().to(device)


def fits_fused(matrix: NF4) -> bool:
    """Return whether the fused kernel can compute a matrix: it must be doubly quantized and consist of whole blocks."""
    return matrix.nested is not None and len(matrix.absmax) * BLOCK == math.prod(matrix.shape)


def compile_dequantize(backend: str = "inductor") -> Callable[[NF4, Any], Tensor]:
    """Return `dequantize_reference` as one graph for all shapes, which torch compiles to one kernel.

    Eager torch runs seven kernels, most of which read and write the whole matrix.
    """
    # By default, kernels fuse a product and a sum and round once; the reference rounds twice.
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    compiled = torch.compile(_expand, dynamic=True, fullgraph=True, backend=backend, options=options)

    def dequantize_fused(matrix: NF4, dtype: torch.dtype) -> Tensor:
        tables = _table_on(_code, matrix.device), _table_on(dynamic_map, matrix.device), _table_on(_shifts, matrix.device)
        tensors = matrix.packed, matrix.absmax, matrix.nested, matrix.offset
        return compiled(*tensors, *tables, dtype).view(matrix.shape)

    return dequantize_fused


def _expand(*tensors: Any) -> Tensor:
    packed, absmax, nested, offset, code, values, shifts, dtype = tensors
    scales = values[absmax.int()] * nested[:, None].expand(-1, NESTED_BLOCK).reshape(-1)[: len(absmax)] + offset
    blocks = code[((packed[:, None] >> shifts) & 15).int()].view(-1, BLOCK)
    return (blocks * scales[:, None]).to(dtype)


def _code() -> Tensor:
    return CODE


def _shifts() -> Tensor:
    return torch.tensor([4, 0], dtype=torch.uint8)


@cache
def _fused_kernel(device: torch.device) -> Callable[[NF4, Any], Tensor] | None:
    """Return the fused kernel if it compiles here and gives the reference's numbers, bit for bit; None otherwise."""
    # A fixed sample of whole blocks, so that the decision is the same in every run.
    sample = quantize(torch.randn(96, 256, generator=torch.Generator().manual_seed(0))).to(device)
    try:
        function = compile_dequantize()
        dtypes = torch.float32, torch.bfloat16
        is_exact = all(torch.equal(function(sample, dtype), dequantize_reference(sample, dtype)) for dtype in dtypes)
    except Exception as error:  # noqa: BLE001 - torch, Triton or a C compiler may raise anything
        logging.getLogger(__name__).info("NF4 is not compiled for %s: %s", device, error)
        return None
    return function if is_exact else None


@cache
def _bitsandbytes_kernel() -> Callable[[NF4, Any], Tensor] | None:
    # The import of bitsandbytes warns about an optional download that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401 - registers the operators
    except (ImportError, OSError, RuntimeError):
        return None
    operator = torch.ops.bitsandbytes.dequantize_4bit.default

    def dequantize_with_kernel(matrix: NF4, dtype: torch.dtype) -> Tensor:
        return operator(matrix.packed.view(-1, 1), magnitudes(matrix), BLOCK, "nf4", matrix.shape, dtype)

    return dequantize_with_kernel


def dense(weight: Tensor | NF4, dtype: torch.dtype) -> Tensor:
    """Return the matrix itself, in `dtype`."""
    return dequantize(weight, dtype) if isinstance(weight, NF4) else weight.to(dtype)


def dense_for_one_product(weight: Tensor | NF4, dtype: torch.dtype) -> Tensor:
    """Return the same as `dense`, in memory that the next call of this thread may use again.

    On a CPU, the pages of a new large matrix take twice as long as its numbers.
    """
    count = math.prod(weight.shape)
    is_new = weight.device.type != "cpu" or count * dtype.itemsize <= MAX_NEW_BYTES or count % BLOCK
    if not isinstance(weight, NF4) or is_new:
        return dense(weight, dtype)
    buffer = getattr(_buffers, str(dtype), None)
    if buffer is None or len(buffer) < count:
        buffer = torch.empty(count, dtype=dtype)
        setattr(_buffers, str(dtype), buffer)
    return dequantize_reference(weight, dtype, buffer[:count])
