"""Features of an adapter that depend on how vLLM and SGLang serve its base model, for the rules of these runtimes."""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub_converters import runtime_models, safe_regex
from adapterhub_converters.adapter import StackedLowRank
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.runtime_models import VllmModel

from .contents import Contents

_NUMBERED_EXPERT = safe_regex.Pattern(r".*\.experts\.[0-9]{1,4}\..*")
_LAYER = safe_regex.Pattern(r".*layers\.[0-9]{1,6}\..*")
_STACKS = ("gate_up_proj", "down_proj")
_UNNAMED = "a base whose config has no architectures"
_TOWER_OPTION = " unless enable_tower_connector_lora is set"


def served_features(contents: Contents, base: BaseSpec | None) -> Iterator[tuple[str, str]]:
    """Yield the features, each with the text that its rule shows."""
    model = runtime_models.vllm_model(base.architecture) if base else None
    stacks = [target for target, delta in contents.other_deltas.items() if isinstance(delta, StackedLowRank)]
    if stacks and model is None:
        yield "experts-of-unknown-model", ""
    if base is None:
        return
    if model is not None:
        yield from _vllm_features(contents, model, stacks)
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


def _vllm_features(contents: Contents, model: VllmModel, stacks: list[str]) -> Iterator[tuple[str, str]]:
    if tower := next((target for target in contents.targets if model.is_in_tower(target)), None):
        yield "vllm-tower", f"{tower}: towers and connectors are left out{_TOWER_OPTION if model.tower_option else ''}"
    for target, parts in contents.pairs.items():
        last = target.rpartition(".")[2]
        if model.tables is not None and last not in model.tables and ("embedding_A" in parts or last == "lm_head"):
            yield "vllm-table", target
    if not model.stacked_experts:
        if stacks:
            yield "vllm-stacked", ""
    elif numbered := next((target for target in contents.pairs if _NUMBERED_EXPERT.fullmatch(target)), None):
        yield "vllm-numbered", numbered
    parents = {target.rpartition(".")[0] for target in stacks}
    if model.stacked_experts and len(stacks) < len(parents) * len(_STACKS):
        yield "vllm-half", ""


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
