"""`Architecture`: the names, row orders, and stacks of the modules of a llama.cpp architecture.

The architectures themselves are data, in `table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

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
"""Tensors that may contain others, one after the other (llama.cpp, convert_hf_to_gguf.py: fuse_qkv, fuse_gate_up_exps)."""
FUSED_IN = {part: (whole, parts) for whole, parts in FUSED.items() for part in parts}
_LAYER_LISTS = ("model.layers", "transformer.h", "gpt_neox.layers", "backbone.layers")
_TEXT_PREFIXES = (
    "model.language_model.", "language_model.model.", "model.text_model.", "thinker.model.language_model.", "thinker.model.",
)  # fmt: skip
EMBEDDINGS = (
    "model.embed_tokens", "transformer.wte", "transformer.word_embeddings",
    "model.language_model.embed_tokens", "language_model.model.embed_tokens", "model.text_model.embed_tokens",
    "gpt_neox.embed_in", "backbone.embeddings",
)  # fmt: skip
"""Names of the table of token embeddings."""
_HEADS = ("language_model.lm_head", "thinker.lm_head")
_PREFIXES_WITHOUT_MODEL = ("layers.", "embed_tokens")


Order = int | tuple[int, int] | tuple[int, int, int] | tuple[int, int, int, int] | tuple[int, int, int, int, int]
"""Order of a module's rows in llama.cpp.

