"""diffusers' `pytorch_lora_weights.safetensors`: peft's factors, under names that begin with the model of the pipeline.

Today diffusers writes `unet.….to_q.lora_A.weight` and `transformer.…`, with peft's config of each model in the header
(`lora_adapter_metadata`; `loaders/lora_base.py`). Its earlier names, `unet.….processor.to_q_lora.down.weight` and
`text_encoder.….lora_linear_layer.down.weight`, are read too. Without a config, and without an alpha for the factors,
the alpha is the rank, as in diffusers itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import BUNDLED, Adapter, Delta, Loss, LossReport, LowRank, LowRankConv, Meta, TensorLoss
from adapterhub_converters.bases.canonical_names import PIPELINE_PARTS
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import FormatError, NotUnderstoodError, RefusedError, refused_error
from adapterhub_converters.formats import peft, pipeline
from adapterhub_converters.formats.candidate import Candidate

from . import factors, family_tables, naming, origin, preserved_header
from .preserved_header import HEADER_KEY, NAMES_KEY

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

CONFIG_KEY = "lora_adapter_metadata"
"""Key of the header's metadata: peft's config of every model, with keys that begin with the model."""
_PREFIX = "base_model.model."
# Names of diffusers' modules that LLMs do not have; a GPT-2's targets begin with `transformer.` too.
_DIFFUSERS = safe_regex.Pattern(r"\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$")
_OLD = safe_regex.Pattern(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_HALVES = {"down": "lora_A", "up": "lora_B"}
_PARTS_IN_PEFT = {"A": ".lora_A.weight", "B": ".lora_B.weight", "bias": ".lora_B.bias", "magnitude": ".lora_magnitude_vector"}


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a safetensors file with a LoRA under diffusers' names."""
    header = candidate.header
    return header is not None and (CONFIG_KEY in header.metadata or any(map(_is_diffusers_name, header.tensors)))


def _is_diffusers_name(name: str) -> bool:
    if _OLD.search(name):
        return True
    stem_and_part = factors.split_name(_current_name(name))
    if stem_and_part is None:
        return False
    part, _, path = stem_and_part[0].partition(".")
    if part != "transformer":
        return part in PIPELINE_PARTS
    return bool(_DIFFUSERS.search(path)) or any(
        table.part == part and table.trainer_path(path) for table in family_tables.TABLES
    )


def _current_name(name: str) -> str:
    """Return diffusers' current name of a tensor."""
    name = name.replace(".processor.", ".")
    match = _OLD.search(name)
    if match:
        text = name.startswith("text_encoder")
        module = f"{match[1]}_proj" if text else f"to_{match[1]}" + (".0" if match[1] == "out" else "")
        name = f"{name[: match.start()]}.{module}.{_HALVES[match[2]]}.weight"
        # The earliest files contain only the UNet, and no prefix.
        name = name if text or name.startswith("unet.") else f"unet.{name}"
    return name.replace(".to_out.lora_magnitude_vector", ".to_out.0.lora_magnitude_vector")


def read(path: Path | Candidate, *, base: BaseSpec | None = None) -> Adapter:
    """Return the adapter in a file. Targets begin with the model of the pipeline, unless `base` is a single model."""
    candidate = Candidate.of(path)
    with candidate.open_safetensors() as file:
        stored = {name: file.tensor(name) for name in file.tensors}
        metadata = dict(file.header.metadata)
    location = str(candidate.path)
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(BUNDLED)}
    parts_by_target = _group_tensors(tensors, location)
    configs = _model_configs(metadata, location)
    is_unnamed = "" in configs and not any(pipeline.part_of(target) for target in parts_by_target)
    read_adapter = (
        _adapter_by_config(parts_by_target, configs[""], location)
        if is_unnamed
        else _read_parts(parts_by_target, configs, location)
    )
    other_entries = {key: text for key, text in metadata.items() if key != CONFIG_KEY}
    meta = dataclasses.replace(read_adapter.meta, header=preserved_header.carried_header(other_entries))
    adapter = preserved_header.with_source(
        dataclasses.replace(read_adapter, meta=meta, source=None), metadata, tensors, location
    )
    described = origin.describe(adapter.meta, metadata, metadata.get(NAMES_KEY, ""), read_adapter.deltas)
    fitted = naming.fit_to_base(dataclasses.replace(adapter, meta=described), base, location)
    return factors.with_bundled(fitted, stored)


def _group_tensors(tensors: Mapping[str, np.ndarray], location: str) -> dict[str, factors.Parts]:
    parts_by_target: dict[str, factors.Parts] = {}
    unknown = []
    for name, array in tensors.items():
        stem_and_part = factors.split_name(_current_name(name))
        if stem_and_part is None:
            unknown.append(f"tensor {name!r}: this kind of tensor is not supported")
        elif stem_and_part[1] in parts_by_target.setdefault(stem_and_part[0], {}):
            raise FormatError(location, f"tensor {name!r} exists under two names")
        else:
            parts_by_target[stem_and_part[0]][stem_and_part[1]] = array
    if unknown:
        raise refused_error(location, unknown, "", NotUnderstoodError)
    return parts_by_target


def _model_configs(metadata: Mapping[str, str], location: str) -> dict[str, dict[str, Any]]:
    """Return peft's config of each model; a file with one unnamed model has it under the empty name."""
    if CONFIG_KEY not in metadata:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in json_file.parse_object(metadata[CONFIG_KEY], f"{location}: {CONFIG_KEY}").items():
        part = pipeline.part_of(key)
        configs.setdefault(part, {})[key.removeprefix(f"{part}.") if part else key] = value
    return configs


