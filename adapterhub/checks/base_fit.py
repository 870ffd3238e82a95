"""Check that an adapter fits a base in both directions: each tensor has its module, and each targeted module its tensors.

No loader checks both (peft 0.21 silently loads a 2-layer adapter on a 4-layer base), so a wrong base of the same width goes
unnoticed. Shapes come from headers; see `adapterhub_converters.bases`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from adapterhub.checks.target_modules import block_of
from adapterhub_converters.adapter import Delta, StackedLowRank, TunedModule
from adapterhub_converters.bases.canonical_names import BaseTensor
from adapterhub_converters.containers.safetensors_header import TensorKind
from adapterhub_converters.formats import peft

from .contents import Contents, Parts
from .loaded_base import in_memory, rename_base, replicate_layers, weight_of
from .report import Problem
from .target_modules import EMBEDDINGS, HEAD_TASKS, OUTPUTS, depths_of, last_of, layer_of, stack_of, targeted_modules

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

# Heads that AutoModelFor… adds to a base (peft/utils/constants.py, SEQ_CLS_HEAD_NAMES).
_HEADS = ("classifier", "score", "pre_classifier", "qa_outputs", "classification_head")
# Hugging Face classes whose linear modules are Conv1D, which stores its weight (in, out).
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "jais"}


def shape_problems(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Yield the disagreements of an adapter with a base, in both directions."""
    yield from tied_weight_problems(contents, base)
    for note in base.notes:
        yield Problem("base-incomplete", "", base.source, note)
    # Shapes are unknown, for example for a base of which only an index was fetched.
    if not base.tensors and base.names and not base.derived:
        yield from _name_problems(contents, base)
        return
    if not base.tensors and not base.packed:
        message = "no weight files; " + (
            "shapes are derived from its config" if base.derived else "only its config was compared"
        )
        yield Problem("base-without-weights", "", base.source, message)
        if not base.derived:
            return
        base = dataclasses.replace(base, tensors=base.derived)
    base = yield from rename_base(contents, replicate_layers(contents, base))
    missing: list[str] = []
    for target, parts in contents.pairs.items():
        weight = weight_of(base, target)
        if weight is None:
            missing.append(target)
        elif isinstance(weight, str):
            yield Problem("shape-unknown", contents.weights, target, weight)
        else:
            transposed = is_conv1d(base) and last_of(target) not in OUTPUTS
            yield from _pair_problems(
                contents.weights, target, parts, weight, transposed=transposed, known_model=bool(base.model_type)
            )
    yield from _other_delta_problems(contents, base, missing)
    yield from _tuner_problems(contents, base, missing)
    yield from _replacement_problems(contents, base, missing)
    yield from _row_problems(contents, base, missing)
    depths = depths_of(base.tensors) if base.derived else {}
    yield from _missing_problems(
        contents.weights, base, [name for name in missing if not _not_derived(contents, base, name, depths)]
    )
    yield from _coverage_problems(contents, base)