0: unchanged. n: the halves of each of n heads become pairs. (g, q): g groups of q query heads, a key head and a value head
become all queries, then all keys, then all values. (h, d, p): in each of h heads of d rows, the pairs among the first p rows
become halves. (first, k, v, d): from row `first` on, the v value heads of d rows of each of k key heads become v times the k
heads. (g, q, k, v, z): g groups of q rows of queries, k of keys, v of values and z of gates become all queries, then all keys,
all values and all gates.
"""


def text_name(module: str) -> str:
    """Return the name of a module in the text model alone: `model.language_model.layers.0.mlp` becomes `model.layers.0.mlp`.

    Vision and audio models have the text model under a prefix; adapters of models without a head have no prefix at all.
    """
    if prefix := next((prefix for prefix in _TEXT_PREFIXES if module.startswith(prefix)), ""):
        return f"model.{module.removeprefix(prefix)}"
    if module.startswith(_PREFIXES_WITHOUT_MODEL):
        return f"model.{module}"
    return module.partition(".")[2] if module.startswith(_HEADS) else module


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        list_path: Path of the list of modules, one per expert, in checkpoints and transformers 4; None if there is none.
        modules: Module of a listed expert to the stem of the tensor that stacks it.
        stacked: Parameter of all experts in transformers 5 to the stems that share its rows.
        interleaved: Whether those rows alternate (gate, up, gate, …) rather than follow one another.
        transposed: Whether Hugging Face stores the parameters `(experts, in, out)`.
    """

    list_path: str | None = "mlp.experts"
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
        classes: Hugging Face classes that convert to it, to their `model_type`; a GGUF is read back as the first one.
        linear: Linear modules of a layer to the stems of their tensors.
        norms: Normalizations of a layer, likewise; llama.cpp does not support LoRA on them.
        top: Modules outside the layers.
        layers: Path of the list of layers.
        permuted: Whether the rows of q and k are reordered for llama.cpp's RoPE.
        unpaired: Whether the rotated pairs of q and k become halves in a model whose rotary embedding has sections.
        grouped: The module with grouped rows of queries, keys, and values, if any.
        head: Whether it supports an output layer of its own; if not, it always uses the embedding table.
        transposed: Whether Hugging Face stores the weights of the linear modules `(in, out)`.
        experts: Its experts, if any.
        unseen: Modules whose LoRA llama.cpp loads and then ignores, with the reason.
        wrapped: Hugging Face classes of vision and audio models whose text model this is, to their `model_type`.
        texts: Further `model_type`s of text models in those classes.
        text: Path of the text model in such a class.
        split: Modules whose rows llama.cpp has in several tensors, one after the other, to their stems.
        marks: Parts of tensor names that tell this row from others of its class: a model that has them all is of this row.
        tiled: Modules of linear attention whose value heads llama.cpp reorders.
        across: The tiled modules whose heads are columns rather than rows.
        whole: Whether a GGUF of it has the names and shapes of the checkpoint, so that adapters are merged into it.
        folder: Whether the tables cover everything in a Hugging Face folder, so that complete models are converted.
        aside: Parameters of a layer that do not support LoRA, to their tensors.
        numbers: Parameters of a layer with a single number, to the metadata keys that list those of all layers.
        shifted: Whether 1 is added to the weights of its norms; in Hugging Face's models, the code of the model adds it.
    """

    gguf: str
    classes: Mapping[str, str]
    linear: Mapping[str, str] = field(default_factory=lambda: ATTENTION | MLP)
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    layers: str = "model.layers"
    permuted: bool = False
    unpaired: bool = False
    grouped: str = ""
    head: bool = True
    transposed: bool = False
    experts: Experts | None = None
    unseen: Mapping[str, str] = field(default_factory=dict)
    aside: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    shifted: bool = False
    wrapped: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    text: str = "model"
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    tiled: frozenset[str] = frozenset()
    across: frozenset[str] = frozenset()
    whole: bool = True
    folder: bool = True

    @property
    def kinds(self) -> frozenset[str]:
        """The `model_type` of its text models, some of which have the suffix `_text`."""
        kinds = frozenset((*self.classes.values(), *self.wrapped.values(), *self.texts))
        return kinds | {f"{kind}_text" for kind in kinds}

    @property
    def lists_experts(self) -> bool:
        """Whether checkpoints store the experts one by one."""
        return bool(self.experts and self.experts.list_path)

    def has_tensor(self, stem: str) -> bool:
        """Return whether the architecture usually has a tensor."""
        return bool(self.module(stem) or self.stacked_module(stem) or self.split_module(stem))

    def first_name(self, module: str) -> str:
        """Return the checkpoint's name of a linear module that transformers may rename; any other name unchanged."""
        inner = self._in_layer(module)
        name = self.module(self.stem(module) or "") if inner and inner[1] in self.linear else None
        return name if name and text_name(name) != text_name(module) else module

    def parameter(self, tensor: str) -> str | None:
        """Return the parameter of a tensor: `blk.0.attn_q.bias` becomes `model.layers.0.self_attn.q_proj.bias`.

        None for experts and unknown tensors.
        """
        stem, _, kind = tensor.rpartition(".")
        if kind in ("weight", "bias") and (module := self.module(stem)):
            return f"{module}.{kind}"
        # Parameters without LoRA, such as a router's bias, have names of their own in GGUF.
        match = _split_layer(tensor, "blk")
        path = next((hf for hf, gguf in self.aside.items() if match and gguf == match[1]), None)
        return self._full_name(f"{self.layers}.{match[0]}.{path}") if match and path else None

    def stem(self, module: str) -> str | None:
        """Return the stem of a module's tensor: `model.layers.0.self_attn.q_proj` becomes `blk.0.attn_q`; None if unknown.

        For an expert, or a parameter of all experts, it is that of the (first) tensor that stacks it.
        """
        return next(iter(self.stems(module)), None)

    def stems(self, module: str) -> tuple[str, ...]:
        """Return the stems of all tensors that a module's delta applies to by default; empty for an unknown module."""
        module = text_name(module)
        if module in self.top:
            return (self.top[module],) if self.head or self.top[module] != "output" else ()
        if not (inner := self._in_layer(module)):
            return ()
        layer, path = inner
        # A module in a layer: linear, a normalization, or part of the experts.
        stems = self.split.get(path, ())
        if stem := self.linear.get(path) or self.norms.get(path):
            stems = (stem,)
        elif self.experts and not stems:
            expert = self._expert(path)
            stems = (self.experts.modules[expert[1]],) if expert else self.experts.stacked.get(path, ())
        return tuple(f"blk.{layer}.{stem}" for stem in stems)

    def expert(self, module: str) -> int | None:
        """Return the number of the expert that a module in the list of experts belongs to."""
        inner = self._in_layer(module)
        expert = self._expert(inner[1]) if inner else None
        return expert[0] if expert else None

    def is_stacked(self, module: str) -> bool:
        """Return whether a module is a parameter of all experts together."""
        inner = self._in_layer(module)
        return bool(inner and self.experts and inner[1] in self.experts.stacked)

    def _in_layer(self, module: str) -> tuple[str, str] | None:
        """Return the layer and the path of a module in it."""
        return _split_layer(text_name(module), self.layers) if self.layers in _LAYER_LISTS else None

    def _full_name(self, module: str) -> str:
        """Return the name that a module of the text model has in the complete model."""
        # In a vision or audio model, the text model is under a prefix.
        is_in_text_model = module.startswith("model.") and self.text != "model"
        return f"{self.text}.{module.removeprefix('model.')}" if is_in_text_model else module

    def _expert(self, path: str) -> tuple[int, str] | None:
        """Return the number of an expert and the path within it."""
        if not self.experts or not self.experts.list_path or not path.startswith(f"{self.experts.list_path}."):
            return None
        number, _, module = path.removeprefix(f"{self.experts.list_path}.").partition(".")
        # A name comes from a file: `int` would accept other digits, and signs.
        if not _is_number(number, 5) or module not in self.experts.modules:
            return None
        return int(number), module

    def module(self, stem: str) -> str | None:
        """Return the module of a stem; None for experts, since one tensor contains many modules."""
        for module, known_stem in self.top.items():
            if stem == known_stem and (self.head or known_stem != "output"):
                return self._full_name(module)
        if not (match := _split_layer(stem, "blk")):
            return None
        path = next((hf for hf, gguf in (*self.linear.items(), *self.norms.items()) if gguf == match[1]), None)
        return self._full_name(f"{self.layers}.{match[0]}.{path}") if path else None

    def listed_module(self, stem: str, expert: int) -> str | None:
        """Return the name of the module of `expert` that `stem` stacks, in the list of experts."""
        match = _split_layer(stem, "blk")
        if not match or not self.experts or not self.experts.list_path:
            return None
        path = next((module for module, gguf in self.experts.modules.items() if gguf == match[1]), None)
        return self._full_name(f"{self.layers}.{match[0]}.{self.experts.list_path}.{expert}.{path}") if path else None

    def stacked_module(self, stem: str) -> str | None:
        """Return the parameter of all experts that (part of) `stem` comes from."""
        match = _split_layer(stem, "blk")
        if not match or not self.experts:
            return None
        path = next((module for module, stems in self.experts.stacked.items() if match[1] in stems), None)
        return self._full_name(f"{self.layers}.{match[0]}.{path}") if path else None

    def split_module(self, stem: str) -> str | None:
        """Return the module of which `stem` has some of the rows."""
        match = _split_layer(stem, "blk")
        path = next((module for module, stems in self.split.items() if match and match[1] in stems), None)
        return self._full_name(f"{self.layers}.{match[0]}.{path}") if match and path else None

    def is_norm(self, module: str) -> bool:
        """Return whether a module is a normalization."""
        inner = self._in_layer(module)
        return self.top.get(text_name(module), "").endswith("_norm") or bool(inner and inner[1] in self.norms)

    def shift(self, parameter: str) -> float:
        """Return what llama.cpp's conversion adds to a parameter: 1 for norms whose models add it themselves, else 0."""
        module, _, kind = parameter.rpartition(".")
        # The norm of linear attention has ordinary weights even in these models.
        is_shifted = self.shifted and kind == "weight" and self.is_norm(module) and not module.endswith("linear_attn.norm")
        return float(is_shifted)

    def reason_ignored(self, module: str) -> str | None:
        """Return the reason why llama.cpp would ignore a LoRA on a module; None if it applies it."""
        inner = self._in_layer(module)
        return self.unseen.get(inner[1] if inner else text_name(module))

    def is_reordered(self, module: str) -> bool:
        """Return whether the rows of a module have another order in llama.cpp."""
        inner = self._in_layer(module)
        return inner is not None and (self._has_permuted_heads(inner[1]) or inner[1] == self.grouped or inner[1] in self.tiled)

    def orders_columns(self, module: str) -> bool:
        """Return whether the order of a module applies to its columns."""
        inner = self._in_layer(module)
        return inner is not None and inner[1] in self.across

    def allows(self, module: str, order: Order) -> bool:
        """Return whether a module may have an order in llama.cpp."""
        inner = self._in_layer(module)
        if inner and (inner[1] in self.tiled or self.unpaired):
            size = 3 if self.unpaired else 5 if inner[1] in self.split else 4
            return not order or (self.is_reordered(module) and isinstance(order, tuple) and len(order) == size)
        tuple_size = 2 if self.grouped else 0
        return self.is_reordered(module) == bool(order) and (len(order) if isinstance(order, tuple) else 0) in (
            (tuple_size,) if order else (0,)
        )

    def _has_permuted_heads(self, path: str) -> bool:
        return (self.permuted or self.unpaired) and path.endswith((".q_proj", ".k_proj"))

    def order(self, module: str, config: Mapping[str, Any], location: str) -> Order:
        """Return the order of a module's rows in llama.cpp, from the numbers in a config; RefusedError without them."""
        if not self.is_reordered(module):
            return 0
        if (inner := self._in_layer(module)) and inner[1] in self.tiled:
            return self.tiles(inner[1], config, location)
        if self.unpaired:
            return _unpaired(module, config, location)
        n_head = _count(module, config, location, "num_attention_heads")
        if self.grouped:
            # BLOOM and GPT-NeoX have a group for each head.
            groups = n_head if self.gguf in ("bloom", "gptneox") else _falcon_groups(module, config, location)
            if n_head % groups:
                raise RefusedError(location, f"{module}: {n_head} heads cannot be divided evenly into {groups} groups")
            return groups, n_head // groups
        # Without grouped-query attention, keys have as many heads as queries.
        if module.endswith("q_proj") or config.get("num_key_value_heads") is None:
            return n_head
        return _count(module, config, location, "num_key_value_heads")

    def tiles(self, path: str, config: Mapping[str, Any], location: str) -> Order:
        """Return the order of the value heads in a module or parameter of linear attention."""
        return _tiles(path, *(_count(path, config, location, f"linear_{key}") for key in _LINEAR_ATTENTION_KEYS))


