"""An adapter that is there already, put into a model: to be trained on, or to be measured.

Its numbers become the factors, magnitudes, biases and rows as they are, in float32. What the layers here cannot hold is
refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from adapterhub.manifest.document import AdapterManifest, BaseInfo, Training
from adapterhub.train.config import LoRAConfig
from adapterhub.train.events import Given
from adapterhub.train.layers.dora import DoRALinear
from adapterhub.train.layers.embeddings import LoRAEmbedding, TokenRows, token_rows
from adapterhub.train.layers.lora import Frozen, lora_layers
from adapterhub.train.layers.targets import Sizes
from adapterhub_converters.adapter import Adapter, FactorPair, LowRank, factor_pairs, scaling
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert

from .base import Base

METHOD = "train"  # how a parent went into what was trained on from it, in adapter.json
# What a training of the same [lora] shows by itself, or leaves no trace of.
_SHAPE = ("r", "alpha", "rslora")
_PARTS = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "magnitude", "lora_bias": "bias"}  # a layer's names, a delta's
_FREE = ("targets", "exclude", "layers", "dropout", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True, eq=False)
class Factors:
    """An adapter whose factors a training or an evaluation starts from.

    Attributes:
        pairs: Its low-rank deltas by module.
        adapter: All of it.
        manifest: Its adapter.json, if it has one.
        where: Its name in messages.
    """

    pairs: Mapping[str, FactorPair]
    adapter: Adapter
    manifest: AdapterManifest | None
    where: str

    @property
    def training(self) -> Training | None:
        """The record of its own training."""
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
        """The rows of the table that it has."""
        return next((rows.ids for rows in self.adapter.rows.values()), ())

    @property
    def config(self) -> LoRAConfig:
        """One that makes a place for everything in it; ranks and scales are then the adapter's."""
        first: Any = next(iter(self.pairs.values()))
        return LoRAConfig(
            r=first.r, alpha=first.alpha, rslora=first.rslora, targets=tuple(self.pairs), dora=self.dora,
            lora_bias=self.lora_bias, trainable_token_indices=self.token_ids,
        )  # fmt: skip


def read(given: Given) -> Factors:
    """The adapter, if it is low-rank deltas that the layers here can hold, and rows of one table."""
    adapter = convert.read(given.path)
    try:
        pairs = factor_pairs(dataclasses.replace(adapter, copies={}))
    except RefusedError as error:
        raise RefusedError(f"{given.where}: {error.where}", error.what, error.hint) from error
    found = Factors(pairs, adapter, AdapterManifest.read(given.folder), given.where)
    for part in ("magnitude", "bias"):
        linear = [target for target, delta in pairs.items() if isinstance(delta, LowRank)]
        without = [target for target in linear if getattr(pairs[target], part) is None]
        if without and len(without) < len(linear):
            raise RefusedError(f"{given.where}: {without[0]}", f"has no {part}, and other layers have one")
    if found.dora and found.lora_bias:
        raise RefusedError(given.where, "has both magnitudes (DoRA) and biases, which peft computes with neither")
    if len(adapter.rows) > 1:
        raise RefusedError(given.where, f"replaces rows of several tables: {', '.join(sorted(adapter.rows))}")
    return found


def check_base(found: Factors, spec: BaseSpec, name: str | None) -> None:
    """RefusedError where the adapter's manifest names another base than this."""
    pinned = found.manifest.base if found.manifest else BaseInfo()
    if pinned.fingerprint and pinned.fingerprint != spec.fingerprint:
        what = f"is for a base of other shapes or names than {spec.where}"
        raise RefusedError(found.where, what, f"`adapterhub validate {found.where} --base {spec.where}` says which")
    if name and pinned.repo and pinned.repo != name:
        raise RefusedError(found.where, f"was trained on {pinned.repo}, not on {name}", "Name that base")


def other_weights(found: Factors, weights: list[dict[str, Any]]) -> list[str]:
    """A note where the base has the shapes but not the bytes that the adapter was trained on."""
    known = {item.digest for item in (found.training.weights if found.training else None) or ()}
    if known and known != {item["digest"] for item in weights}:
        return [f"the base's files are not the bytes that {found.where} was trained on"]
    return []


def check_config(found: Factors, config: LoRAConfig, targets: tuple[str, ...], where: str) -> None:
    """RefusedError unless the config describes an adapter of just these parts, shapes and scales."""
    for name in found.adapter.replaced:
        raise RefusedError(f"{found.where}: {name}", "is replaced as a whole, and a training here learns deltas and rows")
    missing, more = sorted(set(targets) - set(found.pairs)), sorted(set(found.pairs) - set(targets))
    if missing or more:
        name, what = (missing[0], "has no delta") if missing else (more[0], "has a delta that is no target here")
        raise RefusedError(f"{where}: [lora] targets", f"{found.where} {what}: {name}", "Name the targets that it has")
    sizes = Sizes(config, where)
    for target, delta in found.pairs.items():
        shape = {"r": sizes.rank(target), "alpha": sizes.alpha(target), "rslora": config.rslora}
        for key, value in shape.items():
            if getattr(delta, key) != value:
                what = f"{key} is {value} here, and {getattr(delta, key):g} in {found.where} at {target}"
                raise RefusedError(f"{where}: [lora] {key}", what, "Set the same: an adapter that goes on keeps its shape")
    parts = {"dora": found.dora, "lora_bias": found.lora_bias, "trainable_token_indices": found.token_ids}
    for key, have in parts.items():
        if getattr(config, key) != have:
            what = f"is {_said(getattr(config, key))} here, and {_said(have)} in {found.where}"
            raise RefusedError(f"{where}: [lora] {key}", what, "Set the same: an adapter that goes on keeps its shape")
    for item in dataclasses.fields(config):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if item.name not in (*_FREE, *_SHAPE, *parts) and getattr(config, item.name) != default:
            raise RefusedError(f"{where}: [lora] {item.name}", "isn't known of an adapter that goes on", "Leave it out")


