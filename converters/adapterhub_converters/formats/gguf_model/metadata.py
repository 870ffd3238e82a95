"""Write the metadata of a GGUF model, except for its vocabulary: `general.*` and the architecture's hyperparameters.

The hyperparameters follow llama.cpp's `conversion/*.py`, `set_gguf_parameters`. A model is refused if
llama.cpp ignores something that changes the function (an activation, a rotary embedding without tensors there)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.containers.gguf_file import Value, boolean, f32, string, u32
from adapterhub_converters.errors import RefusedError

from .configured import Config

# generation_config.json's keys (gguf-py, `metadata.py`, `Metadata.load`).
_SAMPLING = {
    "top_k": ("top_k", int), "top_p": ("top_p", float), "min_p": ("min_p", float), "temp": ("temperature", float),
    "penalty_repeat": ("repetition_penalty", float), "penalty_last_n": ("penalty_last_n", int),
    "xtc_probability": ("xtc_probability", float), "xtc_threshold": ("xtc_threshold", float),
}  # fmt: skip
_STEPS = ((1e12, 1e-12, "T"), (1e9, 1e-9, "B"), (1e6, 1e-6, "M"), (-1.0, 1e-3, "K"))  # above, factor, unit


def general(gguf: str, name: str, shapes: Mapping[str, tuple[int, ...]], generation: Mapping[str, Any]) -> dict[str, Value]:
    """The keys `general.*`, except for those of the tensors' type."""
    made = {"general.architecture": string(gguf), "general.type": string("model")}
    for key, (asked, kind) in _SAMPLING.items():
        value = generation.get(asked)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 31:
            made[f"general.sampling.{key}"] = Value("INT32", int(value)) if kind is int else f32(float(value))
    return made | {"general.name": string(name), "general.size_label": string(size_label(shapes))}


