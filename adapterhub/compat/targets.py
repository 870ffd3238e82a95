"""Paths of modules: which layer of which stack they are in, and whether a config names them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapterhub_converters import peft
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


def named(option: object, names: list[str], module: str, layers: object) -> bool:
    """Whether peft would wrap a module for `target_modules` or `exclude_modules` (`option`, its `names` if it is a list)."""
    if isinstance(option, str):
        if option == "all-linear":
            return last_of(module) not in (*EMBEDDINGS, *OUTPUTS)
        return fullmatch(option, module, f"{peft.CONFIG}: target_modules")
    if module in names:
        return True
    if not any(module.endswith(f".{name}") for name in names):
        return False
    if layers is None or layers == []:
        return True
    return layer_of(module) in (layers if isinstance(layers, list) else [layers])
