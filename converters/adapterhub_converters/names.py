"""What llama.cpp calls the modules of a Hugging Face model, architecture by architecture, as data.

An architecture is listed when gguf-py's `TensorNameMap` agrees with the names and llama.cpp's own conversion of a model
was found linear and equal to ours on every module (tests/formats/test_gguf_linearity.py): a renaming and, for some, a
permutation of the rows of a module or a stack of experts. Everything else is refused by name. The prefixes of vision
models are not among them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import RefusedError

_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LLAMA = _ATTENTION | _MLP
_FUSED_MLP = {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA2_NORMS = {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm"} | _POST_NORMS
_BLOOM = {
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOOM_TOP = {"transformer.word_embeddings": "token_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}
_GPT2_TOP = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "transformer.word_embeddings")
"""What the table of token embeddings is called."""
_LAYER = re.compile(r"(model\.layers|transformer\.h)\.(0|[1-9][0-9]{0,5})\.(.+)")
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")

Order = int | tuple[int, int]
"""How llama.cpp reorders the rows of a module: 0, not at all; n, the halves of each of n heads become pairs; (g, q), g
groups of q query heads, a key and a value head each become all queries, then all keys, then all values."""


@dataclass(frozen=True)
class Experts:
    """Where a layer has its experts.

    Attributes:
        listed: Path of the list of modules, one an expert, in checkpoints and transformers 4; None when there is none.
        modules: Module of a listed expert to the stem of the tensor that stacks it.
        stacked: Parameter of all experts in transformers 5 to the stems its rows are shared out to.
        interleaved: Whether those rows alternate (gate, up, gate, …) rather than follow one another.
        transposed: Whether Hugging Face stores the parameters `(experts, in, out)`.
    """

    listed: str | None = "mlp.experts"
    modules: Mapping[str, str] = field(
        default_factory=lambda: {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
    )
    stacked: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
            "mlp.experts.down_proj": ("ffn_down_exps",),
        }
    )
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        gguf: Its name in `general.architecture`.
        classes: Hugging Face classes that become it, the one to read it back as first; their `model_type` beside.
        linear: Linear modules of a layer to the stem of their tensor.
        norms: Normalisations of a layer likewise; llama.cpp takes no LoRA on them.
        top: Modules outside the layers.
        layers: Path of the list of layers.
        permuted: Whether the rows of q and k are reordered for llama.cpp's RoPE.
        grouped: The module whose rows hold queries, keys and values in groups, if one does.
        head: Whether it can have an output layer of its own; the others always use the embedding table.
        transposed: Whether Hugging Face stores the weights of the linear modules `(in, out)`.
        experts: Where its experts are.
        unseen: Modules whose LoRA llama.cpp loads and then ignores, with the reason.
    """

    gguf: str
    classes: Mapping[str, str]
    linear: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    norms: Mapping[str, str] = field(default_factory=lambda: _NORMS)
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)
    layers: str = "model.layers"
    permuted: bool = False
    grouped: str = ""
    head: bool = True
    transposed: bool = False
    experts: Experts | None = None
    unseen: Mapping[str, str] = field(default_factory=dict)

    def stem(self, module: str) -> str | None:
        """`model.layers.0.self_attn.q_proj` to `blk.0.attn_q`; None for a module that isn't known.

        For an expert, or a parameter of all experts, the (first) tensor that stacks it.
        """
        return next(iter(self.stems(module)), None)

    def stems(self, module: str) -> tuple[str, ...]:
        """All tensors that a module's delta goes to by default; empty for one that isn't known."""
        if module in self.top:
            return (self.top[module],) if self.head or self.top[module] != "output" else ()
        if not (inner := self._in_layer(module)):
            return ()
        layer, path = inner
        found: tuple[str, ...] = ()
        if stem := self.linear.get(path) or self.norms.get(path):
            found = (stem,)
        elif self.experts:
            expert = self._expert(path)
            found = (self.experts.modules[expert[1]],) if expert else self.experts.stacked.get(path, ())
        return tuple(f"blk.{layer}.{stem}" for stem in found)

    def expert(self, module: str) -> int | None:
        """The number of the expert that a module of the list of experts belongs to."""
        inner = self._in_layer(module)
        expert = self._expert(inner[1]) if inner else None
        return expert[0] if expert else None

    def is_stacked(self, module: str) -> bool:
        """Whether a module is a parameter of all experts together."""
        inner = self._in_layer(module)
        return bool(inner and self.experts and inner[1] in self.experts.stacked)

    def _in_layer(self, module: str) -> tuple[str, str] | None:
        match = _LAYER.fullmatch(module)
        return (match[2], match[3]) if match and match[1] == self.layers else None

    def _expert(self, path: str) -> tuple[int, str] | None:
        if not self.experts or not self.experts.listed or not path.startswith(f"{self.experts.listed}."):
            return None
        number, _, module = path.removeprefix(f"{self.experts.listed}.").partition(".")
        if not re.fullmatch(r"0|[1-9][0-9]{0,4}", number) or module not in self.experts.modules:
            return None
        return int(number), module

    def module(self, stem: str) -> str | None:
        """The inverse of `stem`; None for experts, of which one tensor has many."""
        for module, known in self.top.items():
            if stem == known and (self.head or known != "output"):
                return module
        if not (match := _BLOCK.fullmatch(stem)):
            return None
        found = next((hf for hf, gguf in (*self.linear.items(), *self.norms.items()) if gguf == match[2]), None)
        return f"{self.layers}.{match[1]}.{found}" if found else None

    def listed_module(self, stem: str, expert: int) -> str | None:
        """What the list of experts calls the module of `expert` that `stem` stacks."""
        match = _BLOCK.fullmatch(stem)
        if not match or not self.experts or not self.experts.listed:
            return None
        found = next((module for module, gguf in self.experts.modules.items() if gguf == match[2]), None)
        return f"{self.layers}.{match[1]}.{self.experts.listed}.{expert}.{found}" if found else None

    def stacked_module(self, stem: str) -> str | None:
        """The parameter of all experts that (part of) `stem` comes from."""
        match = _BLOCK.fullmatch(stem)
        if not match or not self.experts:
            return None
        found = next((module for module, stems in self.experts.stacked.items() if match[2] in stems), None)
        return f"{self.layers}.{match[1]}.{found}" if found else None

    def is_norm(self, module: str) -> bool:
        """Whether a module is a normalisation."""
        inner = self._in_layer(module)
        return self.top.get(module, "").endswith("_norm") or bool(inner and inner[1] in self.norms)

    def why_unseen(self, module: str) -> str | None:
        """Why llama.cpp would ignore a LoRA on a module; None when it doesn't."""
        inner = self._in_layer(module)
        return self.unseen.get(inner[1] if inner else module)

    def is_reordered(self, module: str) -> bool:
        """Whether the rows of a module have another order in llama.cpp."""
        inner = self._in_layer(module)
        return inner is not None and (self._heads_of(inner[1]) or inner[1] == self.grouped)

    def _heads_of(self, path: str) -> bool:
        return self.permuted and path in ("self_attn.q_proj", "self_attn.k_proj")

    def order(self, module: str, config: Mapping[str, Any], where: str) -> Order:
        """The order of a module's rows in llama.cpp, from the numbers of a model's config; RefusedError without them."""
        if not self.is_reordered(module):
            return 0
        n_head = _count(module, config, where, "num_attention_heads")
        if self.grouped:
            groups = n_head if self.gguf == "bloom" else _falcon_groups(module, config, where)
            if n_head % groups:
                raise RefusedError(where, f"{module}: {n_head} heads are not shared out evenly to {groups} groups")
            return groups, n_head // groups
        if module.endswith("q_proj") or config.get("num_key_value_heads") is None:
            return n_head
        return _count(module, config, where, "num_key_value_heads")


