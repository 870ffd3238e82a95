"""Whether an adapter fits a base: every tensor of the one has its module in the other, and the other way round.

No loader checks both directions (peft 0.21 loads a 2-layer adapter on a 4-layer base without a word), so a wrong base
of the same width goes unnoticed. Shapes come from headers; see `adapterhub_converters.base`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TypeVar

from adapterhub_converters import peft
from adapterhub_converters.adapter import Delta, StackedLowRank
from adapterhub_converters.base import BaseSpec, BaseTensor
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.patterns import fullmatch

from .contents import Contents, Part, Tensor
from .report import Problem

_T = TypeVar("_T")

_LAYER = re.compile(r"^(?:.*?\.)??(\d+)\.")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")
_OUTPUTS = ("lm_head", "embed_out", "output")
# Hugging Face classes whose linear modules are Conv1D, which stores its weight (in, out).
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "jais"}


def problems(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Both directions against a base."""
    yield from tied(contents, base)
    for note in base.notes:
        yield Problem("base-incomplete", "", base.where, note)
    if not base.tensors and base.names:
        yield from _by_names(contents, base)
        return
    if not base.tensors and not base.packed:
        yield Problem("base-without-weights", "", base.where, "no weight files; only config.json was compared")
        return
    base = yield from _renamed(contents, base)
    missing: list[str] = []
    for target, parts in contents.pairs.items():
        weight = weight_of(base, target)
        if weight is None:
            missing.append(target)
        elif isinstance(weight, str):
            yield Problem("shape-unknown", contents.weights, target, weight)
        else:
            yield from _shapes(contents.weights, target, parts, weight, transposed=conv1d(base), known=bool(base.model_type))
    yield from _others(contents, base, missing)
    yield from _replaced(contents, base, missing)
    yield from _rows(contents, base, missing)
    yield from _missing(contents.weights, base, missing)
    yield from _uncovered(contents, base)


