"""The models of a pipeline that an adapter acts on, and the headers that it preserves.

An adapter of image models may act on several models at once. Its targets then begin with the name of the model, as in
diffusers' own files (`unet.`, `transformer.`, `text_encoder.`, …), and `Meta.parts` lists the models. PEFT has one
model and no such name: for a single model it is removed and stored in the header; several models are refused.

A PEFT source's config is stored in the header of a file that has its tensors under other names, so that the way back
is exact. As in the other formats (`source_config`), it belongs to a payload by its digest, and is checked against what
the file computes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from adapterhub_converters.adapter import Adapter, Delta, LowRank, Meta, Source, problems_beyond_deltas
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.bases.hf_base import PIPELINE_PARTS
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, refused_error
from adapterhub_converters.formats import peft, source_config

PART_KEY, HEADER_KEY, NAMES_KEY = "adapterhub.part", "adapterhub.header", "adapterhub.names"
"""Keys of a header's metadata: the model that an adapter is for, the source's own header, and the table of its names."""

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
    models = {part_of(name) for name in (*adapter.deltas, *adapter.added, *adapter.replaced)}
    if len(models) < 2:
        return without_part(adapter, next(iter(models), parts[0]))
    first = next(part for part in PIPELINE_PARTS if part in models)
    other_targets = [name for name in sorted((*adapter.deltas, *adapter.added, *adapter.replaced)) if part_of(name) != first]
    reasons = [
        f"{target}: the adapter acts on {' and '.join(sorted(models))}, but PEFT has one model" for target in other_targets
    ]
    raise refused_error(
        "", reasons, "Convert one model at a time", code="several-models", drop=f"{part_of(other_targets[0])}.*"
    )


def problems(adapter: Adapter, format_name: str, problem_of: Callable[[Delta], str]) -> Iterator[str]:
    """Yield the reasons why a format of image models cannot express an adapter.

    Args:
        adapter: The adapter.
        format_name: `kohya's format` or the like.
        problem_of: A function that returns why the format cannot express a delta; empty if it can.
    """
    yield from problems_beyond_deltas(adapter, format_name)
    for target, delta in sorted(adapter.deltas.items()):
        if problem := problem_of(delta):
            yield f"{target}: {problem}"
        elif isinstance(delta, LowRank) and delta.transposed_base:
            yield f"{target}: its weight is stored transposed, which image models do not do"


def preserved_header(adapter: Adapter) -> dict[str, str]:
    """Return the entries of the source's header that an adapter preserves."""
    header = adapter.source.metadata if adapter.source else adapter.meta.header
    return {key: header[key] for key in (HEADER_KEY, NAMES_KEY) if key in header}


def carried_header(metadata: Mapping[str, str], names: str = "") -> dict[str, str]:
    """Return the entries to preserve from a file's header, and the table of its names."""
    foreign = {key: text for key, text in metadata.items() if not key.startswith("adapterhub.")}
    names = names or metadata.get(NAMES_KEY, "")
    return {HEADER_KEY: json.dumps(foreign, separators=(",", ":"))} | ({NAMES_KEY: names} if names else {})


def source_header(adapter: Adapter, location: str) -> dict[str, str]:
    """Return the source's own header, as it was; empty if there is none."""
    text = preserved_header(adapter).get(HEADER_KEY)
    return {} if text is None else {str(key): str(value) for key, value in json_file.parse_object(text, location).items()}


# ---- The source's config


_TARGETS = "adapterhub.source.targets"


