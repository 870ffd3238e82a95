"""Features of an adapter that depend on how vLLM and SGLang serve its base model, for the rules of these runtimes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterhub_converters import runtime_models, safe_regex
from adapterhub_converters.adapter import StackedLowRank
from adapterhub_converters.formats.peft.tensor_keys import PREFIX
from adapterhub_converters.runtime_models import VllmModel

from .contents import Contents

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_NUMBERED_EXPERT = safe_regex.Pattern(r".*\.experts\.[0-9]{1,4}\..*")
_LAYER = safe_regex.Pattern(r".*layers\.[0-9]{1,6}\..*")
_STACKS = ("gate_up_proj", "down_proj")
_CLASSIFIER = safe_regex.Pattern(r"(?:.*\.)?(?:score|classifier)\.(?:weight|bias)")
_PAIR_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_UNREAD_ENDS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_MAX_NUMBER = 1e30  # rank or alpha that a config may have here; nothing but a hostile one has a larger
_UNNAMED = "a base whose config has no architectures"
_TOWER_OPTION = " unless enable_tower_connector_lora is set"


def served_features(contents: Contents, base: BaseSpec | None) -> Iterator[tuple[str, str]]:
    """Yield the features, each with the text that its rule shows."""
    model = runtime_models.vllm_model(base.architecture) if base else None
    stacks = [target for target, delta in contents.other_deltas.items() if isinstance(delta, StackedLowRank)]
    if stacks and model is None:
        yield "experts-of-unknown-model", ""
    yield from _vllm_name_features(contents, base, model)
    yield from _vllm_half_features(contents, model)
    if base is None:
        return
    if model is not None:
        yield from _vllm_features(contents, base, model, stacks)
    elif runtime_models.vllm_has_without_lora(base.architecture):
        yield "vllm-without-lora", base.architecture
    elif release := runtime_models.last_vllm(base.architecture):
        yield "vllm-removed", f"{base.architecture} was last in vLLM {release}"
    else:
        yield "vllm-unlisted", base.architecture or _UNNAMED
    if runtime_models.is_in_sglang(base.architecture):
        yield from _sglang_features(contents, base, model)
    else:
        yield "sglang-unlisted", base.architecture or _UNNAMED


def _vllm_features(contents: Contents, base: BaseSpec, model: VllmModel, stacks: list[str]) -> Iterator[tuple[str, str]]:
    if tower := next((target for target in contents.targets if model.is_in_tower(target)), None):
        yield "vllm-tower", f"{tower}: towers and connectors are left out{_TOWER_OPTION if model.tower_option else ''}"
    for target, parts in contents.pairs.items():
        yield from _vllm_module_features(target, model, is_embedding="embedding_A" in parts)
        option = model.packed_projections.get(target.rpartition(".")[2])
        if option and base.config.get(option) is not False:
            yield "vllm-unwrapped", target
    if elsewhere := next((target for target in contents.targets if model.is_elsewhere(target)), None):
        yield "vllm-elsewhere", elsewhere
        stacks = [target for target in stacks if not model.is_elsewhere(target)]
    if not model.stacked_experts:
        if stacks:
            yield "vllm-stacked", ""
    elif numbered := next((target for target in contents.pairs if _NUMBERED_EXPERT.fullmatch(target)), None):
        yield "vllm-numbered", numbered
    parents = {target.rpartition(".")[0] for target in stacks}
    if model.stacked_experts and len(stacks) < len(parents) * len(_STACKS):
        yield "vllm-half", ""


def _vllm_module_features(target: str, model: VllmModel, *, is_embedding: bool) -> Iterator[tuple[str, str]]:
    """Yield what vLLM's own layers make of a module."""
    last = target.rpartition(".")[2]
    if last in model.packed and last not in model.parts:
        yield "vllm-unexpected", target
    if last in model.unwrapped:
        yield "vllm-unwrapped", target
    if model.tables is not None and last not in model.tables and (is_embedding or last == "lm_head"):
        yield "vllm-table", target


def _vllm_name_features(contents: Contents, base: BaseSpec | None, model: VllmModel | None) -> Iterator[tuple[str, str]]:
    """Yield what vLLM makes of names that are not peft's (vllm/lora/utils.py, parse_fine_tuned_lora_name)."""
    in_memory = base.names_in_memory if base else frozenset()
    expected = {name.rpartition(".")[2] for name in in_memory} | (model.parts if model else frozenset())
    for key in (*contents.unknown, *(file_name for file_name, _ in contents.renamed)):
        module = _vllm_module(key)
        if key.endswith(_UNREAD_ENDS):
            continue
        if module is None:
            yield "vllm-name", key
        elif not in_memory:
            yield "vllm-path", key
        elif module.rpartition(".")[2] not in expected:
            yield "vllm-unexpected", module
        elif module not in in_memory and not (model and model.language and base and base.text_tensor(f"{module}.weight")):
            yield "vllm-dropped", module
    for target in contents.pairs if in_memory else ():
        if target.rpartition(".")[2] not in expected and not _NUMBERED_EXPERT.fullmatch(target):
            yield "vllm-unlike-any", target


def _vllm_module(key: str) -> str | None:
    """Return the module that vLLM reads from the name of a tensor; None if it refuses the name."""
    name = key.replace(PREFIX, "") if key.startswith(PREFIX) else key
    end = next((end for end in _PAIR_ENDS if name.endswith(end)), "")
    return name.removesuffix(end) if end else name if _CLASSIFIER.fullmatch(name) else None


def _vllm_half_features(contents: Contents, model: VllmModel | None) -> Iterator[tuple[str, str]]:
    """Yield what vLLM makes of a pair without one of its matrices.

    It multiplies lora_B by the scale, unless that is 1 (vllm/lora/lora_weights.py, optimize), and takes both to a layer. A part
    of a fused layer may be without them there (vllm/lora/layers/column_parallel_linear.py, set_lora).
    """
    for target, parts in contents.pairs.items():
        if {"A", "B"} <= parts.keys() or {"embedding_A", "embedding_B"} <= parts.keys():
            continue
        is_scaled = not {"B", "embedding_B"} & parts.keys() and _scaling(contents, target) != 1
        is_part = model is not None and target.rpartition(".")[2] in model.parts
        yield ("vllm-half-lost" if is_part and not is_scaled else "vllm-half-refused"), target


def _scaling(contents: Contents, target: str) -> float:
    """Return the factor of a module's delta, by the config."""
    values = {}
    for option, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        value = contents.config.get(option, 8)
        if isinstance(by_pattern := contents.config.get(patterns), dict):
            value = next((by_pattern[key] for key in contents.matching(patterns).get(target, ())), value)
        values[option] = float(value) if isinstance(value, int | float) and 0 < value < _MAX_NUMBER else math.nan
    return values["lora_alpha"] / (math.sqrt(values["r"]) if contents.config.get("use_rslora") else values["r"])


def _sglang_features(contents: Contents, base: BaseSpec, model: VllmModel | None) -> Iterator[tuple[str, str]]:
    for target in contents.pairs:
        if base.tensors and base.text_tensor(f"{target}.weight") is None:
            continue  # a module that the base does not have is a problem of its own
        if not runtime_models.sglang_has_memory_for(base.architecture, target):
            yield "sglang-size", target.rpartition(".")[2]
        elif model is not None and model.is_in_tower(target) and _LAYER.fullmatch(target):
            yield "sglang-tower", target
        elif not _LAYER.fullmatch(target) and not any(table in target for table in ("embed_tokens", "lm_head")):
            yield "sglang-layerless", target
