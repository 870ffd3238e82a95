"""Paths of modules, and `target_modules` matched as peft does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapterhub_converters import safe_regex
from adapterhub_converters.formats import peft
from adapterhub_converters.peft_patterns import fullmatch

from .contents import Contents

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")
OUTPUTS = ("lm_head", "embed_out", "output")
# Tasks of peft whose model class adds a head to the base.
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_EXPERT = safe_regex.Pattern(r"\.experts\.\d+\.")


def last_of(target: str) -> str:
    """Return the last name of a module's path."""
    return target.rpartition(".")[2]


def layer_of(target: str) -> int | None:
    """Return the index of the layer that a module is in: the first component that is a number."""
    layer = _layer(target)
    return layer[1] if layer else None


def stack_of(target: str) -> str:
    """Return the list of layers that a module is in, such as `model.layers.`; empty outside of any."""
    layer = _layer(target)
    return layer[0] if layer else ""


def block_of(target: str) -> str:
    """Return the layer that a module is in, such as `model.layers.0`; the module itself outside of any."""
    layer = _layer(target)
    return f"{layer[0]}{layer[1]}" if layer else target


def _layer(target: str) -> tuple[str, int] | None:
    return _layer_around(target.rpartition(".")[0])


@lru_cache(maxsize=1)  # modules of one parent follow each other
def _layer_around(parent: str) -> tuple[str, int] | None:
    at = 0
    for part in parent.split("."):
        if part.isdecimal() and len(part) < 10:
            return parent[:at], int(part)
        at += len(part) + 1
    return None


def depths_of(names: Iterable[str]) -> dict[str, int]:
    """Return the number of layers of each list: a model may have several, of an encoder, a decoder, a vision tower."""
    depths: dict[str, int] = {}
    for name in names:
        if layer := _layer(name):
            depths[layer[0]] = max(depths.get(layer[0], 0), layer[1] + 1)
    return depths


def matches(
    option: object, names: Collection[str], module: str, layers: Collection[float] | None, key: str = "target_modules"
) -> bool:
    """Return whether peft would wrap a module for `target_modules` or `exclude_modules`.

    Args:
        option: The value of the option `key`.
        names: Its names, if it is a list; should be a set where there may be many, like `layers`.
    """
    if isinstance(option, str):
        if option == "all-linear":
            return last_of(module) not in (*EMBEDDINGS, *OUTPUTS)
        return fullmatch(option, module, f"{peft.CONFIG}: {key}")
    if module in names:  # whatever `layers` says
        return True
    return ends_in(names, module) and (layers is None or layer_of(module) in layers)


def ends_in(names: Collection[str], module: str) -> bool:
    """Return whether a path ends in one of `names`, behind a dot."""
    at = len(module)
    for _ in range(_max_parts(frozenset(names))):  # from the end: most names are a single component
        if (at := module.rfind(".", 0, at)) < 0:
            return False
        if module[at + 1 :] in names:
            return True
    return False


@lru_cache(maxsize=4)
def _max_parts(names: frozenset[str]) -> int:
    """Return the number of components of the longest path."""
    return max((name.count(".") + 1 for name in names), default=0)


def chosen_layers(config: Mapping[str, Any]) -> frozenset[float] | None:
    """Return `layers_to_transform`; None for every layer."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    return frozenset(layer for layer in (layers if isinstance(layers, list) else [layers]) if isinstance(layer, int | float))


def is_within(names: Collection[str], module: str) -> bool:
    """Return whether one of `names` is a module or part of its path: `lm_head` of `model.lm_head.dense`."""
    parts = module.split(".")
    # With few names compare each; with many look up every part of the path in the set.
    if len(names) <= 2 * len(parts):
        return any(f".{name}." in f".{module}." for name in names)
    return any(".".join(parts[start:end]) in names for end in range(1, len(parts) + 1) for start in range(end))


def targeted_modules(contents: Contents, base: BaseSpec) -> set[str]:
    """Return the base's modules that peft would wrap for this config (`tuners_utils.check_target_module_exists`)."""
    if contents.format != "peft":
        return set()
    matrices = {
        name.removesuffix(".weight") for name, t in base.tensors.items() if name.endswith(".weight") and len(t.shape) == 2
    }
    targets, excluded = contents.config.get("target_modules"), contents.config.get("exclude_modules")
    saved, targeted = frozenset(contents.names("modules_to_save")), set()
    target_names, excluded_names = (frozenset(contents.names(key)) for key in ("target_modules", "exclude_modules"))
    layers = chosen_layers(contents.config)
    top_modules = {target.split(".", 1)[0] for target in contents.targets} if _has_another_class(contents, base) else None
    # An adapter that lists experts one by one was trained before transformers stacked them.
    listed = any(_EXPERT.search(target) for target in contents.targets)
    for module in matrices:
        if not listed and _EXPERT.search(module):  # transformers 5 stacks them, and peft then finds no such module
            continue
        if top_modules is not None and module.split(".", 1)[0] not in top_modules:
            continue
        if saved and is_within(saved, module):
            continue
        if excluded and matches(excluded, excluded_names, module, None, "exclude_modules"):
            continue
        if matches(targets, target_names, module, layers):
            targeted.add(module)
    return targeted


def _has_another_class(contents: Contents, base: BaseSpec) -> bool:
    """Return whether the adapter was trained on another class of the model than the saved one: another head, or a half."""
    mapping = contents.config.get("auto_mapping")
    trained = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    other_class = isinstance(trained, str) and trained != base.architecture
    return other_class or contents.config.get("task_type") in (*HEAD_TASKS, "FEATURE_EXTRACTION")
