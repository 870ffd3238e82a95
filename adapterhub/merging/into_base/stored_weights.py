"""The weights of a folder, read a tile of rows at a time: stored tensors, and numbers computed from several of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.containers.safetensors_header import TensorInfo
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .tensor_files import Buffer, F32Array, OpenFiles

Rows = Callable[[int, int], F32Array]
"""`(start, stop)` to the numbers of these rows, `(stop - start, columns)`."""
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor and its file."""

    path: Path
    info: TensorInfo

    def load(self, opened: OpenFiles) -> np.ndarray:
        """Return the whole tensor."""
        array = np.empty(self.info.size, np.uint8)
        opened.read(self.path, array, self.info.offset)
        return array.view(self._dtype()).reshape(self.info.shape)

    def rows(self, opened: OpenFiles, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of a matrix."""
        width = self.info.size // max(1, self.info.shape[0])
        array = np.empty((stop - start) * width, np.uint8)
        opened.read(self.path, array, self.info.offset + start * width)
        return array.view(self._dtype()).reshape(stop - start, -1)

    def _dtype(self) -> np.dtype:
        if self.info.dtype not in dtypes.NUMPY:
            raise RefusedError(self.info.name, f"is {self.info.dtype}, a type that cannot be computed with")
        return dtypes.NUMPY[self.info.dtype]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight whose numbers are computed from several tensors.

    Attributes:
        make: Reads what it needs of those tensors and returns a function that reads rows; cached while the weight is in use.
    """

    name: str
    rows: int
    columns: int
    make: Callable[[OpenFiles], Rows]

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read and dequantize rows `start` to `stop` into `out`."""
        rows: Rows = opened.cached(self.name, lambda: self.make(opened))
        np.copyto(out, rows(start, stop), casting="unsafe")


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of gpt-oss in MXFP4.

    `blocks` is `(experts, out, in / 32, 16)`, two codes a byte with the first in the low half; `scales` is `(experts, out, in /
    32)`, powers of two. Dequantized, the experts are `(experts, in, out)`.
    """

    name: str
    blocks: StoredTensor
    scales: StoredTensor

    @property
    def rows(self) -> int:
        """The number of rows of all experts, one after another."""
        return self.blocks.info.shape[0] * 32 * self.blocks.info.shape[2]

    @property
    def columns(self) -> int:
        """The number of outputs."""
        return self.blocks.info.shape[1]

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read rows `start` to `stop` into `out`; they may belong to several experts."""
        rows_per_expert = 32 * self.blocks.info.shape[2]
        for expert in range(start // rows_per_expert, -(-stop // rows_per_expert)):
            first, last = max(start, expert * rows_per_expert), min(stop, (expert + 1) * rows_per_expert)
            expert_rows = opened.cached(f"{self.name} {expert}", partial(self._expert, opened, expert))
            np.copyto(
                out[first - start : last - start],
                expert_rows[first - expert * rows_per_expert : last - expert * rows_per_expert],
                casting="unsafe",
            )

    def _expert(self, opened: OpenFiles, expert: int) -> np.ndarray:
        """Return one expert, `(in, out)`, in bfloat16, which represents every MXFP4 number exactly."""
        raw = self.blocks.rows(opened, expert, expert + 1).reshape(self.columns, -1)
        powers = self.scales.rows(opened, expert, expert + 1).view(np.uint8).reshape(self.columns, -1).astype(np.int32) - 127
        codes = np.stack([raw & 15, raw >> 4], axis=2).reshape(self.columns, -1, 32)
        wide = np.ldexp(_FP4[codes], powers[..., None]).astype(dtypes.BF16)
        return np.ascontiguousarray(wide.reshape(self.columns, -1).T)


@dataclass(frozen=True)
class LogicalWeight:
    """A parameter of a folder under its logical name and shape, whatever tensors store it.

    Attributes:
        dtype: The type of floats that it is dequantized to.
        place: The tensor that stores it, or its codes.
        source: Computes the numbers; None if they are stored as floats.
    """

    shape: tuple[int, ...]
    dtype: str
    place: StoredTensor
    source: PackedWeight | Experts | None
