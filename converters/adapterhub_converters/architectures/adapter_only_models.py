"""Architectures of which adapters alone are converted, one row each: what `rule_named_models` has of the others.

Their GGUF has numbers that only llama.cpp's own conversion of the model writes.
"""

from __future__ import annotations

from typing import Any

from .architecture import ATTENTION, MLP, Architecture, Experts
from .rule_named_models import GRANITE_EXPERTS, SHARED_EXPERT, SHARED_EXPERTS, VISION_TEXT_PATH, modules, row

_FEED_FORWARD = tuple(f"feed_forward.{name}_proj" for name in ("gate", "up", "down"))
_MAMBA = ("mamba.in_proj", "mamba.out_proj")
_NEOX_TOP = {"gpt_neox.embed_in": "token_embd", "lm_head": "output", "embed_out": "output"}
_MIXER = ("mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")
_OLD_LAYOUT: dict[str, Any] = {"top": {"backbone.embeddings": "token_embd", "lm_head": "output"}, "layers": "backbone.layers"}


def _experts(path: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Experts:
    """Return the experts of a layer at a path, which are modules in files and parameters in memory."""
    return Experts(
        path,
        {gate: "ffn_gate_exps", up: "ffn_up_exps", down: "ffn_down_exps"},
        {f"{path}.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), f"{path}.down_proj": ("ffn_down_exps",)},
    )


def _row(gguf: str, classes: dict[str, str], *paths: str, linear: dict[str, str] | None = None, **fields: Any) -> Architecture:
    return row(gguf, classes, linear=modules(*paths) | (linear or {}), norms={}, folder=False, **fields)


def _granite(gguf: str, *paths: str, experts: bool, marks: tuple[str, ...]) -> Architecture:
    """Return one of the four architectures of Granite 4, whose layers may have state spaces, experts, both, or neither."""
    suffix = "_shexp" if experts else ""
    return _row(
        gguf,
        {"GraniteMoeHybridForCausalLM": "granitemoehybrid"},
        *ATTENTION,
        *paths,
        *(("block_sparse_moe.router.layer", "block_sparse_moe.router") if experts else ()),
        linear={"shared_mlp.output_linear": f"ffn_down{suffix}"},
        split={"shared_mlp.input_linear": (f"ffn_gate{suffix}", f"ffn_up{suffix}")},
        permuted=True,
        experts=GRANITE_EXPERTS if experts else None,
        marks=marks,
    )


ADAPTERS_ONLY = (
    _row(
        "qwen3next",
        {"Qwen3NextForCausalLM": "qwen3_next"},
        *ATTENTION,
        "mlp.gate",
        "mlp.shared_expert_gate",
        *SHARED_EXPERT,
        "linear_attn.in_proj_ba",
        "linear_attn.out_proj",
        split={"linear_attn.in_proj_qkvz": ("attn_qkv", "attn_gate")},
        tiled=frozenset({"linear_attn.in_proj_qkvz"}),
        experts=Experts(),
    ),
    _granite("granitehybrid", *_MAMBA, experts=False, marks=(".mamba.",)),
    _granite("granitehybrid", *_MAMBA, experts=True, marks=(".mamba.", ".block_sparse_moe.")),
    _granite("granite", experts=False, marks=()),
    _granite("granitemoe", experts=True, marks=(".block_sparse_moe.",)),
    _row("granitehybrid", {"BambaForCausalLM": "bamba"}, *ATTENTION, *_MAMBA, *_FEED_FORWARD, permuted=True),
    _row(
        "granitemoe",
        {"GraniteMoeSharedForCausalLM": "granitemoeshared"},
        *ATTENTION,
        "block_sparse_moe.router.layer",
        "block_sparse_moe.router",
        "shared_mlp.output_linear",
        split={"shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp")},
        permuted=True,
        experts=GRANITE_EXPERTS,
    ),
    _row("granite_swa", {"GraniteSWAForCausalLM": "granite_swa"}, *ATTENTION, *MLP, permuted=True),
    _row(
        "granite_swa",
        {"GraniteMoeSWAForCausalLM": "granitemoe_swa"},
        *ATTENTION,
        "block_sparse_moe.router",
        "shared_mlp.output_linear",
        linear={"shared_mlp.input_linear": "ffn_up_shexp"},
        permuted=True,
        experts=Experts(
            None,
            stacked={
                "block_sparse_moe.experts.gate_up_proj": ("ffn_gate_up_exps",),
                "block_sparse_moe.experts.down_proj": ("ffn_down_exps",),
            },
        ),
    ),
    _row(
        "gemma3n",
        {"Gemma3nForCausalLM": "gemma3n_text"},
        *ATTENTION,
        *MLP,
        "per_layer_input_gate",
        "per_layer_projection",
        "laurel.linear_left",
        "laurel.linear_right",
        "altup.prediction_coefs",
        "altup.correction_coefs",
        top={"model.embed_tokens": "token_embd", "lm_head": "output"},
        unseen=dict.fromkeys(
            ("altup.modality_router", "model.per_layer_model_projection"),
            "llama.cpp bypasses the adapter here (src/models/gemma3n.cpp)",
        ),
        wrapped={"Gemma3nForConditionalGeneration": "gemma3n"},
    ),
    _row(
        "lfm2moe",
        {"Lfm2MoeForCausalLM": "lfm2_moe"},
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        *(f"feed_forward.{name}" for name in ("w1", "w3", "w2", "gate")),
        "conv.in_proj",
        "conv.out_proj",
        top={"model.embed_tokens": "token_embd"},
        experts=_experts("feed_forward.experts", "w1", "w3", "w2"),
    ),
    *(
        _row(
            "llama4",
            classes,
            *ATTENTION,
            *_FEED_FORWARD,
            "feed_forward.router",
            *(f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
            experts=Experts(None, stacked=_experts("feed_forward.experts").stacked, transposed=True),
            text=text,
        )
        for classes, text in (
            ({"Llama4ForCausalLM": "llama4_text"}, "model"),
            ({"Llama4ForConditionalGeneration": "llama4"}, "language_model.model"),
        )
    ),
    _row("chatglm", {"GlmForCausalLM": "glm"}, *ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"),
    _row(
        "glm4",
        {"Glm4vForConditionalGeneration": "glm4v", "GlmOcrForConditionalGeneration": "glm_ocr"},
        *ATTENTION,
        "mlp.gate_up_proj",
        "mlp.down_proj",
        unpaired=True,
        text=VISION_TEXT_PATH,
    ),
    _row(
        "qwen3vlmoe",
        {"Qwen3OmniMoeForConditionalGeneration": "qwen3_omni_moe"},
        *ATTENTION,
        "mlp.gate",
        experts=Experts(),
        text="thinker.model.language_model",
    ),
    _row("qwen2vl", {"Qwen2_5OmniModel": "qwen2_5_omni"}, *ATTENTION, *MLP, text="thinker.model.language_model"),
    _row(
        "llama",
        {
            "InternLM3ForCausalLM": "internlm3",
            "IQuestCoderForCausalLM": "iquestcoder",
            "LLaMAForCausalLM": "llama",
            "VLlama3ForCausalLM": "llama",
        },
        *ATTENTION,
        *MLP,
        permuted=True,
    ),
    _row("ernie4_5", {"Ernie4_5_ForCausalLM": "ernie4_5"}, *ATTENTION, *MLP),
    _row("stablelm", {"StableLMEpochForCausalLM": "stablelm_epoch"}, *ATTENTION, *MLP),
    _row("qwen2", {"DotsOCRForCausalLM": "dots_ocr", "KORMoForCausalLM": "kormo"}, *ATTENTION, *MLP),
    _row("paddleocr", {"PaddleOCRVLForConditionalGeneration": "paddleocr_vl"}, *ATTENTION, *MLP, text=VISION_TEXT_PATH),
    _row("hunyuan_vl", {"HunYuanVLForConditionalGeneration": "hunyuan_vl"}, *ATTENTION, *MLP, text=VISION_TEXT_PATH),
    _row(
        "qwen3vl", {"Qwen3ASRForConditionalGeneration": "qwen3_asr"}, *ATTENTION, *MLP, texts=("qwen3",), text=VISION_TEXT_PATH
    ),
    _row(
        "gptneox",
        {"GPTNeoXForCausalLM": "gpt_neox"},
        linear={
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        top=_NEOX_TOP,
        layers="gpt_neox.layers",
        grouped="attention.query_key_value",
    ),
    _row(
        "afmoe",
        {"AfmoeForCausalLM": "afmoe"},
        *ATTENTION,
        *MLP,
        "self_attn.gate_proj",
        "mlp.router.gate",
        *SHARED_EXPERTS,
        experts=Experts(),
    ),
    _row(
        "cohere2moe",
        {"Cohere2MoeForCausalLM": "cohere2_moe"},
        *ATTENTION,
        *MLP,
        "mlp.gate",
        *SHARED_EXPERTS,
        experts=Experts(),
    ),
    *(
        _row(gguf, classes, *ATTENTION, *MLP, "mlp.gate", *SHARED_EXPERTS, experts=Experts(), text=text)
        for gguf, classes, text in (
            ("exaone-moe", {"ExaoneMoeForCausalLM": "exaone_moe", "ExaoneMoEForCausalLM": "exaone_moe"}, "model"),
            ("glm4moe", {"SolarOpenForCausalLM": "solar_open"}, "model"),
            ("glm4moe", {"Glm4vMoeForConditionalGeneration": "glm4v_moe"}, VISION_TEXT_PATH),
        )
    ),
    _row(
        "deepseek2-ocr",
        {"DeepseekOCRForCausalLM": "deepseek_vl_v2"},
        *ATTENTION,
        *MLP,
        "mlp.gate",
        *SHARED_EXPERTS,
        experts=Experts(),
        unseen={"lm_head": "llama.cpp bypasses the adapter here (src/models/deepseek2.cpp)"},
    ),
    _row("mellum", {"MellumForCausalLM": "mellum"}, *ATTENTION, "mlp.gate", experts=Experts()),
    _row(
        "hy_v3",
        {"HYV3ForCausalLM": "hy_v3"},
        *ATTENTION,
        *MLP,
        "mlp.router.gate",
        "mlp.gate",
        *(f"mlp.shared_mlp.{name}_proj" for name in ("gate", "up", "down")),
        *SHARED_EXPERTS,
        experts=Experts(),
    ),
    _row(
        "laguna",
        {"LagunaForCausalLM": "laguna"},
        *ATTENTION,
        *MLP,
        "self_attn.g_proj",
        "mlp.gate",
        *SHARED_EXPERT,
        *SHARED_EXPERTS,
        experts=Experts(),
    ),
    _row(
        "jamba",
        {"JambaForCausalLM": "jamba"},
        *ATTENTION,
        *_FEED_FORWARD,
        "feed_forward.router",
        *_MAMBA,
        "mamba.x_proj",
        "mamba.dt_proj",
        experts=_experts("feed_forward.experts"),
    ),
    _row("jais2", {"Jais2ForCausalLM": "jais2"}, *ATTENTION, "mlp.up_proj", "mlp.down_proj"),
    _row("mamba", {"MambaForCausalLM": "mamba", "FalconMambaForCausalLM": "falcon_mamba"}, *_MIXER, **_OLD_LAYOUT),
    _row(
        "starcoder",
        {"GPTBigCodeForCausalLM": "gpt_bigcode"},
        linear={"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        top={"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "lm_head": "output"},
        layers="transformer.h",
        unseen={"transformer.wpe": "llama.cpp does not support LoRA on the position table"},
    ),
)
