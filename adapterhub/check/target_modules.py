"""Paths of modules: which layer of which stack they are in, and whether a config names them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from adapterhub_converters.formats import peft
from adapterhub_converters.patterns import fullmatch

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")
OUTPUTS = ("lm_head", "embed_out", "output")
_LAYER = re.compile(r"^(?:.*?\.)??(\d+)\.")


def last_of(target: str) -> str:
    """The last name of a module's path."""
    return target.rpartition(".")[2]


def layer_of(target: str) -> int | None:
    """The index of the layer a module is in: the first component that is a number."""
    found = _LAYER.match(target)
    return int(found.group(1)) if found else None


def stack_of(target: str) -> str:
    """The list of layers a module is in, `model.layers`; empty outside of them."""
    found = _LAYER.match(target)
    return target[: found.start(1)] if found else ""


def depths_of(names: Iterable[str]) -> dict[str, int]:
    """How many layers each list of them has: a model may have several, of an encoder, a decoder, a vision tower."""
    depths: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            stack = name[: found.start(1)]
            depths[stack] = max(depths.get(stack, 0), int(found.group(1)) + 1)
    return depths


def matches(option: object, names: Collection[str], module: str, layers: Collection[float] | None) -> bool:
    """Whether peft would wrap a module for `target_modules` or `exclude_modules` (`option`, its `names` if it is a list).

    `names` and `layers` should be sets where there may be many.
    """
    if isinstance(option, str):
        if option == "all-linear":
            return last_of(module) not in (*EMBEDDINGS, *OUTPUTS)
        return fullmatch(option, module, f"{peft.CONFIG}: target_modules")
    if module in names:
        return True
    if not any(module[at + 1 :] in names for at, char in enumerate(module) if char == "."):
        return False
    return layers is None or layer_of(module) in layers


def chosen_layers(config: Mapping[str, Any]) -> frozenset[float] | None:
    """`layers_to_transform`; None where that is every layer."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    return frozenset(layer for layer in (layers if isinstance(layers, list) else [layers]) if isinstance(layer, int | float))


def within(names: Collection[str], module: str) -> bool:
    """Whether one of `names` is a module, or part of its path: `lm_head` of `model.lm_head.dense`."""
    parts = module.split(".")
    if len(names) <= 2 * len(parts):
        return any(f".{name}." in f".{module}." for name in names)
    return any(".".join(parts[start:end]) in names for end in range(1, len(parts) + 1) for start in range(end))
