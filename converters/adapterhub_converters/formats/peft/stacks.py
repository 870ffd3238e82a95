"""Experts that an adapter has one by one, stacked into the parameters that transformers 5 has for them.

transformers 5 has one `gate_up_proj` and one `down_proj` for all experts of a layer. peft 0.21.2 maps the old names for some
model types only, and in these it takes every target that ends in `gate_proj`, `up_proj`, `down_proj` or `gate` for a part of an
expert, including dense layers and shared experts (`utils/transformers_weight_conversion.py`). Therefore the form that peft
saves itself is written: `target_parameters`, also for the routers and the other modules with these names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import Adapter, Delta, LowRank, StackedLowRank
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_imports import np

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

STACKING = frozenset({
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "dots1", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "gemma4", "gemma4_text", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "jamba", "kimi_linear", "laguna", "lfm2_moe",
    "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe",
    "qwen3_vl_moe_text", "solar_open",
})  # fmt: skip
"""Model types with `experts.gate_up_proj` `(experts, 2 * inner, outer)` and `experts.down_proj` (transformers 5.24)."""
ALTERNATING = frozenset({"gpt_oss"})
"""Model types in whose `gate_up_proj` the rows of gate and up alternate."""
_TRANSPOSED = frozenset({"gpt_oss", "llama4", "llama4_text"})  # their stacks are (experts, in, out)
_UNGATED = frozenset({"nemotron_h"})  # with up_proj and down_proj only
STACKED = STACKING | _TRANSPOSED | _UNGATED
"""Model types with one parameter for all experts of a layer."""
_EXPERT = safe_regex.Pattern(r"(.+\.experts)\.(\d{1,5})\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
# Last components of the names that peft would take for parts of experts, and of routers, which are not linear layers.
_MISTAKEN_FOR_EXPERTS = frozenset({*_PARTS, "gate", "router"})

Experts = Mapping[int, LowRank]


def stack_experts(adapter: Adapter, base: BaseSpec | None) -> Adapter:
    """Return the adapter with its experts in stacks, under the modules' names in memory; `adapter` itself if there are none.

    Raises:
        RefusedError: An expert has more than a pair, which a stack cannot have.
    """
    # Only the base tells whether transformers stacks its experts.
    if base is None or base.model_type not in STACKED:
        return adapter
    deltas: dict[str, Delta] = {}
    layers: dict[str, dict[str, dict[int, LowRank]]] = {}
    for name, delta in adapter.deltas.items():
        target = base.renaming.module(name)
        place = expert_place(target)
        if place is None:
            deltas[target] = delta
        elif isinstance(delta, LowRank) and delta.plain:
            module, number, part = place
            layers.setdefault(module, {}).setdefault(_PARTS[part], {})[number] = delta
        else:
            raise RefusedError(
                name, "an expert with more than a pair of factors cannot be expressed where peft stacks the experts"
            )
    if not layers:
        return adapter
    for module, parts in layers.items():
        number = experts_in_layer(module, base, max(max(experts) for experts in parts.values()) + 1)
        deltas |= _layer_stacks(module, parts, number, base.model_type)
    return dataclasses.replace(adapter, deltas=deltas, source=None)


def _layer_stacks(module: str, parts: Mapping[str, Experts], number: int, kind: str) -> dict[str, Delta]:
    """Return the stacks of one layer with `number` experts, in the form that the model type `kind` has."""
    stacks = {part: _stack(experts, number, across=kind in _TRANSPOSED) for part, experts in parts.items()}
    if kind in _UNGATED:
        if "gate" in stacks:
            raise RefusedError(module, f"the experts of {kind} have no gate")
        return {f"{module}.{part}_proj": stack for part, stack in stacks.items()}
    deltas: dict[str, Delta] = {f"{module}.down_proj": stacks["down"]} if "down" in stacks else {}
    if "gate" in stacks or "up" in stacks:
        sides = [stacks.get(side) for side in ("gate", "up")]
        deltas[f"{module}.gate_up_proj"] = _gate_up_stack(sides, alternating=kind in ALTERNATING)
    return deltas


def stack_transposed_experts(adapter: Adapter, base: BaseSpec | None) -> Adapter:
    """Do the same as `stack_experts`, but only for bases whose checkpoints, too, have the experts in transposed stacks."""
    return stack_experts(adapter, base) if base is not None and base.model_type in _TRANSPOSED else adapter


def unstacked_notes(adapter: Adapter, base: BaseSpec | None) -> list[str]:
    """Return a note on experts that are written one by one because it is unknown whether the base stacks them."""
    expert_count = sum(_EXPERT.fullmatch(target) is not None for target in adapter.deltas)
    if not expert_count or (base is not None and base.model_type):
        return []
    return [
        f"{expert_count} deltas are for single experts, which peft 0.21 ignores where transformers 5 stacks them: name the base"
    ]


def parameter_modules(adapter: Adapter, base: BaseSpec | None) -> frozenset[str]:
    """Return the modules that `target_parameters` must name because peft would otherwise take them for parts of experts."""
    if base is None or base.model_type not in STACKING:
        return frozenset()
    return frozenset(
        target
        for target, delta in adapter.deltas.items()
        if isinstance(delta, LowRank) and delta.plain and target.rpartition(".")[2] in _MISTAKEN_FOR_EXPERTS
    )


def expert_place(target: str) -> tuple[str, int, str] | None:
    """Return the module with all experts of a layer, the number of one expert, and its part; None for any other target."""
    match = _EXPERT.fullmatch(target)
    return (match[1], int(match[2]), match[3]) if match else None


def experts_in_layer(module: str, base: BaseSpec, least: int) -> int:
    """Return the number of experts of a layer according to the base's config; `least` if it has none.

    Raises:
        RefusedError: The base has fewer than `least`.
    """
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    total = next((base.config[key] for key in keys if isinstance(base.config.get(key), int)), least)
    if least > total:
        raise RefusedError(module, f"expert {least - 1} of {total} in the base")
    return int(total)


def _stack(experts: Experts, count: int, *, across: bool) -> StackedLowRank:
    """Return one delta of all experts: smaller ranks are padded with zeros, and other scales are folded into `lora_B`."""
    r = max(delta.r for delta in experts.values())
    first = next(iter(experts.values()))
    scale = first.scaling
    out, into = first.shape
    lora_A, lora_B = np.zeros((count, r, into), first.lora_A.dtype), np.zeros((count, out, r), first.lora_B.dtype)
    for number, delta in experts.items():
        if delta.shape != (out, into):
            raise RefusedError("", f"experts of the shapes {(out, into)} and {delta.shape} do not make a stack")
        lora_A[number, : delta.r] = delta.lora_A
        # A stack has one scale, that of its first expert; the others' quotients go into `lora_B`.
        factor = delta.scaling / scale if scale else 1.0
        lora_B[number, :, : delta.r] = delta.lora_B if factor == 1 else delta.lora_B.astype(np.float32) * np.float32(factor)
    return _stack_of_scale(lora_A, lora_B, scale, rslora=first.rslora, across=across)


def _stack_of_scale(lora_A: np.ndarray, lora_B: np.ndarray, scale: float, *, rslora: bool, across: bool) -> StackedLowRank:
    r = lora_A.shape[1]
    return StackedLowRank(lora_A, lora_B, scale * (r**0.5 if rslora else r), rslora, transposed_base=across)


def _gate_up_stack(sides: Sequence[StackedLowRank | None], *, alternating: bool) -> StackedLowRank:
    """Return `gate_up_proj`, with the rows of gate above those of up, or `alternating` with them.

    The two keep separate ranks unless they share `lora_A`.
    """
    present = [side for side in sides if side is not None]
    first = present[0]
    count, out, _ = first.lora_B.shape
    scale = first.scaling
    factors = [side.scaling / scale if scale else 1.0 for side in present]
    # One rank suffices for both if they share `lora_A`; otherwise their ranks add up.
    shared = len(present) == 2 and np.array_equal(present[0].lora_A, present[1].lora_A) and factors == [1.0, 1.0]
    r = first.r if shared else sum(side.r for side in present)
    lora_B = np.zeros((count, 2 * out, r), np.result_type(*(side.lora_B for side in present)))
    start = 0
    for side, factor in zip(present, factors, strict=True):
        number = next(i for i, candidate in enumerate(sides) if candidate is side)
        rows = slice(number, None, 2) if alternating else slice(out * number, out * number + out)
        side_lora_B = side.lora_B if factor == 1 else side.lora_B.astype(np.float32) * np.float32(factor)
        lora_B[:, rows, start : start + side.r] = side_lora_B
        start += 0 if shared else side.r
    lora_A = first.lora_A if shared else np.concatenate([side.lora_A for side in present], axis=1)
    return _stack_of_scale(lora_A, lora_B, scale, rslora=first.rslora, across=bool(first.transposed_base))
