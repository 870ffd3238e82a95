"""Shapes of a model's linear modules and tables, computed from its `config.json` alone.

The table lists the modules of each family of models with their rows and columns in terms of config keys, as transformers 5.24
builds them (`models/*/modeling_*.py`); each dimension is a sum of products. Norms, biases, and task heads are left out. A
family that is not listed, or a config that lacks one of the numbers, has no shapes here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from adapterhub_converters.containers.json_file import is_integer
from adapterhub_converters.lazy_dataclass import dataclass

Modules = dict[str, tuple[str, ...]]
"""Path to its dimensions: `a*b+2*c`. A path that ends in `!` is itself a parameter rather than a module with a weight."""

_HIDDEN, _INTERMEDIATE = "hidden_size", "intermediate_size"
_QUERY_ROWS, _KV_ROWS = "num_attention_heads*head_dim", "num_key_value_heads*head_dim"


def _gated_mlp(in_features: str, prefix: str = "mlp.", size: str = _INTERMEDIATE) -> Modules:
    return {
        f"{prefix}gate_proj": (size, in_features),
        f"{prefix}up_proj": (size, in_features),
        f"{prefix}down_proj": (in_features, size),
    }


def _stacked_experts(experts: str, size: str) -> Modules:
    return {
        "mlp.gate": (experts, _HIDDEN), "mlp.experts.gate_up_proj!": (experts, f"2*{size}", _HIDDEN),
        "mlp.experts.down_proj!": (experts, _HIDDEN, size),
    }  # fmt: skip


_ATTENTION: Modules = {
    "self_attn.q_proj": (_QUERY_ROWS, _HIDDEN),
    "self_attn.k_proj": (_KV_ROWS, _HIDDEN),
    "self_attn.v_proj": (_KV_ROWS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _QUERY_ROWS),
}
_LLAMA: Modules = {**_ATTENTION, **_gated_mlp(_HIDDEN)}
_FUSED_MLP: Modules = {"mlp.gate_up_proj": (f"2*{_INTERMEDIATE}", _HIDDEN), "mlp.down_proj": (_HIDDEN, _INTERMEDIATE)}
_NOPE_ROWS = "num_attention_heads*qk_nope_head_dim"
_MLA: Modules = {
    "self_attn.kv_a_proj_with_mqa": ("kv_lora_rank+qk_rope_head_dim", _HIDDEN),
    "self_attn.kv_b_proj": (f"{_NOPE_ROWS}+num_attention_heads*v_head_dim", "kv_lora_rank"),
    "self_attn.o_proj": (_HIDDEN, "num_attention_heads*v_head_dim"),
}
_MLA_QUERY_ROWS = f"{_NOPE_ROWS}+num_attention_heads*qk_rope_head_dim"
_MLA_LOW_RANK_QUERY: Modules = {
    **_MLA,
    "self_attn.q_a_proj": ("q_lora_rank", _HIDDEN),
    "self_attn.q_b_proj": (_MLA_QUERY_ROWS, "q_lora_rank"),
}
_MLA_FULL_QUERY: Modules = {**_MLA, "self_attn.q_proj": (_MLA_QUERY_ROWS, _HIDDEN)}


def _attention(path: str, names: str, size: str, inner: str) -> Modules:
    """Return the shapes of the queries, keys, values, and output of `path`, named in that order."""
    *inputs, output = (f"{path}.{name}" for name in names.split())
    return {**dict.fromkeys(inputs, (inner, size)), output: (size, inner)}


def _two_layers(first: str, second: str, size: str, inner: str) -> Modules:
    return {first: (inner, size), second: (size, inner)}


_BERT: Modules = {
    **_attention("attention", "self.query self.key self.value output.dense", _HIDDEN, _HIDDEN),
    **_two_layers("intermediate.dense", "output.dense", _HIDDEN, _INTERMEDIATE),
}
_DEBERTA: Modules = {
    **_attention("attention", "self.query_proj self.key_proj self.value_proj output.dense", _HIDDEN, _HIDDEN),
    **_two_layers("intermediate.dense", "output.dense", _HIDDEN, _INTERMEDIATE),
}
_BART: Modules = _attention("self_attn", "q_proj k_proj v_proj out_proj", "d_model", "d_model")
_CROSS: Modules = _attention("encoder_attn", "q_proj k_proj v_proj out_proj", "d_model", "d_model")
_T5 = "num_heads*d_kv"
_T5_SELF: Modules = _attention("layer.0.SelfAttention", "q k v o", "d_model", _T5)
_T5_CROSS: Modules = _attention("layer.1.EncDecAttention", "q k v o", "d_model", _T5)


@dataclass(frozen=True)
class Stack:
    """A list of layers: its path, the key of their number, the modules of each, and its MLP without and with experts."""

    path: str
    count: str
    modules: Modules
    dense: Modules = field(default_factory=dict)
    sparse: Modules = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A kind of model: the attribute under which its classes with a head hold it, its layers, and the modules outside them."""

    prefix: str
    stacks: tuple[Stack, ...]
    top: Modules
    head: Modules = field(default_factory=dict)


