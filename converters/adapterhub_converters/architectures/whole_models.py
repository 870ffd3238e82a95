"""The table of llama.cpp's architectures: names and orders of the modules of Hugging Face models.

An architecture is listed if gguf-py's `TensorNameMap` agrees with the names, and llama.cpp's own conversion of a model was
found to be linear and equal to ours on every module (tests/converters/test_architecture_lookup.py): a renaming and, for some,
a permutation of a module's rows or a stack of experts. For these, complete models are converted, too; for those in
`rule_named_models`, mostly adapters and folders. Everything else is refused by name.
"""

from __future__ import annotations

from .architecture import ATTENTION, MLP, NORMS, Architecture, Experts

_FUSED_MLP = {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA2_NORMS = {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm"} | _POST_NORMS
_BLOOM = {
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}

_BLOOM_TOP = {"transformer.word_embeddings": "token_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}
_GPT2_TOP = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}

# Sources: for permutations, LlamaModel.undo_permute and its subclasses in llama.cpp's conversion/; for names, gguf-py,
# tensor_mapping.py.
_MLA_BYPASSED = "llama.cpp bypasses the adapter here (src/models/deepseek2.cpp), so it would load and have no effect"
_LATENT_STEMS = {
    "q_proj": "q", "q_a_proj": "q_a", "q_b_proj": "q_b", "kv_a_proj_with_mqa": "kv_a_mqa", "kv_b_proj": "kv_b",
}  # fmt: skip
_SHARED_EXPERTS = {f"mlp.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")}
ARCHITECTURES = (
    Architecture(
        "llama",
        {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"},
        permuted=True,
        wrapped={"LlavaForConditionalGeneration": "llava", "VoxtralForConditionalGeneration": "voxtral"},
    ),
    Architecture(
        "llama",
        {"MixtralForCausalLM": "mixtral"},
        linear=ATTENTION | {"block_sparse_moe.gate": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp"},
        permuted=True,
        experts=Experts(
            "block_sparse_moe.experts",
            {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"},
        ),
    ),
    Architecture("granite", {"GraniteForCausalLM": "granite"}, permuted=True),
    Architecture("smollm3", {"SmolLM3ForCausalLM": "smollm3"}, permuted=True),
    Architecture("qwen2", {"Qwen2ForCausalLM": "qwen2"}, wrapped={"Qwen2AudioForConditionalGeneration": "qwen2_audio"}),
    Architecture(
        "qwen2moe",
        {"Qwen2MoeForCausalLM": "qwen2_moe"},
        linear=ATTENTION
        | {"mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp"}
        | {f"mlp.shared_expert.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
        experts=Experts(),
    ),
    Architecture("qwen3", {"Qwen3ForCausalLM": "qwen3"}, norms=NORMS | _QK_NORMS),
    Architecture(
        "qwen3moe",
        {"Qwen3MoeForCausalLM": "qwen3_moe"},
        linear=ATTENTION | {"mlp.gate": "ffn_gate_inp"},
        norms=NORMS | _QK_NORMS,
        experts=Experts(),
    ),
    Architecture("gemma", {"GemmaForCausalLM": "gemma"}, head=False, shifted=True),
    Architecture("gemma2", {"Gemma2ForCausalLM": "gemma2"}, norms=_GEMMA2_NORMS, head=False, shifted=True),
    Architecture(
        "gemma3",
        {"Gemma3ForCausalLM": "gemma3_text"},
        norms=_GEMMA2_NORMS | _QK_NORMS,
        shifted=True,
        wrapped={"Gemma3ForConditionalGeneration": "gemma3"},
    ),
    Architecture("olmo2", {"Olmo2ForCausalLM": "olmo2"}, norms=_QK_NORMS | _POST_NORMS),
    Architecture(
        "phi3",
        {"Phi3ForCausalLM": "phi3"},
        linear={"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output"} | _FUSED_MLP,
    ),
    Architecture(
        "starcoder2",
        {"Starcoder2ForCausalLM": "starcoder2"},
        linear=ATTENTION | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    ),
    Architecture(
        "gpt2",
        {"GPT2LMHeadModel": "gpt2"},
        linear={
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        norms={"ln_1": "attn_norm", "ln_2": "ffn_norm"},
        top=_GPT2_TOP,
        layers="transformer.h",
        transposed=True,
        unseen={"transformer.wpe": "llama.cpp does not support LoRA on the position table"},
    ),
    Architecture(
        "falcon",
        {"FalconForCausalLM": "falcon"},
        linear=_BLOOM,
        norms={"input_layernorm": "attn_norm", "ln_attn": "attn_norm_2", "ln_mlp": "attn_norm"},
        top=_BLOOM_TOP,
        layers="transformer.h",
        grouped="self_attention.query_key_value",
    ),
    Architecture(
        "bloom",
        {"BloomForCausalLM": "bloom"},
        linear=_BLOOM,
        norms=NORMS,
        top=_BLOOM_TOP | {"transformer.word_embeddings_layernorm": "token_embd_norm"},
        layers="transformer.h",
        grouped="self_attention.query_key_value",
    ),
    Architecture("stablelm", {"StableLmForCausalLM": "stablelm"}),
    Architecture("command-r", {"CohereForCausalLM": "cohere"}, norms={"input_layernorm": "attn_norm"} | _QK_NORMS, head=False),
    Architecture(
        "glm4",
        {"Glm4ForCausalLM": "glm4"},
        linear=ATTENTION | _FUSED_MLP,
        norms=NORMS | {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    ),
    Architecture(
        "gpt-oss",
        {"GptOssForCausalLM": "gpt_oss"},
        linear=ATTENTION | {"mlp.router": "ffn_gate_inp"},
        norms={"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
        experts=Experts(None, interleaved=True, transposed=True),
        aside={"self_attn.sinks": "attn_sinks.weight"},
    ),
    Architecture(
        "deepseek2",
        {"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"},
        linear={"self_attn.o_proj": "attn_output"} | MLP | _SHARED_EXPERTS | {"mlp.gate": "ffn_gate_inp"},
        norms=NORMS | {"self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.kv_a_layernorm": "attn_kv_a_norm"},
        experts=Experts(),
        aside={"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}
        | {f"self_attn.{name}.weight": f"attn_{stem}.weight" for name, stem in _LATENT_STEMS.items()},
        unseen=dict.fromkeys(
            (*(f"self_attn.{name}" for name in _LATENT_STEMS), "lm_head"),
            _MLA_BYPASSED,
        ),
    ),
    # OLMo's norms have no weights.
    Architecture(
        "olmo",
        {"OlmoForCausalLM": "olmo"},
        norms={},
        top={"model.embed_tokens": "token_embd", "lm_head": "output"},
        permuted=True,
    ),
    Architecture(
        "seed_oss",
        {"SeedOssForCausalLM": "seed_oss"},
        norms={"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
    ),
    Architecture(
        "nemotron",
        {"NemotronForCausalLM": "nemotron"},
        linear=ATTENTION | {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
        shifted=True,
    ),
    Architecture("cohere2", {"Cohere2ForCausalLM": "cohere2"}, norms={"input_layernorm": "attn_norm"}, head=False),
    Architecture("ernie4_5", {"Ernie4_5ForCausalLM": "ernie4_5"}),
    Architecture(
        "arcee",
        {"ArceeForCausalLM": "arcee"},
        linear=ATTENTION | {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
        permuted=True,
    ),
)