def source_keys(adapter: Adapter, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the metadata for a file with `tensors`, if the source is PEFT; `names` maps the file's targets to the source's.

    It is empty for a PEFT folder that was itself written from such a file: the folder alone suffices to write the file again.
    """
    source = adapter.source
    if source is None or source.format != "peft":
        return {}
    # Nothing of this folder's config would be lost: it is what `peft` writes for the adapter.
    if HEADER_KEY in source.metadata and source.config == peft.config_text(adapter):
        return {}
    targets = {ours: [source_target, adapter.deltas[source_target].r] for ours, source_target in sorted(names.items())}
    metadata = source_config.keys(adapter, [], source_config.payload_digest(dict(sorted(tensors.items()))))
    return {**metadata, _TARGETS: json.dumps(targets, separators=(",", ":"))}


def with_source(adapter: Adapter, metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray], location: str) -> Adapter:
    """Return the source's own adapter if its config is in the file and belongs to these tensors; else `adapter`."""
    if not source_config.has_source_config(metadata):
        return adapter
    # Another program has changed the tensors since: the config no longer describes them.
    if _TARGETS not in metadata or not source_config.matches_payload(
        metadata, source_config.payload_digest(dict(sorted(tensors.items())))
    ):
        return dataclasses.replace(adapter, notes=(*adapter.notes, source_config.IGNORED))
    deltas: dict[str, Delta] = {}
    rows = json_file.parse_object(metadata[_TARGETS], f"{location}: {_TARGETS}")
    for ours, row in rows.items():
        match row:
            case [str(source_target), int(r)] if (
                ours in adapter.deltas and 0 < r <= adapter.deltas[ours].r and source_target not in deltas
            ):
                deltas[source_target] = _without_padding(adapter.deltas[ours], r)
            case _:
                problem = f"adapterhub.source.targets has the malformed line {ours[:60]!r}: {str(row)[:60]}"
                raise FormatError(location, problem, source_config.CONVERT_AGAIN)
    if lacking := [
        ours for ours, delta in adapter.deltas.items() if ours not in rows and any(np.any(t) for _, t in delta.parts())
    ]:
        raise FormatError(
            location, f"adapterhub.source.targets lacks {lacking[0]!r}, which has a delta", source_config.CONVERT_AGAIN
        )
    text, header = str(metadata.get("adapterhub.source.config", "")), _text_map(metadata, "metadata", location)
    peft_tensors = peft.state_dict(Adapter(deltas, source=Source("peft", text, header)))
    file_names = _text_map(metadata, "names", location)
    state = {file_names.get(name, name): tensor for name, tensor in peft_tensors.items()}
    if len(state) < len(peft_tensors):
        raise FormatError(location, "the source's config gives two tensors one name")
    source_adapter = peft.parse(text, state, header, location=location)
    if set(source_adapter.deltas) != set(deltas):
        raise FormatError(location, "the source's config gives the tensors other names")
    for source_target, delta in source_adapter.deltas.items():
        if not math.isclose(
            delta.scaling, deltas[source_target].scaling, rel_tol=1e-6, abs_tol=0.0 if delta.scaling else 1e-25
        ):
            raise FormatError(
                location,
                f"{source_target}: the scale is {deltas[source_target].scaling:g} in the file "
                f"and {delta.scaling:g} in the source's config",
            )
    return source_adapter


def _without_padding(delta: Delta, r: int) -> Delta:
    """Return the pair with rank `r`, without the zeros that it was padded with."""
    if not isinstance(delta, LowRank) or r == delta.r:
        return delta
    if np.any(delta.lora_A[r:]) or np.any(delta.lora_B[:, r:]):
        return delta
    lora_A, lora_B = np.ascontiguousarray(delta.lora_A[:r]), np.ascontiguousarray(delta.lora_B[:, :r])
    return dataclasses.replace(delta, lora_A=lora_A, lora_B=lora_B, alpha=delta.alpha * r / delta.r)


def _text_map(metadata: Mapping[str, str], key: str, location: str) -> dict[str, str]:
    entries = json_file.parse_object(metadata.get(f"adapterhub.source.{key}", "{}"), f"{location}: adapterhub.source.{key}")
    if not all(isinstance(value, str) for value in entries.values()):
        raise FormatError(location, f"adapterhub.source.{key} is not a map of text to text")
    return entries