def _read_parts(grouped: Mapping[str, factors.Parts], configs: Mapping[str, Mapping[str, Any]], location: str) -> Adapter:
    models: dict[str, dict[str, factors.Parts]] = {}
    unnamed = [target for target in grouped if not pipeline.part_of(target)]
    if unnamed:
        raise refused_error(
            location,
            [f"{target}: does not begin with a model of a pipeline ({', '.join(PIPELINE_PARTS)})" for target in unnamed],
        )
    for target, part in grouped.items():
        model = pipeline.part_of(target)
        models.setdefault(model, {})[target.removeprefix(f"{model}.")] = part
    deltas: dict[str, Delta] = {}
    notes: list[str] = []
    meta = Meta()
    for model, modules in models.items():
        if model in configs:
            adapter = _adapter_by_config(modules, configs[model], location)
            meta, inner = adapter.meta, adapter.deltas
            notes += [f"{model}: {note}" for note in adapter.notes]
        else:
            inner = {target: factors.delta_of(target, part, (), location) for target, part in modules.items()}
            if any("alpha" not in part for part in modules.values()):
                notes.append(f"{model}: its alpha is not recorded: it is the rank, as in diffusers")
        deltas |= {f"{model}.{target}": delta for target, delta in inner.items()}
    return Adapter(deltas, meta=dataclasses.replace(meta, parts=tuple(sorted(models))), notes=tuple(notes))


def _adapter_by_config(modules: Mapping[str, factors.Parts], config: Mapping[str, Any], location: str) -> Adapter:
    """Return the adapter that peft builds from these modules and a config."""
    state: dict[str, np.ndarray] = {}
    for target, part in modules.items():
        for name, array in part.items():
            if name == "alpha":
                raise RefusedError(
                    location, f"{target}: has an alpha, and there is a config in the header, which may contradict it"
                )
            if name not in _PARTS_IN_PEFT:
                raise RefusedError(location, f"{target}: {name} together with a config of peft is not supported")
            state[f"{_PREFIX}{target}{_PARTS_IN_PEFT[name]}"] = array
    return peft.parse(json.dumps({"peft_type": "LORA", **config}), state, {}, location=location)


# ---- Writing


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`; RefusedError names what the format cannot express."""
    adapter = naming.in_diffusers_names(adapter, "diffusers")
    if problems := list(preserved_header.problems(adapter, "diffusers' format", _problem)):
        raise refused_error("diffusers", problems)
    prefixed = naming.with_model_prefix(adapter, base, "diffusers")
    prefixed = dataclasses.replace(
        prefixed, deltas={target: _with_kernel(target, delta) for target, delta in prefixed.deltas.items()}
    )
    # Both have the same order, as only the names differ.
    names = dict(zip(prefixed.deltas, adapter.deltas, strict=True))
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    for model in sorted({pipeline.part_of(target) for target in prefixed.deltas}):
        inner = {t.removeprefix(f"{model}."): d for t, d in prefixed.deltas.items() if pipeline.part_of(t) == model}
        single_model = Adapter(inner, meta=dataclasses.replace(prefixed.meta, parts=(), header={}))
        config |= {
            f"{model}.{key}": value for key, value in json_file.parse_object(peft.config_text(single_model), str(path)).items()
        }
        tensors |= {f"{model}.{name.removeprefix(_PREFIX)}": array for name, array in peft.state_dict(single_model).items()}
    preserved = preserved_header.entries(prefixed)
    # The header of a trainer's own file is preserved for the way back; sd-scripts' has no `format`.
    source_header = preserved_header.source_header(prefixed, str(path)) if HEADER_KEY in preserved else {"format": "pt"}
    header = source_header | {CONFIG_KEY: json.dumps(config, indent=2, sort_keys=True)}
    header |= {NAMES_KEY: preserved[NAMES_KEY]} if NAMES_KEY in preserved else {}
    safetensors_file.write(path, tensors, header | preserved_header.source_keys(adapter, names, tensors))
    losses = [
        TensorLoss(f"{names[target]}.{'lora_B.bias' if name == 'bias' else name}", Loss.EXACT)
        for target, delta in sorted(prefixed.deltas.items())
        for name, _ in delta.parts()
    ]
    return LossReport(tuple(losses), adapter.notes)


def _with_kernel(target: str, delta: Delta) -> Delta:
    """Return `delta` with the kernel of its convolution, which peft's LoHa flattens."""
    kernel = family_tables.kernel(target)
    if not kernel or not isinstance(delta, LowRank) or delta.shape[1] % math.prod(kernel):
        return delta
    lora_A = delta.lora_A.reshape(delta.r, -1, *kernel)
    lora_B = delta.lora_B.reshape(*delta.lora_B.shape, *(1,) * len(kernel))
    magnitude = None if delta.magnitude is None else delta.magnitude.reshape(1, -1, *(1,) * len(kernel))
    return LowRankConv(lora_A, lora_B, delta.alpha, delta.rslora, magnitude, delta.bias)


def _problem(delta: Delta) -> str:
    if isinstance(delta, LowRank | LowRankConv):
        return ""
    return f"a delta of kind {type(delta).__name__} cannot be expressed in diffusers' format"
