"""The models of a pipeline that an adapter acts on.

An adapter of image models may act on several models at once. Its targets then begin with the name of the model, as in
diffusers' own files (`unet.`, `transformer.`, `text_encoder.`, …), and `Meta.parts` lists the models. PEFT has one
model and no such name: for a single model it is removed and stored in the header; several models are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from adapterhub_converters.adapter import BUNDLED, Adapter, Meta
from adapterhub_converters.bases.canonical_names import PIPELINE_PARTS
from adapterhub_converters.errors import refused_error

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

PART_KEY = "adapterhub.part"
"""Key of a header's metadata: the model that an adapter is for."""

_CLASSES = {
    "UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2",
}  # fmt: skip


def part_of(target: str) -> str:
    """Return the model that a target begins with; empty if it begins with none."""
    first = target.partition(".")[0]
    return first if first in PIPELINE_PARTS else ""


def is_text(part: str) -> bool:
    """Return whether a model of a pipeline works on text only: an encoder, or the small models behind it in Anima and LTX-2."""
    return part.startswith("text_") or part == "connectors"


def part_of_base(base: BaseSpec | None) -> str:
    """Return the name that a base has in a pipeline if it is one model; empty for a pipeline, an unknown model, and None."""
    if base is None or is_pipeline(base):
        return ""
    return "transformer" if "Transformer" in base.architecture else _CLASSES.get(base.architecture, "")


def is_pipeline(base: BaseSpec) -> bool:
    """Return whether a base is a pipeline of several models."""
    return base.architecture.endswith("Pipeline")


def modules_of(base: BaseSpec | None) -> dict[str, set[str]]:
    """Map each model of a base to the paths of its modules; empty if the base has no weights."""
    modules: dict[str, set[str]] = {}
    for name in (base.tensors or base.derived or base.names) if base else ():
        module, _, kind = name.rpartition(".")
        if kind != "bias":
            module = module if kind == "weight" else name  # a parameter that is no weight of a module
            part = part_of(module) if base is not None and is_pipeline(base) else part_of_base(base)
            modules.setdefault(part, set()).add(module.removeprefix(f"{part}.") if part else module)
    return modules


def weight_shape(base: BaseSpec | None, target: str) -> tuple[int, ...] | None:
    """Return the shape of a target's weight in a base; None if it has none. The target may begin with the model."""
    if base is None:
        return None
    tensor = base.tensors.get(f"{_in_base(base, target)}.weight")
    return tuple(tensor.shape) if tensor else None


def is_parameter(base: BaseSpec | None, target: str) -> bool:
    """Return whether a target is a parameter of a base rather than a module with a weight."""
    return base is not None and _in_base(base, target) in base.tensors


def _in_base(base: BaseSpec, target: str) -> str:
    return target if is_pipeline(base) else target.removeprefix(f"{part_of_base(base)}.")


def without_part(adapter: Adapter, part: str) -> Adapter:
    """Return the adapter of the single model `part`, with targets that do not begin with it; the header records it."""
    meta = dataclasses.replace(adapter.meta, parts=(), header={**adapter.meta.header, PART_KEY: part})
    return rename_targets(adapter, lambda name: name.removeprefix(f"{part}."), meta)


def rename_targets(adapter: Adapter, name_of: Callable[[str], str], meta: Meta) -> Adapter:
    """Return the adapter with new names for everything it changes, and another `meta`."""
    deltas = {name_of(target): delta for target, delta in adapter.deltas.items()}
    added, replaced = (
        {name_of(name): values for name, values in values_by_name.items()}
        for values_by_name in (adapter.added, adapter.replaced)
    )
    return dataclasses.replace(adapter, deltas=deltas, added=added, replaced=replaced, meta=meta, source=None)


def single_model(adapter: Adapter) -> Adapter:
    """Return the adapter for a format that has one model, without a name; RefusedError names the targets of other models."""
    parts = adapter.meta.parts
    if not parts:
        return adapter
    changed = [name for name in (*adapter.deltas, *adapter.added, *adapter.replaced) if not name.startswith(BUNDLED)]
    models = {part_of(name) for name in changed}
    if len(models) < 2:
        return without_part(adapter, next(iter(models), parts[0]))
    first = next(part for part in PIPELINE_PARTS if part in models)
    other_targets = [name for name in sorted(changed) if part_of(name) != first]
    reasons = [
        f"{target}: the adapter acts on {' and '.join(sorted(models))}, but PEFT has one model" for target in other_targets
    ]
    raise refused_error(
        "", reasons, "Convert one model at a time", code="several-models", drop=f"{part_of(other_targets[0])}.*"
    )
