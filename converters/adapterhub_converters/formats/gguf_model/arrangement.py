"""Map each tensor of a GGUF model to its Hugging Face sources: one tensor, permuted or in part, or several.

The names and orders are those of `architectures`, which adapters use too. The rest of llama.cpp's conversion
(`conversion/*.py`, `modify_tensors`) is here: the 1 added to norms, stacks of experts, DeepSeek's latent keys, and the tensors
computed from the config, the rotary factors of Llama 3 (conversion/llama.py, `generate_extra_tensors`) and Phi-3
(conversion/phi.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import linear
from adapterhub_converters.architectures import names
from adapterhub_converters.architectures.architecture import Architecture, in_layer, layer_of, text_name
from adapterhub_converters.bases.canonical_names import in_memory
from adapterhub_converters.containers.gguf_file import Value, f32
from adapterhub_converters.errors import RefusedError

from .configured import Config
from .shared_keys import head_size, rotated

Shape = tuple[int, ...]
_UNUSED = linear.Pattern(r"(.*\.)?(rotary_emb\.inv_freq|attention\.(masked_)?bias|h\.\d+\.attn\.(masked_)?bias)")
"""Buffers in old checkpoints."""
_UNTIED_ALONE = ("deepseek2", "hunyuan-dense")
"""Architectures whose conversion leaves out a tied output layer that the folder has nevertheless."""
_AHEAD = ("deepseek2", "glm4moe")
_AHEAD_NAMES = ("mtp.", "model.mtp.", "model.mtp_")
"""Layers that predict several tokens: architectures that number them after the others, and names of those apart."""
_OTHER_MODALITIES = tuple(
    f"{prefix}{name}"
    for prefix in ("", "model.")
    for name in ("vision_tower.", "visual.", "multi_modal_projector.", "audio_tower.", "vision_model.", "image_newline")
)
"""Tensors of vision and audio models, and of what joins them to the text model."""


@dataclass(frozen=True, eq=False)
class SourcePart:
    """Rows of a GGUF tensor that come from one Hugging Face tensor, seen as a matrix (a vector is a column).

    Attributes:
        source: Name of the Hugging Face tensor.
        first: First row of the slab that is used.
        height: Number of rows of the slab.
        transposed: Whether the slab is transposed first.
        picks: Rows of the slab to take, in order; None for all, in place.
        columns: Columns to take, in order; None for all.
    """

    source: str
    first: int
    height: int
    transposed: bool = False
    picks: NDArray[np.int64] | None = None
    columns: slice | NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class Arranged:
    """A tensor of a GGUF model: its parts stacked, or a computed `constant`.

    Attributes:
        shift: Added to every number.
        decay: Whether a number x becomes -exp(x), as those of `A_log` do.
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


