"""Which weights of a model 4-bit quantisation takes, and what config.json then says of it, as transformers 5 has them.

transformers replaces every `nn.Linear` but the output layer (`quantizers/base.py`, `get_keys_to_not_convert`), so that experts
and routers, which it builds of bare parameters, and Falcon's layers, which are of a class of their own, stay in floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_converters import names
from adapterhub_converters.base.bitsandbytes import NF4_STATE, QUANTISATION
from adapterhub_converters.errors import RefusedError

from .hf_base import CONV1D, Folder, Weight

ROUTERS = ("mlp.gate.weight", "mlp.router.weight", "block_sparse_moe.gate.weight", "ffn_gate_inp.weight")
# transformers writes all keys there are, sorted.
_BITSANDBYTES = dict(
    sorted(
        {
            **QUANTISATION,
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
    """Whether a tensor is the weight of a linear layer that training quantises: in a layer, no norm, router or stack."""
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
        raise RefusedError("--requantise nf4", f"{where} stores its weights transposed", _THERE)
    if kind.startswith("Falcon"):
        raise RefusedError(
            "--requantise nf4", "transformers quantises no layer of Falcon, whose class is its own", "Leave it out"
        )
    try:
        names.by_class(kind, where)
    except RefusedError as error:
        raise RefusedError("--requantise nf4", f"which layers of {kind or where} it takes isn't known here", _THERE) from error
    found = {name for name, weight in folder.weights.items() if _is_taken(name, weight) and _was_quantised(folder, weight)}
    if not found:
        raise RefusedError("--requantise nf4", f"{where} has no linear layer that transformers would quantise", _THERE)
    return found


_THERE = "Merge into 16 bits, and let transformers quantise the result when it loads it"


def _is_taken(name: str, weight: Weight) -> bool:
    return is_linear(name) and ".experts." not in name and len(weight.shape) == 2 and min(weight.shape) > 0


def _was_quantised(folder: Folder, weight: Weight) -> bool:
    """What a quantised base kept in floats stays so."""
    return not folder.method or weight.unpacked is not None


def quantisation_config(folder: Folder, taken: set[str], dtype: str | None) -> Mapping[str, Any]:
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
