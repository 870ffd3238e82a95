"""Hyperparameters of individual architectures of GGUF models (llama.cpp, `conversion/*.py`, `set_gguf_parameters`).

A model is refused if llama.cpp's architecture has no key for something that changes the function, or writes another value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adapterhub_converters.containers.gguf_types import MetadataValue, bool_value, f32_value, string_value, u32_value
from adapterhub_converters.errors import RefusedError

from .model_config import Config
from .shared_keys import GATING, Numbers, head_size, layer_kinds, rotated_dimensions, select_shared, vocabulary, window

SIZES = ("context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
RMS, NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def _llama(config: Config) -> Numbers:
    return vocabulary(config) | {"rope.dimension_count": u32_value(head_size(config))}


def _granite(config: Config) -> Numbers:
    if config.get("head_dim") not in (None, config.count("hidden_size") // config.count("num_attention_heads")):
        raise RefusedError(config.where, "config.json: a head_dim of its own, which llama.cpp's granite does not support")
    numbers = _llama(config)
    keys = {
        "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    }  # fmt: skip
    return numbers | {key: f32_value(config.number(name)) for name, key in keys.items() if config.get(name)}


def _qwen2_moe(config: Config) -> Numbers:
    return {
        key: u32_value(config.count(name))
        for name, key in (
            ("moe_intermediate_size", "expert_feed_forward_length"),
            ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        )
        if config.get(name) is not None
    }


def _gemma3(config: Config) -> Numbers:
    if config.get("attn_logit_softcapping") is not None:
        raise RefusedError(config.where, "config.json: attn_logit_softcapping, which llama.cpp's gemma3 does not support")
    numbers = window(config) if config.get("sliding_window_pattern") != 1 else {}
    key = "final_logit_softcapping"
    return numbers | ({key: f32_value(config.number(key))} if config.get(key) else {})


def _cohere(config: Config) -> Numbers:
    numbers: Numbers = {"logit_scale": f32_value(config.number("logit_scale")), "rope.scaling.type": string_value("none")}
    return numbers | ({"context_length": u32_value(config.count("model_max_length"))} if config.get("model_max_length") else {})


def _cohere2(config: Config) -> Numbers:
    head_dim = config.count("hidden_size") // config.count("num_attention_heads")
    rotated_count = int((1.0 if config.get("rotary_pct") is None else config.number("rotary_pct")) * head_dim)
    return (
        {"logit_scale": f32_value(config.number("logit_scale")), "rope.scaling.type": string_value("none")}
        | window(config)
        | vocabulary(config)
        | {"rope.dimension_count": u32_value(rotated_count)}
    )


def _glm4(config: Config) -> Numbers:
    if "mrope_section" in config.rope:
        raise RefusedError(config.where, "config.json: a rotary embedding in sections, which only vision models have")
    return {"rope.dimension_count": u32_value(int(head_size(config) * config.rope_number("partial_rotary_factor", 0.5)))}


def _gpt_oss(config: Config) -> Numbers:
    return window(config) | {"expert_feed_forward_length": u32_value(config.count("intermediate_size"))}


def _deepseek2(config: Config) -> Numbers:
    lora_rank, rope_dim, nope_dim = (config.count(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    numbers = {
        "attention.head_count_kv": u32_value(1),
        "leading_dense_block_count": u32_value(config.count("first_k_dense_replace")),
        "attention.kv_lora_rank": u32_value(lora_rank),
        "attention.key_length": u32_value(lora_rank + rope_dim),
        "attention.value_length": u32_value(lora_rank),
        "attention.key_length_mla": u32_value(nope_dim + rope_dim),
        "attention.value_length_mla": u32_value(config.count("v_head_dim")),
        "expert_feed_forward_length": u32_value(config.count("moe_intermediate_size")),
        "expert_shared_count": u32_value(config.count("n_shared_experts")),
        "expert_weights_scale": f32_value(config.number("routed_scaling_factor")),
        "rope.dimension_count": u32_value(rope_dim),
    } | vocabulary(config)
    if config.get("q_lora_rank") is not None:
        numbers["attention.q_lora_rank"] = u32_value(config.count("q_lora_rank"))
    if config.get("norm_topk_prob"):
        numbers["expert_weights_norm"] = bool_value(True)
    if config.rope.get("mscale_all_dim") is not None:
        numbers["rope.scaling.yarn_log_multiplier"] = f32_value(0.1 * config.rope_number("mscale_all_dim"))
    return numbers


def _window_pattern(config: Config, period: int) -> MetadataValue:
    """Return whether each layer has a window; by default all but the last of every `period` layers have one."""
    count, kinds = config.count("num_hidden_layers"), config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != count:
        kinds = ["full_attention" if layer % period == period - 1 else "sliding_attention" for layer in range(count)]
    return MetadataValue("[BOOL]", [kind == "sliding_attention" for kind in kinds])


def _olmo2(config: Config) -> Numbers:
    if config.model_type != "olmo3":
        return {}
    return window(config) | {"attention.sliding_window_pattern": _window_pattern(config, 4)}


def _exaone4(config: Config) -> Numbers:
    # llama.cpp has a window only in the model with 64 layers (src/models/exaone4.cpp).
    has_window = config.count("num_hidden_layers") == 64
    if (config.get("sliding_window") is not None) != has_window:
        present = "a sliding_window" if not has_window else "no sliding_window"
        raise RefusedError(config.where, f"config.json: {present}, but llama.cpp's exaone4 has one with 64 layers only")
    numbers = vocabulary(config)
    return (
        numbers | window(config) | {"attention.sliding_window_pattern": _window_pattern(config, 4)} if has_window else numbers
    )


def _glm4moe(config: Config) -> Numbers:
    return {
        "rope.dimension_count": u32_value(int(head_size(config) * config.rope_number("partial_rotary_factor", 0.5))),
        "expert_feed_forward_length": u32_value(config.count("moe_intermediate_size")),
        "expert_shared_count": u32_value(config.count("n_shared_experts")),
        "leading_dense_block_count": u32_value(config.count("first_k_dense_replace")),
        "expert_gating_func": u32_value(GATING["sigmoid"]),
        "expert_weights_scale": f32_value(config.number("routed_scaling_factor")),
        "expert_weights_norm": bool_value(bool(config.get("norm_topk_prob"))),
    }


def _hunyuan(config: Config) -> Numbers:
    if config.rope["rope_type"] != "dynamic":
        return {}
    # llama.cpp's conversion applies the NTK-aware alpha to the base frequency (conversion/hunyuan.py).
    alpha, base, size = config.rope_number("alpha", 50), config.rope_number("rope_theta"), config.count("head_dim")
    longest = config.count("max_position_embeddings")
    if base != 10000.0 or longest not in (32 << 10, 256 << 10) or alpha <= 0 or size <= 2:
        raise RefusedError(config.where, "config.json: a dynamic rotary embedding with numbers that llama.cpp does not know")
    return {
        "rope.freq_base": f32_value(base * alpha ** (size / (size - 2))),
        "rope.scaling.type": string_value("none"),
        "rope.scaling.factor": f32_value(1.0),
        "rope.scaling.original_context_length": u32_value(256 << 10),
        "context_length": u32_value(256 << 10),
    }


def _mistral3(config: Config) -> Numbers:
    numbers = _llama(config)
    if config.model_type != "ministral3":
        return numbers
    if config.rope["rope_type"] != "yarn":
        raise RefusedError(config.where, "config.json: the rotary embedding of a ministral3 is not yarn")
    return numbers | {
        "rope.scaling.yarn_log_multiplier": f32_value(config.rope_number("mscale_all_dim")),
        "attention.temperature_scale": f32_value(config.rope_number("llama_4_scaling_beta")),
    }


def _ernie4_5_moe(config: Config) -> Numbers:
    shared = config.count("moe_num_shared_experts")
    numbers = {
        "expert_count": u32_value(config.count("moe_num_experts")),
        "expert_used_count": u32_value(config.count("moe_k")),
        "interleave_moe_layer_step": u32_value(config.count("moe_layer_interval")),
        "leading_dense_block_count": u32_value(config.count("moe_layer_start_index")),
        "expert_feed_forward_length": u32_value(config.count("moe_intermediate_size")),
        "expert_shared_count": u32_value(shared),
    }
    if shared:
        # llama.cpp's conversion divides this way, which is right for the published models (conversion/ernie.py).
        width = config.count("intermediate_size") // max(1, config.count("num_key_value_heads"))
        if width != shared * config.count("moe_intermediate_size"):
            raise RefusedError(
                config.where, f"config.json: shared experts, which llama.cpp's conversion takes to be {width} wide"
            )
        numbers["expert_shared_feed_forward_length"] = u32_value(width)
    return numbers


def _olmoe(config: Config) -> Numbers:
    # llama.cpp's conversion writes this number regardless of the config (conversion/olmo.py).
    _require(config, {"rms_norm_eps": 1e-5, "num_key_value_heads": config.count("num_attention_heads")}, "olmoe")
    return {}


def _phi2(config: Config) -> Numbers:
    _check_theta(config, "phi2")
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    _require(config, {"intermediate_size": 4 * hidden, "num_key_value_heads": heads}, "phi2")
    return {
        "context_length": u32_value(config.count("max_position_embeddings")),
        "embedding_length": u32_value(hidden),
        "feed_forward_length": u32_value(4 * hidden),
        "attention.head_count": u32_value(heads),
        "attention.head_count_kv": u32_value(heads),
        "rope.dimension_count": u32_value(rotated_dimensions(config)),
    } | select_shared(config, NORM)


def _minimax_m2(config: Config) -> Numbers:
    return {
        "expert_feed_forward_length": u32_value(config.count("intermediate_size")),
        "rope.dimension_count": u32_value(config.count("rotary_dim")),
    }


def _lfm2(config: Config) -> Numbers:
    kinds, width = layer_kinds("lfm2", config), config.count("intermediate_size")
    if config.get("block_auto_adjust_ff_dim"):
        width, multiple = int(2 * width / 3), config.count("block_multiple_of")
        if config.get("block_ffn_dim_multiplier") is not None:
            width = int(config.number("block_ffn_dim_multiplier") * width)
        width = multiple * ((width + multiple - 1) // max(1, multiple))
    heads = config.count("num_key_value_heads")
    return vocabulary(config) | {
        "attention.head_count_kv": MetadataValue("[INT32]", [0 if kind == "conv" else heads for kind in kinds]),
        "shortconv.l_cache": u32_value(config.count("conv_L_cache")),
        "feed_forward_length": u32_value(width),
    }


def _sections(config: Config) -> Numbers:
    sections = config.rope.get("mrope_section")
    if (
        not isinstance(sections, list)
        or not 1 <= len(sections) <= 4
        or not all(isinstance(section, int) for section in sections)
    ):
        raise RefusedError(config.where, "config.json: no mrope_section, without which llama.cpp does not load the model")
    return {"rope.dimension_sections": MetadataValue("[INT32]", [*sections, 0, 0, 0][:4])}


def _qwen3vl(config: Config) -> Numbers:
    vision = config.get("vision_config")
    layers = vision.get("deepstack_visual_indexes", [8, 16, 24]) if isinstance(vision, dict) else []
    if not isinstance(layers, list):
        raise RefusedError(config.where, "config.json: deepstack_visual_indexes is not a list")
    return _sections(config) | _qwen2_moe(config) | {"n_deepstack_layers": u32_value(len(layers))}


def _qwen35(config: Config) -> Numbers:
    kinds = layer_kinds("qwen35", config)
    sections = _sections(config) if "mrope_section" in config.rope else {}
    values = config.count("linear_num_value_heads")
    return {
        "rope.dimension_sections": MetadataValue("[INT32]", [11, 11, 10, 0]),
        **sections,
        **_qwen2_moe(config),
        "ssm.conv_kernel": u32_value(config.count("linear_conv_kernel_dim")),
        "ssm.state_size": u32_value(config.count("linear_key_head_dim")),
        "ssm.group_count": u32_value(config.count("linear_num_key_heads")),
        "ssm.time_step_rank": u32_value(values),
        "ssm.inner_size": u32_value(config.count("linear_value_head_dim") * values),
        "attention.recurrent_layers": MetadataValue("[BOOL]", [kind == "linear_attention" for kind in kinds]),
        "full_attention_interval": u32_value(
            config.count("full_attention_interval") if config.get("full_attention_interval") else 4
        ),
        "rope.dimension_count": u32_value(int(head_size(config) * config.rope_number("partial_rotary_factor", 0.25))),
    }


def _olmo(config: Config) -> Numbers:
    numbers = {"attention.layer_norm_epsilon": f32_value(1e-5)}
    return numbers | (
        {"attention.clamp_kqv": f32_value(config.number("clip_qkv"))} if config.get("clip_qkv") is not None else {}
    )


def _nemotron(config: Config) -> Numbers:
    scaling: Numbers = {}
    if config.get("factor") or config.rope.get("factor"):
        factor = config.number("factor") if config.get("factor") else config.rope_number("factor")
        scaling = {"rope.scaling.type": string_value("linear"), "rope.scaling.factor": f32_value(factor)}
    return (
        {"rope.scaling.type": string_value("none")}
        | scaling
        | vocabulary(config)
        | {
            "attention.layer_norm_epsilon": f32_value(config.number("norm_eps")),
            "rope.dimension_count": u32_value(rotated_dimensions(config)),
        }
    )


EXTRA_KEYS: dict[str, Callable[[Config], Numbers]] = {
    "llama": _llama, "arcee": _llama, "smollm3": _llama, "granite": _granite, "qwen2moe": _qwen2_moe, "qwen3moe": _qwen2_moe,
    "gemma3": _gemma3, "command-r": _cohere, "cohere2": _cohere2, "glm4": _glm4, "gpt-oss": _gpt_oss, "deepseek2": _deepseek2,
    "olmo": _olmo, "nemotron": _nemotron, "olmo2": _olmo2, "exaone4": _exaone4, "glm4moe": _glm4moe, "granitemoe": _granite,
    "hunyuan-dense": _hunyuan, "mistral3": _mistral3, "ernie4_5-moe": _ernie4_5_moe, "olmoe": _olmoe, "minimax-m2": _minimax_m2,
    "apertus": _llama, "lfm2": _lfm2, "qwen2vl": _sections, "qwen3vl": _qwen3vl, "qwen3vlmoe": _qwen3vl, "qwen35": _qwen35,
    "qwen35moe": _qwen35,
}  # fmt: skip
"""Keys that an architecture adds to, or changes in, the shared ones."""


def _check_theta(config: Config, name: str) -> None:
    if config.rope.get("rope_theta") != 10000.0:
        raise RefusedError(config.where, f"config.json: a rope_theta of its own, for which llama.cpp's {name} has no key")


def _gemma(config: Config) -> Numbers:
    _check_theta(config, "gemma")
    return select_shared(config, *SIZES, RMS, "attention.key_length", "attention.value_length")


def _gemma2(config: Config) -> Numbers:
    # llama.cpp derives the scale of the queries from the number of layers (src/models/gemma2.cpp).
    divided = config.count("hidden_size") / config.count("num_attention_heads")
    computed = divided if config.count("num_hidden_layers") == 46 else config.count("head_dim")
    if (configured := config.get("query_pre_attn_scalar")) not in (None, computed):
        problem = f"query_pre_attn_scalar is {str(configured)[:40]}, but llama.cpp's gemma2 uses {computed:g}"
        raise RefusedError(config.where, f"config.json: {problem}")
    capped = {key: f32_value(config.number(key)) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    return _gemma(config) | capped | window(config)


def _phi3(config: Config) -> Numbers:
    numbers = select_shared(config, *SIZES, RMS, "rope.freq_base")
    numbers["rope.scaling.original_context_length"] = u32_value(config.count("original_max_position_embeddings"))
    numbers["rope.dimension_count"] = u32_value(rotated_dimensions(config))
    numbers["attention.sliding_window"] = u32_value(config.count("sliding_window") if config.get("sliding_window") else 0)
    return numbers


def _falcon(config: Config) -> Numbers:
    hidden = config.count("hidden_size")
    required = {"alibi": False, "parallel_attn": True, "ffn_hidden_size": 4 * hidden}
    _require(config, required, "falcon")
    _check_theta(config, "falcon")
    groups = config.count("num_kv_heads") if config.get("new_decoder_architecture") else 1
    return {
        "context_length": u32_value(2048),
        "tensor_data_layout": string_value("jploski"),
        "embedding_length": u32_value(hidden),
        "feed_forward_length": u32_value(4 * hidden),
        "attention.head_count": u32_value(config.count("num_attention_heads")),
        "attention.head_count_kv": u32_value(groups),
    } | select_shared(config, NORM)


def _bloom(config: Config) -> Numbers:
    _require(config, {"apply_residual_connection_post_layernorm": False}, "bloom")
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    return {
        "context_length": u32_value(config.count("seq_length") if config.get("seq_length") else hidden),
        "embedding_length": u32_value(hidden),
        "feed_forward_length": u32_value(4 * hidden),
        "attention.head_count": u32_value(heads),
        "attention.head_count_kv": u32_value(heads),
    } | select_shared(config, NORM)


def _gpt2(config: Config) -> Numbers:
    hidden = config.count("hidden_size")
    _require(config, {"n_inner": 4 * hidden, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}, "gpt2")
    return {
        "context_length": u32_value(config.count("n_ctx") if config.get("n_ctx") else config.count("n_positions")),
        "embedding_length": u32_value(hidden),
        "feed_forward_length": u32_value(4 * hidden),
        "attention.head_count": u32_value(config.count("num_attention_heads")),
    } | select_shared(config, NORM)


def _require(config: Config, required: Mapping[str, object], name: str) -> None:
    for key, value in required.items():
        if config.get(key) not in (None, value):
            problem = f"{key} is {str(config.get(key))[:40]}, but llama.cpp's {name} uses {value}"
            raise RefusedError(config.where, f"config.json: {problem}")


def _stablelm(config: Config) -> Numbers:
    _check_theta(config, "stablelm")
    factor = config.rope_number("partial_rotary_factor", 0.25)
    rotated_count = int(factor * (config.count("hidden_size") // config.count("num_attention_heads")))
    return (
        select_shared(config, *SIZES, NORM)
        | {"rope.dimension_count": u32_value(rotated_count)}
        | {"use_parallel_residual": bool_value(bool(config.get("use_parallel_residual")))}
    )


OWN_KEYS: dict[str, Callable[[Config], Numbers]] = {
    "gemma": _gemma, "gemma2": _gemma2, "phi3": _phi3, "falcon": _falcon, "bloom": _bloom, "gpt2": _gpt2,
    "stablelm": _stablelm, "phi2": _phi2,
}  # fmt: skip
"""Architectures with their own list of keys."""
