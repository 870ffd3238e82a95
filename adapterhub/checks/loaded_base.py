"""A base as the class that loads it names its modules: with or without its head, its layers repeated.

The files of a base name its modules as one version of transformers did, for one class of models. An adapter names them as they
were in memory when it was trained; the base gets those names before the two are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, TypeVar

from adapterhub_converters.bases.canonical_names import BaseTensor

from .contents import Contents
from .report import Problem
from .target_modules import EMBEDDINGS, OUTPUTS, last_of, layer_of, stack_of

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_T = TypeVar("_T")

_MAX_LAYERS = 2_000


def base_for_class(contents: Contents, base: BaseSpec) -> BaseSpec:
    """Return the base as the class that loads it names its modules: with or without its head, its layers repeated.

    A prefix that no class explains stays as it is.
    """
    replicated = replicate_layers(contents, base)
    renaming = rename_base(contents, replicated)
    while True:
        try:
            if next(renaming).code == "other-prefix":
                return replicated
        except StopIteration as result:
            renamed: BaseSpec = result.value
            return renamed


def replicate_layers(contents: Contents, base: BaseSpec) -> BaseSpec:
    """Return the base with its layers repeated by `layer_replication` (peft/tuners/lora/model.py, `_replicate_layers`)."""
    ranges = contents.config.get("layer_replication")
    if not isinstance(ranges, list) or len(ranges) > 100 or not all(map(_is_range, ranges)):
        return base
    sources = [layer for start, end in ranges for layer in range(start, end)]
    stacks = {stack_of(target) for target in contents.targets} - {""}
    # A hostile config could repeat layers without end.
    if len(sources) > _MAX_LAYERS:
        return base
    copies: dict[int, list[int]] = {}
    for new, source in enumerate(sources):
        copies.setdefault(source, []).append(new)
    tensors = {name: tensor for name, tensor in base.tensors.items() if stack_of(name) not in stacks}
    for name, tensor in base.tensors.items():
        if (stack := stack_of(name)) in stacks:
            path_in_layer = name.removeprefix(f"{stack}{layer_of(name)}")
            tensors |= {f"{stack}{new}{path_in_layer}": tensor for new in copies.get(layer_of(name) or 0, ())}
    return dataclasses.replace(base, tensors=tensors)


def _is_range(item: object) -> bool:
    """Return whether a value is a pair of layer numbers of a plausible size."""
    return isinstance(item, list) and len(item) == 2 and all(type(n) is int and 0 <= n <= 1000 for n in item)


def rename_base(contents: Contents, base: BaseSpec) -> Generator[Problem, None, BaseSpec]:
    """Return the base under the adapter's names of its modules, and yield a problem for each renaming.

    Transformers' own renaming is tried first, then one exchange of prefixes that explains most of what is missing.
    """
    missing = _missing_targets(contents, base)
    if not missing:
        return base
    swap = _prefix_swap(missing, base)
    loaded = dataclasses.replace(base, tensors=in_memory(base.tensors, base), packed=in_memory(base.packed, base))
    renamed = loaded.tensors.keys() != base.tensors.keys() or loaded.packed.keys() != base.packed.keys()
    still_missing = _missing_targets(contents, loaded) if renamed else missing
    loaded_swap = _prefix_swap(still_missing, loaded) if renamed else None
    # A renaming by transformers counts only where it explains more than an exchange of prefixes alone.
    if renamed and (
        len(still_missing) < len(missing)
        or _unexplained(still_missing, loaded_swap, loaded) < _unexplained(missing, swap, base)
    ):
        message = f"{len(missing)} modules have the names of transformers 5, the base's files those of transformers 4"
        yield Problem("renamed-modules", contents.weights, "", message)
        base, missing, swap = loaded, still_missing, loaded_swap
    if swap is None:
        return base
    old, new = swap
    is_pipeline = base.architecture.endswith("Pipeline")
    # A model inside the base can be trained alone: one of a pipeline, or the thinker of Qwen3-Omni.
    inner = "pipeline" if is_pipeline else "base" if base.renaming.has_model_at(new) else ""
    message = f'{len(missing)} modules begin with "{old}", the base\'s with "{new}"'
    # The base lacks a component such as `model.`: it was saved without its head.
    if new == "" and old.count(".") == 1:
        yield Problem("headless-base", contents.weights, "", message)
    elif old == "" and new.count(".") == 1 and (inner or contents.config.get("task_type") != "CAUSAL_LM"):
        hint = f"Put it on the {inner}'s {new.removesuffix('.')}" if inner else "Load the base with AutoModel"
        yield Problem("headless-adapter", contents.weights, "", message, hint)
        return dataclasses.replace(base, tensors=_without_prefix(base.tensors, new), packed=_without_prefix(base.packed, new))
    else:
        yield Problem("other-prefix", contents.weights, "", message, "Rename the tensors, or use the base it was trained on")
    return dataclasses.replace(
        base, tensors=_swap_prefixes(base.tensors, new, old), packed=_swap_prefixes(base.packed, new, old)
    )


def _missing_targets(contents: Contents, base: BaseSpec) -> list[str]:
    """Return the changed modules that the base does not have under these names."""
    changed = contents.pairs or dict.fromkeys(name.rpartition(".")[0] for name in contents.replaced)
    return [target for target in changed if weight_of(base, target) is None]


def in_memory(names: Mapping[str, _T], base: BaseSpec) -> dict[str, _T]:
    """Return the names that transformers gives parameters when it loads them."""
    return {name: names[stored] for stored, name in base.renaming.names(names).items()}


def _without_prefix(names: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    """Return the names that begin with `prefix`, without it: a model without its head."""
    return {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}


def _swap_prefixes(names: Mapping[str, _T], prefix: str, new_prefix: str) -> dict[str, _T]:
    """Return the names with `prefix` replaced by `new_prefix`."""
    return {new_prefix + name.removeprefix(prefix) if name.startswith(prefix) else name: value for name, value in names.items()}


def weight_of(base: BaseSpec, target: str) -> BaseTensor | str | None:
    """Return the weight of a module with its logical shape; the reason if that is unknown; None if there is no module."""
    weight = base.tensor(f"{target}.weight")
    if weight is not None:
        return weight
    if base.tied and target.rpartition(".")[2] in OUTPUTS:
        tables = {name: name.removesuffix(".weight") for name in (*base.tensors, *base.packed)}
        table = next((name for name, module in tables.items() if last_of(module) in EMBEDDINGS), "")
        return base.tensors.get(table) or base.packed.get(table)
    return base.packed.get(f"{target}.weight") or base.packed.get(target)


def _prefix_swap(missing: list[str], base: BaseSpec) -> tuple[str, str] | None:
    """Return the prefix of missing modules and the base's prefix in its place, if one exchange explains most of them."""
    if not missing:
        return None
    names = {name.removesuffix(".weight") for name in (*base.tensors, *base.packed)}
    first = min((target for target in missing if layer_of(target) is not None), default=min(missing))
    parts = first.split(".")
    for cut in range(len(parts) - 1):
        tail = ".".join(parts[cut:])
        heads = [name.removesuffix(tail) for name in names if name == tail or name.endswith(f".{tail}")]
        if len(heads) == 1:
            old, new = first.removesuffix(tail), heads[0]
            if any(part.isdigit() for part in f"{old}{new}".split(".")):  # another layer is not another prefix
                return None
            explained = sum(_swap_prefix(name, old, new) in names for name in missing)
            return (old, new) if old != new and 2 * explained > len(missing) else None
    return None


def _unexplained(missing: list[str], swap: tuple[str, str] | None, base: BaseSpec) -> int:
    """Return how many missing modules are missing after an exchange of prefixes as well."""
    return len(missing) if swap is None else sum(weight_of(base, _swap_prefix(name, *swap) or "") is None for name in missing)


def _swap_prefix(name: str, old: str, new: str) -> str | None:
    return new + name.removeprefix(old) if name.startswith(old) else None
