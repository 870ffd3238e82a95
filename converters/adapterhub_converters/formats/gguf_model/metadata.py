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
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
}  # fmt: skip
"""The type of most tensors in a file, or the name of a mixture, to its number (llama.cpp, include/llama.h, `llama_ftype`)."""


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


def _pattern(config: Config, period: int) -> Value:
    """Whether each layer has a window; by default all but the last of so many."""
    count, kinds = config.count("num_hidden_layers"), config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != count:
        kinds = ["full_attention" if layer % period == period - 1 else "sliding_attention" for layer in range(count)]
    return Value("[BOOL]", [kind == "sliding_attention" for kind in kinds])


def _olmo2(config: Config) -> Numbers:
    if config.model_type != "olmo3":
        return {}
    return _window(config) | {"attention.sliding_window_pattern": _pattern(config, 4)}


def _exaone4(config: Config) -> Numbers:
    # llama.cpp has a window in the model of 64 layers alone (src/models/exaone4.cpp).
    wide = config.count("num_hidden_layers") == 64
    if (config.get("sliding_window") is not None) != wide:
        what = "a sliding_window" if not wide else "no sliding_window"
        raise RefusedError(config.where, f"config.json: {what}, but llama.cpp's exaone4 has one with 64 layers only")
    made = _vocabulary(config)
    return made | _window(config) | {"attention.sliding_window_pattern": _pattern(config, 4)} if wide else made


def _glm4moe(config: Config) -> Numbers:
    return {
        "rope.dimension_count": u32(int(head_size(config) * config.rope_number("partial_rotary_factor", 0.5))),
        "expert_feed_forward_length": u32(config.count("moe_intermediate_size")),
        "expert_shared_count": u32(config.count("n_shared_experts")),
        "leading_dense_block_count": u32(config.count("first_k_dense_replace")),
        "expert_gating_func": u32(_GATING["sigmoid"]),
        "expert_weights_scale": f32(config.number("routed_scaling_factor")),
        "expert_weights_norm": boolean(bool(config.get("norm_topk_prob"))),
    }


def _hunyuan(config: Config) -> Numbers:
    if config.rope["rope_type"] != "dynamic":
        return {}
    alpha, base, size = config.rope_number("alpha", 50), config.rope_number("rope_theta"), config.count("head_dim")
    longest = config.count("max_position_embeddings")
    if base != 10000.0 or longest not in (32 << 10, 256 << 10) or alpha <= 0 or size <= 2:
        raise RefusedError(config.where, "config.json: a dynamic rotary embedding with numbers that llama.cpp does not know")
    return {
        "rope.freq_base": f32(base * alpha ** (size / (size - 2))),
        "rope.scaling.type": string("none"),
        "rope.scaling.factor": f32(1.0),
        "rope.scaling.original_context_length": u32(256 << 10),
        "context_length": u32(256 << 10),
    }


def _mistral3(config: Config) -> Numbers:
    made = _llama(config)
    if config.model_type != "ministral3":
        return made
    if config.rope["rope_type"] != "yarn":
        raise RefusedError(config.where, "config.json: the rotary embedding of a ministral3 is not yarn")
    return made | {
        "rope.scaling.yarn_log_multiplier": f32(config.rope_number("mscale_all_dim")),
        "attention.temperature_scale": f32(config.rope_number("llama_4_scaling_beta")),
    }


def _ernie4_5_moe(config: Config) -> Numbers:
    shared = config.count("moe_num_shared_experts")
    made = {
        "expert_count": u32(config.count("moe_num_experts")),
        "expert_used_count": u32(config.count("moe_k")),
        "interleave_moe_layer_step": u32(config.count("moe_layer_interval")),
        "leading_dense_block_count": u32(config.count("moe_layer_start_index")),
        "expert_feed_forward_length": u32(config.count("moe_intermediate_size")),
        "expert_shared_count": u32(shared),
    }
    if shared:
        # Its conversion divides so, which is right for the published models (conversion/ernie.py).
        wide = config.count("intermediate_size") // max(1, config.count("num_key_value_heads"))
        if wide != shared * config.count("moe_intermediate_size"):
            raise RefusedError(
                config.where, f"config.json: shared experts, which llama.cpp's conversion takes to be {wide} wide"
            )
        made["expert_shared_feed_forward_length"] = u32(wide)
    return made


def _olmoe(config: Config) -> Numbers:
    # Its conversion writes this number whatever the config has (conversion/olmo.py).
    _only(config, {"rms_norm_eps": 1e-5, "num_key_value_heads": config.count("num_attention_heads")}, "olmoe")
    return {}


def _phi2(config: Config) -> Numbers:
    _check_theta(config, "phi2")
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    _only(config, {"intermediate_size": 4 * hidden, "num_key_value_heads": heads}, "phi2")
    return {
        "context_length": u32(config.count("max_position_embeddings")),
        "embedding_length": u32(hidden),
        "feed_forward_length": u32(4 * hidden),
        "attention.head_count": u32(heads),
        "attention.head_count_kv": u32(heads),
        "rope.dimension_count": u32(rotated(config)),
    } | _some(config, _NORM)


def _minimax_m2(config: Config) -> Numbers:
    return {
        "expert_feed_forward_length": u32(config.count("intermediate_size")),
        "rope.dimension_count": u32(config.count("rotary_dim")),
    }


