"""A weight on its way into a bitsandbytes checkpoint in NF4, a tile at a time.

The state beside the codes (`base.bitsandbytes`) holds the mean of magnitudes, which is known when the last tile is: its JSON is
padded with spaces, so that the file can be laid out before.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.base.bitsandbytes import BLOCK, NESTED_BLOCK, NF4_STATE, nf4_state
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.files.safetensors_file import byte_view

from .files import write_at
from .nf4 import CODE, codes_of, dynamic_map, magnitudes, packed, quantised, sampled

F32Array = NDArray[np.float32]

_LONGEST = 24  # characters of a float32 in JSON

Entry = tuple[str, str, tuple[int, ...]]
"""A stored tensor: its name, dtype and shape."""


@dataclass(frozen=True, eq=False)
class IntoNF4:
    """How one weight is stored.

    Attributes:
        name: Of the weight.
        shape: `(out_features, in_features)`.
        dtype: The floats that were quantised, and that come back.
        places: Byte of the file at which each stored tensor begins, by name; empty until the file is laid out.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    places: Mapping[str, int] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What it is stored as."""
        count = math.prod(self.shape)
        blocks = -(-count // BLOCK)
        return (
            (self.name, "U8", (-(-count // 2), 1)),
            (f"{self.name}.absmax", "U8", (blocks,)),
            (f"{self.name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
            (f"{self.name}.nested_quant_map", "F32", (dynamic_map().size,)),
            (f"{self.name}.quant_map", "F32", (CODE.size,)),
            (f"{self.name}{NF4_STATE}", "U8", (len(self._state(0.0)),)),
        )

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(math.prod(shape) * dtypes.BITS[dtype] // 8 for _, dtype, shape in self.entries)

    def step(self, columns: int) -> int:
        """The number of rows that tiles must have a multiple of: whole blocks."""
        return max(2, BLOCK // math.gcd(BLOCK, columns))

    def through(self, rows: F32Array) -> F32Array:
        """Rows as they come back, nearly: the mean is that of these rows."""
        return sampled(rows)

    def writer(self, sink: int) -> Callable[[F32Array, int], int]:
        """What takes tiles and their first elements' numbers, in any order and from any thread, and gives bytes written."""
        return _Writer(self, sink).write

    def _state(self, offset: float) -> bytes:
        said = nf4_state(self.shape, self.dtype, offset)
        return json.dumps(said).encode().ljust(len(json.dumps({**said, "nested_offset": 0.0})) - len("0.0") + _LONGEST)

    def rest(self, largest: F32Array) -> Mapping[str, np.ndarray]:
        """What lies beside the codes, given the magnitudes of all blocks."""
        found = quantised(largest)
        if not math.isfinite(found.offset):
            raise RefusedError(self.name, "the mean of its largest magnitudes is over the largest float32 number")
        return {
            f"{self.name}.absmax": found.codes,
            f"{self.name}.nested_absmax": found.scales,
            f"{self.name}.nested_quant_map": dynamic_map(),
            f"{self.name}.quant_map": CODE,
            f"{self.name}{NF4_STATE}": np.frombuffer(self._state(float(found.offset)), np.uint8),
        }


class _Writer:
    """Writes codes as they come, and what lies beside them with the last."""

    def __init__(self, into: IntoNF4, sink: int) -> None:
        self._into, self._sink = into, sink
        self._left = math.prod(into.shape)
        self._largest = np.empty(-(-self._left // BLOCK), np.float32)
        self._lock = threading.Lock()

    def write(self, values: F32Array, first: int) -> int:
        flat = values.reshape(-1)
        largest = magnitudes(flat)
        self._largest[first // BLOCK : first // BLOCK + largest.size] = largest
        size = self._put(self._into.name, packed(codes_of(flat, largest)), first // 2)
        with self._lock:
            self._left -= flat.size
            last = not self._left
        return size + (sum(self._put(name, array) for name, array in self._into.rest(self._largest).items()) if last else 0)

    def _put(self, name: str, array: np.ndarray, offset: int = 0) -> int:
        write_at(self._sink, byte_view(np.ascontiguousarray(array)), self._into.places[name] + offset)
        return array.nbytes