_EMBEDDING: Modules = {"embed_tokens": ("vocab_size", _HIDDEN)}
_HEAD: Modules = {"lm_head": ("vocab_size", _HIDDEN)}


def _decoder(modules: Modules, dense: Modules | None = None, sparse: Modules | None = None) -> Family:
    return Family("model.", (Stack("layers", "num_hidden_layers", modules, dense or {}, sparse or {}),), _EMBEDDING, _HEAD)


_EXPERTS, _EXPERT_SIZE = "num_experts", "moe_intermediate_size"
_SHARED = _gated_mlp(_HIDDEN, "mlp.shared_expert.", "shared_expert_intermediate_size")
_DEEPSEEK = _stacked_experts("n_routed_experts", _EXPERT_SIZE) | _gated_mlp(
    _HIDDEN, "mlp.shared_experts.", f"n_shared_experts*{_EXPERT_SIZE}"
)


def _gpt2(config: Mapping[str, Any]) -> Family:
    inner = "n_inner" if config.get("n_inner") else f"4*{_HIDDEN}"
    # Conv1D stores (in, out).
    layer: Modules = {
        "attn.c_attn": (_HIDDEN, f"3*{_HIDDEN}"),
        "attn.c_proj": (_HIDDEN, _HIDDEN),
        "mlp.c_fc": (_HIDDEN, inner),
        "mlp.c_proj": (inner, _HIDDEN),
    }
    top: Modules = {"wte": ("vocab_size", _HIDDEN), "wpe": ("n_positions", _HIDDEN)}
    return Family("transformer.", (Stack("h", "num_hidden_layers", layer),), top, _HEAD)


_WORD_EMBEDDINGS: Modules = {"word_embeddings": ("vocab_size", _HIDDEN)}


def _bloom(config: Mapping[str, Any]) -> Family:
    rows, inner = f"3*{_HIDDEN}", f"4*{_HIDDEN}"
    if config.get("model_type") == "falcon":
        inner = "ffn_hidden_size" if config.get("ffn_hidden_size") else inner
        if config.get("new_decoder_architecture"):
            rows = "num_attention_heads*head_dim+2*num_kv_heads*head_dim"
        elif config.get("multi_query"):
            rows = f"{_HIDDEN}+2*head_dim"
    layer: Modules = {"self_attention.query_key_value": (rows, _HIDDEN), "self_attention.dense": (_HIDDEN, _HIDDEN)}
    layer |= _two_layers("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", _HIDDEN, inner)
    return Family("transformer.", (Stack("h", "num_hidden_layers", layer),), _WORD_EMBEDDINGS, _HEAD)


def _t5(config: Mapping[str, Any]) -> Family:
    is_gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    first_layers: Modules = (
        {"wi_0": ("d_ff", "d_model"), "wi_1": ("d_ff", "d_model")} if is_gated else {"wi": ("d_ff", "d_model")}
    )
    mlp: Modules = {**first_layers, "wo": ("d_model", "d_ff")}
    encoder: Modules = _T5_SELF | {f"layer.1.DenseReluDense.{name}": shape for name, shape in mlp.items()}
    decoder: Modules = {**_T5_SELF, **_T5_CROSS, **{f"layer.2.DenseReluDense.{name}": shape for name, shape in mlp.items()}}
    stacks = (Stack("encoder.block", "num_layers", encoder), Stack("decoder.block", "num_decoder_layers", decoder))
    head: Modules = {"lm_head": ("vocab_size", "d_model")}
    return Family("", stacks, {"shared": ("vocab_size", "d_model")}, head)