def decayed(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """-exp of numbers, rounded once (llama.cpp, conversion/qwen.py, of `A_log`)."""
    return -np.exp(numbers, dtype=np.float64).astype(np.float32)


@dataclass(frozen=True)
class Arrangement:
    """All tensors, in the order of the Hugging Face ones, and a note for each tensor left out.

    Attributes:
        numbers: Key of the metadata to the tensors of one number whose values it lists, in the order of the layers.
    """

    tensors: tuple[Arranged, ...]
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sources(self) -> frozenset[str]:
        """The Hugging Face tensors that are used."""
        listed = (name for names in self.numbers.values() for name in names)
        return frozenset((*listed, *(part.source for tensor in self.tensors for part in tensor.parts)))


def arranged(architecture: Architecture, shapes: Mapping[str, Shape], config: Config) -> Arrangement:
    """Arrange the tensors of the GGUF from those of a folder; RefusedError names a tensor that llama.cpp does not support."""
    work = _Work(architecture, shapes, config)
    made = [tensor for name, shape in shapes.items() for tensor in work.of(name, shape)]
    made += work.stacks()
    for name, count in Counter(one.name for one in made).items():
        if count > 1:
            raise RefusedError(config.where, f"more than one tensor for llama.cpp's {name}")
    work.check()
    return Arrangement(tuple(made), tuple(work.notes), work.numbers())


def _one_by_one(architecture: Architecture) -> Architecture:
    """Return the architecture with its experts in a list of modules, as transformers 5 saves those that other files stack."""
    experts = architecture.experts
    if not experts or experts.listed or experts.interleaved:
        return architecture
    return replace(architecture, experts=replace(experts, listed="mlp.experts"))


class _Work:
    """Collects experts, to be stacked at the end."""

    def __init__(self, architecture: Architecture, shapes: Mapping[str, Shape], config: Config) -> None:
        self._architecture, self._config, self._where = architecture, config, config.where
        self._experts: dict[str, dict[int, tuple[str, Shape]]] = {}
        self._numbers: dict[str, dict[int, str]] = {}
        self._listed = _one_by_one(architecture)
        self._shapes = shapes
        self._layers = config.count("num_hidden_layers")
        self._prefix = next(iter(architecture.top)).partition(".")[0] + "."
        self.notes: list[str] = []

    def of(self, name: str, shape: Shape) -> Iterator[Arranged]:
        known = self._architecture
        if _UNUSED.fullmatch(name) or self._left_out(name):
            return
        own = self._own_name(name)
        module, _, kind = own.rpartition(".")
        layer, inner = layer_of(own), in_layer(own)
        if layer is not None and inner and inner in known.numbers and layer < self._layers and math.prod(shape) == 1:
            self._numbers.setdefault(known.numbers[inner], {})[layer] = name
        elif (expert := self._listed.expert(module)) is not None and kind == "weight":
            self._experts.setdefault(str(self._listed.stem(module)), {})[expert] = name, shape
        elif known.is_stacked(own) or known.is_stacked(own.removesuffix("_bias")):
            yield from self._stacked(own, name, shape)
        elif layer is not None and own.endswith(".self_attn.kv_b_proj.weight") and known.gguf == "deepseek2":
            yield from self._latent(own, name, shape)
        else:
            yield self._plain(own, name, shape)

    def _own_name(self, name: str) -> str:
        """Return the name in the text model alone, with the prefix that old checkpoints of GPT-2 and Bloom lack, and that of
        the module in memory if only this is known."""
        if self._prefix != "model." and not name.startswith((self._prefix, "lm_head.")):
            return self._prefix + name
        own = text_name(name)
        module = own.rpartition(".")[0]
        renamed = own if self._architecture.stem(module) else in_memory(own, self._config.model_type)
        return renamed if self._architecture.is_stacked(renamed) else own

    def _left_out(self, name: str) -> bool:
        known, own = self._architecture, text_name(name)
        head = own == "lm_head.weight" and not known.head
        tied = own == "lm_head.weight" and known.gguf in _UNTIED_ALONE and self._config.get("tie_word_embeddings")
        layer = layer_of(name)
        ahead = (layer is not None and layer >= self._layers and known.gguf in _AHEAD) or name.startswith(_AHEAD_NAMES)
        elsewhere = (known.wrapped or known.text != "model") and name.startswith(_OTHER_MODALITIES)
        if head or tied:
            self.notes.append("lm_head.weight was left out: llama.cpp uses the embedding table")
        if ahead:
            self.notes.append("the layers for multi-token prediction were left out")
        if elsewhere:
            self.notes.append("the vision or audio model was left out: llama.cpp reads it from a file of its own, mmproj")
        return bool(head or tied or ahead or elsewhere)

    def _plain(self, own: str, name: str, shape: Shape) -> Arranged:
        known = self._architecture
        module, _, kind = own.rpartition(".")
        target = self._target(own, module, kind)
        if target is None:
            raise RefusedError(self._where, f"{name} {shape}: no known tensor of llama.cpp's {known.gguf} corresponds to it")
        order = self._order(own, module)
        if order and known.gguf == "olmo" and kind == "bias":
            raise RefusedError(self._where, f"{name}: llama.cpp does not permute the rows of this bias")
        turned = known.transposed and len(shape) == 2 and layer_of(own) is not None
        rows = shape[-1] if turned or known.is_across(module) else shape[0] if shape else 1
        if not names.divides(order, rows):
            raise RefusedError(self._where, f"{name}: {rows} rows do not match {order} heads")
        height = math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)
        if target.endswith(("conv1d.weight", "shortconv.conv.weight")):  # (channels, 1, width)
            shape = (height, shape[-1])
        picks = names.permuted(np.arange(rows), order) if order else None
        if order and known.is_across(module):
            part = SourcePart(name, 0, height, columns=picks)
        else:
            part = SourcePart(name, 0, height, turned, picks)
        decay = own.endswith(".A_log")
        return Arranged(target, shape[::-1] if turned else shape, (part,), known.shift(own), decay)

    def _order(self, own: str, module: str) -> names.Order:
        """Return the order of the rows of a parameter, or of its columns."""
        inner = in_layer(own)
        if inner in self._architecture.aside and inner and inner.startswith("linear_attn."):
            return self._architecture.tiles(inner, self._config.values, self._where)
        return self._architecture.order(module, self._config.values, self._where)

    def _target(self, own: str, module: str, kind: str) -> str | None:
        known, layer = self._architecture, layer_of(own)
        if layer is not None and layer >= self._layers:
            return None
        inner = own.removeprefix(f"{known.layers}.{layer}.")
        if layer is not None and inner in known.aside:
            return f"blk.{layer}.{known.aside[inner]}"
        stem = known.stem(module) if kind in ("weight", "bias") else None
        if stem and stem.endswith(".attn_norm") and f"{known.layers}.{layer}.ln_mlp.weight" in self._shapes:
            stem += "_2" if module.endswith(".ln_attn") else ""
        return f"{stem}.{kind}" if stem else None

    def _stacked(self, own: str, name: str, shape: Shape) -> Iterator[Arranged]:
        experts = self._architecture.experts
        stems = self._architecture.stems(own.removesuffix("_bias"))
        if experts is None or len(shape) != 2 + (not own.endswith("_bias")):
            raise RefusedError(self._where, f"{name} {shape}: not a stack of experts")
        count = len(stems)
        if own.endswith("_bias"):
            for number, stem in enumerate(stems):
                per = shape[1] // count
                take = slice(number, None, count) if experts.interleaved else slice(number * per, (number + 1) * per)
                yield Arranged(f"{stem}.bias", (shape[0], per), (SourcePart(name, 0, shape[0], columns=take),))
            return
        rows, columns = (shape[2], shape[1]) if experts.transposed else (shape[1], shape[2])
        per = rows // count
        for number, stem in enumerate(stems):
            picks = np.arange(number, rows, count) if experts.interleaved else np.arange(number * per, (number + 1) * per)
            parts = tuple(
                SourcePart(name, e * shape[1], shape[1], experts.transposed, picks if count > 1 else None)
                for e in range(shape[0])
            )
            yield Arranged(f"{stem}.weight", (shape[0], per, columns), parts)

    def _latent(self, own: str, name: str, shape: Shape) -> Iterator[Arranged]:
        """Yield the keys of every head, transposed because llama.cpp multiplies the query by them, and its values
        (`deepseek.py`).
        """
        heads, keys, values = (self._config.count(key) for key in ("num_key_value_heads", "qk_nope_head_dim", "v_head_dim"))
        per, prefix = keys + values, f"blk.{layer_of(own)}.attn_"
        if shape[0] != heads * per:
            raise RefusedError(self._where, f"{name}: {shape[0]} rows do not match {heads} heads of {per}")
        turned = tuple(SourcePart(name, head * per, keys, transposed=True) for head in range(heads))
        rest = tuple(SourcePart(name, head * per + keys, values) for head in range(heads))
        yield Arranged(f"{prefix}k_b.weight", (heads, shape[1], keys), turned)
        yield Arranged(f"{prefix}v_b.weight", (heads, values, shape[1]), rest)

    def stacks(self) -> Iterator[Arranged]:
        """Stack the experts that the checkpoint stores one by one."""
        for stem, found in self._experts.items():
            gap = next((number for number in range(len(found)) if number not in found), None)
            if gap is not None:
                what = f"the tensor of expert {gap} for llama.cpp's {stem} is missing, and others up to {max(found)} are there"
                raise RefusedError(self._where, what)
            shape = found[0][1]
            if other := next(((name, other) for name, other in found.values() if other != shape), None):
                raise RefusedError(self._where, f"{other[0]} {other[1]}: other experts have {shape}")
            parts = tuple(SourcePart(found[number][0], 0, shape[0]) for number in range(len(found)))
            yield Arranged(f"{stem}.weight", (len(found), *shape), parts)

    def numbers(self) -> dict[str, tuple[str, ...]]:
        """Return the tensors of one number each; RefusedError if a layer lacks one."""
        for key in self._architecture.numbers.values():
            found = self._numbers.get(key, {})
            if (layer := next((layer for layer in range(self._layers) if layer not in found), None)) is not None:
                raise RefusedError(self._where, f"layer {layer} has no tensor of one number for llama.cpp's {key}")
        return {key: tuple(found[layer] for layer in range(self._layers)) for key, found in self._numbers.items()}

    def check(self) -> None:
        """Raise RefusedError if the output layer of the model would be lost."""
        if (
            not self._architecture.head
            and "lm_head.weight" in self._shapes
            and self._config.get("tie_word_embeddings") is False
        ):
            what = f"an output layer of its own, but llama.cpp's {self._architecture.gguf} only uses the embedding table"
            raise RefusedError(self._where, what)


