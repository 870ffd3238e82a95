"""NF4 with double quantization in numpy: the bytes that bitsandbytes makes of a weight, and what comes back of them.

A block of 64 weights is divided by its largest magnitude and each quotient replaced by the nearest of 16 codes, two to a
byte, the first in the high half; the magnitudes, less their mean, are quantized to 8 bits in blocks of 256 (QLoRA, arXiv
2305.14314, section 3; bitsandbytes 0.50, `functional.py`, `quantize_4bit`, and `backends/cpu`). The mean is torch's (`mean`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.bases.bitsandbytes import BLOCK, NESTED_BLOCK, NF4_CODE
from adapterhub_converters.errors import RefusedError

from .arithmetic import mean
from .output_files import TILE
from .tensor_io import Buffer, Kind, Opened, Source

F32Array = NDArray[np.float32]

CODE = np.array(NF4_CODE, np.float32)
_BOUNDS = (CODE[:-1] + CODE[1:]) / np.float32(2)
_ZERO = 7  # the code of 0
_LEAST = np.float32(1e-38)  # what bitsandbytes divides by instead of zero
_CHUNK = 1 << 18  # weights looked at at a time: their intermediates stay in the cache


@cache
def dynamic_map() -> F32Array:
    """The 256 values of the 8-bit dynamic type, ascending (arXiv 2110.02861; bitsandbytes' `create_dynamic_map`)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent + 1
        # torch.linspace goes from both ends, in fused multiply-adds.
        step = float(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count - 1)))
        places = range(count)
        low, high = float(np.float32(0.1)), count - 1
        bounds = np.array([low + step * i if i < count // 2 else 1.0 - step * (high - i) for i in places], np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scale = np.float32(10.0 ** (exponent - 6))
        values += [float(value) for value in scale * means] + [float(-value) for value in scale * means]
    return np.array(sorted(values), np.float32)


@cache
def _steps() -> NDArray[np.uint8]:
    """The index of the nearest of the 256 values for each of 65536 steps over [-1, 1], as bitsandbytes' kernel has it."""
    steps = (np.arange(65536, dtype=np.float64) * (2 / 65535) - 1).astype(np.float32)
    codes = dynamic_map()
    above = np.clip(np.searchsorted(codes, steps), 1, 255)
    below = np.abs(steps - codes[above - 1]) <= np.abs(codes[above] - steps)
    found: NDArray[np.uint8] = (above - below).astype(np.uint8)
    return found


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """The largest magnitudes of all blocks of a weight in their own 8-bit form.

    Attributes:
        codes: uint8 `(blocks,)`, indices into `dynamic_map`.
        scales: float32 `(ceil(blocks / 256),)`, what those values are multiplied by.
        offset: The mean magnitude, which is added.
    """

    codes: NDArray[np.uint8]
    scales: F32Array
    offset: np.float32

    def restored(self) -> F32Array:
        """Float32 `(blocks,)`."""
        scales = np.repeat(self.scales, NESTED_BLOCK)[: self.codes.size]
        back: F32Array = dynamic_map()[self.codes] * scales + self.offset
        return back


def magnitudes(values: F32Array) -> F32Array:
    """The largest magnitude of each block of 64 of `values`, flat; a last block may be short."""
    found: F32Array = np.abs(_blocks(values.reshape(-1))).max(axis=1, initial=0)
    if values.size % BLOCK:
        found[-1] = max(found[-1], _LEAST)  # bitsandbytes does so in a short block alone
    return found


def quantized(largest: F32Array) -> Magnitudes:
    """The magnitudes of a whole weight in 8 bits."""
    offset = mean(largest)
    shifted = largest - offset
    blocks = np.concatenate([shifted, np.zeros(-shifted.size % NESTED_BLOCK, np.float32)]).reshape(-1, NESTED_BLOCK)
    scales = np.abs(blocks).max(axis=1)
    with np.errstate(all="ignore"):
        quotients = np.nan_to_num(np.clip(blocks * (np.float32(1) / scales)[:, None], -1, 1))
    steps = ((quotients + np.float32(1)) * np.float32(0.5 * 65535) + np.float32(0.5)).astype(np.int32)
    codes = np.where(scales[:, None] > 0, _steps()[steps], np.uint8(0))
    return Magnitudes(codes.reshape(-1)[: largest.size], scales, offset)


def codes_of(values: F32Array, largest: F32Array) -> NDArray[np.uint8]:
    """The index of the nearest of the 16 codes of each of `values`, flat; `largest` of their blocks."""
    found = np.empty(values.size, np.uint8)
    for start in range(0, values.size, _CHUNK):
        some = values[start : start + _CHUNK]
        quotients = _quotients(some, largest[start // BLOCK : start // BLOCK - (-some.size // BLOCK)])
        codes = np.zeros(some.size, np.uint8)
        for bound in _BOUNDS:  # fifteen comparisons beat a search
            codes += (quotients > bound).view(np.uint8)
        found[start : start + _CHUNK] = codes
    return found


def packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes a byte; a last one without a partner is beside that of zero."""
    pairs = np.append(codes, np.full(codes.size % 2, _ZERO, np.uint8)).reshape(-1, 2)
    found: NDArray[np.uint8] = (pairs[:, 0] << np.uint8(4)) | pairs[:, 1]
    return found


def _blocks(values: F32Array) -> F32Array:
    padded = np.concatenate([values, np.zeros(-values.size % BLOCK, np.float32)]) if values.size % BLOCK else values
    return padded.reshape(-1, BLOCK)


def _quotients(values: F32Array, largest: F32Array) -> F32Array:
    """In bitsandbytes' own arithmetic: times the reciprocal, but in a last block that isn't full divided."""
    safe = np.maximum(largest, _LEAST)[:, None]
    blocks = _blocks(values)
    quotients: F32Array = blocks * np.reciprocal(safe)
    if values.size % BLOCK:
        quotients[-1] = blocks[-1] / safe[-1]
    return quotients.reshape(-1)[: values.size]


def through(values: F32Array, largest: F32Array, back: F32Array) -> F32Array:
    """`values` (flat, whole blocks but for a last short one) as they come back; `largest` and `back` of their blocks."""
    codes = codes_of(values, largest)
    found: F32Array = CODE[codes] * np.repeat(back, BLOCK)[: values.size]
    return found


def sampled(values: F32Array) -> F32Array:
    """Rows of a tensor as they come back, the mean of magnitudes being that of these rows."""
    largest = magnitudes(values)
    return through(values.reshape(-1), largest, quantized(largest).restored()).reshape(values.shape)


@dataclass(eq=False)
class ThroughNF4:
    """A weight as training in NF4 saw it: quantized, dequantized, and rounded to the base's own type."""

    name: str
    inner: Source
    kind: Kind

    @property
    def rows(self) -> int:
        """Those of the weight."""
        return self.inner.rows

    @property
    def columns(self) -> int:
        """Those of the weight."""
        return self.inner.columns

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Rows from whole blocks, of which the first and the last may begin or end in other rows."""
        largest, back = self._magnitudes(opened, buffer)
        step = BLOCK // math.gcd(BLOCK, self.columns)
        first, last = start // step * step, min(-(-stop // step) * step, self.rows)
        values = np.empty((last - first, self.columns), np.float32)
        self.inner.read(opened, first, last, values, buffer)
        block = first * self.columns // BLOCK
        blocks = slice(block, block - (-values.size // BLOCK))
        seen = through(values.reshape(-1), largest[blocks], back[blocks]).reshape(values.shape)
        raw = np.empty((last - first, self.kind.row_size(self.columns)), np.uint8)
        self.kind.encode(seen, raw)
        self.kind.decode(raw, seen)
        np.copyto(out, seen[start - first : stop - first])

    def _magnitudes(self, opened: Opened, buffer: Buffer) -> tuple[F32Array, F32Array]:
        """Of all blocks: the mean needs every one, so that the tensor is read twice."""
        found: tuple[F32Array, F32Array] = opened.held(f"nf4 {self.name}", lambda: self._measure(opened, buffer))
        return found

    def _measure(self, opened: Opened, buffer: Buffer) -> tuple[F32Array, F32Array]:
        step = BLOCK // math.gcd(BLOCK, self.columns)
        step *= max(1, TILE // (step * self.columns))
        found = []
        for start in range(0, self.rows, step):
            values = np.empty((min(step, self.rows - start), self.columns), np.float32)
            self.inner.read(opened, start, start + len(values), values, buffer)
            found.append(magnitudes(values))
        largest = np.concatenate(found)
        if not np.isfinite(largest).all():
            raise RefusedError(self.name, "the base has NaN or Inf in it, which NF4 cannot say")
        return largest, quantized(largest).restored()
