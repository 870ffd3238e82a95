"""The Hugging Face sources of each tensor of a GGUF model: one tensor, permuted or in part, or several.

The names and orders are those of `architectures`, which adapters use too. The rest of llama.cpp's conversion
(`conversion/*.py`, `modify_tensors`) is here: the 1 added to norms, stacks of experts, DeepSeek's latent keys, and the tensors
computed from the config, which are the rotary factors of Llama 3 (conversion/llama.py, `generate_extra_tensors`) and Phi-3
(conversion/phi.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import field, replace

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import safe_regex
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.architectures.architecture import Architecture, layer_of, path_in_layer, text_name
from adapterhub_converters.bases.names_in_memory import renaming
from adapterhub_converters.containers.gguf_types import MetadataValue, f32_value
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .model_config import Config
from .shared_keys import head_size, rotated_dimensions

Shape = tuple[int, ...]
_UNUSED = safe_regex.Pattern(r"(.*\.)?(rotary_emb\.inv_freq|attention\.(masked_)?bias|h\.\d+\.attn\.(masked_)?bias)")
"""Buffers in old checkpoints."""
_UNTIED_ALONE = ("deepseek2", "hunyuan-dense")
"""Architectures whose conversion leaves out a tied output layer even if the folder has it."""
_AHEAD = ("deepseek2", "glm4moe")
_AHEAD_NAMES = ("mtp.", "model.mtp.", "model.mtp_")
"""Layers that predict several tokens: architectures that number them after the others, and names of those stored apart."""
_OTHER_MODALITIES = tuple(
    f"{prefix}{name}"
    for prefix in ("", "model.")
    for name in (
        "vision_tower.", "visual.", "multi_modal_projector.", "audio_tower.", "vision_model.", "image_newline",
        "vision_encoder.", "vision_projection.", "connector.", "merger.",
    )
)  # fmt: skip
"""Prefixes of tensors in vision and audio models, and in the projectors that join them to the text model."""


@dataclass(frozen=True, eq=False)
class SourcePart:
    """Rows of a GGUF tensor that come from one Hugging Face tensor, viewed as a matrix (a vector is a column).

    Attributes:
        source: The name of the Hugging Face tensor.
        first: The first row of the slab that is used.
        height: The number of rows of the slab.
        transposed: Whether the slab is transposed first.
        picks: The rows of the slab to take, in order; None for all, in place.
        columns: The columns to take, in order; None for all.
    """

    source: str
    first: int
    height: int
    transposed: bool = False
    picks: NDArray[np.int64] | None = None
    columns: slice | NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class ArrangedTensor:
    """A tensor of a GGUF model: its parts stacked, or a computed `constant`.

    Attributes:
        shift: The number added to every element.
        decay: Whether each number x becomes -exp(x), as in `A_log`.
    """

    name: str
    shape: Shape
    parts: tuple[SourcePart, ...]
    shift: float = 0.0
    decay: bool = False
    constant: NDArray[np.float32] | None = None

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Number of rows of the tensor as a matrix."""
        return math.prod(self.shape) // max(1, self.columns)