def _by_names(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Both directions as far as names go: modules that are missing, and layers too many or too few."""
    nothing = dataclasses.replace(base, tensors={name: BaseTensor((), "") for name in base.names})
    base = yield from _renamed(contents, nothing)
    wanted = [*contents.targets, *contents.replaced, *contents.copies, *contents.rows]
    yield from _missing(contents.weights, base, [name for name in wanted if not _is_named(name, base)])
    yield from _uncovered(contents, base)


def _is_named(name: str, base: BaseSpec) -> bool:
    """Whether a base whose names alone are known has a module or a parameter, or the experts that it stacks."""
    there = name in base.tensors or weight_of(base, name.removesuffix(".weight")) is not None
    return there or any(known.startswith(f"{_block(name)}.") and ".experts.0." in known for known in base.tensors)


def _renamed(contents: Contents, base: BaseSpec) -> Generator[Problem, None, BaseSpec]:
    """The base under the names that the adapter has for its modules, when one exchange of prefixes explains them all."""
    missing = [target for target in contents.pairs if weight_of(base, target) is None]
    swap = _prefix_swap(missing, {name.removesuffix(".weight") for name in (*base.tensors, *base.packed)}) if missing else None
    if swap is None:
        return base
    old, new = swap
    what = f'{len(missing)} modules begin with "{old}", the base\'s with "{new}"'
    if new == "" and old.count(".") == 1:
        yield Problem("headless-base", contents.weights, "", what)
    else:
        yield Problem("other-prefix", contents.weights, "", what, "Rename the tensors, or use the base it was trained on")
    return dataclasses.replace(base, tensors=_prefixed(base.tensors, new, old), packed=_prefixed(base.packed, new, old))


def _prefixed(names: Mapping[str, _T], prefix: str, other: str) -> dict[str, _T]:
    return {other + name.removeprefix(prefix) if name.startswith(prefix) else name: value for name, value in names.items()}


def conv1d(base: BaseSpec) -> bool:
    """Whether the base's linear modules store `(in, out)`."""
    return base.model_type in _CONV1D


def weight_of(base: BaseSpec, target: str) -> BaseTensor | str | None:
    """The weight of a module with its logical shape; a reason when that is not known; None when there is no module."""
    weight = base.tensors.get(f"{target}.weight")
    if weight is not None:
        return weight
    if base.tied and target.rpartition(".")[2] in _OUTPUTS:
        tables = {name: name.removesuffix(".weight") for name in (*base.tensors, *base.packed)}
        table = next((name for name, module in tables.items() if _last(module) in _EMBEDDINGS), "")
        return base.tensors.get(table) or base.packed.get(table)
    return base.packed.get(f"{target}.weight") or base.packed.get(target)


def _last(target: str) -> str:
    return target.rpartition(".")[2]


def _shapes(file: str, target: str, parts: Part, weight: BaseTensor, *, transposed: bool, known: bool) -> Iterator[Problem]:
    got = delta_shape(parts)
    if got is None or len(weight.shape) != 2:
        return
    rows, columns = weight.shape
    wanted = (columns, rows) if transposed and "A" in parts else (rows, columns)
    if got == wanted:
        return
    if not known and got == wanted[::-1]:
        what = f"the base stores {wanted}; without its config.json it is not known which of them is the input"
        yield Problem("shape-unknown", file, target, what)
        return
    vocabulary = 0 if _last(target) in (*_EMBEDDINGS, *_OUTPUTS) else None
    if vocabulary is not None and got[1] == wanted[1]:
        what = f"{got[0]} tokens, the base has {wanted[0]}"
        yield Problem("vocab-differs", file, target, what, "Resize the base's vocabulary as it was in training")
        return
    what = f"lora_B @ lora_A is {got}, the base's weight is {wanted}"
    yield Problem("shape-mismatch", file, target, what, "Another size of the model, or another model")


def delta_shape(parts: Part) -> tuple[int, int] | None:
    """Rows and columns of what is added to the weight, in the base's orientation; None when the halves make none."""
    embedding = "embedding_A" in parts
    first, second = parts.get("embedding_A" if embedding else "A"), parts.get("embedding_B" if embedding else "B")
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        return None
    return (first.shape[1], second.shape[0]) if embedding else (second.shape[0], first.shape[1])


def _others(contents: Contents, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    for target, delta in contents.others.items():
        weight = base.tensors.get(target) or weight_of(base, target)
        if weight is None and any(name.startswith(f"{_block(target)}.") and ".experts.0." in name for name in base.tensors):
            weight = "stored expert by expert; transformers stacks them when it loads"
        if weight is None:
            missing.append(target)
        elif isinstance(weight, str):
            yield Problem("shape-unknown", contents.weights, target, weight)
        elif weight.shape not in _either_way(delta):
            what = f"the delta is {delta.shape}, the base's weight is {weight.shape}"
            yield Problem("shape-mismatch", contents.weights, target, what, "Another size of the model, or another model")


def _block(target: str) -> str:
    """The layer a module is in: `model.layers.0`."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", target)
    return found.group(0) if found else target


def _either_way(delta: Delta) -> set[tuple[int, ...]]:
    """The shapes that the base's weight may have for a delta: experts and Conv1D may be stored (in, out)."""
    shape = delta.shape
    turned = (*shape[:-2], shape[-1], shape[-2])
    if isinstance(delta, StackedLowRank):
        both = delta.transposed_base is None
        return {shape, turned} if both else {turned} if delta.transposed_base else {shape}
    if getattr(delta, "transposed_base", False):
        return {turned}
    return {shape}


def _replaced(contents: Contents, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    for name, tensor in [*contents.replaced.items(), *contents.copies.items()]:
        weight = base.tensors.get(name) or (weight_of(base, name.rpartition(".")[0]) if name.endswith(".weight") else None)
        if weight is None:
            missing.append(name)
        elif isinstance(weight, BaseTensor) and weight.shape != tensor.shape:
            yield _whole_shape(contents.weights, name, tensor, weight)


def _whole_shape(file: str, name: str, tensor: Tensor, weight: BaseTensor) -> Problem:
    vocabulary = _last(name.rpartition(".")[0]) in (*_EMBEDDINGS, *_OUTPUTS) and tensor.shape[1:] == weight.shape[1:]
    what = f"shape {tensor.shape}, the base's is {weight.shape}"
    return Problem("vocab-differs" if vocabulary else "shape-mismatch", file, name, what)


def _rows(contents: Contents, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    for target, tensor in contents.rows.items():
        weight = weight_of(base, target)
        if weight is None:
            missing.append(target)
        elif isinstance(weight, BaseTensor):
            outside = [number for number in contents.row_ids[target] if not 0 <= number < weight.shape[0]]
            if outside:
                what = f"token {outside[0]} of {weight.shape[0]}"
                yield Problem(
                    "row-outside", contents.weights, target, what, "Resize the base's vocabulary as it was in training"
                )
            if tensor.shape[1:] != weight.shape[1:]:
                yield Problem(
                    "shape-mismatch", contents.weights, target, f"rows of {tensor.shape[1:]}, the base's of {weight.shape[1:]}"
                )


def _missing(file: str, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    """Layers that the base lacks are one problem, other modules one each."""
    depth = depth_of([*base.tensors, *base.packed])
    deep = [target for target in missing if (layer := layer_of(target)) is not None and layer >= depth > 0]
    if deep:
        last = max(layer_of(target) or 0 for target in deep)
        what = f"{len(deep)} modules are in layers {depth} to {last}; the base has layers 0 to {depth - 1}"
        yield Problem("base-shallower", file, "", what, "Another size of the model")
    for target in sorted(set(missing) - set(deep)):
        yield Problem("no-such-module", file, target, "the base has no such module")


def _prefix_swap(missing: Iterable[str], names: set[str]) -> tuple[str, str] | None:
    """The prefix that all missing modules have and the one the base has instead, when one exchange explains them all."""
    first = min(missing)
    parts = first.split(".")
    for cut in range(len(parts) - 1):
        tail = ".".join(parts[cut:])
        heads = [name.removesuffix(tail) for name in names if name == tail or name.endswith(f".{tail}")]
        if len(heads) == 1:
            old, new = first.removesuffix(tail), heads[0]
            return (old, new) if old != new and all(_swapped(name, old, new) in names for name in missing) else None
    return None


def _swapped(name: str, old: str, new: str) -> str | None:
    return new + name.removeprefix(old) if name.startswith(old) else None


def layer_of(target: str) -> int | None:
    """The index of the layer a module is in: the first component that is a number."""
    found = _LAYER.match(target)
    return int(found.group(1)) if found else None


def depth_of(names: Iterable[str]) -> int:
    """How many layers there are."""
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)


def _uncovered(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Modules of the base that should have a delta and do not."""
    try:
        wanted = _targeted(contents, base)
    except AdapterhubError as error:
        yield Problem("not-understood", peft.CONFIG, "target_modules", error.what, error.hint)
        return
    missing = wanted - set(contents.targets)
    ours, depth = depth_of(contents.targets), depth_of([*base.tensors, *base.packed])
    deeper = {target for target in missing if (layer_of(target) or 0) >= ours > 0}
    if deeper or _stops_early(contents, ours, depth):
        what = f"the adapter ends at layer {ours - 1}, the base at layer {depth - 1}"
        hint = "Another size of the model; if only these layers were trained, set layers_to_transform"
        yield Problem("base-deeper", contents.weights, "", what, hint)
    for target in sorted(missing - deeper):
        yield Problem("uncovered-module", contents.weights, target, "target_modules names it, but it has no tensors")


def _stops_early(contents: Contents, ours: int, depth: int) -> bool:
    """Whether whole paths, which name no layer they lack, cover every layer from 0 on and then end before the base does."""
    if not ours or ours >= depth or contents.config.get("layers_to_transform") is not None:
        return False
    if contents.format == "peft" and not any("." in name for name in contents.names("target_modules")):
        return False
    return {layer_of(target) for target in contents.targets} - {None} == set(range(ours))


def _targeted(contents: Contents, base: BaseSpec) -> set[str]:
    """The base's modules that peft would wrap for this config (`tuners_utils.check_target_module_exists`)."""
    if contents.format != "peft":
        return set()
    matrices = {
        name.removesuffix(".weight") for name, t in base.tensors.items() if name.endswith(".weight") and len(t.shape) == 2
    }
    targets, excluded = contents.config.get("target_modules"), contents.config.get("exclude_modules")
    saved = contents.names("modules_to_save")
    found = set()
    for module in matrices:
        if any(item == module or f".{item}." in f".{module}." for item in saved):
            continue
        if excluded and named(excluded, contents.names("exclude_modules"), module, None):
            continue
        if named(targets, contents.names("target_modules"), module, contents.config.get("layers_to_transform")):
            found.add(module)
    return found


def named(option: object, names: list[str], module: str, layers: object) -> bool:
    """Whether peft would wrap a module for `target_modules` or `exclude_modules` (`option`, its `names` if it is a list)."""
    if isinstance(option, str):
        if option == "all-linear":
            return _last(module) not in (*_EMBEDDINGS, *_OUTPUTS)
        return fullmatch(option, module, f"{peft.CONFIG}: target_modules")
    if module in names:
        return True
    if not any(module.endswith(f".{name}") for name in names):
        return False
    if layers is None or layers == []:
        return True
    return layer_of(module) in (layers if isinstance(layers, list) else [layers])


def tied(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Changes to one of two tied tables."""
    if not base.tied:
        return
    names: Mapping[str, list[str]] = defaultdict(list)
    for target in [*contents.pairs, *(name.rpartition(".")[0] for name in contents.replaced), *contents.rows]:
        last = _last(target)
        if last in _EMBEDDINGS:
            names["input"].append(target)
        elif last in _OUTPUTS:
            names["output"].append(target)
    if bool(names["input"]) != bool(names["output"]):
        side = "input" if names["input"] else "output"
        what = f"the base ties its input and output tables; only the {side} side is changed"
        yield Problem(
            "tied-weights", contents.weights, names[side][0], what, "llama.cpp cannot load it; train neither, or untie the base"
        )