def _lfm2(config: Config) -> Numbers:
    kinds, wide = config.get("layer_types"), config.count("intermediate_size")
    if not isinstance(kinds, list) or len(kinds) != config.count("num_hidden_layers"):
        raise RefusedError(config.where, "config.json: no layer_types for every layer")
    if config.get("block_auto_adjust_ff_dim"):
        wide, of = int(2 * wide / 3), config.count("block_multiple_of")
        if config.get("block_ffn_dim_multiplier") is not None:
            wide = int(config.number("block_ffn_dim_multiplier") * wide)
        wide = of * ((wide + of - 1) // max(1, of))
    heads = config.count("num_key_value_heads")
    return _vocabulary(config) | {
        "attention.head_count_kv": Value("[INT32]", [0 if kind == "conv" else heads for kind in kinds]),
        "shortconv.l_cache": u32(config.count("conv_L_cache")),
        "feed_forward_length": u32(wide),
    }


def _sections(config: Config) -> Numbers:
    sections = config.rope.get("mrope_section")
    if not isinstance(sections, list) or not 1 <= len(sections) <= 4 or not all(isinstance(one, int) for one in sections):
        raise RefusedError(config.where, "config.json: no mrope_section, without which llama.cpp does not load the model")
    return {"rope.dimension_sections": Value("[INT32]", [*sections, 0, 0, 0][:4])}


def _qwen3vl(config: Config) -> Numbers:
    vision = config.get("vision_config")
    layers = vision.get("deepstack_visual_indexes", [8, 16, 24]) if isinstance(vision, dict) else []
    if not isinstance(layers, list):
        raise RefusedError(config.where, "config.json: deepstack_visual_indexes is not a list")
    return _sections(config) | _qwen2_moe(config) | {"n_deepstack_layers": u32(len(layers))}


def _qwen35(config: Config) -> Numbers:
    kinds, count = config.get("layer_types"), config.count("num_hidden_layers")
    if not isinstance(kinds, list):
        every = config.count("full_attention_interval") if config.get("full_attention_interval") else 4
        kinds = ["full_attention" if layer % every == every - 1 else "linear_attention" for layer in range(count)]
    if len(kinds) != count:
        raise RefusedError(config.where, f"config.json: {len(kinds)} layer_types for {count} layers")
    sections = _sections(config) if "mrope_section" in config.rope else {}
    values = config.count("linear_num_value_heads")
    return {
        "rope.dimension_sections": Value("[INT32]", [11, 11, 10, 0]),
        **sections,
        **_qwen2_moe(config),
        "ssm.conv_kernel": u32(config.count("linear_conv_kernel_dim")),
        "ssm.state_size": u32(config.count("linear_key_head_dim")),
        "ssm.group_count": u32(config.count("linear_num_key_heads")),
        "ssm.time_step_rank": u32(values),
        "ssm.inner_size": u32(config.count("linear_value_head_dim") * values),
        "attention.recurrent_layers": Value("[BOOL]", [kind == "linear_attention" for kind in kinds]),
        "full_attention_interval": u32(config.count("full_attention_interval") if config.get("full_attention_interval") else 4),
        "rope.dimension_count": u32(int(head_size(config) * config.rope_number("partial_rotary_factor", 0.25))),
    }


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
    "olmo": _olmo, "nemotron": _nemotron, "olmo2": _olmo2, "exaone4": _exaone4, "glm4moe": _glm4moe, "granitemoe": _granite,
    "hunyuan-dense": _hunyuan, "mistral3": _mistral3, "ernie4_5-moe": _ernie4_5_moe, "olmoe": _olmoe, "minimax-m2": _minimax_m2,
    "apertus": _llama, "lfm2": _lfm2, "qwen2vl": _sections, "qwen3vl": _qwen3vl, "qwen3vlmoe": _qwen3vl, "qwen35": _qwen35,
    "qwen35moe": _qwen35,
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
    "stablelm": _stablelm, "phi2": _phi2,
}  # fmt: skip
"""Architectures with their own list of keys."""


# ---- All keys under an architecture's prefix


_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_ACTIVATIONS = {
    "gemma": _GELU, "gemma2": _GELU, "gemma3": _GELU, "starcoder2": _GELU, "gpt2": _GELU, "falcon": _GELU, "bloom": _GELU,
    "nemotron": ("relu2",), "arcee": ("relu2",), "phi2": _GELU, "apertus": ("xielu",),
}  # fmt: skip
"""The activations that llama.cpp computes (`src/models/*.cpp`); silu for all others. Its gelu is the tanh approximation."""
_SCALED = {
    **dict.fromkeys(
        ("llama", "granite", "smollm3", "arcee", "granitemoe", "mistral3", "apertus", "exaone4"),
        ("default", "linear", "yarn", "llama3"),
    ),
    "hunyuan-dense": ("default", "linear", "yarn", "dynamic"),
    **dict.fromkeys(("qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe"), ("default", "yarn")),
    "phi3": ("default", "longrope", "su"),
    **dict.fromkeys(("command-r", "cohere2"), ("default",)),
}
"""Types of rotary embeddings with a scaling that llama.cpp's conversion writes, as numbers or tensors."""


def hyperparameters(architecture: Architecture, config: Config) -> Numbers:
    """The hyperparameters: key under the architecture's prefix to value."""
    _check(architecture, config)
    special = _OWN.get(architecture.gguf)
    made = special(config) if special else _shared(config) | _MORE.get(architecture.gguf, _nothing)(config)
    if architecture.gguf in ("granite", "granitemoe"):  # llama.cpp has no head_dim for them
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