def negative_exp(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return -exp of numbers, rounded once (llama.cpp, conversion/qwen.py, for `A_log`)."""
    return -np.exp(numbers, dtype=np.float64).astype(np.float32)


@dataclass(frozen=True)
class Arrangement:
    """All tensors, in the order of the Hugging Face ones, and a note for each tensor left out.

    Attributes:
        numbers: Metadata key to the tensors of one number whose values it lists, in the order of the layers.
    """

    tensors: tuple[ArrangedTensor, ...]
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sources(self) -> frozenset[str]:
        """The Hugging Face tensors that are used."""
        number_tensors = (name for names in self.numbers.values() for name in names)
        return frozenset((*number_tensors, *(part.source for tensor in self.tensors for part in tensor.parts)))


def arrange(architecture: Architecture, shapes: Mapping[str, Shape], config: Config) -> Arrangement:
    """Arrange the GGUF's tensors from those of a folder; RefusedError names a tensor that llama.cpp does not support."""
    arranger = _Arranger(architecture, shapes, config)
    tensors = [tensor for name, shape in shapes.items() for tensor in arranger.arrange(name, shape)]
    tensors += arranger.stacks()
    for name, count in Counter(tensor.name for tensor in tensors).items():
        if count > 1:
            raise RefusedError(config.where, f"more than one tensor for llama.cpp's {name}")
    arranger.check()
    return Arrangement(tuple(tensors), tuple(arranger.notes), arranger.numbers())


def _one_by_one(architecture: Architecture) -> Architecture:
    """Return the architecture with its experts as a list of modules, the form in which transformers 5 saves stacked experts."""
    experts = architecture.experts
    if not experts or experts.list_path or experts.interleaved:
        return architecture
    return replace(architecture, experts=replace(experts, list_path="mlp.experts"))


class _Arranger:
    """An arranger of single tensors, which collects experts to be stacked at the end."""

    def __init__(self, architecture: Architecture, shapes: Mapping[str, Shape], config: Config) -> None:
        self._architecture, self._config, self._where = architecture, config, config.where
        self._experts: dict[str, dict[int, tuple[str, Shape]]] = {}
        self._numbers: dict[str, dict[int, str]] = {}
        self._listed = _one_by_one(architecture)
        self._shapes = shapes
        self._layers = config.count("num_hidden_layers")
        self._prefix = next(iter(architecture.top)).partition(".")[0] + "."
        self.notes: list[str] = []

    def arrange(self, name: str, shape: Shape) -> Iterator[ArrangedTensor]:
        architecture = self._architecture
        if _UNUSED.fullmatch(name) or self._is_left_out(name):
            return
        model_name = self._model_name(name)
        module, _, kind = model_name.rpartition(".")
        layer, inner = layer_of(model_name), path_in_layer(model_name)
        if layer is not None and inner and inner in architecture.numbers and layer < self._layers and math.prod(shape) == 1:
            self._numbers.setdefault(architecture.numbers[inner], {})[layer] = name
        elif (expert := self._listed.expert(module)) is not None and kind == "weight":
            self._experts.setdefault(str(self._listed.stem(module)), {})[expert] = name, shape
        elif architecture.is_stacked(model_name) or architecture.is_stacked(model_name.removesuffix("_bias")):
            yield from self._stack_tensors(model_name, name, shape)
        elif layer is not None and model_name.endswith(".self_attn.kv_b_proj.weight") and architecture.gguf == "deepseek2":
            yield from self._latent_tensors(model_name, name, shape)
        else:
            yield self._plain_tensor(model_name, name, shape)

    def _model_name(self, name: str) -> str:
        """Return a tensor's name in the text model.

        It gets the prefix that old checkpoints of GPT-2 and Bloom lack, and the module's name in memory if only that is known.
        """
        if self._prefix != "model." and not name.startswith((self._prefix, "lm_head.")):
            return self._prefix + name
        inner_name = text_name(name)
        module = inner_name.rpartition(".")[0]
        renamed = inner_name if self._architecture.stem(module) else renaming(self._config.model_type)(inner_name)
        return renamed if self._architecture.is_stacked(renamed) else inner_name

    def _is_left_out(self, name: str) -> bool:
        architecture, model_name = self._architecture, text_name(name)
        head = model_name == "lm_head.weight" and not architecture.head
        tied = model_name == "lm_head.weight" and architecture.gguf in _UNTIED_ALONE and self._config.get("tie_word_embeddings")
        layer = layer_of(name)
        ahead = (layer is not None and layer >= self._layers and architecture.gguf in _AHEAD) or name.startswith(_AHEAD_NAMES)
        elsewhere = (architecture.wrapped or architecture.text != "model") and name.startswith(_OTHER_MODALITIES)
        if head or tied:
            self.notes.append("lm_head.weight was left out: llama.cpp uses the embedding table")
        if ahead:
            self.notes.append("the layers for multi-token prediction were left out")
        if elsewhere:
            self.notes.append("the vision or audio model was left out: llama.cpp reads it from a file of its own, mmproj")
        return bool(head or tied or ahead or elsewhere)

    def _plain_tensor(self, model_name: str, name: str, shape: Shape) -> ArrangedTensor:
        architecture = self._architecture
        module, _, kind = model_name.rpartition(".")
        target = self._target(model_name, module, kind)
        if target is None:
            raise RefusedError(
                self._where, f"{name} {shape}: no known tensor of llama.cpp's {architecture.gguf} corresponds to it"
            )
        order = self._order(model_name, module)
        if order and architecture.gguf == "olmo" and kind == "bias":
            raise RefusedError(self._where, f"{name}: llama.cpp does not permute the rows of this bias")
        is_transposed = architecture.transposed and len(shape) == 2 and layer_of(model_name) is not None
        rows = shape[-1] if is_transposed or architecture.orders_columns(module) else shape[0] if shape else 1
        if not architecture_lookup.order_fits(order, rows):
            raise RefusedError(self._where, f"{name}: {rows} rows do not match {order} heads")
        height = math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)
        if target.endswith(("conv1d.weight", "shortconv.conv.weight")):  # (channels, 1, width)
            shape = (height, shape[-1])
        picks = architecture_lookup.permute_rows(np.arange(rows), order) if order else None
        if order and architecture.orders_columns(module):
            part = SourcePart(name, 0, height, columns=picks)
        else:
            part = SourcePart(name, 0, height, is_transposed, picks)
        decay = model_name.endswith(".A_log")
        return ArrangedTensor(target, shape[::-1] if is_transposed else shape, (part,), architecture.shift(model_name), decay)

    def _order(self, model_name: str, module: str) -> architecture_lookup.Order:
        """Return the order of the rows, or columns, of a parameter."""
        inner = path_in_layer(model_name)
        if inner in self._architecture.aside and inner and inner.startswith("linear_attn."):
            return self._architecture.tiles(inner, self._config.values, self._where)
        return self._architecture.order(module, self._config.values, self._where)

    def _target(self, model_name: str, module: str, kind: str) -> str | None:
        architecture, layer = self._architecture, layer_of(model_name)
        if layer is not None and layer >= self._layers:
            return None
        inner = model_name.removeprefix(f"{architecture.layers}.{layer}.")
        if layer is not None and inner in architecture.aside:
            return f"blk.{layer}.{architecture.aside[inner]}"
        stem = architecture.stem(module) if kind in ("weight", "bias") else None
        if stem and stem.endswith(".attn_norm") and f"{architecture.layers}.{layer}.ln_mlp.weight" in self._shapes:
            stem += "_2" if module.endswith(".ln_attn") else ""
        return f"{stem}.{kind}" if stem else None

    def _stack_tensors(self, model_name: str, name: str, shape: Shape) -> Iterator[ArrangedTensor]:
        experts = self._architecture.experts
        stems = self._architecture.stems(model_name.removesuffix("_bias"))
        if experts is None or len(shape) != 2 + (not model_name.endswith("_bias")):
            raise RefusedError(self._where, f"{name} {shape}: not a stack of experts")
        count = len(stems)
        if model_name.endswith("_bias"):
            for number, stem in enumerate(stems):
                rows_each = shape[1] // count
                take = (
                    slice(number, None, count) if experts.interleaved else slice(number * rows_each, (number + 1) * rows_each)
                )
                yield ArrangedTensor(f"{stem}.bias", (shape[0], rows_each), (SourcePart(name, 0, shape[0], columns=take),))
            return
        rows, columns = (shape[2], shape[1]) if experts.transposed else (shape[1], shape[2])
        rows_each = rows // count
        for number, stem in enumerate(stems):
            picks = (
                np.arange(number, rows, count)
                if experts.interleaved
                else np.arange(number * rows_each, (number + 1) * rows_each)
            )
            parts = tuple(
                SourcePart(name, e * shape[1], shape[1], experts.transposed, picks if count > 1 else None)
                for e in range(shape[0])
            )
            yield ArrangedTensor(f"{stem}.weight", (shape[0], rows_each, columns), parts)

    def _latent_tensors(self, model_name: str, name: str, shape: Shape) -> Iterator[ArrangedTensor]:
        """Yield the keys and the values of all heads, as separate tensors (`deepseek.py`).

        The keys are transposed because llama.cpp multiplies the query by them.
        """
        heads, keys, values = (self._config.count(key) for key in ("num_key_value_heads", "qk_nope_head_dim", "v_head_dim"))
        rows_per_head, prefix = keys + values, f"blk.{layer_of(model_name)}.attn_"
        if shape[0] != heads * rows_per_head:
            raise RefusedError(self._where, f"{name}: {shape[0]} rows do not match {heads} heads of {rows_per_head}")
        key_parts = tuple(SourcePart(name, head * rows_per_head, keys, transposed=True) for head in range(heads))
        value_parts = tuple(SourcePart(name, head * rows_per_head + keys, values) for head in range(heads))
        yield ArrangedTensor(f"{prefix}k_b.weight", (heads, shape[1], keys), key_parts)
        yield ArrangedTensor(f"{prefix}v_b.weight", (heads, values, shape[1]), value_parts)

    def stacks(self) -> Iterator[ArrangedTensor]:
        """Yield the stacks of experts that the checkpoint stores one by one."""
        for stem, experts in self._experts.items():
            gap = next((number for number in range(len(experts)) if number not in experts), None)
            if gap is not None:
                problem = (
                    f"the tensor of expert {gap} for llama.cpp's {stem} is missing, and others up to {max(experts)} are there"
                )
                raise RefusedError(self._where, problem)
            shape = experts[0][1]
            if differing := next(((name, size) for name, size in experts.values() if size != shape), None):
                raise RefusedError(self._where, f"{differing[0]} {differing[1]}: other experts have {shape}")
            parts = tuple(SourcePart(experts[number][0], 0, shape[0]) for number in range(len(experts)))
            yield ArrangedTensor(f"{stem}.weight", (len(experts), *shape), parts)

    def numbers(self) -> dict[str, tuple[str, ...]]:
        """Return the tensors with one number each; RefusedError if a layer lacks one."""
        for key in self._architecture.numbers.values():
            names_by_layer = self._numbers.get(key, {})
            if (layer := next((layer for layer in range(self._layers) if layer not in names_by_layer), None)) is not None:
                raise RefusedError(self._where, f"layer {layer} has no tensor of one number for llama.cpp's {key}")
        return {
            key: tuple(names_by_layer[layer] for layer in range(self._layers)) for key, names_by_layer in self._numbers.items()
        }

    def check(self) -> None:
        """Raise RefusedError if the model's output layer would be lost."""
        if (
            not self._architecture.head
            and "lm_head.weight" in self._shapes
            and self._config.get("tie_word_embeddings") is False
        ):
            problem = f"an output layer of its own, but llama.cpp's {self._architecture.gguf} only uses the embedding table"
            raise RefusedError(self._where, problem)


