"""Tiny random models, as a Hugging Face folder and as GGUF for llama.cpp, and LoRA adapters made by peft itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.containers import gguf_output
from adapterhub_converters.containers.gguf_types import MetadataValue, f32_value, string_value, u32_value
from tests.support import tiny_families

CONFIG: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip

# What a GGUF of each architecture says beside the numbers that all have (llama.cpp, conversion/*.py, set_gguf_parameters).
EXTRAS: dict[str, dict[str, MetadataValue]] = {
    "granite": {
        "attention.scale": f32_value(0.25), "embedding_scale": f32_value(2.0), "residual_scale": f32_value(0.5),
        "logit_scale": f32_value(2.0),
    },
    "gemma2": {
        "attn_logit_softcapping": f32_value(50.0), "final_logit_softcapping": f32_value(30.0),
        "attention.sliding_window": u32_value(4096),
    },
    "gemma3": {"attention.sliding_window": u32_value(4096)},
    "phi3": {"rope.scaling.original_context_length": u32_value(256), "attention.sliding_window": u32_value(256)},
}  # fmt: skip
# What write_gguf can write without llama.cpp's own conversion.
GGUF = (
    "llama", "granite", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "phi3", "starcoder2",
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "GraniteForCausalLM": {
        "attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
    },
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "GPT2LMHeadModel": {"n_ctx": 256, "tie_word_embeddings": True},
    "FalconForCausalLM": {
        "head_dim": None, "num_kv_heads": 2, "new_decoder_architecture": True, "intermediate_size": None,
        "tie_word_embeddings": True,
    },
    "BloomForCausalLM": {"tie_word_embeddings": True},
    "CohereForCausalLM": {"tie_word_embeddings": True, "logit_scale": 0.5, "eos_token_id": 1, "bos_token_id": 2},
    "GptOssForCausalLM": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    # Heads of 32, since vLLM packs them for AMX, where a CPU has it, in blocks of 32.
    "DeepseekV2ForCausalLM": {
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
    "DeepseekV3ForCausalLM": {
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid",
    },
    "Cohere2ForCausalLM": {
        "tie_word_embeddings": True, "logit_scale": 0.5, "eos_token_id": 1, "bos_token_id": 2, "rotary_pct": 1.0,
    },
    "GemmaForCausalLM": {"tie_word_embeddings": True},
    "Gemma2ForCausalLM": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
}  # fmt: skip
_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
_QWEN_EXPERTS = CONFIGS["Qwen2MoeForCausalLM"]
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 64, "embed_dim": 64, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
    "deepstack_visual_indexes": [], "fullatt_block_indexes": [0],
}  # fmt: skip
_AUDIO: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_mel_bins": 16, "max_source_positions": 32,
}  # fmt: skip
_SECTIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
# Text models of which adapters alone are converted.
CONFIGS |= {
    "Qwen3_5ForCausalLM": _LINEAR_ATTENTION,
    "Qwen3_5MoeForCausalLM": {**_LINEAR_ATTENTION, **_QWEN_EXPERTS},
    "Olmo3ForCausalLM": {"sliding_window": 64},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True,
    },
    "GraniteMoeForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "HunYuanDenseV1ForCausalLM": {},
    "Ministral3ForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "intermediate_size": 128,
    },
    "Exaone4ForCausalLM": {"sliding_window": 64, "sliding_window_pattern": 4},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "PhiForCausalLM": {"num_key_value_heads": 4, "intermediate_size": 256, "head_dim": None},
    "NemotronHForCausalLM": {
        "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16,
        "n_groups": 2, "ssm_state_size": 16,
    },
    "MiniMaxM2ForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16, "scoring_func": "sigmoid"},
    "ApertusForCausalLM": {},
    "Gemma4ForCausalLM": {
        "tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0,
    },
}  # fmt: skip
# Vision and audio models, whose numbers are those of the text model.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "LlavaForConditionalGeneration": {"vision_config": {"model_type": "clip_vision_model", **_VISION}},
    "VoxtralForConditionalGeneration": {"audio_config": _AUDIO},
    "Qwen2AudioForConditionalGeneration": {"audio_config": _AUDIO},
    "Mistral3ForConditionalGeneration": {"vision_config": {"model_type": "pixtral", **_VISION}},
    "Qwen2VLForConditionalGeneration": {"vision_config": _QWEN_VISION},
    "Qwen2_5_VLForConditionalGeneration": {"vision_config": _QWEN_VISION},
    "Qwen3VLForConditionalGeneration": {"vision_config": _QWEN_VISION},
    "Qwen3VLMoeForConditionalGeneration": {"vision_config": _QWEN_VISION},
    "MiniCPMV4_6ForConditionalGeneration": {"vision_config": {**_VISION, "image_size": 56, "insert_layer_id": 0}},
    "Gemma3ForConditionalGeneration": {"vision_config": _VISION, "mm_tokens_per_image": 4},
    "Gemma4ForConditionalGeneration": {"vision_config": _VISION, "audio_config": None},
    "Qwen3_5ForConditionalGeneration": {"vision_config": _QWEN_VISION},
    "Qwen3_5MoeForConditionalGeneration": {"vision_config": _QWEN_VISION},
    "Cosmos3EdgeForConditionalGeneration": {"vision_config": _VISION, "projector_hidden_size": 32},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {
        "vision_config": _QWEN_VISION, "audio_config": {**_AUDIO, "output_dim": 64, "downsample_hidden_size": 16},
    },
}  # fmt: skip
_TEXT: dict[str, dict[str, Any]] = {
    "VoxtralForConditionalGeneration": {"model_type": "llama"},
    "LlavaForConditionalGeneration": {"model_type": "llama"},
    "Qwen2AudioForConditionalGeneration": {"model_type": "qwen2"},
    "Mistral3ForConditionalGeneration": {"model_type": "mistral"},
    "Qwen2VLForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen2_5_VLForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen3VLForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen3VLMoeForConditionalGeneration": {**CONFIGS["Qwen3MoeForCausalLM"], "rope_parameters": _SECTIONS},
    "Gemma3ForConditionalGeneration": CONFIGS["Gemma3ForCausalLM"],
    "Gemma4ForConditionalGeneration": CONFIGS["Gemma4ForCausalLM"],
    "Qwen3_5ForConditionalGeneration": CONFIGS["Qwen3_5ForCausalLM"],
    "MiniCPMV4_6ForConditionalGeneration": {"model_type": "qwen3_5_text", **CONFIGS["Qwen3_5ForCausalLM"]},
    "Qwen3_5MoeForConditionalGeneration": CONFIGS["Qwen3_5MoeForCausalLM"],
    "Cosmos3EdgeForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {**CONFIGS["Qwen3MoeForCausalLM"], "rope_parameters": _SECTIONS},
}


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_HALF = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_MODALITY: dict[str, Any] = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
# Models that need nothing but the sizes that `tiny_families` gives by the names of their config.
SIZES_ONLY = (
    "GraniteMoeSharedForCausalLM", "GraniteSWAForCausalLM", "SmolVLMForConditionalGeneration", "GlmForCausalLM",
    "Idefics3ForConditionalGeneration", "HunYuanVLForConditionalGeneration",
    "AudioFlamingo3ForConditionalGeneration", "GPTNeoXForCausalLM", "AfmoeForCausalLM", "SolarOpenForCausalLM",
    "HYV3ForCausalLM", "LagunaForCausalLM", "Jais2ForCausalLM", "MambaForCausalLM", "FalconMambaForCausalLM",
    "GPTBigCodeForCausalLM",
)  # fmt: skip
# Others, with what they need besides.
BY_NAME: dict[str, dict[str, Any]] = {name: {} for name in SIZES_ONLY} | {
    "Qwen3NextForCausalLM": _MIXED,
    "LightOnOcrForConditionalGeneration": {"tie_word_embeddings": True},
    "Cohere2MoeForCausalLM": {"logit_scale": 0.5},
    "MellumForCausalLM": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    "GraniteMoeSWAForCausalLM": {},
    "ExaoneMoeForCausalLM": {"scoring_func": "sigmoid"},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "Gemma3nForCausalLM": {"hidden_size_per_layer_input": 256, "laurel_rank": 64, "vocab_size_per_layer_input": 128},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2VlForConditionalGeneration": {"layer_types": ["conv", "full_attention"]},
    "Llama4ForCausalLM": {"num_hidden_layers": 4, "intermediate_size_mlp": 80},
    "Llama4ForConditionalGeneration": {
        "num_hidden_layers": 4, "intermediate_size_mlp": 80, "vision_config": {**_MODALITY, "pixel_shuffle_ratio": 1.0},
    },
    "Glm4vForConditionalGeneration": {"rope_parameters": _HALF},
    "GlmOcrForConditionalGeneration": {"rope_parameters": _HALF},
    "Glm4vMoeForConditionalGeneration": {"rope_parameters": _HALF},
    "PaddleOCRVLForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen3ASRForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "JambaForCausalLM": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "num_key_value_heads": 2,
    },
}  # fmt: skip


def _config(config_class: Any, name: str, config: dict[str, Any]) -> Any:
    if name in BY_NAME:
        return tiny_families.config_of_parts(config_class, **{"vocab_size": CONFIG["vocab_size"], **BY_NAME[name], **config})
    if name in MULTIMODAL:
        text = {**CONFIG, **_TEXT[name], **config}
        numbers = {**MULTIMODAL[name], "text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}
    else:
        numbers = {**CONFIG, **CONFIGS.get(name, {}), **config}
    return config_class(**{key: value for key, value in numbers.items() if value is not None})


def model(name: str = "LlamaForCausalLM", *, seed: int = 0, **config: Any) -> Any:
    """A random model in float32 whose weights are large enough that every module matters."""
    import torch
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    built_model = cls(_config(cls.config_class, name, config)).eval()
    with torch.no_grad():
        for path, parameter in built_model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(path)))
            parameter.copy_(noise * 0.1 + (("norm" in path or ".ln_" in path) and parameter.ndim == 1 and not _adds_one(name)))
    return built_model


def _adds_one(name: str) -> bool:
    """Whether the model adds 1 to the weights of its norms."""
    return name.startswith(("Gemma", "Qwen3_5", "MiniCPMV4_6")) and not name.startswith(("Gemma3n", "Gemma4"))


def write_gguf(built_model: Any, path: Path, **tokenizer: MetadataValue) -> Path:
    """`built_model` as a GGUF model in float32, by default without a tokenizer, enough for llama.cpp to run token ids."""
    config = built_model.config.to_dict()
    architecture = architecture_lookup.by_class(
        config["architectures"][0] if config.get("architectures") else type(built_model).__name__, "tiny"
    )
    metadata: dict[str, MetadataValue] = {
        "general.architecture": string_value(architecture.gguf),
        "general.type": string_value("model"),
        "general.name": string_value("tiny"),
    }
    numbers: dict[str, MetadataValue] = {
        "block_count": u32_value(config["num_hidden_layers"]),
        "context_length": u32_value(config["max_position_embeddings"]),
        "embedding_length": u32_value(config["hidden_size"]),
        "feed_forward_length": u32_value(config["intermediate_size"]),
        "attention.head_count": u32_value(config["num_attention_heads"]),
        "attention.head_count_kv": u32_value(config["num_key_value_heads"]),
        "attention.key_length": u32_value(built_model.config.head_dim),
        "attention.value_length": u32_value(built_model.config.head_dim),
        "rope.dimension_count": u32_value(built_model.config.head_dim),
        "rope.freq_base": f32_value(_rope_theta(config)),
        "attention.layer_norm_rms_epsilon": f32_value(config.get("rms_norm_eps", 1e-6)),
        "attention.layer_norm_epsilon": f32_value(config.get("norm_epsilon", 1e-5)),
        "vocab_size": u32_value(config["vocab_size"]),
    } | EXTRAS.get(architecture.gguf, {})
    metadata |= {f"{architecture.gguf}.{key}": value for key, value in numbers.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in ({"model": string_value("none")} | tokenizer).items()}
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in built_model.named_parameters():
        module, _, kind = name.rpartition(".")
        array = parameter.detach().numpy()
        if architecture.is_norm(module) and architecture.gguf.startswith("gemma"):
            array = array + 1  # llama.cpp's Gemma norms include the 1 (conversion/gemma.py)
        tensors[f"{architecture.stem(module)}.{kind}"] = architecture_lookup.permute_rows(
            array, architecture.order(module, config, "tiny")
        )
    gguf_output.write(path, metadata, tensors)
    return path


def _rope_theta(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def adapter(built_model: Any, path: Path, *, dtype: str = "float32", strength: float = 0.1, **config: Any) -> Any:
    """A random LoRA on `built_model`, saved by peft as `path`; returns the peft model, in float32, ready to be asked."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0, **config}
    wrapped = get_peft_model(built_model, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape) * strength).to(getattr(torch, dtype)))
    lora_values = {name: parameter.data.clone() for name, parameter in wrapped.named_parameters() if "lora_" in name}
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    wrapped.save_pretrained(str(path), save_embedding_layers=False)
    for name, parameter in wrapped.named_parameters():
        if name in lora_values:
            parameter.data = lora_values[name]
    return wrapped