def _count(module: str, config: Mapping[str, Any], location: str, key: str) -> int:
    """Return a number of heads from a config; RefusedError without it."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        problem = f"{module}: the order of its rows depends on the number of heads, which is unknown"
        raise RefusedError(location, problem, "Name its base model", code="base-required")
    return value


# Keys of the config, after `linear_`.
_LINEAR_ATTENTION_KEYS = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")


def _tiles(path: str, keys: int, values: int, key_dim: int, value_dim: int) -> Order:
    if path.endswith("in_proj_qkvz"):  # llama.cpp, conversion/qwen.py, Qwen3NextModel
        return keys, key_dim, key_dim, values // keys * value_dim, values // keys * value_dim
    # The rule of llama.cpp, conversion/qwen.py, _LinearAttentionVReorderBase.
    if keys == values:
        return 0
    first_row = 2 * keys * key_dim if path.endswith(("in_proj_qkv", "conv1d.weight")) else 0
    return first_row, keys, values // keys, 1 if path.endswith(("in_proj_a", "in_proj_b", "A_log", "dt_bias")) else value_dim


def _unpaired(module: str, config: Mapping[str, Any], location: str) -> Order:
    # The rule of llama.cpp, conversion/glm.py, Glm4Model, where the partial factor has the same default.
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return 0
    heads = _count(module, config, location, "num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads")
    size, factor = _count(module, config, location, "head_dim"), rope.get("partial_rotary_factor", 0.5)
    if not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise RefusedError(location, f"{module}: partial_rotary_factor is {str(factor)[:40]}, not a number above 0 up to 1")
    rotated = int(size * factor)
    return (heads, size, rotated) if rotated else 0


def _falcon_groups(module: str, config: Mapping[str, Any], location: str) -> int:
    # The rule of transformers' modeling_falcon.py; a GGUF base contains the number.
    if config.get("new_decoder_architecture"):
        return _count(module, config, location, "num_kv_heads")
    if config.get("multi_query") is False:
        raise RefusedError(location, f"{module}: llama.cpp does not support a Falcon without multi-query attention (Falcon-RW)")
    return 1


def layer_of(module: str) -> int | None:
    """Return the number of the layer that a module is in."""
    layer_and_path = next(filter(None, (_split_layer(text_name(module), layers) for layers in _LAYER_LISTS)), None)
    return int(layer_and_path[0]) if layer_and_path else None


def path_in_layer(module: str) -> str | None:
    """Return the path of a module within its layer, such as `self_attn.q_proj`, if the layers are `model.layers`."""
    layer_and_path = _split_layer(module, "model.layers")
    return layer_and_path[1] if layer_and_path else None


def _split_layer(name: str, layers: str) -> tuple[str, str] | None:
    """Split `<layers>.<number>.<path>` into number and path; None for a name outside that list of layers."""
    if not name.startswith(f"{layers}."):
        return None
    number, _, path = name[len(layers) + 1 :].partition(".")
    return (number, path) if path and _is_number(number, 6) else None


def _is_number(text: str, digits: int) -> bool:
    return text.isdecimal() and text.isascii() and len(text) <= digits and (text[0] != "0" or text == "0")
