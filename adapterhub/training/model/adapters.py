"""Adapters into and out of a model: one to train further or to evaluate, and the one that was trained.

An existing adapter's factors, magnitudes, biases and rows are copied unchanged, in float32; anything that the layers here
cannot represent is refused by name. The trained one is returned in the canonical form that every format is written from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from adapterhub.manifest.document import AdapterManifest, BaseInfo, Training
from adapterhub.training.config import LoRAConfig, TrainConfig
from adapterhub.training.events import InitialAdapter
from adapterhub.training.layers.embeddings import LoRAEmbedding, TokenRows, token_rows
from adapterhub.training.layers.experts import LoRAStack
from adapterhub.training.layers.lora import Frozen, lora_layers
from adapterhub.training.layers.targets import Sizes
from adapterhub.training.layers.variants import DoRALinear, difference
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

from .base import Base
from .weights import as_numpy

METHOD = "train"  # of a parent in adapter.json
_PARTS = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "magnitude", "lora_bias": "bias"}  # a layer's names, a delta's
# Keys of [lora] that are compared with every delta, and those that may differ from the training of the adapter.
_SHAPE = ("r", "alpha", "rslora")
_FREE = ("targets", "exclude", "layers", "dropout", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True, eq=False)
class Factors:
    """The numbers of an existing adapter.

    Attributes:
        pairs: Its low-rank deltas by module.
        adapter: The whole adapter.
        manifest: Its adapter.json, if it has one.
        where: The adapter, in messages.
    """

    pairs: Mapping[str, FactorPair]
    adapter: Adapter
    manifest: AdapterManifest | None
    where: str

    @property
    def training(self) -> Training | None:
        """The record of its training."""
        return self.manifest.training if self.manifest else None

    @property
    def dora(self) -> bool:
        """Whether its linear layers have magnitudes."""
        return any(getattr(delta, "magnitude", None) is not None for delta in self.pairs.values())

    @property
    def lora_bias(self) -> bool:
        """Whether its linear layers have biases of their own."""
        return any(getattr(delta, "bias", None) is not None for delta in self.pairs.values())

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of its table rows."""
        return next((rows.ids for rows in self.adapter.rows.values()), ())

    @property
    def config(self) -> LoRAConfig:
        """A config that gives a model layers for everything in it; `put` then sets ranks and scales."""
        first: Any = next(iter(self.pairs.values()))
        return LoRAConfig(
            r=first.r, alpha=first.alpha, rslora=first.rslora, targets=tuple(self.pairs), dora=self.dora,
            lora_bias=self.lora_bias, trainable_token_indices=self.token_ids,
        )  # fmt: skip


def read(initial: InitialAdapter, spec: BaseSpec) -> Factors:
    """Read an adapter for a base, whose experts are in stacks in memory.

    Raises:
        RefusedError: It is not low-rank deltas of one kind and rows of at most one table.
    """
    adapter = peft.stacked(convert.read(initial.path, base=spec), spec)
    try:
        pairs = factor_pairs(dataclasses.replace(adapter, copies={}))
    except RefusedError as error:
        raise RefusedError(f"{initial.where}: {error.where}", error.what, error.hint, code=error.code) from error
    found = Factors(pairs, adapter, AdapterManifest.read(initial.folder), initial.where)
    for part in ("magnitude", "bias"):
        linear = [target for target, delta in pairs.items() if isinstance(delta, LowRank)]
        without = [target for target in linear if getattr(pairs[target], part) is None]
        if without and len(without) < len(linear):
            raise RefusedError(f"{initial.where}: {without[0]}", f"has no {part}, but other layers have one")
    if found.dora and found.lora_bias:
        raise RefusedError(initial.where, "has both magnitudes (DoRA) and biases, which peft does not support either")
    if len(adapter.rows) > 1:
        raise RefusedError(initial.where, f"replaces rows of several tables: {', '.join(sorted(adapter.rows))}")
    return found