def _count(module: str, config: Mapping[str, Any], where: str, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RefusedError(
            where, f"{module}: the order of its rows depends on the number of heads, which is not known", "Pass --base"
        )
    return value


def _falcon_groups(module: str, config: Mapping[str, Any], where: str) -> int:
    # As transformers' modeling_falcon.py decides it; the file of a GGUF base says how many there are.
    if config.get("new_decoder_architecture"):
        return _count(module, config, where, "num_kv_heads")
    if config.get("multi_query") is False:
        raise RefusedError(where, f"{module}: a Falcon without multi-query attention (Falcon-RW) is none that llama.cpp runs")
    return 1


# Permutation: LlamaModel.undo_permute and its subclasses in llama.cpp's conversion/. Names: gguf-py, tensor_mapping.py.
_RAW = "llama.cpp multiplies past the adapter here (src/models/deepseek2.cpp), so it would load and do nothing"
_SHARED = {f"mlp.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")}
ARCHITECTURES = (
    Architecture("llama", {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}, permuted=True),
    Architecture(
        "llama",
        {"MixtralForCausalLM": "mixtral"},
        linear=_ATTENTION | {"block_sparse_moe.gate": "ffn_gate_inp"},
        permuted=True,
        experts=Experts(
            "block_sparse_moe.experts",
            {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"},
        ),
    ),
    Architecture("granite", {"GraniteForCausalLM": "granite"}, permuted=True),
    Architecture("smollm3", {"SmolLM3ForCausalLM": "smollm3"}, permuted=True),
    Architecture("qwen2", {"Qwen2ForCausalLM": "qwen2"}),
    Architecture(
        "qwen2moe",
        {"Qwen2MoeForCausalLM": "qwen2_moe"},
        linear=_ATTENTION
        | {"mlp.gate": "ffn_gate_inp"}
        | {f"mlp.shared_expert.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
        experts=Experts(),
        unseen={"mlp.shared_expert_gate": "llama.cpp keeps this weight as a vector and takes no LoRA on it"},
    ),
    Architecture("qwen3", {"Qwen3ForCausalLM": "qwen3"}, norms=_NORMS | _QK_NORMS),
    Architecture(
        "qwen3moe",
        {"Qwen3MoeForCausalLM": "qwen3_moe"},
        linear=_ATTENTION | {"mlp.gate": "ffn_gate_inp"},
        norms=_NORMS | _QK_NORMS,
        experts=Experts(),
    ),
    Architecture("gemma", {"GemmaForCausalLM": "gemma"}, head=False),
    Architecture("gemma2", {"Gemma2ForCausalLM": "gemma2"}, norms=_GEMMA2_NORMS, head=False),
    Architecture("gemma3", {"Gemma3ForCausalLM": "gemma3_text"}, norms=_GEMMA2_NORMS | _QK_NORMS),
    Architecture("olmo2", {"Olmo2ForCausalLM": "olmo2"}, norms=_QK_NORMS | _POST_NORMS),
    Architecture(
        "phi3",
        {"Phi3ForCausalLM": "phi3"},
        linear={"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output"} | _FUSED_MLP,
    ),
    Architecture(
        "starcoder2",
        {"Starcoder2ForCausalLM": "starcoder2"},
        linear=_ATTENTION | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
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
        unseen={"transformer.wpe": "llama.cpp takes no LoRA on the table of positions"},
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
        norms=_NORMS,
        top=_BLOOM_TOP | {"transformer.word_embeddings_layernorm": "token_embd_norm"},
        layers="transformer.h",
        grouped="self_attention.query_key_value",
    ),
    Architecture("stablelm", {"StableLmForCausalLM": "stablelm"}),
    Architecture("command-r", {"CohereForCausalLM": "cohere"}, norms={"input_layernorm": "attn_norm"} | _QK_NORMS, head=False),
    Architecture(
        "glm4",
        {"Glm4ForCausalLM": "glm4"},
        linear=_ATTENTION | _FUSED_MLP,
        norms=_NORMS | {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    ),
    Architecture(
        "gpt-oss",
        {"GptOssForCausalLM": "gpt_oss"},
        linear=_ATTENTION | {"mlp.router": "ffn_gate_inp"},
        norms={"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
        experts=Experts(None, interleaved=True, transposed=True),
    ),
    Architecture(
        "deepseek2",
        {"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"},
        linear={"self_attn.o_proj": "attn_output"} | _MLP | _SHARED | {"mlp.gate": "ffn_gate_inp"},
        norms=_NORMS | {"self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.kv_a_layernorm": "attn_kv_a_norm"},
        experts=Experts(),
        unseen=dict.fromkeys(
            (
                "self_attn.q_proj",
                "self_attn.q_a_proj",
                "self_attn.q_b_proj",
                "self_attn.kv_a_proj_with_mqa",
                "self_attn.kv_b_proj",
                "lm_head",
            ),
            _RAW,
        ),
    ),
)


def layer_of(module: str) -> int | None:
    """The number of the layer a module is in."""
    match = _LAYER.fullmatch(module)
    return int(match[2]) if match else None


def in_layer(module: str) -> str | None:
    """The path of a module within its layer, `self_attn.q_proj`, where the layers are `model.layers`."""
    match = _LAYER.fullmatch(module)
    return match[3] if match and match[1] == "model.layers" else None


def by_class(name: str, where: str) -> Architecture:
    """The architecture of a Hugging Face class; RefusedError for one that isn't listed."""
    for architecture in ARCHITECTURES:
        if name in architecture.classes:
            return architecture
    known = ", ".join(sorted(name for architecture in ARCHITECTURES for name in architecture.classes))
    raise RefusedError(where, f"{name or 'an unnamed architecture'} has no verified mapping to llama.cpp", f"Known: {known}")


def by_gguf(name: str, where: str, *, experts: bool = False) -> Architecture:
    """The architecture of a `general.architecture`, of those that share it the one with or without experts; RefusedError
    for one that isn't listed."""
    found = [architecture for architecture in ARCHITECTURES if name == architecture.gguf]
    if found:
        return next((one for one in found if (one.experts is not None) == experts), found[0])
    known = ", ".join(sorted({architecture.gguf for architecture in ARCHITECTURES}))
    raise RefusedError(where, f"llama.cpp's {name[:40]!r} has no verified mapping to Hugging Face's names", f"Known: {known}")


def permuted(rows: np.ndarray, order: Order) -> np.ndarray:
    """`rows` `(out_features, …)` from Hugging Face's order to llama.cpp's; RefusedError when they cannot have that order.

    The pairs are those of llama.cpp's `conversion/llama.py`, `permute`, the groups those of `falcon.py` and `bloom.py`.
    """
    return rows[_permutation(len(rows), order)] if order else rows


def unpermuted(rows: np.ndarray, order: Order) -> np.ndarray:
    """The inverse of `permuted`."""
    return rows[np.argsort(_permutation(len(rows), order))] if order else rows


def divides(order: Order, rows: int) -> bool:
    """Whether `rows` rows can have an order."""
    return not rows % (2 * order if isinstance(order, int) else order[0] * (order[1] + 2)) if order else True


def _permutation(rows: int, order: Order) -> np.ndarray:
    """The number of the row that comes to each place."""
    if not divides(order, rows):
        raise RefusedError("", f"{rows} rows do not have the order {order}")
    numbers = np.arange(rows)
    if isinstance(order, int):
        return numbers.reshape(order, 2, -1).swapaxes(1, 2).reshape(-1)
    groups = numbers.reshape(order[0], order[1] + 2, -1)
    return np.concatenate([part.reshape(-1) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
