"""NF4 with double quantization in numpy: the bytes that bitsandbytes makes of a weight, and their dequantized numbers.

A block of 64 weights is divided by its largest magnitude and each quotient replaced by the nearest of 16 codes, two to a byte,
the first in the high half; the magnitudes, minus their mean, are quantized to 8 bits in blocks of 256 (QLoRA, arXiv 2305.14314,
section 3; bitsandbytes 0.50, `functional.py`, `quantize_4bit`, and `backends/cpu`). The mean has the bits of torch's in one
thread.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.bases.bitsandbytes_state import BLOCK, NESTED_BLOCK, NF4_CODE
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .output_files import TILE
from .tensor_files import Buffer, OpenFiles, TensorSource
from .tensor_types import Kind

F32Array = NDArray[np.float32]

CODE = np.array(NF4_CODE, np.float32)
_BOUNDS = (CODE[:-1] + CODE[1:]) / np.float32(2)
_ZERO = 7  # the code of 0
_MIN_DIVISOR = np.float32(1e-38)  # bitsandbytes' divisor in place of zero
_CHUNK = 1 << 18  # weights processed at a time: their intermediates stay in the cache

# The constants of torch's sum, see `mean`.
_LANES = 8  # numbers in a vector
_CHAINS = 4  # vectors summed side by side
_MIN_BITS = 4  # log2 of the shortest block


@cache
def dynamic_map() -> F32Array:
    """Return the 256 values of the 8-bit dynamic type, ascending (arXiv 2110.02861; bitsandbytes' `create_dynamic_map`)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent + 1
        # torch.linspace runs from both ends, in fused multiply-adds.
        step = float(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count - 1)))
        low, high = float(np.float32(0.1)), count - 1
        bounds = np.array([low + step * i if i < count // 2 else 1.0 - step * (high - i) for i in range(count)], np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scale = np.float32(10.0 ** (exponent - 6))
        values += [float(value) for value in scale * means] + [float(-value) for value in scale * means]
    return np.array(sorted(values), np.float32)


@cache
def _dynamic_codes() -> NDArray[np.uint8]:
    """Return the index of the nearest of the 256 values for each of 65536 steps over [-1, 1], as in bitsandbytes' kernel."""
    steps = (np.arange(65536, dtype=np.float64) * (2 / 65535) - 1).astype(np.float32)
    codes = dynamic_map()
    above = np.maximum(np.searchsorted(codes, steps), 1)
    below = np.abs(steps - codes[above - 1]) <= np.abs(codes[above] - steps)
    codes_of_steps: NDArray[np.uint8] = (above - below).astype(np.uint8)
    return codes_of_steps


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """The largest magnitudes of a weight's blocks, quantized to 8 bits.

    Attributes:
        codes: uint8 `(blocks,)`, indices into `dynamic_map`.
        scales: float32 `(ceil(blocks / 256),)`, the factors of those values.
        offset: The mean magnitude, which is added.
    """

    codes: NDArray[np.uint8]
    scales: F32Array
    offset: np.float32

    def dequantize(self) -> F32Array:
        """Return the dequantized magnitudes, float32 `(blocks,)`."""
        scales = np.repeat(self.scales, NESTED_BLOCK)[: self.codes.size]
        magnitudes: F32Array = dynamic_map()[self.codes] * scales + self.offset
        return magnitudes


def magnitudes(values: F32Array) -> F32Array:
    """Return the largest magnitude of each block of 64 of the flattened `values`; the last block may be short."""
    largest: F32Array = np.abs(_blocks(values.reshape(-1))).max(axis=1, initial=0)
    if values.size % BLOCK:
        largest[-1] = max(largest[-1], _MIN_DIVISOR)  # bitsandbytes does so only in a short block
    return largest


def quantize_magnitudes(largest: F32Array) -> Magnitudes:
    """Quantize the magnitudes of a whole weight to 8 bits."""
    offset = mean(largest)
    shifted = largest - offset
    blocks = np.concatenate([shifted, np.zeros(-shifted.size % NESTED_BLOCK, np.float32)]).reshape(-1, NESTED_BLOCK)
    scales = np.abs(blocks).max(axis=1)
    with np.errstate(all="ignore"):
        quotients = np.nan_to_num(np.clip(blocks * (np.float32(1) / scales)[:, None], -1, 1))
    steps = ((quotients + np.float32(1)) * np.float32(0.5 * 65535) + np.float32(0.5)).astype(np.int32)
    codes = np.where(scales[:, None] > 0, _dynamic_codes()[steps], np.uint8(0))
    return Magnitudes(codes.reshape(-1)[: largest.size], scales, offset)


def codes_of(values: F32Array, largest: F32Array) -> NDArray[np.uint8]:
    """Return the index of the nearest of the 16 codes for each of `values` `(n,)`; `largest` has the blocks' magnitudes."""
    all_codes = np.empty(values.size, np.uint8)
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK]
        quotients = _quotients(chunk, largest[start // BLOCK : start // BLOCK - (-chunk.size // BLOCK)])
        codes = np.zeros(chunk.size, np.uint8)
        for bound in _BOUNDS:  # fifteen comparisons beat a search
            codes += (quotients > bound).view(np.uint8)
        all_codes[start : start + _CHUNK] = codes
    return all_codes


def pack_codes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack two codes into each byte; an odd last code is paired with the code of zero."""
    pairs = np.append(codes, np.full(codes.size % 2, _ZERO, np.uint8)).reshape(-1, 2)
    pairs_in_bytes: NDArray[np.uint8] = (pairs[:, 0] << np.uint8(4)) | pairs[:, 1]
    return pairs_in_bytes


def _blocks(values: F32Array) -> F32Array:
    """Return flat values as rows of 64, the last one padded with zeros."""
    padded = np.concatenate([values, np.zeros(-values.size % BLOCK, np.float32)]) if values.size % BLOCK else values
    return padded.reshape(-1, BLOCK)


def _quotients(values: F32Array, largest: F32Array) -> F32Array:
    """Divide as bitsandbytes does: multiply by the reciprocal, except that a short last block is divided."""
    safe = np.maximum(largest, _MIN_DIVISOR)[:, None]
    blocks = _blocks(values)
    quotients: F32Array = blocks * np.reciprocal(safe)
    if values.size % BLOCK:
        quotients[-1] = blocks[-1] / safe[-1]
    return quotients.reshape(-1)[: values.size]


def round_trip(values: F32Array, largest: F32Array, restored: F32Array) -> F32Array:
    """Quantize and dequantize `values`.

    Args:
        values: `(n,)`, whole blocks except for a short last one.
        largest: The magnitudes of these blocks.
        restored: The same magnitudes after their own quantization.
    """
    codes = codes_of(values, largest)
    dequantized: F32Array = CODE[codes] * np.repeat(restored, BLOCK)[: values.size]
    return dequantized


def round_trip_sample(values: F32Array) -> F32Array:
    """Quantize and dequantize rows of a tensor, with the mean of their own magnitudes in place of the whole tensor's."""
    largest = magnitudes(values)
    return round_trip(values.reshape(-1), largest, quantize_magnitudes(largest).dequantize()).reshape(values.shape)


@dataclass(eq=False)
class ThroughNF4:
    """A weight as training in NF4 saw it: quantized, dequantized, and rounded to the base's own type."""

    name: str
    inner: TensorSource
    kind: Kind

    @property
    def rows(self) -> int:
        """The number of rows of the weight."""
        return self.inner.rows

    @property
    def columns(self) -> int:
        """The number of columns of the weight."""
        return self.inner.columns

    @property
    def _step(self) -> int:
        """The least number of rows that make whole blocks."""
        return BLOCK // math.gcd(BLOCK, self.columns)

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read the rows, computed together with those before and after that share a block with them."""
        largest, restored = self._magnitudes(opened, buffer)
        step = self._step
        first, last = start // step * step, min(-(-stop // step) * step, self.rows)
        values = np.empty((last - first, self.columns), np.float32)
        self.inner.read(opened, first, last, values, buffer)
        block = first * self.columns // BLOCK
        blocks = slice(block, block - (-values.size // BLOCK))
        training_rows = round_trip(values.reshape(-1), largest[blocks], restored[blocks]).reshape(values.shape)
        # bitsandbytes returns the base's own dtype, so training saw this rounding too.
        raw = np.empty((last - first, self.kind.row_size(self.columns)), np.uint8)
        self.kind.encode(training_rows, raw)
        self.kind.decode(raw, training_rows)
        np.copyto(out, training_rows[start - first : stop - first])

    def _magnitudes(self, opened: OpenFiles, buffer: Buffer) -> tuple[F32Array, F32Array]:
        """Return the magnitudes of all blocks, exact and as quantized; the mean needs all, so the tensor is read twice."""

        def load() -> tuple[F32Array, F32Array]:
            step = self._step * max(1, TILE // (self._step * self.columns))
            tiles = []
            for start in range(0, self.rows, step):
                values = np.empty((min(step, self.rows - start), self.columns), np.float32)
                self.inner.read(opened, start, start + len(values), values, buffer)
                tiles.append(magnitudes(values))
            largest = np.concatenate(tiles)
            if not np.isfinite(largest).all():
                raise RefusedError(self.name, "the base has NaN or Inf here, which NF4 cannot hold", code="non-finite")
            return largest, quantize_magnitudes(largest).dequantize()

        return opened.cached(f"nf4 {self.name}", load)


def mean(values: F32Array) -> np.float32:
    """Return the mean of `values` `(n,)`, n > 0, with every bit of torch's in one thread.

    bitsandbytes stores block magnitudes minus their mean, and a float32 sum depends on its order. torch on a CPU (2.13,
    `aten/src/ATen/native/cpu/SumKernel.cpp`, `cascade_sum`) adds eight lanes side by side, each in four chains, each chain in
    blocks of 16 or more whose sums are summed in blocks again, four levels deep; then the numbers that do not fill a vector of
    eight, and the lanes. The order is the same with AVX2 and AVX-512: torch has no wider kernel here.

    That is the order of one thread. From 32,768 numbers on (2 million weights in blocks of 64) torch splits the work evenly
    among its threads and adds up their sums, so that two threads may give a mean up to 2 units in the last place away.
    """
    return np.float32(_sum(values) / np.float32(values.size))


def _sum(values: F32Array) -> np.float32:
    """Return the sum of all values: whole vectors first, then the remaining numbers and the lanes."""
    # Fewer numbers than a vector has: torch sums them as scalars.
    if values.size < _LANES:
        return np.float32(_sum_in_chains(values.reshape(-1, 1))[0])
    in_vectors = values.size // _LANES * _LANES
    lanes = _sum_in_chains(values[:in_vectors].reshape(-1, _LANES))
    return np.float32(_sum_in_order(np.concatenate([values[in_vectors:], lanes])))


def _sum_in_chains(vectors: F32Array) -> F32Array:
    """Return the sum of `(n, width)` over n, in four chains."""
    count = len(vectors) // _CHAINS
    first, *later_chains = _sum_in_cascade(vectors[: count * _CHAINS].reshape(count, _CHAINS, vectors.shape[1]))
    return _sum_in_order(np.stack([first, *vectors[count * _CHAINS :], *later_chains]))


def _sum_in_cascade(rows: F32Array) -> F32Array:
    """Return the sum over rows in blocks of blocks of blocks; rows that fill no block are summed separately at each level."""
    step = 1 << max(_MIN_BITS, (len(rows) - 1).bit_length() // 4)
    rests = []
    for _ in range(3):
        in_blocks = len(rows) // step * step
        rests.append(_sum_in_order(rows[in_blocks:]))
        rows = _sum_in_order(np.moveaxis(rows[:in_blocks].reshape(-1, step, *rows.shape[1:]), 1, 0))
    return _sum_in_order(np.stack([*rests, _sum_in_order(rows)]))


def _sum_in_order(rows: F32Array) -> F32Array:
    """Return the sum over the first axis, from the first row to the last; zeros if there are no rows."""
    total: F32Array = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total = total + row
    return total
