"""What an architecture says in GGUF beside what most say, or in its place.

As llama.cpp has it (`conversion/*.py`, `set_gguf_parameters`); what its program computes otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adapterhub_converters.containers.gguf_file import boolean, f32, string, u32
from adapterhub_converters.errors import RefusedError

from .configured import Config
from .usual import Numbers, head_size, rotated, usual


def _vocabulary(config: Config) -> Numbers:
    return {"vocab_size": u32(config.count("vocab_size"))}


def _llama(config: Config) -> Numbers:
    return _vocabulary(config) | {"rope.dimension_count": u32(head_size(config))}


def _granite(config: Config) -> Numbers:
    if config.get("head_dim") not in (None, config.count("hidden_size") // config.count("num_attention_heads")):
        raise RefusedError(config.where, "config.json: a head_dim of its own, which llama.cpp's granite has not")
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
        raise RefusedError(config.where, "config.json: attn_logit_softcapping, which llama.cpp's gemma3 has not")
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
        raise RefusedError(config.where, "config.json: a rotary embedding in sections, which only a model of images has")
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


MORE: dict[str, Callable[[Config], Numbers]] = {
    "llama": _llama, "arcee": _llama, "smollm3": _llama, "granite": _granite, "qwen2moe": _qwen2_moe, "qwen3moe": _qwen2_moe,
    "gemma3": _gemma3, "command-r": _cohere, "cohere2": _cohere2, "glm4": _glm4, "gpt-oss": _gpt_oss, "deepseek2": _deepseek2,
    "olmo": _olmo, "nemotron": _nemotron,
}  # fmt: skip
"""What an architecture says beside, or instead of, what all say."""


def _some(config: Config, *keys: str) -> Numbers:
    return {key: value for key, value in usual(config).items() if key in keys}


_SIZES = ("context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
_RMS, _NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def _usual_theta(config: Config, name: str) -> None:
    if config.rope.get("rope_theta") != 10000.0:
        raise RefusedError(config.where, f"config.json: a rope_theta of its own, which llama.cpp's {name} has no key for")


def _gemma(config: Config) -> Numbers:
    _usual_theta(config, "gemma")
    return _some(config, *_SIZES, _RMS, "attention.key_length", "attention.value_length")


def _gemma2(config: Config) -> Numbers:
    # llama.cpp knows the scale of the queries by the number of layers (src/models/gemma2.cpp).
    divided = config.count("hidden_size") / config.count("num_attention_heads")
    wanted = divided if config.count("num_hidden_layers") == 46 else config.count("head_dim")
    if config.get("query_pre_attn_scalar") not in (None, wanted):
        raise RefusedError(config.where, f"config.json: query_pre_attn_scalar is not {wanted:g}, by which llama.cpp scales")
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
    _usual_theta(config, "falcon")
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
            raise RefusedError(config.where, f"config.json: {key} is {config.get(key)}, and llama.cpp's {name} has {value}")


def _stablelm(config: Config) -> Numbers:
    _usual_theta(config, "stablelm")
    factor = config.rope_number("partial_rotary_factor", 0.25)
    turned = int(factor * (config.count("hidden_size") // config.count("num_attention_heads")))
    return (
        _some(config, *_SIZES, _NORM)
        | {"rope.dimension_count": u32(turned)}
        | {"use_parallel_residual": boolean(bool(config.get("use_parallel_residual")))}
    )


OWN: dict[str, Callable[[Config], Numbers]] = {
    "gemma": _gemma, "gemma2": _gemma2, "phi3": _phi3, "falcon": _falcon, "bloom": _bloom, "gpt2": _gpt2,
    "stablelm": _stablelm,
}  # fmt: skip
"""Architectures with a list of their own."""
