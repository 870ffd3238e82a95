"""Architectures that take one row each, with names by rule; adapters for them, and mostly their folders, are converted.

`STEMS` is gguf-py's name of each linear module, which hardly depends on the architecture. A row selects those that a layer has,
and adds its norms and what is permuted, stacked, tiled, or ignored. A row is admitted if its conversion is linear: llama.cpp's
own conversion of a model, applied to the model with the adapter merged, differs by exactly what is written
(tests/converters/test_rule_named_models.py); and its folders if they match llama.cpp's own conversion byte for byte
(tests/merging/into_base/test_folder_by_rule.py).
"""

from __future__ import annotations

from typing import Any

from .architecture import ATTENTION, MLP, NORMS, TOP, Architecture, Experts

_STATE_SPACE = {"in_proj": "ssm_in", "x_proj": "ssm_x", "dt_proj": "ssm_dt", "out_proj": "ssm_out"}
STEMS = {
    **ATTENTION,
    **MLP,
    "self_attn.dense": "attn_output",
    "self_attn.out_proj": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    **{f"feed_forward.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    **{f"feed_forward.shared_expert.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.router": "ffn_gate_inp",
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.gate_proj": "attn_gate",
    "self_attn.g_proj": "attn_gate",
    "shared_mlp.output_linear": "ffn_down_shexp",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.correction_coefs": "altup_correct_coef",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.out_proj": "ssm_out",
    **{f"{mixer}.{name}": stem for mixer in ("mixer", "mamba") for name, stem in _STATE_SPACE.items()},
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router.gate": "ffn_gate_inp",
    **{f"mlp.shared_mlp.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
    "router.proj": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_expert.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
}
"""Linear module of a layer to the stem of its tensor."""
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_POST_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}
_AFTER_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_LINEAR_ATTENTION_PARAMETERS = {
    f"linear_attn.{name}": stem
    for name, stem in (("conv1d.weight", "ssm_conv1d.weight"), ("dt_bias", "ssm_dt.bias"), ("A_log", "ssm_a"))
}
VISION_TEXT_PATH = "model.language_model"
SHARED_EXPERT = tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
SHARED_EXPERTS = tuple(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down"))
GRANITE_EXPERTS = Experts(
    None,
    stacked={
        "block_sparse_moe.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
        "block_sparse_moe.experts.down_proj": ("ffn_down_exps",),
    },
)
_GEMMA4_TOP = {
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.per_layer_model_projection": "per_layer_model_proj",
}  # fmt: skip
_NEMOTRON_TOP = {"model.embeddings": "token_embd", "lm_head": "output"}
_MIXER = {path: stem for path, stem in STEMS.items() if path.startswith("mixer.") and stem not in ("ssm_x", "ssm_dt")}
_TILED = frozenset(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"))
_ACROSS = frozenset({"linear_attn.out_proj"})


def modules(*paths: str) -> dict[str, str]:
    """Return the linear modules of these paths, to their stems."""
    return {path: STEMS[path] for path in paths}


def row(
    gguf: str, classes: dict[str, str], *extra_paths: str, linear: dict[str, str] | None = None, **fields: Any
) -> Architecture:
    """Return a row: attention and a gated MLP, or the modules in `linear`, and the modules `extra_paths`."""
    linear = (ATTENTION | MLP if linear is None else linear) | modules(*extra_paths)
    return Architecture(gguf, classes, linear=linear, **{"norms": NORMS, "top": TOP, **fields}, whole=False)


BY_RULE = (
    row(
        "qwen35",
        {"Qwen3_5ForCausalLM": "qwen3_5_text"},
        *_TILED,
        wrapped={"Qwen3_5ForConditionalGeneration": "qwen3_5", "MiniCPMV4_6ForConditionalGeneration": "minicpmv4_6"},
        norms=_POST_NORMS | _QK_NORMS | {"linear_attn.norm": "ssm_norm"},
        aside=_LINEAR_ATTENTION_PARAMETERS,
        shifted=True,
        tiled=_TILED,
        across=_ACROSS,
    ),
    row(
        "qwen35moe",
        {"Qwen3_5MoeForCausalLM": "qwen3_5_moe_text"},
        *_TILED,
        *SHARED_EXPERT,
        "mlp.gate",
        "mlp.shared_expert_gate",
        linear=ATTENTION,
        wrapped={"Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe"},
        norms=_POST_NORMS | _QK_NORMS | {"linear_attn.norm": "ssm_norm"},
        aside=_LINEAR_ATTENTION_PARAMETERS,
        shifted=True,
        tiled=_TILED,
        across=_ACROSS,
        experts=Experts(None),
    ),
    row("qwen3vl", {"Qwen3VLForConditionalGeneration": "qwen3_vl"}, norms=NORMS | _QK_NORMS, text=VISION_TEXT_PATH),
    row(
        "qwen3vlmoe",
        {"Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe"},
        "mlp.gate",
        linear=ATTENTION,
        norms=NORMS | _QK_NORMS,
        text=VISION_TEXT_PATH,
        experts=Experts(None, transposed=True),
    ),
    row(
        "qwen2vl",
        {"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl", "Qwen2VLForConditionalGeneration": "qwen2_vl"},
        text=VISION_TEXT_PATH,
    ),
    row("olmo2", {"Olmo3ForCausalLM": "olmo3"}, norms=_QK_NORMS | _AFTER_NORMS),
    row(
        "lfm2",
        {"Lfm2ForCausalLM": "lfm2"},
        linear=modules(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "feed_forward.w1",
            "feed_forward.w3",
            "feed_forward.w2",
            "conv.in_proj",
            "conv.out_proj",
        ),
        norms={
            "operator_norm": "attn_norm",
            "ffn_norm": "ffn_norm",
            "self_attn.q_layernorm": "attn_q_norm",
            "self_attn.k_layernorm": "attn_k_norm",
        },
        top={"model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "lm_head": "output"},
        aside={"conv.conv.weight": "shortconv.conv.weight"},
        wrapped={"Lfm2VlForConditionalGeneration": "lfm2_vl"},
    ),
    row(
        "llama",
        {"SmolVLMForConditionalGeneration": "smolvlm", "Idefics3ForConditionalGeneration": "idefics3"},
        texts=("llama",),
        text="model.text_model",
        permuted=True,
    ),
    row(
        "qwen3",
        {"LightOnOcrForConditionalGeneration": "lighton_ocr", "LightOnOCRForConditionalGeneration": "lighton_ocr"},
        norms=NORMS | _QK_NORMS,
        texts=("qwen3",),
        text=VISION_TEXT_PATH,
    ),
    row("qwen2", {"AudioFlamingo3ForConditionalGeneration": "audioflamingo3"}, texts=("qwen2",), text=VISION_TEXT_PATH),
    row(
        "glm4moe",
        {"Glm4MoeForCausalLM": "glm4_moe"},
        "mlp.gate",
        *SHARED_EXPERTS,
        norms=_POST_NORMS | _QK_NORMS,
        aside={"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"},
        experts=Experts(),
    ),
    row(
        "granitemoe",
        {"GraniteMoeForCausalLM": "granitemoe"},
        "block_sparse_moe.router.layer",
        "block_sparse_moe.router",
        linear=ATTENTION,
        permuted=True,
        experts=GRANITE_EXPERTS,
    ),
    row(
        "hunyuan-dense",
        {"HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense"},
        norms=NORMS | {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
    ),
    row(
        "mistral3",
        {"Ministral3ForCausalLM": "ministral3"},
        wrapped={"Mistral3ForConditionalGeneration": "mistral3"},
        texts=("mistral",),
        permuted=True,
    ),
    row(
        "ernie4_5-moe",
        {"Ernie4_5_MoeForCausalLM": "ernie4_5_moe"},
        "mlp.gate",
        *SHARED_EXPERTS,
        aside={"mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias"},
        experts=Experts(),
    ),
    row("exaone4", {"Exaone4ForCausalLM": "exaone4"}, norms=_QK_NORMS | _AFTER_NORMS),
    row("olmoe", {"OlmoeForCausalLM": "olmoe"}, "mlp.gate", linear=ATTENTION, norms=NORMS | _QK_NORMS, experts=Experts()),
    row(
        "phi2",
        {"PhiForCausalLM": "phi"},
        linear=modules("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
        norms={"input_layernorm": "attn_norm"},
        top={"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
    ),
    row(
        "nemotron_h",
        {"NemotronHForCausalLM": "nemotron_h"},
        linear=_MIXER,
        norms={},
        top=_NEMOTRON_TOP,
        permuted=True,
        folder=False,
    ),
    row(
        "nemotron_h_moe",
        {"NemotronHForCausalLM": "nemotron_h"},
        linear=_MIXER
        | {"mixer.gate": "ffn_gate_inp"}
        | {f"mixer.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("up", "down")},
        norms={},
        top=_NEMOTRON_TOP,
        permuted=True,
        folder=False,
        experts=Experts(
            "mixer.experts",
            {"up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"},
            {"mixer.experts.up_proj": ("ffn_up_exps",), "mixer.experts.down_proj": ("ffn_down_exps",)},
        ),
    ),
    row(
        "minimax-m2",
        {"MiniMaxM2ForCausalLM": "minimax_m2"},
        "block_sparse_moe.gate",
        "mlp.gate",
        linear=ATTENTION,
        norms=NORMS | _QK_NORMS,
        aside={
            "block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias",
            "mlp.e_score_correction_bias": "exp_probs_b.bias",
        },
        experts=Experts("block_sparse_moe.experts", {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}),
    ),
    row(
        "apertus",
        {"ApertusForCausalLM": "apertus"},
        linear=ATTENTION | {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
        norms={"attention_layernorm": "attn_norm", "feedforward_layernorm": "ffn_norm"} | _QK_NORMS,
        numbers={f"mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")},
    ),
    row(
        "gemma4",
        {"Gemma4ForCausalLM": "gemma4_text"},
        "per_layer_input_gate",
        "per_layer_projection",
        "router.proj",
        norms={},
        top=_GEMMA4_TOP,
        folder=False,
        unseen={
            "experts.down_proj": "llama.cpp adds LoRA here without the scale of the expert (src/llama-graph.cpp)",
            "model.per_layer_model_projection": "llama.cpp bypasses the adapter here (src/models/gemma4.cpp)",
        },
        wrapped={"Gemma4ForConditionalGeneration": "gemma4"},
        experts=Experts(
            None,
            stacked={"experts.gate_up_proj": ("ffn_gate_up_exps",), "experts.down_proj": ("ffn_down_exps",)},
        ),
    ),
)