def size_label(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`1.1B`, or `8x7B` of a model with experts (gguf-py, `utility.py`, `size_label`)."""
    stacked = {name: shape for name, shape in shapes.items() if "_exps." in name and len(shape) > 2}
    counts = [shape[0] for shape in stacked.values()]
    expert = sum(math.prod(shape) // shape[0] for shape in stacked.values())
    shared = sum(math.prod(shape) for name, shape in shapes.items() if name not in stacked)
    number = sum(counts) // len(counts) if counts else 0
    return f"{number}x{_rounded(shared + expert)}" if number else _rounded(shared)


def _rounded(count: int) -> str:
    factor, unit = next((factor, unit) for least, factor, unit in _STEPS if count > least)
    scaled = count * factor
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{unit}"


def stored(wanted: str) -> dict[str, Value]:
    """The keys of the type of most tensors."""
    return {"general.file_type": u32(FILE_TYPES[wanted]), "general.quantization_version": u32(2)}


FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""The type of most tensors in a file to its number (llama.cpp, include/llama.h, `llama_ftype`)."""


# ---- Keys that most architectures share


Numbers = dict[str, Value]

_COUNTS = {  # of all architectures without a list of their own; the first key found in config.json counts
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
_GATING = {"softmax": 1, "sigmoid": 2}  # gguf-py, `ExpertGatingFuncType`


def _shared(config: Config) -> Numbers:
    """The keys that most architectures share; RefusedError for an expert gating that llama.cpp does not support."""
    made: Numbers = {}
    for key, names in _COUNTS.items():
        if name := _first_key(config.values, names):
            made[key] = u32(config.count(name))
    made |= _rope(config)
    for key, names in _EPSILONS.items():
        if name := _first_key(config.values, names):
            made[key] = f32(config.number(name))
    score = config.get("scoring_func")
    if score is not None:
        if not isinstance(score, str) or score not in _GATING:
            raise RefusedError(config.where, f"config.json: scoring_func {str(score)[:40]!r} is not supported by llama.cpp")
        made["expert_gating_func"] = u32(_GATING[score])
    if config.get("head_dim") is not None:
        made["attention.key_length"] = made["attention.value_length"] = u32(config.count("head_dim"))
    return made


def _first_key(values: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    """The first of the names with a value."""
    return next((name for name in names if values.get(name) is not None), None)


def _rope(config: Config) -> Numbers:
    rope, made = config.rope, {}
    if rope["rope_type"] in ("linear", "yarn"):
        made["rope.scaling.type"] = string(rope["rope_type"])
        made["rope.scaling.factor"] = f32(config.rope_number("factor"))
    if rope["rope_type"] == "yarn":
        made["rope.scaling.original_context_length"] = u32(config.rope_count("original_max_position_embeddings"))
        for key, names in _YARN.items():
            if name := _first_key(rope, names):
                made[f"rope.scaling.{key}"] = f32(config.rope_number(name))
    made["rope.freq_base"] = f32(config.rope_number("rope_theta"))
    if config.sliding_rope:
        made["rope.freq_base_swa"] = f32(config.sliding_rope_number("rope_theta"))
    return made


def head_size(config: Config) -> int:
    """The number of rows of a head."""
    if config.get("head_dim") is not None:
        return config.count("head_dim")
    return config.count("hidden_size") // config.count("num_attention_heads")


def rotated(config: Config) -> int:
    """The rotated dimensions of a head, where the partial factor applies to the hidden size."""
    factor = config.rope_number("partial_rotary_factor", 1.0)
    return int(factor * config.count("hidden_size")) // config.count("num_attention_heads")


# ---- Keys of single architectures


def _vocabulary(config: Config) -> Numbers:
    return {"vocab_size": u32(config.count("vocab_size"))}


def _llama(config: Config) -> Numbers:
    return _vocabulary(config) | {"rope.dimension_count": u32(head_size(config))}


def _granite(config: Config) -> Numbers:
    if config.get("head_dim") not in (None, config.count("hidden_size") // config.count("num_attention_heads")):
        raise RefusedError(config.where, "config.json: a head_dim of its own, which llama.cpp's granite does not support")
    made = _llama(config)
    keys = {
        "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    }  # fmt: skip
    return made | {key: f32(config.number(name)) for name, key in keys.items() if config.get(name)}


def _qwen2_moe(config: Config) -> Numbers:
    return {
        key: u32(config.count(name))
        for name, key in (
            ("moe_intermediate_size", "expert_feed_forward_length"),
            ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        )
        if config.get(name) is not None
    }


def _window(config: Config) -> Numbers:
    return {"attention.sliding_window": u32(config.count("sliding_window"))}


def _gemma3(config: Config) -> Numbers:
    if config.get("attn_logit_softcapping") is not None:
        raise RefusedError(config.where, "config.json: attn_logit_softcapping, which llama.cpp's gemma3 does not support")
    made = _window(config) if config.get("sliding_window_pattern") != 1 else {}
    key = "final_logit_softcapping"
    return made | ({key: f32(config.number(key))} if config.get(key) else {})


def _cohere(config: Config) -> Numbers:
    made: Numbers = {"logit_scale": f32(config.number("logit_scale")), "rope.scaling.type": string("none")}
    return made | ({"context_length": u32(config.count("model_max_length"))} if config.get("model_max_length") else {})


def _cohere2(config: Config) -> Numbers:
    per = config.count("hidden_size") // config.count("num_attention_heads")
    turned = int((1.0 if config.get("rotary_pct") is None else config.number("rotary_pct")) * per)
    return (
        {"logit_scale": f32(config.number("logit_scale")), "rope.scaling.type": string("none")}
        | _window(config)
        | _vocabulary(config)
        | {"rope.dimension_count": u32(turned)}
    )


def _glm4(config: Config) -> Numbers:
    if "mrope_section" in config.rope:
        raise RefusedError(config.where, "config.json: a rotary embedding in sections, which only vision models have")
    return {"rope.dimension_count": u32(int(head_size(config) * config.rope_number("partial_rotary_factor", 0.5)))}


def _gpt_oss(config: Config) -> Numbers:
    return _window(config) | {"expert_feed_forward_length": u32(config.count("intermediate_size"))}


def _deepseek2(config: Config) -> Numbers:
    kept, turned, plain = (config.count(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    made = {
        "attention.head_count_kv": u32(1),
        "leading_dense_block_count": u32(config.count("first_k_dense_replace")),
        "attention.kv_lora_rank": u32(kept),
        "attention.key_length": u32(kept + turned),
        "attention.value_length": u32(kept),
        "attention.key_length_mla": u32(plain + turned),
        "attention.value_length_mla": u32(config.count("v_head_dim")),
        "expert_feed_forward_length": u32(config.count("moe_intermediate_size")),
        "expert_shared_count": u32(config.count("n_shared_experts")),
        "expert_weights_scale": f32(config.number("routed_scaling_factor")),
        "rope.dimension_count": u32(turned),
    } | _vocabulary(config)
    if config.get("q_lora_rank") is not None:
        made["attention.q_lora_rank"] = u32(config.count("q_lora_rank"))
    if config.get("norm_topk_prob"):
        made["expert_weights_norm"] = boolean(True)
    if config.rope.get("mscale_all_dim") is not None:
        made["rope.scaling.yarn_log_multiplier"] = f32(0.1 * config.rope_number("mscale_all_dim"))
    return made


def _olmo(config: Config) -> Numbers:
    made = {"attention.layer_norm_epsilon": f32(1e-5)}
    return made | ({"attention.clamp_kqv": f32(config.number("clip_qkv"))} if config.get("clip_qkv") is not None else {})


def _nemotron(config: Config) -> Numbers:
    if config.get("num_key_value_heads") is None:
        raise RefusedError(config.where, "config.json: num_key_value_heads is missing")
    scaling: Numbers = {}
    if config.get("factor") or config.rope.get("factor"):
        factor = config.number("factor") if config.get("factor") else config.rope_number("factor")
        scaling = {"rope.scaling.type": string("linear"), "rope.scaling.factor": f32(factor)}
    return (
        {"rope.scaling.type": string("none")}
        | scaling
        | _vocabulary(config)
        | {"attention.layer_norm_epsilon": f32(config.number("norm_eps")), "rope.dimension_count": u32(rotated(config))}
    )


_MORE: dict[str, Callable[[Config], Numbers]] = {
    "llama": _llama, "arcee": _llama, "smollm3": _llama, "granite": _granite, "qwen2moe": _qwen2_moe, "qwen3moe": _qwen2_moe,
    "gemma3": _gemma3, "command-r": _cohere, "cohere2": _cohere2, "glm4": _glm4, "gpt-oss": _gpt_oss, "deepseek2": _deepseek2,
    "olmo": _olmo, "nemotron": _nemotron,
}  # fmt: skip
"""Keys that an architecture adds to, or changes in, the shared ones."""


def _some(config: Config, *keys: str) -> Numbers:
    return {key: value for key, value in _shared(config).items() if key in keys}


_SIZES = ("context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
_RMS, _NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def _check_theta(config: Config, name: str) -> None:
    if config.rope.get("rope_theta") != 10000.0:
        raise RefusedError(config.where, f"config.json: a rope_theta of its own, for which llama.cpp's {name} has no key")


def _gemma(config: Config) -> Numbers:
    _check_theta(config, "gemma")
    return _some(config, *_SIZES, _RMS, "attention.key_length", "attention.value_length")


def _gemma2(config: Config) -> Numbers:
    # llama.cpp derives the scale of the queries from the number of layers (src/models/gemma2.cpp).
    divided = config.count("hidden_size") / config.count("num_attention_heads")
    wanted = divided if config.count("num_hidden_layers") == 46 else config.count("head_dim")
    if config.get("query_pre_attn_scalar") not in (None, wanted):
        raise RefusedError(
            config.where, f"config.json: query_pre_attn_scalar is not {wanted:g}, the only one llama.cpp supports"
        )
    capped = {key: f32(config.number(key)) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    return _gemma(config) | capped | _window(config)


def _phi3(config: Config) -> Numbers:
    made = _some(config, *_SIZES, _RMS, "rope.freq_base")
    made["rope.scaling.original_context_length"] = u32(config.count("original_max_position_embeddings"))
    made["rope.dimension_count"] = u32(rotated(config))
    made["attention.sliding_window"] = u32(config.count("sliding_window") if config.get("sliding_window") else 0)
    return made


def _falcon(config: Config) -> Numbers:
    hidden = config.count("hidden_size")
    asked = {"alibi": False, "parallel_attn": True, "ffn_hidden_size": 4 * hidden}
    _only(config, asked, "falcon")
    _check_theta(config, "falcon")
    groups = config.count("num_kv_heads") if config.get("new_decoder_architecture") else 1
    return {
        "context_length": u32(2048),
        "tensor_data_layout": string("jploski"),
        "embedding_length": u32(hidden),
        "feed_forward_length": u32(4 * hidden),
        "attention.head_count": u32(config.count("num_attention_heads")),
        "attention.head_count_kv": u32(groups),
    } | _some(config, _NORM)


def _bloom(config: Config) -> Numbers:
    _only(config, {"apply_residual_connection_post_layernorm": False}, "bloom")
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    return {
        "context_length": u32(config.count("seq_length") if config.get("seq_length") else hidden),
        "embedding_length": u32(hidden),
        "feed_forward_length": u32(4 * hidden),
        "attention.head_count": u32(heads),
        "attention.head_count_kv": u32(heads),
    } | _some(config, _NORM)


def _gpt2(config: Config) -> Numbers:
    hidden = config.count("hidden_size")
    _only(config, {"n_inner": 4 * hidden, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}, "gpt2")
    return {
        "context_length": u32(config.count("n_ctx") if config.get("n_ctx") else config.count("n_positions")),
        "embedding_length": u32(hidden),
        "feed_forward_length": u32(4 * hidden),
        "attention.head_count": u32(config.count("num_attention_heads")),
    } | _some(config, _NORM)


def _only(config: Config, asked: Mapping[str, object], name: str) -> None:
    for key, value in asked.items():
        if config.get(key) not in (None, value):
            raise RefusedError(config.where, f"config.json: {key} is {config.get(key)}, but llama.cpp's {name} uses {value}")


def _stablelm(config: Config) -> Numbers:
    _check_theta(config, "stablelm")
    factor = config.rope_number("partial_rotary_factor", 0.25)
    turned = int(factor * (config.count("hidden_size") // config.count("num_attention_heads")))
    return (
        _some(config, *_SIZES, _NORM)
        | {"rope.dimension_count": u32(turned)}
        | {"use_parallel_residual": boolean(bool(config.get("use_parallel_residual")))}
    )


_OWN: dict[str, Callable[[Config], Numbers]] = {
    "gemma": _gemma, "gemma2": _gemma2, "phi3": _phi3, "falcon": _falcon, "bloom": _bloom, "gpt2": _gpt2,
    "stablelm": _stablelm,
}  # fmt: skip
"""Architectures with their own list of keys."""


# ---- All keys under an architecture's prefix


_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_ACTIVATIONS = {
    "gemma": _GELU, "gemma2": _GELU, "gemma3": _GELU, "starcoder2": _GELU, "gpt2": _GELU, "falcon": _GELU, "bloom": _GELU,
    "nemotron": ("relu2",), "arcee": ("relu2",),
}  # fmt: skip
"""The activations that llama.cpp computes (`src/models/*.cpp`); silu for all others. Its gelu is the tanh approximation."""
_SCALED = {
    **dict.fromkeys(("llama", "granite", "smollm3", "arcee"), ("default", "linear", "yarn", "llama3")),
    "phi3": ("default", "longrope", "su"),
    **dict.fromkeys(("command-r", "cohere2"), ("default",)),
}
"""Types of rotary embeddings with a scaling that llama.cpp's conversion writes, as numbers or tensors."""


def hyperparameters(architecture: Architecture, config: Config) -> Numbers:
    """The hyperparameters: key under the architecture's prefix to value."""
    _check(architecture, config)
    special = _OWN.get(architecture.gguf)
    made = special(config) if special else _shared(config) | _MORE.get(architecture.gguf, _nothing)(config)
    if architecture.gguf == "granite":  # llama.cpp has no head_dim for it
        made = {key: value for key, value in made.items() if key not in ("attention.key_length", "attention.value_length")}
    return {"block_count": u32(config.count("num_hidden_layers"))} | made


def _check(architecture: Architecture, config: Config) -> None:
    known = _ACTIVATIONS.get(architecture.gguf, ("silu", "swish"))
    # hidden_act is "gelu" in an old Gemma, but its null hidden_activation counts.
    key = next((key for key in ("hidden_activation", "hidden_act", "activation_function", "activation") if config.get(key)), "")
    if key and config.get(key) not in known:
        what = f"config.json: {key} is {config.get(key)}, but llama.cpp's {architecture.gguf} computes {known[-1]}"
        raise RefusedError(config.where, what)
    kind = config.rope["rope_type"]
    if kind not in _SCALED.get(architecture.gguf, ("default",) if architecture.gguf in _OWN else ("default", "linear", "yarn")):
        what = f"a rotary embedding of the type {str(kind)[:40]!r}, which llama.cpp's conversion of {architecture.gguf} ignores"
        raise RefusedError(config.where, what)
    if config.sliding_rope.get("rope_type", "default") != "default":
        raise RefusedError(
            config.where, "the rotary embedding of the layers with a window is scaled, for which llama.cpp has no key"
        )


def _nothing(_: Config) -> Numbers:
    return {}
