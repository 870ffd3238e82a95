"""Parsing of PEFT's tuners other than LoRA, by the rows of `adapter.tuned`: which tensor is which part of which module.

A tuner of prompts changes no module: its tensor is assigned to a module called `prompt_embeddings`, which no base has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import TUNERS, Adapter, Meta, Rows, TunedModule, Tuner
from adapterhub_converters.errors import FormatError, NotUnderstoodError, refused_error

from .adapter_config import CONFIG, WEIGHTS
from .adapter_config import meta as meta_of
from .tensor_keys import PREFIX

PROMPTS = "prompt_embeddings"
_CLASSIFIER = "base_model.internal_xlora_classifier.layers."  # X-LoRA's, which is no part of the model
_ROWS, _NORMS = ".trainable_tokens_delta", ".ln_tuning_layers"


def parse(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], location: str) -> Adapter:
    """Return the adapter for a checked config whose `peft_type` is one of TUNERS, and the tensors of its file.

    Raises:
        FormatError: The tensors do not belong together.
        RefusedError: There are tensors that the tuner does not have.
    """
    tuner = TUNERS[config["peft_type"]]
    weights_location = f"{location}/{WEIGHTS}"
    shared = {name: tensors[f"base_model.{name}"] for name in tuner.shared if f"base_model.{name}" in tensors}
    modules: dict[str, dict[str, np.ndarray]] = {}
    replaced: dict[str, np.ndarray] = {}
    rows: dict[str, Rows] = {}
    unknown = []
    for key, tensor in tensors.items():
        kind, name, part = _classify(key, tuner)
        if kind == "part":
            modules.setdefault(name, {})[part] = tensor
        elif kind == "rows":
            rows[name] = _rows(name, tensor, config, location)
        elif kind == "replaced":
            replaced[name] = tensor
        elif kind == "shared" and name in shared:
            if not np.array_equal(shared[name], tensor):
                raise FormatError(weights_location, f"{key} differs from {name}, which all modules share")
        else:
            unknown.append(f"tensor {key!r}: not a kind of tensor that {config['peft_type']} has")
    if unknown:
        raise refused_error(weights_location, unknown)
    tuned = {target: _change(target, {**shared, **parts}, config, weights_location) for target, parts in modules.items()}
    if not tuned and not replaced and not rows and tuner.method != "xlora":  # of whose classifier peft 0.21 saves a part
        raise FormatError(weights_location, f"there are no tensors of {config['peft_type']}")
    plain = meta_of(config)
    numbers = {key: value for key, value in _numbers(config).items() if isinstance(value, str | int | float)}
    meta = Meta(plain.base_model, plain.revision, plain.task_type, method=tuner.method, numbers=numbers)
    return Adapter({}, replaced, rows, meta, tuned=tuned)


def _classify(key: str, tuner: Tuner) -> tuple[str, str, str]:
    """Return the kind, name and part of a tensor: `part` of a module, `shared`, `rows` of a table, `replaced`, or `unknown`."""
    name, last = key.removeprefix(PREFIX), key.rpartition(".")[2]
    if last in tuner.shared:  # RandLora saves it with each module as well
        return "shared", last, ""
    # The tensors of prompts and of X-LoRA's classifier have no module, and so no prefix.
    if beside := _beside_model(key, last, tuner):
        return beside
    if not key.startswith(PREFIX) or tuner.method == "xlora":
        return "unknown", key, ""
    parts = {*tuner.tensor_names, *(part for variant in tuner.variants for part in variant)} - {PROMPTS}
    if part := next((part for part in parts if name.endswith(f".{part}")), ""):
        return "part", name.removesuffix(f".{part}"), part
    for method, kind, mark in (("trainable_tokens", "rows", _ROWS), ("ln_tuning", "replaced", _NORMS)):
        if tuner.method == method and mark in name:
            return kind, name.replace(mark, ""), ""
    saved = name.endswith((".weight", ".bias")) and "lora_" not in name  # by modules_to_save
    return "replaced" if saved else "unknown", name, ""


def _beside_model(key: str, last: str, tuner: Tuner) -> tuple[str, str, str] | None:
    """Classify a tensor that belongs to no module of the model; None for any other."""
    if key == PROMPTS and PROMPTS in tuner.tensor_names:
        return "part", PROMPTS, PROMPTS
    if key.startswith(_CLASSIFIER) and tuner.method == "xlora" and last in tuner.tensor_names:
        return "part", key.removeprefix("base_model.").rpartition(".")[0], last
    return None


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the tuner's own keys, with peft's defaults."""
    return {key: config.get(key, default) for key, default in TUNERS[config["peft_type"]].numbers.items()}


def _change(target: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], location: str) -> TunedModule:
    """Return the change of a module, made of its own tensors and those that all modules share."""
    tuner = TUNERS[config["peft_type"]]
    shared = {name: tensors[name] for name in tuner.shared if name in tensors}
    parts = {name: tensor for name, tensor in tensors.items() if name not in shared}
    if all(set(parts) != set(names) for names in (tuner.tensor_names, *tuner.variants)):
        raise FormatError(location, f"{target}: {', '.join(sorted(parts))} do not make a change by {tuner.method}")
    if missing := [name for name in tuner.shared if name not in shared]:
        if config.get("save_projection") is False:
            problem = f"{missing[0]} was not saved; peft makes it from the random numbers of a seed"
            raise NotUnderstoodError(location, problem, "Save it again with save_projection=True")
        raise FormatError(location, f"base_model.{missing[0]} is missing")
    for name, tensor in tensors.items():
        integers = name in tuner.integers
        wrong_dtype = tensor.dtype.kind not in "iu" if integers else dtypes.name_of(tensor.dtype) not in dtypes.FLOATS
        if wrong_dtype or 0 in tensor.shape:
            raise FormatError(location, f"{target}.{name}: {tensor.dtype} {tensor.shape} is not a part of {tuner.method}")
    return TunedModule(tuner, parts, _numbers(config), shared, bool(config.get("fan_in_fan_out")))


def _rows(table: str, tensor: np.ndarray, config: Mapping[str, Any], location: str) -> Rows:
    ids = config.get("token_indices")
    if not isinstance(ids, list) or not all(type(number) is int for number in ids):
        raise FormatError(f"{location}/{CONFIG}", '"token_indices" is not a list of token ids')
    if tensor.ndim != 2 or len(ids) != len(tensor):
        problem = f"{table}: shape {tensor.shape} are not the rows of {len(ids)} tokens"
        raise FormatError(f"{location}/{WEIGHTS}", problem)
    return Rows(tuple(ids), tensor)