def _said(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).lower()


def put(base: Base, found: Factors) -> None:
    """Have everything that is trained in the model begin as it is in the adapter; ranks and scales are the adapter's."""
    for path, layer in lora_layers(base.model):
        delta: Any = found.pairs[path]
        for name, part in _PARTS.items():
            array, own = getattr(delta, part, None), getattr(layer, name, None)
            if array is not None and own is not None:
                ranks = {"lora_A": own.ndim - 2, "lora_B": own.ndim - 1}.get(name)
                _check_shape(array.shape, own.shape, ranks, f"{found.where}: {path}", name)
                setattr(layer, name, _parameter(array, own))
        layer.scaling = scaling(delta.alpha, delta.r, rslora=delta.rslora)
    rows = token_rows(base.model)
    for path, replaced in found.adapter.rows.items():
        if rows is None or base.model.get_submodule(path) is not rows:
            raise RefusedError(f"{found.where}: {path}", "has replaced rows, and is not the model's input table")
        _check_shape(replaced.values.shape, rows.rows.shape, None, f"{found.where}: {path}", "rows")
        rows.rows = _parameter(replaced.values, rows.rows)
    for name, array in found.adapter.copies.items():
        _check_copy(base, name, array, found.where)


def _check_shape(have: tuple[int, ...], want: tuple[int, ...], free: int | None, where: str, name: str) -> None:
    """RefusedError where a size other than the rank, which is dimension `free`, isn't the layer's."""
    for at, (own, size) in enumerate(zip(have, want, strict=True)):
        if own != size and at != free:
            raise RefusedError(where, f"{name} is {tuple(have)}, and the base's layer has {size} there")


def _parameter(array: np.ndarray, before: Any) -> Any:
    numbers = torch.from_numpy(np.array(array, np.float32, order="C")).to(before.device)
    return nn.Parameter(numbers, requires_grad=before.requires_grad)


def _check_copy(base: Base, name: str, array: np.ndarray, where: str) -> None:
    """peft saves the table beside its delta: it has to be the base's."""
    path, _, leaf = name.rpartition(".")
    own = getattr(base.model.get_submodule(path), leaf)
    copy = torch.from_numpy(np.array(array, np.float32, order="C")).to(own)
    if copy.shape != own.shape or not torch.equal(copy, own):
        raise RefusedError(f"{where}: {name}", "a copy of the base's weight rides along, and it isn't this base's")


@contextlib.contextmanager
def replaced(base: Base, found: Factors) -> Iterator[None]:
    """Within the block the parameters that the adapter replaces are its own: modules that peft saved as a whole.

    One that was tied to another is by itself then, as in peft: the other stays the base's.
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for name, array in found.adapter.replaced.items():
            path, _, leaf = name.rpartition(".")
            module, key = _holder(base.model, path, leaf, f"{found.where}: {name}")
            own = getattr(module, key)
            if tuple(own.shape) != array.shape:
                what = f"is replaced with one of shape {array.shape}, and the base's is {tuple(own.shape)}"
                raise RefusedError(f"{found.where}: {name}", what)
            numbers = torch.from_numpy(np.array(array, np.float32, order="C")).to(base.head)
            before.append((module, key, own))
            setattr(module, key, nn.Parameter(numbers, requires_grad=False) if isinstance(own, nn.Parameter) else numbers)
        yield
    finally:
        for module, key, own in reversed(before):
            setattr(module, key, own)


def _holder(model: Any, path: str, leaf: str, where: str) -> tuple[Any, str]:
    """The module that a parameter is in, and what it calls it."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise RefusedError(where, "is replaced by the adapter, and the base has no such module") from error
    if isinstance(module, LoRAEmbedding | TokenRows):
        raise RefusedError(where, "is replaced as a whole and has a delta or rows as well")
    key = "base" if isinstance(module, Frozen) and leaf == "weight" else leaf
    turned = key == "base" and module.transposed
    if turned or getattr(module, key, None) is None:
        raise RefusedError(where, "is replaced by the adapter, and cannot be replaced in this base")
    return module, key


def take_out(base: Base) -> None:
    """Have every delta and row count nothing: what is left is the base."""
    with torch.no_grad():
        for _, layer in lora_layers(base.model):
            layer.scaling = 0.0
            if isinstance(layer, DoRALinear):
                layer.magnitude.copy_(layer.squares.sqrt())
        rows = token_rows(base.model)
        if rows is not None:
            rows.rows.copy_(rows.initial)
            rows.write()
