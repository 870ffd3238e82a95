"""A model's config.json completed with transformers' defaults, as llama.cpp's conversion reads it (`AutoConfig`, `to_dict`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_converters.containers.json_file import is_integer, is_number
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

_DIVIDED = (
    "llama", "mistral", "arcee", "nemotron", "cohere2", "seed_oss", "ernie4_5", "ministral3",
)  # fmt: skip
"""Model types whose null `head_dim` means the hidden size divided by the number of heads."""
_MULTI_HEAD = (
    "llama", "granite", "olmo", "olmo2", "phi3", "cohere", "cohere2", "arcee", "nemotron", "deepseek_v2", "olmo3",
    "granitemoe", "olmoe", "phi", "apertus",
)  # fmt: skip
"""Model types with a key head for every query head by default."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    "granite": {
        "rms_norm_eps": 1e-6, "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "smollm3": {"rms_norm_eps": 1e-6, "rope_theta": 2e6},
    "qwen2": {"rms_norm_eps": 1e-6},
    "qwen2_moe": {
        "rms_norm_eps": 1e-6, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3": {"rms_norm_eps": 1e-6, "head_dim": 128},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "gemma": {"rms_norm_eps": 1e-6, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "rms_norm_eps": 1e-6, "head_dim": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    },
    "gemma3_text": {
        "rms_norm_eps": 1e-6, "head_dim": 256, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
    "starcoder2": {"norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh"},
    "gpt2": {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    "falcon": {"layer_norm_epsilon": 1e-5},
    "bloom": {"layer_norm_epsilon": 1e-5},
    "stablelm": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_parallel_residual": False},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 5e5},
    "glm4": {"rms_norm_eps": 1.5625e-07, "head_dim": 128, "partial_rotary_factor": 0.5},
    "gpt_oss": {"rms_norm_eps": 1e-5, "head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0},
    "deepseek_v2": {
        "rms_norm_eps": 1e-6, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "first_k_dense_replace": 0,
        "n_shared_experts": 2,
    },
    "deepseek_v3": {
        "rms_norm_eps": 1e-6, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 3,
        "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "n_routed_experts": 256,
    },
    "olmo": {},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
    "glm4_moe": {
        "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True,
    },
    "granitemoe": {
        "rms_norm_eps": 1e-6, "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
        "logits_scaling": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "hunyuan_v1_dense": {"rms_norm_eps": 1e-5, "eod_token_id": 3},
    "ministral3": {"rms_norm_eps": 1e-5},
    "ernie4_5_moe": {
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_layer_end_index": -1,
    },
    "exaone4": {"rms_norm_eps": 1e-5, "sliding_window": 4096},
    "olmoe": {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
    "phi": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
    "minimax_m2": {
        "rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 5e6, "num_local_experts": 256, "num_experts_per_tok": 8,
    },
    "apertus": {"rms_norm_eps": 1e-5, "rope_theta": 12e6, "hidden_act": "xielu"},
    "lfm2": {
        "norm_eps": 1e-5, "rope_theta": 1e6, "conv_L_cache": 3, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "qwen2_vl": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen2_5_vl": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen3_vl": {"rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 5e5},
    "qwen3_vl_moe": {
        "rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 5e5, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    },
    "qwen3_5": {
        "rms_norm_eps": 1e-6, "head_dim": 256, "partial_rotary_factor": 0.25, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    },
    "seed_oss": {"rms_norm_eps": 1e-6, "head_dim": 128},
    "nemotron": {"norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "relu2"},
    "cohere2": {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "sliding_window": 4096},
    "ernie4_5": {"rms_norm_eps": 1e-5, "head_dim": 128, "rope_theta": 5e5},
    "arcee": {"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
}  # fmt: skip
"""Defaults of the classes in transformers 5.24, as far as a GGUF contains them."""
_DEFAULTS["qwen3_5_moe"] = _DEFAULTS["qwen3_5"] | {
    "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
}  # fmt: skip
_DEFAULTS |= {
    f"{kind}_text": _DEFAULTS[kind] for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
}
_OWN_NAMES = {"gpt2": {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}}
_OWN_NAMES["bloom"] = {"n_embed": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
_OWN_NAMES["falcon"] = {"n_embed": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
_SCALED = ("llama3", "yarn", "longrope")
_MAX_FLOAT = 3.4e38  # of float32
_MAX_COUNTS = {"num_hidden_layers": 10_000, "num_attention_heads": 1 << 20, "hidden_size": 1 << 24, "head_dim": 1 << 20}
"""Upper limits of the numbers that size lists and arrays, and of those that others are divided by."""


@dataclass(frozen=True)
class Config:
    """The numbers of a model.

    Attributes:
        rope: The settings of its rotary embedding.
        sliding_rope: The settings of the rotary embedding in layers with a window.
    """

    where: str
    model_type: str
    values: Mapping[str, Any]
    rope: Mapping[str, Any]
    sliding_rope: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return a value; None if it is missing."""
        return self.values.get(key)

    def count(self, key: str) -> int:
        """Return a whole number; RefusedError if it is missing or not a whole number."""
        return self._whole(key, self.values.get(key))

    def _whole(self, key: str, value: Any) -> int:
        if not is_integer(value) or not 0 <= value < 1 << 32:
            raise RefusedError(self.where, f"config.json: {key} is {str(value)[:40]}, but a GGUF needs a number there")
        return value

    def number(self, key: str) -> float:
        """Return a number; RefusedError if it is missing or not a number."""
        return self._float(key, self.values.get(key))

    def rope_number(self, key: str, default: float | None = None) -> float:
        """Return a number of the rotary embedding; RefusedError if it is missing and there is no default."""
        return self._float(key, self.rope.get(key, default))

    def rope_count(self, key: str) -> int:
        """Return a whole number of the rotary embedding."""
        value = self.rope.get(key)
        return self._whole(key, int(value) if isinstance(value, float) and value.is_integer() else value)

    def sliding_rope_number(self, key: str) -> float:
        """Return a number of the rotary embedding of layers with a window."""
        return self._float(key, self.sliding_rope.get(key))

    def _float(self, key: str, value: Any) -> float:
        if not is_number(value) or abs(value) > _MAX_FLOAT:
            raise RefusedError(self.where, f"config.json: {key} is {str(value)[:40]}, but a GGUF needs a number there")
        return float(value)


def complete_config(config: Mapping[str, Any], location: str) -> Config:
    """Complete the config of a model, or of the text model in it, with the defaults of its class."""
    # A vision model has the numbers of its text model in an object of their own.
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    model_type = str(config.get("model_type"))
    if model_type not in _DEFAULTS:
        raise RefusedError(
            location, f"model_type {model_type[:40]!r} has no verified conversion to GGUF", code="unsupported-architecture"
        )
    values = {**_DEFAULTS[model_type], **config}
    for own_name, common_name in _OWN_NAMES.get(model_type, {}).items():
        values.setdefault(common_name, values.get(own_name))
    for key, largest in _MAX_COUNTS.items():
        if isinstance(number := values.get(key), int) and not 1 <= number <= largest:
            raise RefusedError(location, f"config.json: {key} is {number}, not a number from 1 to {largest:,}")
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if model_type in _MULTI_HEAD and values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if (
        model_type in _DIVIDED
        and values.get("head_dim") is None
        and isinstance(heads, int)
        and isinstance(hidden, int)
        and heads
    ):
        values["head_dim"] = hidden // heads
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key), dict | None):
            raise RefusedError(location, f"config.json: {key} is not an object")
    rope, sliding = _rope(values, model_type)
    return Config(location, model_type, values, rope, sliding)


def _rope(values: Mapping[str, Any], model_type: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rotary embedding of most layers and of those with a window (transformers, `convert_rope_params_to_dict`)."""
    configured_rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta = values.get("rope_theta", 10000.0)
    if model_type == "gemma3_text":
        nested = {
            key: dict(configured_rope[key])
            for key in ("full_attention", "sliding_attention")
            if isinstance(configured_rope.get(key), dict)
        }
        plain = {} if nested else configured_rope
        full = {
            "rope_type": "default",
            "rope_theta": values.get("rope_theta", 1e6),
            **plain,
            **nested.get("full_attention", {}),
        }
        local = {"rope_type": "default", "rope_theta": values.get("rope_local_base_freq", 10000.0)}
        return _with_rope_type(full, values), local | nested.get("sliding_attention", {})
    if model_type == "olmo3":
        defaults = {"rope_type": "default", "rope_theta": theta}
        parameters = values.get("rope_parameters") or {}
        kinds = [
            parameters[kind] if isinstance(parameters.get(kind), dict) else {}
            for kind in ("full_attention", "sliding_attention")
        ]
        return _with_rope_type({**defaults, **kinds[0], **(values.get("rope_scaling") or {})}, values), defaults | kinds[1]
    rope = {"rope_theta": theta, **configured_rope}
    if rope.get("rope_type", rope.get("type")) == "mrope":  # Qwen2-VL's name of the default in sections
        rope["rope_type"] = "default"
    if values.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    return _with_rope_type(rope, values), {}


def _with_rope_type(rope: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] in _SCALED:
        if values.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return rope
