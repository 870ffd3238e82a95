"""Layers that mlx-lm tuned in full (`fine_tune_type: full`): parameters of a model, without a delta.

The file has every parameter of the layers that were trained, under mlx-lm's names and in its form (mlx-lm, `lora.py`,
`tuner/trainer.py`). For the model types in `SAME_PARAMETERS` both match the model's own files, except that experts are stacked;
others have transposed convolutions, 1 added to norms, or matrices that are products of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import FULL, MAX_EXPERTS, Adapter, Meta
from adapterhub_converters.errors import FormatError, RefusedError

from .module_names import VERSION, expert_place, in_base

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

SAME_PARAMETERS = frozenset({
    "apertus", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma2", "gemma3", "gemma3_text", "glm",
    "glm4", "glm4_moe", "granite", "helium", "hunyuan_v1_dense", "llama", "llava", "minimax_m2", "ministral3", "mistral",
    "mistral3", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_5_vl", "qwen2_moe",
    "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_vl", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Model types whose parameters mlx-lm loads unchanged; a test compares each with the model it builds from a checkpoint."""


def read(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], location: str, base: BaseSpec | None) -> Adapter:
    """Return the full parameters, by their names in the model's files.

    Args:
        config: The folder's config.
        tensors: The parameters by mlx-lm's names.
        location: The file, for errors.
        base: The base model; None if the caller only describes the adapter.

    Raises:
        RefusedError: The model was quantized, or mlx-lm has the base's parameters in another form.
        FormatError: A tensor is not a parameter.
    """
    # Only for these types has a test shown that names and forms are the same.
    if base is not None and base.model_type and base.model_type not in SAME_PARAMETERS:
        problem = f"mlx-lm {VERSION} is not known to have the parameters of {base.model_type} in the form of its files"
        raise RefusedError(location, problem, "Fuse the two with mlx_lm.fuse, and use the fused model")
    replaced: dict[str, np.ndarray] = {}
    for name, array in sorted(tensors.items()):
        _check(name, array, location)
        replaced |= _parameters_in_files(in_base(name, base), array)
    if not replaced:
        raise FormatError(location, "there is no parameter in it")
    table = next((name for name in replaced if name.endswith("embed_tokens.weight")), None)
    if base is not None and base.tied and table:  # mlx-lm computes the output with the table
        replaced["lm_head.weight"] = replaced[table]
    model = config.get("model")
    meta = Meta(base_model=model if isinstance(model, str) and model else None, method=FULL)
    return Adapter({}, replaced=replaced, meta=meta)


def _check(name: str, array: np.ndarray, location: str) -> None:
    kind, part = dtypes.name_of(array.dtype), name.rpartition(".")[2]
    if part in ("lora_a", "lora_b", "m"):
        raise FormatError(location, f"tensor {name!r} belongs to a LoRA, but the config is for full parameters")
    if kind not in dtypes.FLOATS or part in ("scales", "biases"):
        raise RefusedError(location, f"tensor {name!r} is {kind}, as in a quantized model", "Train the model in 16 bits")
    if 0 in array.shape or (array.ndim == 3 and expert_place(name.rpartition(".")[0]) and len(array) > MAX_EXPERTS):
        raise FormatError(location, f"tensor {name!r} has the shape {array.shape}")


def _parameters_in_files(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Return a parameter under its names in the model's files, which have experts one by one."""
    module, _, part = name.rpartition(".")
    place = expert_place(module) if array.ndim == 3 and part == "weight" else None
    return (
        {f"{place[0]}.{e}.{place[1]}.weight": expert_array for e, expert_array in enumerate(array)} if place else {name: array}
    )
