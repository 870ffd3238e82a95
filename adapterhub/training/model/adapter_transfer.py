"""Adapters into and out of a model: one to train further or to evaluate, and the one that was trained.

An existing adapter's factors, magnitudes, biases and rows are copied unchanged, in float32; anything that the layers here
cannot represent is refused by name. The trained adapter is returned in the canonical form that every format is written from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from adapterhub.manifest.document import AdapterManifest, BaseInfo, Training
from adapterhub.training.events import InitialAdapter
from adapterhub.training.layers.embeddings import LoRAEmbedding, TokenRows, token_rows
from adapterhub.training.layers.expert_stacks import LoRAStack
from adapterhub.training.layers.lora import Frozen, lora_layers
from adapterhub.training.layers.targets import Sizes
from adapterhub.training.layers.variants import DoRALinear, difference
from adapterhub.training.train_config import LoRAConfig, TrainConfig
from adapterhub_converters.adapter import (
    Adapter,
    Delta,
    FactorPair,
    LowRank,
    LowRankEmbedding,
    Meta,
    Rows,
    StackedLowRank,
    factor_pairs,
    scaling,
)
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.lazy_dataclass import dataclass

from .base_model import Base
from .base_tensors import as_numpy

METHOD = "train"  # the method of a parent in adapter.json
# The names of parameters in a layer, and in a delta.
_FIELDS_OF_DELTA = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "magnitude", "lora_bias": "bias"}
# Keys of [lora] that are compared with every delta, and those that may differ from the training of the adapter.
_SHAPE_KEYS = ("r", "alpha", "rslora")
_FREE_KEYS = ("targets", "exclude", "layers", "dropout", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True, eq=False)
class Factors:
    """The numbers of an existing adapter.

    Attributes:
        pairs: Its low-rank deltas by module.
        adapter: The complete adapter.
        manifest: Its adapter.json, if it has one.
        location: The adapter, in messages.
    """

    pairs: Mapping[str, FactorPair]
    adapter: Adapter
    manifest: AdapterManifest | None
    location: str

    @property
    def training(self) -> Training | None:
        """The record of the adapter's training."""
        return self.manifest.training if self.manifest else None

    @property
    def dora(self) -> bool:
        """Whether the adapter's linear layers have magnitudes."""
        return any(getattr(delta, "magnitude", None) is not None for delta in self.pairs.values())

    @property
    def lora_bias(self) -> bool:
        """Whether the deltas of the adapter's linear layers have biases."""
        return any(getattr(delta, "bias", None) is not None for delta in self.pairs.values())

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of the table rows in the adapter."""
        return next((rows.ids for rows in self.adapter.rows.values()), ())

    @property
    def config(self) -> LoRAConfig:
        """A config that gives a model layers for everything in the adapter; `copy_into_model` then sets ranks and scales."""
        first: Any = next(iter(self.pairs.values()))
        return LoRAConfig(
            r=first.r, alpha=first.alpha, rslora=first.rslora, targets=tuple(self.pairs), dora=self.dora,
            lora_bias=self.lora_bias, trainable_token_indices=self.token_ids,
        )  # fmt: skip


def read(initial: InitialAdapter, spec: BaseSpec) -> Factors:
    """Read an adapter for a base, whose experts are stacked in memory.

    Raises:
        RefusedError: It consists of more than low-rank deltas of one kind and rows of one table.
    """
    # Experts that a file has one by one are stacked, as the model in memory has them.
    adapter = peft.stack_experts(convert.read(initial.path, base=spec), spec)
    try:
        pairs = factor_pairs(dataclasses.replace(adapter, copies={}))
    except RefusedError as error:
        raise RefusedError(f"{initial.location}: {error.where}", error.what, error.hint, code=error.code) from error
    factors = Factors(pairs, adapter, AdapterManifest.read(initial.folder), initial.location)
    for field in ("magnitude", "bias"):
        linear_targets = [target for target, delta in pairs.items() if isinstance(delta, LowRank)]
        without = [target for target in linear_targets if getattr(pairs[target], field) is None]
        if without and len(without) < len(linear_targets):
            raise RefusedError(f"{initial.location}: {without[0]}", f"has no {field}, but other layers have one")
    if factors.dora and factors.lora_bias:
        raise RefusedError(initial.location, "has both magnitudes (DoRA) and biases, which peft does not support either")
    if len(adapter.rows) > 1:
        raise RefusedError(initial.location, f"replaces rows of several tables: {', '.join(sorted(adapter.rows))}")
    return factors


def check_base(factors: Factors, spec: BaseSpec, name: str | None) -> None:
    """Refuse an adapter whose adapter.json names another base.

    Raises:
        RefusedError: With the code `other-base-shapes` and the fields `adapter` and `base` if names or shapes differ.
    """
    recorded = factors.manifest.base if factors.manifest else BaseInfo()
    if recorded.fingerprint and not spec.has_fingerprint(recorded.fingerprint):
        problem = f"is for a base with other tensor names or shapes than {spec.source}"
        raise RefusedError(factors.location, problem, code="other-base-shapes", adapter=factors.location, base=spec.source)
    if name and recorded.repo and recorded.repo != name:
        raise RefusedError(factors.location, f"was trained on {recorded.repo}, not on {name}", "Set that base")


def other_weights(factors: Factors, weights: list[dict[str, Any]]) -> list[str]:
    """Return a note if the base has the same shapes as the one that the adapter was trained on, but not the same bytes."""
    recorded = {item.digest for item in (factors.training.weights if factors.training else None) or ()}
    if recorded and recorded != {item["digest"] for item in weights}:
        return [f"the base's weights differ from those that {factors.location} was trained on"]
    return []


def check_config(factors: Factors, config: LoRAConfig, targets: tuple[str, ...], location: str) -> None:
    """Refuse a config that does not describe an adapter with exactly these parts, shapes and scales."""
    hint = "Set the same: an adapter keeps its shape when it is trained further"
    for name in factors.adapter.replaced:
        raise RefusedError(f"{factors.location}: {name}", "is replaced as a whole, but only deltas and rows can be trained")
    missing, extra = sorted(set(targets) - set(factors.pairs)), sorted(set(factors.pairs) - set(targets))
    if missing or extra:
        name, problem = (missing[0], "has no delta") if missing else (extra[0], "has a delta that is not a target")
        raise RefusedError(
            f"{location}: [lora] targets", f"{factors.location} {problem}: {name}", "Set the targets that it has"
        )
    sizes = Sizes(config, location)
    for target, delta in factors.pairs.items():
        settings = {"r": sizes.rank(target), "alpha": sizes.alpha(target), "rslora": config.rslora}
        for key, value in settings.items():
            if getattr(delta, key) != value:
                problem = f"is {_toml(value)}, but {_toml(getattr(delta, key))} in {factors.location} at {target}"
                raise RefusedError(f"{location}: [lora] {key}", problem, hint)
    adapter_parts = {"dora": factors.dora, "lora_bias": factors.lora_bias, "trainable_token_indices": factors.token_ids}
    for key, adapter_value in adapter_parts.items():
        if getattr(config, key) != adapter_value:
            problem = f"is {_toml(getattr(config, key))}, but {_toml(adapter_value)} in {factors.location}"
            raise RefusedError(f"{location}: [lora] {key}", problem, hint)
    for item in dataclasses.fields(config):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if item.name not in (*_FREE_KEYS, *_SHAPE_KEYS, *adapter_parts) and getattr(config, item.name) != default:
            raise RefusedError(
                f"{location}: [lora] {item.name}", "cannot be used when an adapter is trained further", "Leave it out"
            )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}"


def copy_into_model(base: Base, factors: Factors) -> None:
    """Copy the adapter into all trained parameters of the model; ranks and scales are the adapter's."""
    for path, layer in lora_layers(base.model):
        delta: Any = factors.pairs[path]
        for name, field in _FIELDS_OF_DELTA.items():
            array, parameter = getattr(delta, field, None), getattr(layer, name, None)
            if array is not None and parameter is not None:
                # The rank may differ from that of the layer; all other dimensions have to agree.
                rank_dimension = {"lora_A": parameter.ndim - 2, "lora_B": parameter.ndim - 1}.get(name)
                _check_shape(array.shape, parameter.shape, rank_dimension, f"{factors.location}: {path}", name)
                setattr(layer, name, _parameter(array, parameter))
        layer.scaling = scaling(delta.alpha, delta.r, rslora=delta.rslora)
    rows = token_rows(base.model)
    for path, replaced in factors.adapter.rows.items():
        if rows is None or base.model.get_submodule(path) is not rows:
            raise RefusedError(f"{factors.location}: {path}", "has replaced rows, but is not the model's input table")
        _check_shape(replaced.values.shape, rows.rows.shape, None, f"{factors.location}: {path}", "rows")
        rows.rows = _parameter(replaced.values, rows.rows)
    for name, array in factors.adapter.copies.items():
        check_copy(base, name, array, factors.location)


