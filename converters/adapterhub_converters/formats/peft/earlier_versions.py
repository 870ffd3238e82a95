"""Upgrade of an adapter saved by an earlier peft to the layout that peft 0.21.2 loads and computes with.

Two things changed. Some versions swapped the factors of `target_parameters` (see the module of that name). And files made
with transformers 4 have experts one by one, whereas transformers 5 has them in stacks; peft maps these for some models only,
and for those only if all experts of a layer have one rank and one scale (`utils/transformers_weight_conversion.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterhub_converters.adapter import Adapter, Delta, Source, StackedLowRank
from adapterhub_converters.containers import json_file

from . import stacks, target_parameters
from .adapter_config import CONFIG, Scales
from .writer import config_text

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

ExpertNames = tuple[str, str, str]
"""The names of an expert's gate, up and down."""
# Model types whose experts peft maps, with the names they had before (transformers 5.24, `_MODEL_TO_CONVERSION_PATTERN`).
MAPPED: dict[str, ExpertNames] = {
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), ("w1", "w3", "w2")),
    **dict.fromkeys(
        ("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
         "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
         "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "solar_open"),
        ("gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip


class LayoutProblem(NamedTuple):
    """What peft 0.21.2 does with a file of an earlier peft (`ignored`, `wrong` or `refused`), and why."""

    verdict: str
    reason: str


def layout_problem(adapter: Adapter, base: BaseSpec | None) -> LayoutProblem | None:
    """Return what peft 0.21.2 gets wrong in an adapter read from a PEFT folder; None if no problem is known."""
    if swapped := _stacks_to_swap(adapter, base):
        version = _config(adapter).get("peft_version") or "before 0.19.1"
        problem = f"{swapped[0]}: peft {version} saved the factors of its experts the other way round"
        square = all(delta.shape[0] == delta.shape[1] for delta in map(adapter.deltas.__getitem__, swapped))
        return LayoutProblem("wrong" if square else "refused", problem)
    # Experts one by one are wrong only where the base has them in stacks.
    if base is None or base.model_type not in stacks.STACKING:
        return None
    by_layer: dict[str, dict[tuple[int, str], Delta]] = {}
    other_targets = set[str]()
    for target, delta in adapter.deltas.items():
        if place := stacks.expert_place(target):
            module, number, part = place
            by_layer.setdefault(module, {})[number, part] = delta
        elif not isinstance(delta, StackedLowRank):
            other_targets.add(target)
    return _expert_problem(by_layer, other_targets, base, Scales(_config(adapter), CONFIG)) if by_layer else None


_ExpertsByLayer = Mapping[str, Mapping[tuple[int, str], Delta]]
"""The module with all experts of a layer to the delta of each expert's parts."""


def _expert_problem(by_layer: _ExpertsByLayer, other_targets: set[str], base: BaseSpec, scales: Scales) -> LayoutProblem | None:
    names = MAPPED.get(base.model_type)
    module = next(iter(by_layer))
    # peft has no mapping for this model type: it silently ignores the tensors.
    if names is None:
        return LayoutProblem("ignored", f"{module}: single experts, which transformers 5 has in stacks")
    return (
        _naming_problem(by_layer, other_targets, names)
        or _coverage_problem(by_layer, names, base)
        or _scale_problem(by_layer, names, base, scales)
    )


def _naming_problem(by_layer: _ExpertsByLayer, other_targets: set[str], names: ExpertNames) -> LayoutProblem | None:
    """Return a problem with names that peft does not map, or that it maps although they belong to other modules."""
    module, parts = next(iter(by_layer)), _parts(by_layer)
    if foreign := sorted(parts - set(names)):
        return LayoutProblem("ignored", f"{module}: experts called {foreign[0]}, which no version of the base has")
    if mistaken := sorted(name for name in other_targets if name.rpartition(".")[2] in names):
        return LayoutProblem("ignored", f"{mistaken[0]} is taken for a module of an expert, because of its name")
    return None


def _coverage_problem(by_layer: _ExpertsByLayer, names: ExpertNames, base: BaseSpec) -> LayoutProblem | None:
    """Return a problem with parts or experts that have no delta, where peft needs all of them."""
    (gate, up, _), parts, module = names, _parts(by_layer), next(iter(by_layer))
    if (gate in parts) != (up in parts):
        return LayoutProblem("refused", f"{module}: {gate} and {up} are one parameter, and only one of them has a delta")
    if any(len(layer) < len(parts) * stacks.experts_in_layer(module, base, 1) for module, layer in by_layer.items()):
        return LayoutProblem("refused", f"{module}: some of its experts have no delta")
    return None


def _scale_problem(by_layer: _ExpertsByLayer, names: ExpertNames, base: BaseSpec, scales: Scales) -> LayoutProblem | None:
    """Return a problem with ranks and scales that the config gives a stack differently from its experts."""
    for module, layer in by_layer.items():
        place = base.renaming.module(module)
        for (_, part), delta in layer.items():
            stack = f"{place}.gate_up_proj" if part in names[:2] else f"{place}.down_proj"
            if delta.r != scales.rank(stack):
                return LayoutProblem("refused", f"{module}: {part} has rank {delta.r}, but its stack has another")
            if delta.alpha != scales.alpha(stack) or (delta.rslora and part in names[:2]):
                return LayoutProblem("wrong", f"{module}: {part} is scaled differently from its stack")
    return None


def _parts(by_layer: _ExpertsByLayer) -> set[str]:
    return {part for layer in by_layer.values() for _, part in layer}


def _config(adapter: Adapter) -> dict[str, Any]:
    return json_file.parse_object(adapter.source.config if adapter.source else "{}", CONFIG)


def _stacks_to_swap(adapter: Adapter, base: BaseSpec | None) -> list[str]:
    """Return the stacks of a PEFT folder whose factors peft 0.21.2 expects the other way round."""
    stacked = [target for target, delta in adapter.deltas.items() if isinstance(delta, StackedLowRank)]
    if adapter.source is None or not stacked:
        return []
    version, swapped = _config(adapter).get("peft_version"), adapter.source.turned
    return [
        t for t in stacked if target_parameters.is_swap_expected(t, version, base, is_swapped=t in swapped) != (t in swapped)
    ]


def upgrade_layout(adapter: Adapter, base: BaseSpec | None) -> Adapter:
    """Return the adapter of a PEFT folder in a form with which peft 0.21.2 computes completely; itself if it is in that form.

    Raises:
        RefusedError: peft cannot express it for this base.
    """
    source = adapter.source
    if source is None or layout_problem(adapter, base) is None:
        return adapter
    if swapped := _stacks_to_swap(adapter, base):
        upgraded_config = _config(adapter) | {"peft_version": target_parameters.WRITTEN_VERSION}
        source = dataclasses.replace(
            source, config=json.dumps(upgraded_config, indent=2), turned=source.turned ^ frozenset(swapped)
        )
        adapter = dataclasses.replace(adapter, source=source)
    # Swapping may not have been the only problem.
    if layout_problem(adapter, base) is not None:
        stacked = stacks.stack_experts(adapter, base)
        config = config_text(stacked, parameters=stacks.parameter_modules(stacked, base))
        source = Source("peft", config, source.metadata, {}, source.turned)
        adapter = dataclasses.replace(stacked, source=source)
    note = f"brought forward to the layout of peft {target_parameters.WRITTEN_VERSION} and later"
    return dataclasses.replace(adapter, notes=(*adapter.notes, note))