def _deepseek(config: Mapping[str, Any]) -> Family:
    return _decoder(_MLA_LOW_RANK_QUERY if config.get("q_lora_rank") else _MLA_FULL_QUERY, _gated_mlp(_HIDDEN), _DEEPSEEK)


def _seq2seq(head: str) -> Family:
    encoder: Modules = {**_BART, **_two_layers("fc1", "fc2", "d_model", "encoder_ffn_dim")}
    decoder: Modules = {**_BART, **_CROSS, **_two_layers("fc1", "fc2", "d_model", "decoder_ffn_dim")}
    stacks = (Stack("encoder.layers", "encoder_layers", encoder), Stack("decoder.layers", "decoder_layers", decoder))
    table: Modules = {"decoder.embed_tokens": ("vocab_size", "d_model")}
    shared: Modules = {"shared": ("vocab_size", "d_model")} if head == "lm_head" else {}
    return Family("model.", stacks, {**table, **shared}, {head: ("vocab_size", "d_model")})


def _encoder(prefix: str, layer: Modules) -> Family:
    words: Modules = {"embeddings.word_embeddings": ("vocab_size", _HIDDEN)}
    return Family(prefix, (Stack("encoder.layer", "num_hidden_layers", layer),), words)


_DISTILBERT = Family(
    "distilbert.",
    (
        Stack(
            "transformer.layer",
            "n_layers",
            {
                **_attention("attention", "q_lin k_lin v_lin out_lin", "dim", "dim"),
                **_two_layers("ffn.lin1", "ffn.lin2", "dim", "hidden_dim"),
            },
        ),
    ),
    {"embeddings.word_embeddings": ("vocab_size", "dim")},
)
_VIT = Family(
    "vit.",
    (
        Stack(
            "layers",
            "num_hidden_layers",
            {
                **_attention("attention", "q_proj k_proj v_proj o_proj", _HIDDEN, _HIDDEN),
                **_two_layers("mlp.fc1", "mlp.fc2", _HIDDEN, _INTERMEDIATE),
            },
        ),
    ),
    {},
)
_PHI3: Modules = {
    "self_attn.qkv_proj": (f"{_QUERY_ROWS}+2*{_KV_ROWS}", _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _QUERY_ROWS),
    **_FUSED_MLP,
}
_GPT_OSS: Modules = {
    **_ATTENTION, "mlp.router": ("num_local_experts", _HIDDEN),
    "mlp.experts.gate_up_proj!": ("num_local_experts", _HIDDEN, f"2*{_INTERMEDIATE}"),
    "mlp.experts.down_proj!": ("num_local_experts", _INTERMEDIATE, _HIDDEN),
}  # fmt: skip

FAMILIES: dict[str, Any] = {
    **dict.fromkeys(
        ("llama", "mistral", "granite", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "stablelm",
         "cohere", "cohere2", "olmo", "seed_oss", "ernie4_5"),
        _decoder(_LLAMA),
    ),
    **dict.fromkeys(
        ("nemotron", "arcee"),
        _decoder({**_ATTENTION, **_two_layers("mlp.up_proj", "mlp.down_proj", _HIDDEN, _INTERMEDIATE)}),
    ),
    "phi3": _decoder(_PHI3),
    "glm4": _decoder({**_ATTENTION, **_FUSED_MLP}),
    "starcoder2": _decoder({**_ATTENTION, **_two_layers("mlp.c_fc", "mlp.c_proj", _HIDDEN, _INTERMEDIATE)}),
    "mixtral": _decoder({**_ATTENTION, **_stacked_experts("num_local_experts", _INTERMEDIATE)}),
    "qwen2_moe": _decoder(
        _ATTENTION,
        _gated_mlp(_HIDDEN),
        {**_stacked_experts(_EXPERTS, _EXPERT_SIZE), **_SHARED, "mlp.shared_expert_gate": ("1", _HIDDEN)},
    ),
    "qwen3_moe": _decoder(_ATTENTION, _gated_mlp(_HIDDEN), _stacked_experts(_EXPERTS, _EXPERT_SIZE)),
    "gpt_oss": _decoder(_GPT_OSS),
    "deepseek_v2": _deepseek, "deepseek_v3": _deepseek, "gpt2": _gpt2, "bloom": _bloom, "falcon": _bloom, "t5": _t5, "mt5": _t5,
    "bert": _encoder("bert.", _BERT), "roberta": _encoder("roberta.", _BERT), "xlm-roberta": _encoder("roberta.", _BERT),
    "deberta-v2": _encoder("deberta.", _DEBERTA), "distilbert": _DISTILBERT, "vit": _VIT,
    "bart": _seq2seq("lm_head"), "whisper": _seq2seq("proj_out"),
}  # fmt: skip
_HEADLESS_CLASSES = ("Model", "EncoderModel")
_MAX_LAYERS = 2_000  # ten times the largest model's: a config must not decide how much memory is used


