"""Write weights into a bitsandbytes checkpoint in NF4, a tile at a time, and decide which weights of a model to write so.

The state stored with the codes (`bases.bitsandbytes_state`) contains the mean of the magnitudes, which is known after the last
tile: its JSON is padded with spaces, so that the file can be laid out before.

transformers 5 replaces every `nn.Linear` except the output layer (`quantizers/base.py`, `get_keys_to_not_convert`), so experts
and routers, which it builds from bare parameters, and Falcon's layers, which have a class of their own, stay in floats.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases.bitsandbytes_state import BLOCK, NESTED_BLOCK, NF4_STATE, QUANTIZATION, nf4_state
from adapterhub_converters.containers.safetensors_file import byte_view
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .nf4_numpy import CODE, codes_of, dynamic_map, magnitudes, pack_codes, quantize_magnitudes, round_trip_sample
from .read_base import CONV1D, Folder, Weight
from .tensor_files import write_at

F32Array = NDArray[np.float32]

_MAX_NUMBER = 24  # characters of a float32 in JSON
_LET_TRANSFORMERS = "Merge into 16 bits, and let transformers quantize the result when it loads it"

ROUTERS = ("mlp.gate.weight", "mlp.router.weight", "block_sparse_moe.gate.weight", "ffn_gate_inp.weight")
# transformers writes all keys, sorted.
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

Entry = tuple[str, str, tuple[int, ...]]
"""A stored tensor: its name, dtype and shape."""


@dataclass(frozen=True, eq=False)
class NF4Packing:
    """The packing of one weight as NF4.

    Attributes:
        name: The name of the weight.
        shape: `(out_features, in_features)`.
        dtype: The type of floats that is quantized and restored.
        places: The byte of the file at which each stored tensor begins, by name; empty until the file is laid out.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    places: Mapping[str, int] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The tensors that the weight is stored as."""
        count = math.prod(self.shape)
        blocks = -(-count // BLOCK)
        return (
            (self.name, "U8", (-(-count // 2), 1)),
            (f"{self.name}.absmax", "U8", (blocks,)),
            (f"{self.name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
            (f"{self.name}.nested_quant_map", "F32", (dynamic_map().size,)),
            (f"{self.name}.quant_map", "F32", (CODE.size,)),
            (f"{self.name}{NF4_STATE}", "U8", (self._state_size,)),
        )

    @property
    def size(self) -> int:
        """The number of bytes of these tensors."""
        return sum(math.prod(shape) * dtypes.BITS[dtype] // 8 for _, dtype, shape in self.entries)

    def step(self, columns: int) -> int:
        """Return the number of rows that a tile's height must be a multiple of to have whole blocks."""
        return max(2, BLOCK // math.gcd(BLOCK, columns))

    def round_trip(self, rows: F32Array) -> F32Array:
        """Return rows quantized and dequantized, with the mean of their own magnitudes."""
        return round_trip_sample(rows)

    def writer(self, sink: int) -> Callable[[F32Array, int], int]:
        """Return a function that writes a tile, given the number of its first element, and returns the bytes written.

        Tiles may come in any order and from any thread.
        """
        return _Writer(self, sink).write

    @property
    def _state_size(self) -> int:
        """The number of bytes of the state with the longest offset."""
        return len(json.dumps(nf4_state(self.shape, self.dtype, 0.0))) - len("0.0") + _MAX_NUMBER

    def _state(self, offset: float) -> bytes:
        """Return the state as JSON, padded with spaces, which JSON allows at the end."""
        return json.dumps(nf4_state(self.shape, self.dtype, offset)).encode().ljust(self._state_size)

    def scales(self, largest: F32Array) -> Mapping[str, np.ndarray]:
        """Return the tensors other than the codes, by name, given the magnitudes of all blocks."""
        quantized_magnitudes = quantize_magnitudes(largest)
        if not math.isfinite(quantized_magnitudes.offset):
            raise RefusedError(self.name, "the mean of its largest magnitudes is over the largest float32 number")
        return {
            f"{self.name}.absmax": quantized_magnitudes.codes,
            f"{self.name}.nested_absmax": quantized_magnitudes.scales,
            f"{self.name}.nested_quant_map": dynamic_map(),
            f"{self.name}.quant_map": CODE,
            f"{self.name}{NF4_STATE}": np.frombuffer(self._state(float(quantized_magnitudes.offset)), np.uint8),
        }


class _Writer:
    """A writer of the codes of each tile and, after the last tile, of the other tensors."""

    def __init__(self, packing: NF4Packing, sink: int) -> None:
        self._packing, self._sink = packing, sink
        self._remaining = math.prod(packing.shape)
        self._largest = np.empty(-(-self._remaining // BLOCK), np.float32)
        self._lock = threading.Lock()

    def write(self, values: F32Array, first: int) -> int:
        flat = values.reshape(-1)
        largest = magnitudes(flat)
        # Tiles write to disjoint ranges, so only the counter needs the lock.
        self._largest[first // BLOCK : first // BLOCK + largest.size] = largest
        size = self._write_array(self._packing.name, pack_codes(codes_of(flat, largest)), first // 2)
        with self._lock:
            self._remaining -= flat.size
            last = not self._remaining
        return size + (
            sum(self._write_array(name, array) for name, array in self._packing.scales(self._largest).items()) if last else 0
        )

    def _write_array(self, name: str, array: np.ndarray, offset: int = 0) -> int:
        write_at(self._sink, byte_view(np.ascontiguousarray(array)), self._packing.places[name] + offset)
        return array.nbytes


def is_linear(name: str) -> bool:
    """Return whether a tensor is a linear weight that training quantizes: in a layer, and no norm, router or stack."""
    parts = name.split(".")
    if name.endswith(ROUTERS) or "_exps" in name:
        return False
    return name.endswith(".weight") and any(part.isdigit() for part in parts) and "norm" not in parts[-2]


def weights_in_nf4(folder: Folder) -> set[str]:
    """Return the names of the weights that a folder stores in NF4."""
    return {name.partition(NF4_STATE)[0] for shard in folder.shards for name in shard.tensors if NF4_STATE in name}


def weights_for_nf4(folder: Folder, *, dtype: str | None = None) -> set[str]:
    """Return the weights to store in NF4: those already in NF4 in the folder, else those that transformers quantizes.

    Args:
        dtype: The requested type of the other weights.

    Raises:
        RefusedError: The layers of this architecture are not known, or none of them is quantized.
    """
    already_nf4 = weights_in_nf4(folder)
    if already_nf4 and dtype:
        raise RefusedError(dtype, "the base is in NF4 already, and unchanged tensors keep their type", "Name no type of floats")
    if already_nf4:
        return already_nf4
    location, kind = folder.spec.source, folder.spec.architecture
    if folder.spec.model_type in CONV1D:
        raise RefusedError(location, "stores its weights transposed, which NF4 does not", _LET_TRANSFORMERS)
    if kind.startswith("Falcon"):
        raise RefusedError(
            location, "transformers quantizes no layer of Falcon, which has its own class of layers", "Use floats"
        )
    try:
        architecture_lookup.by_class(kind, location, whole=True)
    except RefusedError as error:
        reason = f"the layers of {kind or 'this model'} that NF4 would quantize are not known"
        raise RefusedError(location, reason, _LET_TRANSFORMERS) from error
    # Weights that a quantized base keeps in floats stay in floats.
    in_floats = {name for name, weight in folder.weights.items() if folder.method and weight.dequantized is None}
    quantizable = {name for name, weight in folder.weights.items() if _is_quantizable(name, weight)} - in_floats
    if not quantizable:
        raise RefusedError(location, "has no linear layer that transformers would quantize", _LET_TRANSFORMERS)
    return quantizable


def _is_quantizable(name: str, weight: Weight) -> bool:
    """Return whether transformers would quantize a weight, by its name and shape."""
    return is_linear(name) and ".experts." not in name and len(weight.shape) == 2 and min(weight.shape) > 0


def quantization_config(folder: Folder, packed: set[str], dtype: str | None) -> Mapping[str, Any]:
    """Return the `quantization_config` of a model with the weights `packed` in NF4; the folder's own, if it is in NF4.

    Args:
        dtype: The type of the other weights, as torch spells it.
    """
    base_config = folder.config.get("quantization_config")
    if weights_in_nf4(folder) and isinstance(base_config, dict):
        return {**base_config, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"}
    in_floats = sorted(
        name.removesuffix(".weight")
        for name, weight in folder.weights.items()
        if _is_quantizable(name, weight) and name not in packed
    )
    skipped = {"llm_int8_skip_modules": ["lm_head", *in_floats]} if in_floats else {}
    return {**_BITSANDBYTES, "bnb_4bit_compute_dtype": dtype or "float32", **skipped}
