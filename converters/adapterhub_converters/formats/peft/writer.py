"""Writing of an `Adapter` as a PEFT folder; an adapter read from a PEFT folder is written with the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters.adapter import (
    FULL,
    Adapter,
    Loss,
    LossReport,
    LowRank,
    LowRankConv,
    LowRankEmbedding,
    StackedLowRank,
    TensorLoss,
    refuse_bundled,
    refuse_differences,
    with_factored_as_pairs,
)
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.peft_patterns import escape

from . import stacks, target_parameters
from .adapter_config import CONFIG, WEIGHTS
from .tensor_keys import classify, state_dict

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

# The modules that PEFT itself adds to modules_to_save for a task (`peft_model.py`).
_TASK_MODULES = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write a PEFT folder into the existing, empty folder `path`; experts are stacked if transformers stacks the base's."""
    refuse_differences(adapter, "peft")
    refuse_bundled(adapter)
    peft_source = adapter.source if adapter.source and adapter.source.format == "peft" else None
    written = adapter if peft_source else stacks.stack_experts(with_factored_as_pairs(adapter), base)
    tensors = state_dict(written)
    if peft_source:
        tensors = {peft_source.names.get(name, name): tensor for name, tensor in tensors.items()}
    safetensors_file.write(
        path / WEIGHTS, tensors, peft_source.metadata if peft_source else {"format": "pt", **adapter.meta.header}
    )
    text = peft_source.config if peft_source else config_text(written, parameters=stacks.parameter_modules(written, base))
    json_file.write_text(path / CONFIG, text)
    changed = {target for target, delta in adapter.deltas.items() if written.deltas.get(target, delta) is not delta}
    losses = [
        TensorLoss(name, Loss.ROUNDED, "factors are products, rounded once in float32")
        if classify(name)[1] in changed
        else TensorLoss(name, Loss.EXACT)
        for name in sorted(tensors)
    ]
    notes = () if peft_source else stacks.unstacked_notes(written, base)
    return LossReport(tuple(losses), (*written.notes, *notes))


def config_text(adapter: Adapter, *, parameters: Collection[str] = ()) -> str:
    """Return the text of an `adapter_config.json` from which peft builds the same function, formatted as peft formats it.

    Targets are full paths and patterns are full, escaped paths, so that neither a deeper base nor the order of keys,
    which peft does not preserve, can change which module gets which rank and alpha. The weights of `parameters`, modules of the
    adapter, are named as `target_parameters`.

    Raises:
        RefusedError: PEFT cannot express the adapter: it has only one switch each for rsLoRA, DoRA and transposed bases.
    """
    _check_lora(adapter)
    deltas = adapter.deltas
    rslora = {delta.rslora for delta in deltas.values()}
    if len(rslora) > 1:
        raise RefusedError("peft", "some modules scale by rsLoRA and some do not; PEFT has one switch for all")
    transposed = {delta.transposed_base for delta in deltas.values() if isinstance(delta, LowRank)}
    if len(transposed) > 1:
        raise RefusedError("peft", "some bases are stored transposed and some are not; PEFT has one switch for all")
    with_dora = [getattr(delta, "magnitude", None) is not None for delta in deltas.values()]
    if any(with_dora) and not all(with_dora) and not adapter.meta.dora:
        without_magnitude = list(deltas)[with_dora.index(False)]
        raise RefusedError(without_magnitude, "has no DoRA magnitude and others have one; PEFT has one switch for all")
    r = _most_common(delta.r for delta in deltas.values())
    alpha = _most_common(delta.alpha for delta in deltas.values())
    stacked = sorted(target for target, delta in deltas.items() if isinstance(delta, StackedLowRank))
    weights = sorted(f"{target}.weight" for target in parameters)
    # As a parameter, the weight of a module has the rank of `….weight`, and its tensors are still the module's.
    keys = {target: _exact_pattern(target) + (r"(\.weight)?" if target in parameters else "") for target in deltas}
    config = {
        "alpha_pattern": {keys[t]: _number(d.alpha) for t, d in deltas.items() if d.alpha != alpha},
        "base_model_name_or_path": adapter.meta.base_model,
        "bias": _bias_setting(adapter),
        "fan_in_fan_out": transposed == {True},
        "inference_mode": True,
        "init_lora_weights": True if adapter.meta.init == "default" else adapter.meta.init,
        "lora_alpha": _number(alpha),
        "lora_bias": any(getattr(delta, "bias", None) is not None for delta in deltas.values()),
        # peft refuses dropout together with target_parameters; it has no effect after training.
        "lora_dropout": 0.0 if stacked or weights else adapter.meta.dropout,
        "modules_to_save": saved_modules(adapter) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {keys[target]: delta.r for target, delta in deltas.items() if delta.r != r},
        "revision": adapter.meta.revision,
        "target_modules": sorted(set(deltas) - set(stacked) - set(parameters)),
        "task_type": adapter.meta.task_type,
        "trainable_token_indices": {target: list(rows.ids) for target, rows in adapter.rows.items()} or None,
        "use_dora": adapter.meta.dora or any(with_dora),
        "use_rslora": rslora == {True},
    }
    if stacked or weights:
        config |= {"target_parameters": sorted([*stacked, *weights]), "peft_version": target_parameters.WRITTEN_VERSION}
    if adapter.meta.invocation:
        config["alora_invocation_tokens"] = list(adapter.meta.invocation)
    if adapter.meta.layers:
        config["layer_replication"] = [list(pair) for pair in adapter.meta.layers]
    if adapter.meta.ties:
        config["ensure_weight_tying"] = True
    return json.dumps(config, indent=2, sort_keys=True)


def _check_lora(adapter: Adapter) -> None:
    if adapter.meta.method == FULL:
        problem = "the parameters were tuned as a whole, and there is no low-rank delta to write"
        raise RefusedError("peft", problem, "Merge the adapter into its base")
    if adapter.meta.method:
        raise RefusedError(
            "peft", f"the adapter is by {adapter.meta.method}, but PEFT's config for LoRA would declare it as LoRA"
        )
    for target, delta in adapter.deltas.items():
        if not isinstance(delta, LowRank | LowRankEmbedding | LowRankConv | StackedLowRank):
            raise RefusedError(target, f"a delta of kind {type(delta).__name__} is not LoRA (`factored_out` converts it)")


def saved_modules(adapter: Adapter) -> list[str]:
    """Return `modules_to_save`: the modules that are replaced as a whole, except those of which only a bias was trained."""
    heads = _TASK_MODULES.get(adapter.meta.task_type or "", ())
    modules = set()
    for name in adapter.replaced:
        module, _, kind = name.rpartition(".")
        parts = module.split(".")
        head = next((index for index, part in enumerate(parts) if part in heads), None)
        if head is not None:
            modules.add(".".join(parts[: head + 1]))
        elif kind != "bias" or f"{module}.weight" in adapter.replaced:
            modules.add(module)
    return sorted(modules)


def _bias_setting(adapter: Adapter) -> str:
    # The biases of saved modules are replaced with them, and need no setting.
    saved = saved_modules(adapter)
    trained = [
        name.removesuffix(".bias")
        for name in adapter.replaced
        if name.endswith(".bias") and not any(f"{name}.".startswith(f"{module}.") for module in saved)
    ]
    return "none" if not trained else "lora_only" if all(module in adapter.deltas for module in trained) else "all"


def _most_common(values: Iterable[Any]) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value)) if counts else 8


def _exact_pattern(target: str) -> str:
    # peft matches `(.*\.)?(KEY)$` against the path: a full path needs no ^.
    return escape(target)


def _number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