def check_base(found: Factors, spec: BaseSpec, name: str | None) -> None:
    """Refuse an adapter whose adapter.json names another base.

    Raises:
        RefusedError: With the code `other-base-shapes` and the fields `adapter` and `base`, where names or shapes differ.
    """
    recorded = found.manifest.base if found.manifest else BaseInfo()
    if recorded.fingerprint and recorded.fingerprint != spec.fingerprint:
        what = f"is for a base with other tensor names or shapes than {spec.where}"
        raise RefusedError(found.where, what, code="other-base-shapes", adapter=found.where, base=spec.where)
    if name and recorded.repo and recorded.repo != name:
        raise RefusedError(found.where, f"was trained on {recorded.repo}, not on {name}", "Set that base")


def other_weights(found: Factors, weights: list[dict[str, Any]]) -> list[str]:
    """Return a note where the base has the shapes but not the bytes that the adapter was trained on."""
    recorded = {item.digest for item in (found.training.weights if found.training else None) or ()}
    if recorded and recorded != {item["digest"] for item in weights}:
        return [f"the base's weights differ from those that {found.where} was trained on"]
    return []


def check_config(found: Factors, config: LoRAConfig, targets: tuple[str, ...], where: str) -> None:
    """Refuse a config that does not describe an adapter of exactly these parts, shapes and scales."""
    same = "Set the same: an adapter keeps its shape when it is trained further"
    for name in found.adapter.replaced:
        raise RefusedError(f"{found.where}: {name}", "is replaced as a whole, but only deltas and rows can be trained")
    missing, more = sorted(set(targets) - set(found.pairs)), sorted(set(found.pairs) - set(targets))
    if missing or more:
        name, what = (missing[0], "has no delta") if missing else (more[0], "has a delta that is not a target")
        raise RefusedError(f"{where}: [lora] targets", f"{found.where} {what}: {name}", "Set the targets that it has")
    sizes = Sizes(config, where)
    for target, delta in found.pairs.items():
        shape = {"r": sizes.rank(target), "alpha": sizes.alpha(target), "rslora": config.rslora}
        for key, value in shape.items():
            if getattr(delta, key) != value:
                what = f"is {_toml(value)}, but {_toml(getattr(delta, key))} in {found.where} at {target}"
                raise RefusedError(f"{where}: [lora] {key}", what, same)
    parts = {"dora": found.dora, "lora_bias": found.lora_bias, "trainable_token_indices": found.token_ids}
    for key, have in parts.items():
        if getattr(config, key) != have:
            what = f"is {_toml(getattr(config, key))}, but {_toml(have)} in {found.where}"
            raise RefusedError(f"{where}: [lora] {key}", what, same)
    for item in dataclasses.fields(config):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if item.name not in (*_FREE, *_SHAPE, *parts) and getattr(config, item.name) != default:
            raise RefusedError(
                f"{where}: [lora] {item.name}", "cannot be used when an adapter is trained further", "Leave it out"
            )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}"


def put(base: Base, found: Factors) -> None:
    """Copy the adapter into everything that is trained in the model; ranks and scales are the adapter's."""
    for path, layer in lora_layers(base.model):
        delta: Any = found.pairs[path]
        for name, part in _PARTS.items():
            array, own = getattr(delta, part, None), getattr(layer, name, None)
            if array is not None and own is not None:
                rank_dimension = {"lora_A": own.ndim - 2, "lora_B": own.ndim - 1}.get(name)
                _check_shape(array.shape, own.shape, rank_dimension, f"{found.where}: {path}", name)
                setattr(layer, name, _parameter(array, own))
        layer.scaling = scaling(delta.alpha, delta.r, rslora=delta.rslora)
    rows = token_rows(base.model)
    for path, replaced in found.adapter.rows.items():
        if rows is None or base.model.get_submodule(path) is not rows:
            raise RefusedError(f"{found.where}: {path}", "has replaced rows, but is not the model's input table")
        _check_shape(replaced.values.shape, rows.rows.shape, None, f"{found.where}: {path}", "rows")
        rows.rows = _parameter(replaced.values, rows.rows)
    for name, array in found.adapter.copies.items():
        check_copy(base, name, array, found.where)