def shapes_from_config(config: Mapping[str, Any], architecture: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter for a completed config; empty for an unknown family."""
    family = FAMILIES.get(str(config.get("model_type", "")))
    if callable(family):
        family = family(config)
    if family is None:
        return {}
    experts = config.get("num_experts", config.get("num_local_experts"))  # transformers 5 writes one or the other
    numbers = {**config, "num_experts": experts, "num_local_experts": experts}
    try:
        # A missing or malformed number makes all shapes unknown, rather than some of them wrong.
        return dict(_shapes(family, numbers, architecture))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return {}


def _shapes(family: Family, config: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the shape of each parameter of a model of this family."""
    is_headless = architecture.endswith(_HEADLESS_CLASSES) and not architecture.endswith("LMHeadModel")
    prefix = "" if is_headless else family.prefix
    has_lm_head = "CausalLM" in architecture or architecture.endswith(("LMHeadModel", "ForConditionalGeneration"))
    yield from _module_shapes(prefix, family.top, config)
    config = {**config, "mlp_only_layers": frozenset(config.get("mlp_only_layers") or ())}  # looked up for every layer
    for stack in family.stacks:
        if stack.path.startswith("decoder.") and architecture.endswith("EncoderModel"):
            continue
        if (count := _config_number(stack.count, config)) > _MAX_LAYERS:
            raise ValueError(stack.count)
        for layer in range(count):
            layer_modules = {**stack.modules, **(stack.sparse if _is_sparse(layer, config) else stack.dense)}
            yield from _module_shapes(f"{prefix}{stack.path}.{layer}.", layer_modules, config)
    if has_lm_head and not config.get("tie_word_embeddings", True):
        yield from _module_shapes("", family.head, config)


def _module_shapes(prefix: str, modules: Modules, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the full name and shape of each module's parameter."""
    for name, dims in modules.items():
        stem = name.removesuffix("!")
        yield f"{prefix}{stem}{'' if stem != name else '.weight'}", tuple(_dimension(dim, config) for dim in dims)


def _dimension(dim: str, config: Mapping[str, Any]) -> int:
    """Evaluate a dimension such as `a*b+2*c`."""
    return sum(math.prod(_config_number(factor, config) for factor in term.split("*")) for term in dim.split("+"))


def _config_number(name: str, config: Mapping[str, Any]) -> int:
    """Return a factor: a literal, or a positive number in the config; ValueError for anything else."""
    value = int(name) if name.isdigit() else config[name]
    if not is_integer(value) or not 0 < value < 2**31:
        raise ValueError(name)
    return value


def _is_sparse(layer: int, config: Mapping[str, Any]) -> bool:
    """Return whether a layer has experts (`Qwen2MoeDecoderLayer`, `DeepseekV3DecoderLayer`)."""
    if "first_k_dense_replace" in config:
        return layer >= int(config["first_k_dense_replace"])
    step = config.get("decoder_sparse_step", 1)
    return layer not in config["mlp_only_layers"] and bool(config.get("num_experts")) and (layer + 1) % int(step) == 0
