"""An adapter that is there already, put into a model: to be trained on, or to be measured.

Its numbers become the factors as they are, in float32. What the layers here cannot hold is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from adapterhub import facts
from adapterhub.train.config import LoRAConfig
from adapterhub.train.events import Given
from adapterhub.train.layers.lora import lora_layers
from adapterhub_converters import formats
from adapterhub_converters.adapter import LowRank, plain_pairs, scaling
from adapterhub_converters.base import BaseSpec
from adapterhub_converters.errors import RefusedError

from .base import Base

METHOD = "train"  # how a parent went into what was trained on from it, in adapter.json


@dataclass(frozen=True, eq=False)
class Factors:
    """The low-rank deltas of an adapter by module, and what its adapter.json says; `where` stands in messages."""

    pairs: Mapping[str, LowRank]
    facts: Mapping[str, Any]
    where: str


def read(given: Given) -> Factors:
    """The adapter, if it is nothing but plain low-rank deltas on linear layers."""
    adapter = formats.read(given.path)
    pairs: dict[str, LowRank] = {}
    for target, delta in plain_pairs(adapter).items():
        special = not isinstance(delta, LowRank) or delta.magnitude is not None or delta.bias is not None
        if special or not isinstance(delta, LowRank):
            raise RefusedError(
                f"{given.where}: {target}", "is no plain low-rank delta of a linear layer, which alone is known here"
            )
        pairs[target] = delta
    for name in (*adapter.replaced, *adapter.rows):
        raise RefusedError(f"{given.where}: {name}", "is replaced by the adapter, which isn't known here yet")
    return Factors(pairs, facts.read_facts(given.folder) or {}, given.where)


def check_base(found: Factors, spec: BaseSpec, name: str | None) -> None:
    """RefusedError where the adapter's facts name another base than this."""
    said = found.facts.get("base") or {}
    if said.get("fingerprint") and said["fingerprint"] != spec.fingerprint:
        what = f"is for a base of other shapes or names than {spec.where}"
        raise RefusedError(found.where, what, f"`adapterhub validate {found.where} --base {spec.where}` says which")
    if name and said.get("repo") and said["repo"] != name:
        raise RefusedError(found.where, f"was trained on {said['repo']}, not on {name}", "Name that base")


def other_weights(found: Factors, weights: list[dict[str, Any]]) -> list[str]:
    """A note where the base has the shapes but not the bytes that the adapter was trained on."""
    known = {item["digest"] for item in (found.facts.get("training") or {}).get("weights") or ()}
    if known and known != {item["digest"] for item in weights}:
        return [f"the base's files are not the bytes that {found.where} was trained on"]
    return []


def check_config(found: Factors, config: LoRAConfig, targets: tuple[str, ...], where: str) -> None:
    """RefusedError unless the config describes an adapter of just these shapes and scales."""
    wanted = {"r": config.r, "alpha": config.alpha, "rslora": config.rslora}
    for target, delta in found.pairs.items():
        for key, value in wanted.items():
            if getattr(delta, key) != value:
                what = f"{key} is {value} here, and {getattr(delta, key):g} in {found.where} at {target}"
                raise RefusedError(f"{where}: [lora] {key}", what, "Set the same: an adapter that goes on keeps its shape")
    for item in dataclasses.fields(config):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if item.name not in (*wanted, "targets") and getattr(config, item.name) != default:
            raise RefusedError(f"{where}: [lora] {item.name}", "isn't known of an adapter that goes on", "Leave it out")
    missing, more = sorted(set(targets) - set(found.pairs)), sorted(set(found.pairs) - set(targets))
    if missing or more:
        name, what = (missing[0], "has no delta") if missing else (more[0], "has a delta that is no target here")
        raise RefusedError(f"{where}: [lora] targets", f"{found.where} {what}: {name}", "Name the targets that it has")


def put(base: Base, found: Factors) -> None:
    """Have every LoRA layer of the model begin with the adapter's factors; ranks and scales are the adapter's."""
    for path, layer in lora_layers(base.model):
        delta = found.pairs[path]
        for name in ("lora_A", "lora_B"):
            array, side = getattr(delta, name), 1 if name == "lora_A" else 0
            size = getattr(layer, name).shape[side]
            if array.shape[side] != size:
                raise RefusedError(f"{found.where}: {path}", f"{name} is {array.shape}, and the base's layer has {size} there")
            numbers = torch.from_numpy(np.array(array, np.float32, order="C")).to(getattr(layer, name).device)
            setattr(layer, name, nn.Parameter(numbers, requires_grad=getattr(layer, name).requires_grad))
        layer.scaling = scaling(delta.alpha, delta.r, rslora=delta.rslora)