def _name_problems(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Yield disagreements in names with a base whose shapes are unknown: missing modules, and layers too many or too few."""
    without_shapes = dataclasses.replace(base, tensors={name: BaseTensor((), "") for name in base.names})
    base = yield from rename_base(contents, without_shapes)
    changed = [*contents.targets, *contents.replaced, *contents.copies, *contents.rows]
    blocks = _with_experts(base)
    yield from _missing_problems(contents.weights, base, [name for name in changed if not _is_named(name, base, blocks)])
    yield from _coverage_problems(contents, base)


def _is_named(name: str, base: BaseSpec, blocks: Collection[str]) -> bool:
    """Return whether a base of which only names are known has a module or parameter, or the experts that it stacks."""
    return name in base.tensors or weight_of(base, name.removesuffix(".weight")) is not None or block_of(name) in blocks


def is_conv1d(base: BaseSpec) -> bool:
    """Return whether the base's linear modules store `(in, out)`."""
    return base.model_type in _CONV1D


def _pair_problems(
    file: str, target: str, parts: Parts, weight: BaseTensor, *, transposed: bool, known_model: bool
) -> Iterator[Problem]:
    """Yield the disagreement of a low-rank pair with the base's weight."""
    actual = delta_shape(parts)
    if actual is None or len(weight.shape) != 2:
        return
    rows, columns = weight.shape
    # Embedding tables are never transposed, so this holds for pairs of linear layers alone.
    expected = (columns, rows) if transposed and "A" in parts else (rows, columns)
    if actual == expected:
        return
    # The transpose: only the model's class, in its config, could tell which is right.
    if not known_model and actual == expected[::-1]:
        message = f"the base stores {expected}; without its config.json it is unknown which of them is the input"
        yield Problem("shape-unknown", file, target, message)
        return
    vocabulary = 0 if last_of(target) in (*EMBEDDINGS, *OUTPUTS) else None
    if vocabulary is not None and actual[1] == expected[1]:
        message = f"{actual[0]} tokens, the base has {expected[0]}"
        hint = "Resize the base's vocabulary as it was in training"
        yield Problem("vocab-differs", file, target, message, hint, str(expected[0]), str(actual[0]))
        return
    message = f"lora_B @ lora_A is {actual}, the base's weight is {expected}"
    yield Problem(
        "shape-mismatch", file, target, message, "Another size of the model, or another model", str(expected), str(actual)
    )


def delta_shape(parts: Parts) -> tuple[int, int] | None:
    """Return rows and columns of the delta, in the base's orientation; None if the halves make no matrix."""
    embedding = "embedding_A" in parts
    first, second = parts.get("embedding_A" if embedding else "A"), parts.get("embedding_B" if embedding else "B")
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        return None
    return (first.shape[1], second.shape[0]) if embedding else (second.shape[0], first.shape[1])


def _other_delta_problems(contents: Contents, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    """Yield the disagreements of deltas that are not a pair of matrices."""
    blocks = _with_experts(base) if contents.other_deltas else ()
    loaded = in_memory(base.tensors, base) if contents.other_deltas else {}
    for target, delta in contents.other_deltas.items():
        weight = base.tensor(target) or weight_of(base, target) or _stacked_experts(base, target) or loaded.get(target)
        if weight is None and block_of(target) in blocks:
            weight = "stored expert by expert; transformers stacks them when it loads"
        if weight is None:
            missing.append(target)
        elif isinstance(weight, str):
            yield Problem("shape-unknown", contents.weights, target, weight)
        elif weight.shape not in _possible_shapes(delta):
            message = f"the delta is {delta.shape}, the base's weight is {weight.shape}"
            hint = "Another size of the model, or another model"
            yield Problem("shape-mismatch", contents.weights, target, message, hint, str(weight.shape), str(delta.shape))


def _tuner_problems(contents: Contents, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    """Yield the disagreements of changes by tuners other than LoRA."""
    if contents.config.get("peft_type") == "XLORA":
        yield from _classifier_problems(contents, base)
        return
    for target, change in contents.tuned.items():
        if not change.acts_on_weight:
            yield from _prompt_problems(contents, base, change)
            continue
        weight = weight_of(base, target)
        if weight is None:
            missing.append(target)
        elif isinstance(weight, str):
            yield Problem("shape-unknown", contents.weights, target, weight)
        elif not change.fits(weight.shape):
            actual = ", ".join(f"{part} {tensor.shape}" for part, tensor in change.parts())
            message = f"{actual} of {change.tuner.method} do not fit the base's weight, which is {weight.shape}"
            yield Problem("shape-mismatch", contents.weights, target, message, "", str(weight.shape), actual)


def _prompt_problems(contents: Contents, base: BaseSpec, change: TunedModule) -> Iterator[Problem]:
    """Yield the disagreement of tokens that are put before the input with the base's widths, as far as its config has them."""
    ((part, tensor),) = change.parts()
    layers = base.config.get("num_hidden_layers")
    heads = base.config.get("num_key_value_heads", base.config.get("num_attention_heads"))
    width, size = base.config.get("hidden_size"), base.config.get("head_dim")
    if change.tuner.method == "prefix_tuning":
        size = size or (
            width // base.config["num_attention_heads"] if width and base.config.get("num_attention_heads") else None
        )
        width = 2 * layers * heads * size if layers and heads and size else None
    if width is not None and tensor.shape[-1] != width:
        message = f"{tensor.shape[-1]} numbers for each token; the base needs {width}"
        yield Problem("shape-mismatch", contents.weights, part, message, "", str(width), str(tensor.shape[-1]))


def _classifier_problems(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Yield the disagreement of X-LoRA's classifier, which reads the hidden states of the base, with their width."""
    width, config_width = base.config.get("hidden_size"), contents.config.get("hidden_size")
    if width is not None and config_width != width:
        message = f"the classifier reads {config_width} numbers for each token, the base has {width}"
        yield Problem("shape-mismatch", peft.CONFIG, "hidden_size", message, "", str(width), str(config_width))


# The parameter that transformers 5 stacks to the modules that it stacks, as a list of experts names them.
_LISTED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


def _stacked_experts(base: BaseSpec, target: str) -> BaseTensor | None:
    """Return the parameter that transformers 5 stacks from experts that are separate in the files."""
    module, _, name = target.rpartition(".")
    old = module.replace(".mlp.", ".block_sparse_moe.")  # Mixtral's
    listed = old if f"{old}.0.w1.weight" in base.tensors else module
    for parts in _LISTED.get(name, ()):
        matrices = [base.tensors.get(f"{listed}.0.{part}.weight") for part in parts]
        shapes = [tensor.shape for tensor in matrices if tensor is not None and len(tensor.shape) == 2]
        if len(shapes) == len(parts):
            # Counted by name, since configs spell the number of experts in many ways.
            experts = 1
            while f"{listed}.{experts}.{parts[0]}.weight" in base.tensors:
                experts += 1
            return BaseTensor((experts, sum(shape[0] for shape in shapes), shapes[0][1]), "")
    return None


def _with_experts(base: BaseSpec) -> set[str]:
    """Return the layers whose experts the files store one by one."""
    return {block_of(name) for name in base.tensors if ".experts.0." in name}


def _possible_shapes(delta: Delta) -> set[tuple[int, ...]]:
    """Return the shapes that the base's weight may have for a delta: experts and Conv1D may be stored `(in, out)`."""
    shape = delta.shape
    transposed = (*shape[:-2], shape[-1], shape[-2])
    if isinstance(delta, StackedLowRank):
        either = delta.transposed_base is None
        return {shape, transposed} if either else {transposed} if delta.transposed_base else {shape}
    if getattr(delta, "transposed_base", False):
        return {transposed}
    return {shape}


def _replacement_problems(contents: Contents, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    """Yield the disagreements of whole tensors with those of the base that they replace or copy."""
    heads: dict[str, TensorKind] = {}
    # A head of the task is a top-level module that the base lacks.
    tops = {name.split(".", 1)[0] for name in (*base.tensors, *base.packed)}
    for name, tensor in [*contents.replaced.items(), *contents.copies.items()]:
        weight = base.tensors.get(name) or (weight_of(base, name.rpartition(".")[0]) if name.endswith(".weight") else None)
        if weight is None and is_head(contents, tops, name):
            heads[name.rpartition(".")[0]] = tensor
        elif weight is None:
            missing.append(name)
        elif isinstance(weight, BaseTensor) and weight.shape != tensor.shape:
            yield _whole_tensor_problem(contents.weights, name, tensor, weight)
    for head, tensor in heads.items():
        message = f"not in the base: the class of the task adds it, and the adapter contains it with {tensor.shape[0]} outputs"
        yield Problem("new-head", contents.weights, head, message)


def is_head(contents: Contents, tops: Collection[str], name: str) -> bool:
    """Return whether a whole tensor belongs to a head that the class of the task adds to a base with the modules `tops`."""
    top, task = name.split(".", 1)[0], contents.config.get("task_type")
    if layer_of(name) is not None or top in tops:
        return False
    return top in contents.names("modules_to_save") and (task in HEAD_TASKS or (task is None and top in _HEADS))


def _whole_tensor_problem(file: str, name: str, tensor: TensorKind, weight: BaseTensor) -> Problem:
    vocabulary = last_of(name.rpartition(".")[0]) in (*EMBEDDINGS, *OUTPUTS) and tensor.shape[1:] == weight.shape[1:]
    message = f"shape {tensor.shape}, the base's is {weight.shape}"
    code = "vocab-differs" if vocabulary else "shape-mismatch"
    return Problem(code, file, name, message, "", str(weight.shape), str(tensor.shape))


def _row_problems(contents: Contents, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    """Yield the disagreements of replaced token rows with the base's table."""
    for target, tensor in contents.rows.items():
        weight = weight_of(base, target)
        if weight is None:
            missing.append(target)
        elif isinstance(weight, BaseTensor):
            outside = [number for number in contents.row_ids[target] if not 0 <= number < weight.shape[0]]
            if outside:
                message = f"token {outside[0]} of {weight.shape[0]}"
                hint, last = "Resize the base's vocabulary as it was in training", weight.shape[0] - 1
                yield Problem("row-outside", contents.weights, target, message, hint, f"0 to {last}", str(outside[0]))
            if tensor.shape[1:] != weight.shape[1:]:
                message = f"rows of {tensor.shape[1:]}, the base's of {weight.shape[1:]}"
                shapes = (str(weight.shape[1:]), str(tensor.shape[1:]))
                yield Problem("shape-mismatch", contents.weights, target, message, "", *shapes)


def _not_derived(contents: Contents, base: BaseSpec, name: str, depths: Mapping[str, int]) -> bool:
    """Return whether a parameter cannot be derived from a config: a norm, a bias, a head, an expert under its name in files."""
    if not base.derived or (layer_of(name) or 0) >= depths.get(stack_of(name), 1):
        return False
    is_whole_tensor = name in contents.replaced or name in contents.copies
    return (
        is_whole_tensor
        or layer_of(name) is None
        or ".experts." in name
        or f"{base.renaming.module(name)}.weight" in base.tensors
    )


def _missing_problems(file: str, base: BaseSpec, missing: list[str]) -> Iterator[Problem]:
    """Yield one problem for all layers that the base lacks, and one for each other module."""
    if not missing:
        return
    depths = depths_of([*base.tensors, *base.packed])
    # A missing layer is one problem, not one for each of its modules.
    too_deep = [target for target in missing if (layer_of(target) or 0) >= depths.get(stack_of(target), 0) > 0]
    for stack in sorted({stack_of(target) for target in too_deep}):
        layers, depth = [layer_of(target) or 0 for target in too_deep if stack_of(target) == stack], depths[stack]
        message = f"{len(layers)} modules are in layers {depth} to {max(layers)}; the base has layers 0 to {depth - 1}"
        yield Problem(
            "base-shallower", file, "", message, "Another size of the model", f"{max(layers) + 1} layers", f"{depth} layers"
        )
    for target in sorted(set(missing) - set(too_deep)):
        yield Problem("no-such-module", file, target, "the base has no such module")


def _coverage_problems(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Yield the modules of the base that should have a delta but do not."""
    targeted = targeted_modules(contents, base)
    # Targeted by the config, but without tensors in the file.
    missing = targeted - set(contents.targets)
    if contents.is_tuned:  # which may replace what it targets
        missing -= {*contents.rows, *(name.rpartition(".")[0] for name in contents.replaced)}
    adapter_depths, base_depths = depths_of(contents.targets), depths_of([*base.tensors, *base.packed])
    deeper = {target for target in missing if (layer_of(target) or 0) >= adapter_depths.get(stack_of(target), 0) > 0}
    stacks = {stack_of(target) for target in deeper} | _stop_early(contents, adapter_depths, base_depths)
    for stack in sorted(stacks):
        message = f"the adapter ends at layer {adapter_depths[stack] - 1}, the base at layer {base_depths[stack] - 1}"
        hint = "Another size of the model; if only these layers were trained, set layers_to_transform"
        yield Problem(
            "base-deeper",
            contents.weights,
            "",
            message,
            hint,
            f"{adapter_depths[stack]} layers",
            f"{base_depths[stack]} layers",
        )
    hint = "If it was trained, save the adapter again; if not, take it out of target_modules"
    for target in sorted(missing - deeper):
        yield Problem("uncovered-module", contents.weights, target, "target_modules names it, but it has no tensors", hint)


def _stop_early(contents: Contents, adapter_depths: Mapping[str, int], base_depths: Mapping[str, int]) -> set[str]:
    """Return the stacks in which the adapter covers every layer from 0 on, but ends before the base without saying so."""
    # The config says that only some layers were trained.
    if contents.config.get("layers_to_transform") is not None:
        return set()
    if contents.format == "peft" and not any("." in name for name in contents.names("target_modules")):
        return set()
    covered: dict[str, set[int | None]] = defaultdict(set)
    for target in contents.targets:
        covered[stack_of(target)].add(layer_of(target))
    return {
        stack
        for stack, depth in adapter_depths.items()
        if depth < base_depths.get(stack, 0) and covered[stack] == set(range(depth))
    }


def tied_weight_problems(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Yield a change to only one of two tied tables."""
    if not base.tied:
        return
    names: Mapping[str, list[str]] = defaultdict(list)
    # Not replaced rows: peft replaces those of the tied output table too (tuners/tuners_utils.py, `inject_adapter`).
    for target in [*contents.pairs, *(name.rpartition(".")[0] for name in contents.replaced)]:
        last = last_of(target)
        if last in EMBEDDINGS:
            names["input"].append(target)
        elif last in OUTPUTS:
            names["output"].append(target)
    if bool(names["input"]) != bool(names["output"]):
        side = "input" if names["input"] else "output"
        message = f"the base ties its input and output tables, but only the {side} side is changed"
        yield Problem(
            "tied-weights",
            contents.weights,
            names[side][0],
            message,
            "llama.cpp cannot load it; train neither, or untie the base",
        )