def _check_shape(
    shape: tuple[int, ...], expected_shape: tuple[int, ...], free_dimension: int | None, location: str, name: str
) -> None:
    """Refuse a shape that differs from the layer's in any dimension but `free_dimension`, the rank."""
    for dimension, (size, expected_size) in enumerate(zip(shape, expected_shape, strict=True)):
        if size != expected_size and dimension != free_dimension:
            raise RefusedError(
                location, f"{name} has shape {tuple(shape)}, but dimension {dimension} of the base's layer is {expected_size}"
            )


def _parameter(array: np.ndarray, template: Any) -> Any:
    tensor = torch.from_numpy(np.array(array, np.float32, order="C")).to(template.device)
    return nn.Parameter(tensor, requires_grad=template.requires_grad)


def check_copy(base: Base, name: str, array: np.ndarray, location: str) -> None:
    """Refuse a copy of the embedding table, which peft saves along with its delta, if it differs from the base's."""
    path, _, leaf = name.rpartition(".")
    base_weight = getattr(base.model.get_submodule(path), leaf)
    copy = torch.from_numpy(np.array(array, np.float32, order="C")).to(base_weight)
    if copy.shape != base_weight.shape or not torch.equal(copy, base_weight):
        raise RefusedError(f"{location}: {name}", "is a copy of a base weight, but not of this base's")