def _check_shape(have: tuple[int, ...], want: tuple[int, ...], free: int | None, where: str, name: str) -> None:
    """Refuse a shape that differs from the layer's in any dimension but `free`, the rank."""
    for at, (own, size) in enumerate(zip(have, want, strict=True)):
        if own != size and at != free:
            raise RefusedError(where, f"{name} has shape {tuple(have)}, but dimension {at} of the base's layer is {size}")


def _parameter(array: np.ndarray, before: Any) -> Any:
    numbers = torch.from_numpy(np.array(array, np.float32, order="C")).to(before.device)
    return nn.Parameter(numbers, requires_grad=before.requires_grad)


def check_copy(base: Base, name: str, array: np.ndarray, where: str) -> None:
    """Refuse a copy of the table, which peft saves along with its delta, that is not the base's."""
    path, _, leaf = name.rpartition(".")
    own = getattr(base.model.get_submodule(path), leaf)
    copy = torch.from_numpy(np.array(array, np.float32, order="C")).to(own)
    if copy.shape != own.shape or not torch.equal(copy, own):
        raise RefusedError(f"{where}: {name}", "is a copy of a base weight, but not of this base's")


@contextlib.contextmanager
def replaced(base: Base, found: Factors) -> Iterator[None]:
    """Use the adapter's own parameters, of modules that peft saved as a whole, within the block.

    One that was tied to another is separate meanwhile, as in peft: the other keeps the base's values.
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for name, array in found.adapter.replaced.items():
            path, _, leaf = name.rpartition(".")
            module, key = _holder(base.model, path, leaf, f"{found.where}: {name}")
            own = getattr(module, key)
            if tuple(own.shape) != array.shape:
                what = f"has shape {array.shape}, but the base's has {tuple(own.shape)}"
                raise RefusedError(f"{found.where}: {name}", what)
            numbers = torch.from_numpy(np.array(array, np.float32, order="C")).to(base.head)
            before.append((module, key, own))
            setattr(module, key, nn.Parameter(numbers, requires_grad=False) if isinstance(own, nn.Parameter) else numbers)
        yield
    finally:
        for module, key, own in reversed(before):
            setattr(module, key, own)


def _holder(model: nn.Module, path: str, leaf: str, where: str) -> tuple[Any, str]:
    """Return the module that has a parameter, and the attribute."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise RefusedError(where, "is replaced by the adapter, but the base has no such module") from error
    if isinstance(module, LoRAEmbedding | TokenRows):
        raise RefusedError(where, "is replaced as a whole and has a delta or rows as well")
    key = "base" if isinstance(module, Frozen) and leaf == "weight" else leaf
    transposed = key == "base" and module.transposed
    if transposed or getattr(module, key, None) is None:
        raise RefusedError(where, "is replaced by the adapter, which is not supported in this base")
    return module, key


def remove(base: Base) -> None:
    """Disable every delta and row: what is left is the base."""
    with torch.no_grad():
        for _, layer in lora_layers(base.model):
            layer.scaling = 0.0
            if isinstance(layer, DoRALinear):
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
    if layer.initial is not None:
        A, B = difference(A, B, layer.initial)
        alpha *= math.sqrt(2) if layer.rslora else 2  # the same scaling at twice the rank
    magnitude = as_numpy(layer.magnitude) if hasattr(layer, "magnitude") else None
    bias = None if layer.lora_bias is None else as_numpy(layer.lora_bias)
    return LowRank(
        as_numpy(A), as_numpy(B), alpha, layer.rslora, magnitude=magnitude, bias=bias, transposed_base=layer.transposed
    )