# ---- Factors of the rotary embedding


def rope_tensors(gguf: str, config: Config) -> tuple[tuple[Arranged, ...], dict[str, Value]]:
    """Return the tensors of rotary factors, computed from the config, and their keys."""
    if config.rope["rope_type"] == "llama3":
        return (_constant("rope_freqs.weight", _llama3(config)),), {}
    if gguf == "phi3" and config.rope.get("long_factor"):
        return _phi3(config)
    return (), {}


def _constant(name: str, numbers: np.ndarray) -> Arranged:
    return Arranged(name, numbers.shape, (), constant=numbers)


def _llama3(config: Config) -> np.ndarray:
    size = head_size(config)
    # In float32, as llama.cpp computes it in torch, whose powers are the nearest numbers more often than numpy's in float32.
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = np.float32(1.0) / np.power(config.rope_number("rope_theta"), exponents, dtype=np.float64).astype(np.float32)
    usual = {
        "factor": 16.0 if config.model_type == "exaone4" else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    factor, low, high, original = (config.rope_number(key, default) for key, default in usual.items())
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


def _phi3(config: Config) -> tuple[tuple[Arranged, ...], dict[str, Value]]:
    rope, half = config.rope, rotated(config) // 2
    given = {kind: rope.get(f"{kind}_factor") for kind in ("long", "short")}
    for numbers in given.values():
        if not isinstance(numbers, list) or len(numbers) != half or not all(isinstance(one, int | float) for one in numbers):
            what = f"long_factor and short_factor of the rotary embedding do not have {half} numbers each"
            raise RefusedError(config.where, f"config.json: {what}")
    factors = {kind: np.array(numbers, np.float32) for kind, numbers in given.items()}
    original = config.count("original_max_position_embeddings")
    scale = config.count("max_position_embeddings") / original
    attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
    tensors = tuple(_constant(f"rope_factors_{kind}.weight", found) for kind, found in factors.items())
    return tensors, {"rope.scaling.attn_factor": f32(attention)}
