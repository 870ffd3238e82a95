"""The tensors of a 4-bit bitsandbytes matrix in a checkpoint, as transformers saves and loads them.

`X.weight` contains the codes, `.absmax` the magnitudes of blocks, and `.quant_map` the code book. With double quantization the
magnitudes are codes themselves, with `.nested_absmax` and `.nested_quant_map`. `.quant_state.bitsandbytes__nf4` (or `__fp4`)
contains the rest as JSON bytes (bitsandbytes 0.50: `functional.py`, `QuantState.as_dict`; `nn/modules.py`,
`_save_to_state_dict`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STATE_INFIX = ".quant_state.bitsandbytes__"
"""The infix of a state's name, between the name of the weight and that of the 4-bit type."""
NF4_STATE = f"{STATE_INFIX}nf4"
COMPANION_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""Suffixes of the other tensors of a weight, after its name and a dot."""

BLOCK = 64  # weights that share one magnitude
NESTED_BLOCK = 256  # magnitudes that share one magnitude of their own
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""The state's name for the dtype before quantization, by its safetensors name."""

# From QLoRA (arXiv 2305.14314), appendix E, with the values as bitsandbytes writes them (`functional.py`, `get_4bit_type`).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4 as float32, ascending."""

QUANTIZATION = {
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True,
    "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip
"""The `quantization_config` of a model in NF4, except for the dtype to compute in."""


def nf4_state(shape: Sequence[int], dtype: str, offset: float | None) -> dict[str, Any]:
    """Return the state of an NF4 matrix whose dtype was `dtype` (`BF16`, `F16`, or `F32`) before quantization.

    `offset` is the mean of the magnitudes; None without double quantization.
    """
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": DTYPES[dtype], "shape": list(shape)}
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return state
