"""What llama.cpp calls the modules of a Hugging Face model, architecture by architecture, as data.

An architecture is listed when gguf-py's `TensorNameMap` agrees with every name (tested) and llama.cpp's conversion of
its linear weights was found to be linear and exact: a renaming and, for some, a permutation of the rows of q and k
(`conversion/llama.py`, `permute`). Everything else is refused by name. Expert weights, fused and split projections
and the prefixes of vision models are not among them.
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
_LLAMA = _ATTENTION | {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA2_NORMS = {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm"} | _POST_NORMS

_EMBEDDING, _HEAD = ("model.embed_tokens", "token_embd"), ("lm_head", "output")
_FINAL_NORM = ("model.norm", "output_norm")
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        gguf: Its name in `general.architecture`.
        classes: Hugging Face classes that become it, the one to read it back as first; their `model_type` beside.
        linear: Linear modules of a layer to the stem of their tensor.
        norms: Normalisations of a layer likewise; llama.cpp takes no LoRA on them.
        permuted: Whether the rows of q and k are reordered for llama.cpp's RoPE.
        head: Whether it can have an output layer of its own; the others always use the embedding table.
    """

    gguf: str
    classes: Mapping[str, str]
    linear: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    norms: Mapping[str, str] = field(default_factory=lambda: _NORMS)
    permuted: bool = False
    head: bool = True

    @property
    def _top(self) -> tuple[tuple[str, str], ...]:
        return (_EMBEDDING, _FINAL_NORM, _HEAD) if self.head else (_EMBEDDING, _FINAL_NORM)

    def stem(self, module: str) -> str | None:
        """`model.layers.0.self_attn.q_proj` to `blk.0.attn_q`; None for a module that isn't known."""
        for known, stem in self._top:
            if module == known:
                return stem
        if not (match := _LAYER.fullmatch(module)):
            return None
        found = self.linear.get(match[2]) or self.norms.get(match[2])
        return f"blk.{match[1]}.{found}" if found else None

    def module(self, stem: str) -> str | None:
        """The inverse of `stem`."""
        for module, known in self._top:
            if stem == known:
                return module
        if not (match := _BLOCK.fullmatch(stem)):
            return None
        found = next((hf for hf, gguf in (*self.linear.items(), *self.norms.items()) if gguf == match[2]), None)
        return f"model.layers.{match[1]}.{found}" if found else None

    def is_norm(self, module: str) -> bool:
        """Whether a module is a normalisation."""
        match = _LAYER.fullmatch(module)
        return module == _FINAL_NORM[0] or bool(match and match[2] in self.norms)

    def heads(self, module: str, config: Mapping[str, Any], where: str) -> int:
        """How many heads the rows of a module are reordered in; 0 when they keep their order."""
        match = _LAYER.fullmatch(module)
        if not self.permuted or not match or match[2] not in ("self_attn.q_proj", "self_attn.k_proj"):
            return 0
        n_head = config.get("num_attention_heads")
        n_head_kv = config.get("num_key_value_heads") or n_head
        heads = n_head if match[2] == "self_attn.q_proj" else n_head_kv
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
            raise RefusedError(
                where, f"{module}: the order of its rows depends on the number of heads, which is not known", "Pass --base"
            )
        return heads


# Permutation: LlamaModel.undo_permute and its subclasses in llama.cpp's conversion/. Names: gguf-py, tensor_mapping.py.
ARCHITECTURES = (
    Architecture("llama", {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}, permuted=True),
    Architecture("granite", {"GraniteForCausalLM": "granite"}, permuted=True),
    Architecture("smollm3", {"SmolLM3ForCausalLM": "smollm3"}, permuted=True),
    Architecture("qwen2", {"Qwen2ForCausalLM": "qwen2"}),
    Architecture("qwen3", {"Qwen3ForCausalLM": "qwen3"}, norms=_NORMS | _QK_NORMS),
    Architecture("gemma", {"GemmaForCausalLM": "gemma"}, head=False),
    Architecture("gemma2", {"Gemma2ForCausalLM": "gemma2"}, norms=_GEMMA2_NORMS, head=False),
    Architecture("gemma3", {"Gemma3ForCausalLM": "gemma3_text"}, norms=_GEMMA2_NORMS | _QK_NORMS),
    Architecture("olmo2", {"Olmo2ForCausalLM": "olmo2"}, norms=_QK_NORMS | _POST_NORMS),
    Architecture(
        "phi3",
        {"Phi3ForCausalLM": "phi3"},
        linear={
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    ),
    Architecture(
        "starcoder2",
        {"Starcoder2ForCausalLM": "starcoder2"},
        linear=_ATTENTION | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    ),
)


def layer_of(module: str) -> int | None:
    """The number of the layer a module is in."""
    match = _LAYER.fullmatch(module)
    return int(match[1]) if match else None


def in_layer(module: str) -> str | None:
    """The path of a module within its layer, `self_attn.q_proj`."""
    match = _LAYER.fullmatch(module)
    return match[2] if match else None


def by_class(name: str, where: str) -> Architecture:
    """The architecture of a Hugging Face class; RefusedError for one that isn't listed."""
    for architecture in ARCHITECTURES:
        if name in architecture.classes:
            return architecture
    known = ", ".join(sorted(name for architecture in ARCHITECTURES for name in architecture.classes))
    raise RefusedError(where, f"{name or 'an unnamed architecture'} has no verified mapping to llama.cpp", f"Known: {known}")


def by_gguf(name: str, where: str) -> Architecture:
    """The architecture of a `general.architecture`; RefusedError for one that isn't listed."""
    for architecture in ARCHITECTURES:
        if name == architecture.gguf:
            return architecture
    known = ", ".join(sorted(architecture.gguf for architecture in ARCHITECTURES))
    raise RefusedError(where, f"llama.cpp's {name[:40]!r} has no verified mapping to Hugging Face's names", f"Known: {known}")


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's order of rows, halves of a head one after the other, to llama.cpp's, pairs; `heads` 0: as it is.

    `rows` is `(heads * head_dim, …)` (llama.cpp, `conversion/llama.py`, `permute`).
    """
    return _swapped(rows, heads, 2, rows.shape[0] // (2 * heads)) if heads else rows


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permuted`."""
    return _swapped(rows, heads, rows.shape[0] // (2 * heads), 2) if heads else rows


def _swapped(rows: np.ndarray, heads: int, first: int, second: int) -> np.ndarray:
    shape = (heads, first, second, *rows.shape[1:])
    return np.ascontiguousarray(rows.reshape(shape).swapaxes(1, 2)).reshape(rows.shape)
