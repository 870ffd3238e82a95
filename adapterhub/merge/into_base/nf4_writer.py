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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.architectures import names
from adapterhub_converters.bases.bitsandbytes import BLOCK, NESTED_BLOCK, NF4_STATE, QUANTIZATION, nf4_state
from adapterhub_converters.containers.safetensors_file import byte_view
from adapterhub_converters.errors import RefusedError

from .nf4 import CODE, codes_of, dynamic_map, magnitudes, packed, quantized, sampled
from .read_folder import CONV1D, Folder, Weight
from .tensor_io import write_at

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
        dtype: The floats that were quantized, and that come back.
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
        found = quantized(largest)
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


# ---- Which weights of a model 4-bit quantization takes, and what config.json then says of it, as transformers 5 has


ROUTERS = ("mlp.gate.weight", "mlp.router.weight", "block_sparse_moe.gate.weight", "ffn_gate_inp.weight")
# transformers writes all keys there are, sorted.
_BITSANDBYTES = dict(
    sorted(
        {
            **QUANTIZATION,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": None,
            "llm_int8_threshold": 6.0,
        }.items()
    )
)


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer that training quantizes: in a layer, no norm, router or stack."""
    parts = name.split(".")
    if name.endswith(ROUTERS) or "_exps" in name:
        return False
    return name.endswith(".weight") and any(part.isdigit() for part in parts) and "norm" not in parts[-2]


def in_nf4(folder: Folder) -> set[str]:
    """The names of the weights that a folder has in NF4."""
    return {name.partition(NF4_STATE)[0] for shard in folder.shards for name in shard.tensors if NF4_STATE in name}


def to_nf4(folder: Folder, *, dtype: str | None = None) -> set[str]:
    """The weights that a model in NF4 has in 4 bits: those of the folder that are so, else those that transformers takes.

    `dtype`: the floats that are asked for beside them.

    Raises:
        RefusedError: Which these are isn't known for its architecture, or none are.
    """
    own = in_nf4(folder)
    if own and dtype:
        raise RefusedError("--dtype", "the base is in NF4 already, and what does not change stays as it is", "Leave it out")
    if own:
        return own
    where, kind = folder.spec.where, folder.spec.architecture
    if folder.spec.model_type in CONV1D:
        raise RefusedError("--requantize nf4", f"{where} stores its weights transposed", _THERE)
    if kind.startswith("Falcon"):
        raise RefusedError(
            "--requantize nf4", "transformers quantizes no layer of Falcon, whose class is its own", "Leave it out"
        )
    try:
        names.by_class(kind, where)
    except RefusedError as error:
        raise RefusedError("--requantize nf4", f"which layers of {kind or where} it takes isn't known here", _THERE) from error
    found = {name for name, weight in folder.weights.items() if _is_taken(name, weight) and _was_quantized(folder, weight)}
    if not found:
        raise RefusedError("--requantize nf4", f"{where} has no linear layer that transformers would quantize", _THERE)
    return found


_THERE = "Merge into 16 bits, and let transformers quantize the result when it loads it"


def _is_taken(name: str, weight: Weight) -> bool:
    return is_linear(name) and ".experts." not in name and len(weight.shape) == 2 and min(weight.shape) > 0


def _was_quantized(folder: Folder, weight: Weight) -> bool:
    """What a quantized base kept in floats stays so."""
    return not folder.method or weight.unpacked is not None


def quantization_config(folder: Folder, taken: set[str], dtype: str | None) -> Mapping[str, Any]:
    """What `config.json` says of a model with these weights in NF4: the folder's own words, if it is one.

    `dtype`: the floats that the rest is in, as torch spells them.
    """
    own = folder.config.get("quantization_config")
    if in_nf4(folder) and isinstance(own, dict):
        return {**own, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"}
    kept = sorted(
        name.removesuffix(".weight") for name, weight in folder.weights.items() if _is_taken(name, weight) and name not in taken
    )
    skipped = {"llm_int8_skip_modules": ["lm_head", *kept]} if kept else {}
    return {**_BITSANDBYTES, "bnb_4bit_compute_dtype": dtype or "float32", **skipped}