@contextlib.contextmanager
def with_replaced_modules(base: Base, factors: Factors) -> Iterator[None]:
    """Within the block, use the adapter's parameters for modules that peft saved in full.

    A parameter that was tied to another is separate meanwhile, as in peft: the other keeps the base's values.
    """
    originals: list[tuple[Any, str, Any]] = []
    try:
        for name, array in factors.adapter.replaced.items():
            path, _, leaf = name.rpartition(".")
            module, key = _module_and_attribute(base.model, path, leaf, f"{factors.location}: {name}")
            original = getattr(module, key)
            if tuple(original.shape) != array.shape:
                problem = f"has shape {array.shape}, but the base's has {tuple(original.shape)}"
                raise RefusedError(f"{factors.location}: {name}", problem)
            tensor = torch.from_numpy(np.array(array, np.float32, order="C")).to(base.head)
            originals.append((module, key, original))
            setattr(module, key, nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor)
        yield
    finally:
        # In reverse, so that a parameter that was replaced twice gets its first value back.
        for module, key, original in reversed(originals):
            setattr(module, key, original)


def _module_and_attribute(model: nn.Module, path: str, leaf: str, location: str) -> tuple[Any, str]:
    """Return the module that has a parameter, and the name of the attribute."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise RefusedError(location, "is replaced by the adapter, but the base has no such module") from error
    if isinstance(module, LoRAEmbedding | TokenRows):
        raise RefusedError(location, "is replaced as a whole and has a delta or rows as well")
    key = "base" if isinstance(module, Frozen) and leaf == "weight" else leaf
    transposed = key == "base" and module.transposed
    if transposed or getattr(module, key, None) is None:
        raise RefusedError(location, "is replaced by the adapter, which is not supported in this base")
    return module, key


def remove(base: Base) -> None:
    """Disable every delta and trained row, so that only the base is left."""
    with torch.no_grad():
        for _, layer in lora_layers(base.model):
            layer.scaling = 0.0
            if isinstance(layer, DoRALinear):
                # Without a delta, the magnitudes are the norms of the base's rows.
                layer.magnitude.copy_(layer.squares.sqrt())
        rows = token_rows(base.model)
        if rows is not None:
            rows.rows.copy_(rows.initial)
            rows.write()


# ---- The trained adapter


def trained_adapter(config: TrainConfig, base: Base) -> Adapter:
    """Return the adapter that `base` carries, in float32."""
    deltas = {path: _delta(layer) for path, layer in lora_layers(base.model)}
    rows = {}
    table = token_rows(base.model)
    if table is not None:
        path = next(path for path, module in base.model.named_modules() if module is table)
        rows[path] = Rows(table.ids, as_numpy(table.rows))
    meta = Meta(config.base.name, config.base.revision, "CAUSAL_LM", dropout=config.lora.dropout)
    return Adapter(deltas, rows=rows, meta=meta)


def _delta(layer: Any) -> Delta:
    if isinstance(layer, LoRAEmbedding):
        return LowRankEmbedding(as_numpy(layer.lora_A), as_numpy(layer.lora_B), layer.alpha, layer.rslora)
    if isinstance(layer, LoRAStack):
        return StackedLowRank(as_numpy(layer.lora_A), as_numpy(layer.lora_B), layer.alpha, layer.rslora, layer.transposed)
    A, B, alpha = layer.lora_A, layer.lora_B, layer.alpha
    # PiSSA changes the base; as a plain LoRA of twice the rank, the adapter fits the unchanged one (`variants`).
    if layer.initial is not None:
        A, B = difference(A, B, layer.initial)
        alpha *= math.sqrt(2) if layer.rslora else 2  # keeps the scaling at twice the rank
    magnitude = as_numpy(layer.magnitude) if hasattr(layer, "magnitude") else None
    bias = None if layer.lora_bias is None else as_numpy(layer.lora_bias)
    return LowRank(
        as_numpy(A), as_numpy(B), alpha, layer.rslora, magnitude=magnitude, bias=bias, transposed_base=layer.transposed
    )
