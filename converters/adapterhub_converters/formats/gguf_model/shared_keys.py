"""Hyperparameters of a GGUF model that most architectures share, from a config (llama.cpp, `conversion/base.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub_converters.containers.gguf_types import MetadataValue, f32_value, string_value, u32_value
from adapterhub_converters.errors import RefusedError

from .model_config import Config

Numbers = dict[str, MetadataValue]

_COUNTS = {  # for all architectures without a list of their own; the first key present in config.json counts
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
}
_EPSILONS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
}
_YARN = {
    "yarn_ext_factor": ("extrapolation_factor",), "yarn_attn_factor": ("attention_factor", "attn_factor"),
    "yarn_beta_fast": ("beta_fast",), "yarn_beta_slow": ("beta_slow",),
}  # fmt: skip
GATING = {"softmax": 1, "sigmoid": 2}  # gguf-py, `ExpertGatingFuncType`


def shared_numbers(config: Config) -> Numbers:
    """Return the keys that most architectures share; RefusedError for an expert gating that llama.cpp does not support."""
    numbers: Numbers = {}
    for key, names in _COUNTS.items():
        if name := _first_key(config.values, names):
            numbers[key] = u32_value(config.count(name))
    numbers |= _rope(config)
    for key, names in _EPSILONS.items():
        if name := _first_key(config.values, names):
            numbers[key] = f32_value(config.number(name))
    score = config.get("scoring_func")
    if score is not None:
        if not isinstance(score, str) or score not in GATING:
            raise RefusedError(config.where, f"config.json: scoring_func {str(score)[:40]!r} is not supported by llama.cpp")
        numbers["expert_gating_func"] = u32_value(GATING[score])
    if config.get("head_dim") is not None:
        numbers["attention.key_length"] = numbers["attention.value_length"] = u32_value(config.count("head_dim"))
    return numbers


def _first_key(values: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    """Return the first of the names that has a value; None if none has one."""
    return next((name for name in names if values.get(name) is not None), None)


def _rope(config: Config) -> Numbers:
    rope, numbers = config.rope, {}
    if rope["rope_type"] in ("linear", "yarn"):
        numbers["rope.scaling.type"] = string_value(rope["rope_type"])
        numbers["rope.scaling.factor"] = f32_value(config.rope_number("factor"))
    if rope["rope_type"] == "yarn":
        numbers["rope.scaling.original_context_length"] = u32_value(config.rope_count("original_max_position_embeddings"))
        for key, names in _YARN.items():
            if name := _first_key(rope, names):
                numbers[f"rope.scaling.{key}"] = f32_value(config.rope_number(name))
    numbers["rope.freq_base"] = f32_value(config.rope_number("rope_theta"))
    if config.sliding_rope:
        numbers["rope.freq_base_swa"] = f32_value(config.sliding_rope_number("rope_theta"))
    return numbers


def head_size(config: Config) -> int:
    """Return the number of rows of a head."""
    if config.get("head_dim") is not None:
        return config.count("head_dim")
    return config.count("hidden_size") // config.count("num_attention_heads")


def rotated_dimensions(config: Config) -> int:
    """Return the number of rotated dimensions of a head, where the partial factor applies to the hidden size."""
    factor = config.rope_number("partial_rotary_factor", 1.0)
    return int(factor * config.count("hidden_size")) // config.count("num_attention_heads")


def select_shared(config: Config, *keys: str) -> Numbers:
    """Return the shared keys among `keys`."""
    return {key: value for key, value in shared_numbers(config).items() if key in keys}


def vocabulary(config: Config) -> Numbers:
    """Return the size of the vocabulary."""
    return {"vocab_size": u32_value(config.count("vocab_size"))}


def window(config: Config) -> Numbers:
    """Return the width of the window in layers that have one."""
    return {"attention.sliding_window": u32_value(config.count("sliding_window"))}


def layer_kinds(gguf: str, config: Config) -> list[object]:
    """Return the kind of each layer; layers of one kind have the same tensors.

    Raises:
        RefusedError: The config does not have one kind for each layer.
    """
    count, layer_types = config.count("num_hidden_layers"), config.get("layer_types")
    if key := _DENSE_FIRST.get(gguf):
        return [layer >= config.count(key) for layer in range(count)]
    if gguf not in _HYBRID:
        return [None] * count
    if layer_types is None and gguf.startswith("qwen35"):
        interval = config.count("full_attention_interval") if config.get("full_attention_interval") else 4
        return ["full_attention" if layer % interval == interval - 1 else "linear_attention" for layer in range(count)]
    if not isinstance(layer_types, list) or len(layer_types) != count:
        raise RefusedError(config.where, f"config.json: layer_types does not have one entry for each of {count} layers")
    return list(layer_types)


_DENSE_FIRST = {
    "deepseek2": "first_k_dense_replace", "glm4moe": "first_k_dense_replace", "ernie4_5-moe": "moe_layer_start_index",
}  # fmt: skip
"""Architectures whose first layers have no experts, to the key with their number."""
_HYBRID = ("lfm2", "qwen35", "qwen35moe")
"""Architectures with several kinds of layers."""
