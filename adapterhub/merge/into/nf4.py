"""NF4 with double quantisation in numpy: what a weight was in training, as bitsandbytes' code makes it.

A block of 64 weights is divided by its largest magnitude and each quotient replaced by the nearest of 16 codes; the
magnitudes, less their mean, are quantised to 8 bits in blocks of 256 (QLoRA, arXiv 2305.14314, section 3; bitsandbytes
0.49, `functional.py`, `quantize_4bit`, and `backends/cpu`). torch sums the mean in an order of its own, so that its last
bit may differ here, and with it, rarely, one of the 8-bit magnitudes by a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.errors import RefusedError

from .running import TILE, Buffer, Opened, Source
from .stored import Kind

F32Array = NDArray[np.float32]

BLOCK = 64  # weights that share one magnitude
NESTED_BLOCK = 256  # magnitudes that share one

# QLoRA, appendix E, as bitsandbytes spells the values (`functional.py`, `get_4bit_type`).
CODE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_BOUNDS = (CODE[:-1] + CODE[1:]) / np.float32(2)


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


def magnitudes(values: F32Array) -> F32Array:
    """The largest magnitude of each block of 64 of `values`, flat; a last block may be short."""
    flat = values.reshape(-1)
    padded = np.concatenate([flat, np.zeros(-flat.size % BLOCK, np.float32)]) if flat.size % BLOCK else flat
    found: F32Array = np.abs(padded.reshape(-1, BLOCK)).max(axis=1)
    return found


def restored(largest: F32Array) -> F32Array:
    """Magnitudes as they come back from their own 8-bit form."""
    offset = np.float32(largest.mean(dtype=np.float64))
    shifted = largest - offset
    blocks = np.concatenate([shifted, np.zeros(-shifted.size % NESTED_BLOCK, np.float32)]).reshape(-1, NESTED_BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    quotients = np.clip(blocks * (np.float32(1) / np.maximum(scale, np.float32(1e-38))), -1, 1)
    steps = ((quotients + np.float32(1)) * np.float32(0.5 * 65535) + np.float32(0.5)).astype(np.int32)
    codes = np.where(scale > 0, _steps()[steps], 0)
    back: F32Array = (dynamic_map()[codes] * scale).reshape(-1)[: largest.size] + offset
    return back


def through(values: F32Array, largest: F32Array, back: F32Array) -> F32Array:
    """`values` (flat, whole blocks but for a last short one) as they come back; `largest` and `back` of their blocks."""
    count = values.size
    padded = np.concatenate([values, np.zeros(-count % BLOCK, np.float32)]) if count % BLOCK else values
    blocks = padded.reshape(-1, BLOCK)
    safe = np.maximum(largest, np.float32(1e-38))[:, None]
    quotients = blocks * (np.float32(1) / safe)
    if count % BLOCK:
        quotients[-1] = blocks[-1] / safe[-1]
    codes = np.searchsorted(_BOUNDS, np.clip(quotients, -1, 1), side="left")
    found: F32Array = (CODE[codes] * back[:, None]).reshape(-1)[:count]
    return found


def sampled(values: F32Array) -> F32Array:
    """Rows of a tensor as they come back, the mean of magnitudes being that of these rows."""
    largest = magnitudes(values)
    return through(values.reshape(-1), largest, restored(largest)).reshape(values.shape)


@dataclass(eq=False)
class ThroughNF4:
    """A weight as training in NF4 saw it: quantised, dequantised, and rounded to the base's own type."""

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
        return largest, restored(largest)
