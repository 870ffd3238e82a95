"""Small models of mlx-lm of every type that adapters are written for, made of configs alone."""

from __future__ import annotations

import re
from typing import Any

NUMBERS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256, "tie_word_embeddings": False, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5,
    "mlp_bias": False, "attention_bias": False, "sliding_window": 64, "rope_scaling": None, "use_qk_norm": True,
    "n_shared_experts": 1, "num_shared_experts": 1, "shared_expert_intermediate_size": 32, "max_window_layers": 2,
    "mlp_only_layers": [0], "decoder_sparse_step": 1, "moe_layer_start_index": 1, "moe_num_shared_experts": 1,
    "num_dense_layers": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "full_attention_interval": 2, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_DENSE = {"num_experts": 0}
_GPT_2 = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64, "n_inner": 96, "rotary_dim": 8}
_LONG = {"short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 64}
EXTRAS: dict[str, dict[str, Any]] = {
    "afmoe": {**_SLIDING, "global_attn_every_n_layers": 2},
    "cohere2": {"sliding_window_pattern": 2},
    "deepseek_v2": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.0,
                         "original_max_position_embeddings": 64},
    },
    "exaone4": {**_SLIDING, "rope_scaling": {"rope_type": "default"}, "sliding_window_pattern": "LG"},
    "exaone_moe": {**_SLIDING, "is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma3": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma4": {**_SLIDING, "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 16},
    "gemma4_text": {**_SLIDING, "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 16},
    "gemma4_unified": {**_SLIDING, "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 16},
    "glm_moe_dsa": {"moe_layer_freq": 1, "topk_method": "noaux_tc"},
    "gpt2": _GPT_2,
    "gpt_bigcode": {**_GPT_2, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "gptj": _GPT_2,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
        "shared_intermediate_size": 96,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "layers_block_type": ["mamba", "attention"], "layer_types": ["mamba", "attention"],
    },
    "kimi_linear": {
        "linear_attn_config": {
            "full_attn_layers": [2], "kda_layers": [1], "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4,
        },
        "moe_layer_freq": 1, "num_expert_group": 1, "q_lora_rank": None, "num_experts_per_token": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "llama4": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96},
    "longcat_flash": {
        "num_layers": 2, "zero_expert_num": 1, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2,
    },
    "mellum": _SLIDING,
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-5, "n_shared_experts": None,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16,
        "sliding_window_size": 64, "partial_rotary_factor": 1.0, "attention_value_scale": None, "scoring_func": "sigmoid",
        "norm_topk_prob": True, "topk_method": "noaux_tc",
    },
    "minicpm3": {
        "rope_scaling": {"rope_type": "longrope", **_LONG}, "dim_model_base": 64, "scale_depth": 1.0, "scale_emb": 1.0,
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "E"], "num_hidden_layers": 4, "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "moe_latent_size": None,
    },
    "olmo3": _SLIDING,
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "phimoe": {"rope_scaling": {"type": "longrope", "short_mscale": 1.0, "long_mscale": 1.0, **_LONG}},
    "qwen3_5": _DENSE,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 64},
    "smollm3": {"no_rope_layers": [1, 1]},
}  # fmt: skip


def config(kind: str, **changes: Any) -> dict[str, Any]:
    """A config of a model type, transformers' own with small numbers."""
    import transformers

    try:
        defaults = transformers.AutoConfig.for_model(kind).to_dict()
    except ValueError:  # not one of transformers'
        defaults = {"model_type": kind}
    numbers = NUMBERS | EXTRAS.get(kind, {}) | changes
    text = defaults["text_config"] if isinstance(defaults.get("text_config"), dict) else defaults
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(text.get(key), list):
            text[key] = text[key][:2]
    text |= numbers
    if text is not defaults:
        defaults |= {
            "vision_config": {},
            "vocab_size": 128,
            "tie_word_embeddings": False,
            "hidden_size": 64,
            "num_hidden_layers": 2,
        }
    return defaults


def model(kind: str, **changes: Any) -> Any:
    """mlx-lm's model of a type; its weights are never computed."""
    from mlx_lm.utils import _get_classes

    given_config = config(kind, **changes)
    cls, args = _get_classes(given_config)
    for _ in range(20):
        try:
            return cls(args.from_dict(given_config))
        except TypeError as error:  # which names the arguments that transformers does not have
            missing = re.findall(r"'(\w+)'", str(error)) if "missing" in str(error) else []
            if not missing:
                raise
            missing_fields = {name: NUMBERS.get(name, 2) for name in missing}
            given_config |= missing_fields
            given_config["text_config"] = missing_fields | given_config.get("text_config", {})
    raise TypeError(kind)