# ---- Factors of the rotary embedding


def rope_tensors(gguf: str, config: Config) -> tuple[tuple[ArrangedTensor, ...], dict[str, MetadataValue]]:
    """Return the tensors of rotary factors, computed from the config, and their keys."""
    if config.rope["rope_type"] == "llama3":
        return (_constant("rope_freqs.weight", _llama3(config)),), {}
    if gguf == "phi3" and config.rope.get("long_factor"):
        return _phi3(config)
    return (), {}


def _constant(name: str, numbers: np.ndarray) -> ArrangedTensor:
    return ArrangedTensor(name, numbers.shape, (), constant=numbers)


def _llama3(config: Config) -> np.ndarray:
    size = head_size(config)
    # In float32, as llama.cpp computes it in torch, whose powers are the nearest numbers more often than numpy's in float32.
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = np.float32(1.0) / np.power(config.rope_number("rope_theta"), exponents, dtype=np.float64).astype(np.float32)
    defaults = {
        "factor": 16.0 if config.model_type == "exaone4" else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    factor, low, high, original = (config.rope_number(key, default) for key, default in defaults.items())
    if low == high or not low or not high or not factor:
        raise RefusedError(
            config.where, "config.json: the llama3 factors of the rotary embedding contain a 0 or equal low and high factors"
        )
    factors = []
    for frequency in frequencies:
        wave = np.float32(1) / frequency * np.float32(2 * math.pi)  # torch divides a number by the reciprocal
        if wave < original / high:
            factors.append(np.float32(1))
        elif wave > original / low:
            factors.append(np.float32(factor))
        else:
            smooth = (np.float32(1) / wave * np.float32(original) - np.float32(low)) / np.float32(high - low)
            factors.append(np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth))
    return np.array(factors, np.float32)


def _phi3(config: Config) -> tuple[tuple[ArrangedTensor, ...], dict[str, MetadataValue]]:
    rope, half = config.rope, rotated_dimensions(config) // 2
    factor_lists = {kind: rope.get(f"{kind}_factor") for kind in ("long", "short")}
    for numbers in factor_lists.values():
        if (
            not isinstance(numbers, list)
            or len(numbers) != half
            or not all(isinstance(number, int | float) for number in numbers)
        ):
            problem = f"long_factor and short_factor of the rotary embedding do not have {half} numbers each"
            raise RefusedError(config.where, f"config.json: {problem}")
    factors = {kind: np.array(numbers, np.float32) for kind, numbers in factor_lists.items()}
    original = config.count("original_max_position_embeddings")
    scale = config.count("max_position_embeddings") / original
    # The attention factor of longrope (transformers, `_compute_longrope_parameters`).
    attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
    tensors = tuple(_constant(f"rope_factors_{kind}.weight", factor_array) for kind, factor_array in factors.items())
    return tensors, {"rope.scaling.attn_factor": f32_value(attention)}
