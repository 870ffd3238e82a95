"""Tiny random models of any causal family of transformers: its own config, with every number that gives a size made small."""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY = 259
# By the name that a family's config has for it. Heads of keys divide heads of queries, and all sizes are multiples of 16.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "d_model": 64, "n_layers": 2, "n_layer": 2, "n_heads": 4, "n_head": 4, "n_embd": 64, "n_positions": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "qk_head_dim": 32, "o_lora_rank": 16, "o_groups": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96,
    "shared_expert_intermediate_size": 48, "shared_intermediate_size": 48, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1,
    "sliding_window": 8, "attention_chunk_size": 8, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 16,
    "index_block_size": 4, "index_topk_blocks": 2, "index_local_blocks": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_ssm": 128,
    "rotary_dim": 8, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "global_head_dim": 16, "num_kv_shared_layers": 0,
    "dim": 64, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1,
}  # fmt: skip

# Of the vision or audio part of a model, whose sizes matter to nobody.
OTHER_SIZES: dict[str, Any] = {
    "depth": 1, "num_layers": 1, "num_hidden_layers": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 2,
    "num_attention_heads": 2, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 28, "patch_size": 14,
    "deepstack_visual_indexes": [], "fullatt_block_indexes": [0], "d_model": 32, "encoder_layers": 1,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16, "max_source_positions": 32, "output_dim": 64,
}  # fmt: skip


# What a family needs besides, by its type.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse"] * 2, "index_n_heads": 2},  # as many as heads of keys
}


def config(config_class: Any, **sizes: Any) -> Any:
    """Return a small config of the class; `sizes` replace what it would have."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    numbers = {name: value for name, value in SIZES.items() if name in defaults or name in config_class.attribute_map}
    numbers |= {
        name: 0.0
        for name, value in defaults.items()
        if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float)
    }
    # Latent attention has as many heads of keys as of queries, and its config may say so by default alone.
    if defaults.get("num_key_value_heads") == defaults.get("num_attention_heads", 0):
        numbers["num_key_value_heads"] = SIZES["num_attention_heads"]
    return config_class(**numbers | sizes)


def config_of_parts(config_class: Any, **sizes: Any) -> Any:
    """Return a small config of a class whose text, vision and audio models have configs of their own.

    `sizes` has the further sizes of the text model, and those of another part under its name; None leaves a size alone.
    """
    parts = {name: _part_class(config_class, name) for name in getattr(config_class, "sub_configs", {})}
    other_parts = {name: sizes.pop(name, {}) for name in parts if name != "text_config"}
    if "text_config" not in parts:
        return config(config_class, **sizes)
    text = config(parts["text_config"], **sizes)
    numbers = {"tie_word_embeddings": sizes["tie_word_embeddings"]} if "tie_word_embeddings" in sizes else {}
    for name, part_sizes in other_parts.items():
        fields = {field.name for field in dataclasses.fields(parts[name])} | set(parts[name].attribute_map)
        default_sizes = {size: value for size, value in OTHER_SIZES.items() if size in fields}
        numbers[name] = parts[name](**default_sizes | part_sizes).to_dict()
    return config_class(text_config=text.to_dict(), **numbers)


def _part_class(config_class: Any, name: str) -> Any:
    part_class = config_class.sub_configs[name]
    return (
        part_class
        if dataclasses.is_dataclass(part_class) and part_class.__name__ != "AutoConfig"
        else type(getattr(config_class(), name))
    )


def model(family: str, **sizes: Any) -> Any:
    """Return a tiny random causal model of a family, whose weights are large enough for every module to matter."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    torch.manual_seed(0)
    random_model = model_class(_config_of(family, model_class, **sizes))
    for parameter in random_model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return random_model


def parameter_count(family: str) -> int | None:
    """Return the number of parameters of a tiny model of a family; None if a small config is not enough for it."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in model_class(_config_of(family, model_class)).parameters())
    except Exception:
        return None


def _config_of(family: str, model_class: Any, **sizes: Any) -> Any:
    return config(model_class.config_class, **OF_FAMILY.get(family, {}) | sizes)
