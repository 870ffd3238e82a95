"""What an architecture of llama.cpp is: what its modules are called there, in which order their rows are, what is stacked.

The architectures themselves are data, in `architectures`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub_converters.errors import RefusedError

ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
"""Tensors that may hold others, one after the other (llama.cpp, convert_hf_to_gguf.py: fuse_qkv, fuse_gate_up_exps)."""
FUSED_IN = {part: (whole, parts) for whole, parts in FUSED.items() for part in parts}
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
        norms: Normalizations of a layer likewise; llama.cpp takes no LoRA on them.
        top: Modules outside the layers.
        layers: Path of the list of layers.
        permuted: Whether the rows of q and k are reordered for llama.cpp's RoPE.
        grouped: The module whose rows hold queries, keys and values in groups, if one does.
        head: Whether it can have an output layer of its own; the others always use the embedding table.
        transposed: Whether Hugging Face stores the weights of the linear modules `(in, out)`.
        experts: Where its experts are.
        unseen: Modules whose LoRA llama.cpp loads and then ignores, with the reason.
        aside: Parameters of a layer that take no LoRA to their tensors.
        shifted: Whether the weights of its norms are those of Hugging Face and 1, which the model adds there.
    """

    gguf: str
    classes: Mapping[str, str]
    linear: Mapping[str, str] = field(default_factory=lambda: ATTENTION | MLP)
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    layers: str = "model.layers"
    permuted: bool = False
    grouped: str = ""
    head: bool = True
    transposed: bool = False
    experts: Experts | None = None
    unseen: Mapping[str, str] = field(default_factory=dict)
    aside: Mapping[str, str] = field(default_factory=dict)
    shifted: bool = False

    @property
    def listed(self) -> bool:
        """Whether a checkpoint has its experts one by one."""
        return bool(self.experts and self.experts.listed)

    def has(self, stem: str) -> bool:
        """Whether it mostly has a tensor."""
        return bool(self.module(stem) or self.stacked_module(stem))

    def first_name(self, module: str) -> str:
        """What the checkpoint calls a linear module that transformers may call otherwise; itself if it isn't known."""
        inner = self._in_layer(module)
        return (self.module(self.stem(module) or "") or module) if inner and inner[1] in self.linear else module

    def parameter(self, tensor: str) -> str | None:
        """`blk.0.attn_q.bias` to `model.layers.0.self_attn.q_proj.bias`; None for experts and what isn't known."""
        stem, _, kind = tensor.rpartition(".")
        if kind in ("weight", "bias") and (module := self.module(stem)):
            return f"{module}.{kind}"
        match = _BLOCK.fullmatch(tensor)
        found = next((hf for hf, gguf in self.aside.items() if match and gguf == match[2]), None)
        return f"{self.layers}.{match[1]}.{found}" if match and found else None

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
        """Whether a module is a normalization."""
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
        what = f"{module}: the order of its rows depends on the number of heads, which is not known"
        raise RefusedError(where, what, "Name its base model", code="base-required")
    return value


def _falcon_groups(module: str, config: Mapping[str, Any], where: str) -> int:
    # As transformers' modeling_falcon.py decides it; the file of a GGUF base says how many there are.
    if config.get("new_decoder_architecture"):
        return _count(module, config, where, "num_kv_heads")
    if config.get("multi_query") is False:
        raise RefusedError(where, f"{module}: a Falcon without multi-query attention (Falcon-RW) is none that llama.cpp runs")
    return 1


def layer_of(module: str) -> int | None:
    """The number of the layer a module is in."""
    match = _LAYER.fullmatch(module)
    return int(match[2]) if match else None


def in_layer(module: str) -> str | None:
    """The path of a module within its layer, `self_attn.q_proj`, where the layers are `model.layers`."""
    match = _LAYER.fullmatch(module)
    return match[3] if match and match[1] == "model.layers" else None
