"""Parsing of PEFT's tuners other than LoRA, by the rows of `adapter.peft_tuners`: which tensor is which part of which module.

A tuner of prompts changes no module: its tensor is assigned to a module called `prompt_embeddings`, which no base has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import TUNERS, Adapter, Meta, Rows, TunedModule, Tuner
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotUnderstoodError, refused_error
from adapterhub_converters.lazy_imports import np

from .adapter_config import CONFIG, WEIGHTS
from .adapter_config import meta as meta_of
from .tensor_keys import PREFIX

PROMPTS = "prompt_embeddings"
_CLASSIFIER = "base_model.internal_xlora_classifier.layers."  # X-LoRA's, which is no part of the model
_COPY = ".base_layer."
_ROWS, _NORMS = ".trainable_tokens_delta", ".ln_tuning_layers"


def parse(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], location: str) -> Adapter:
    """Return the adapter for a checked config whose `peft_type` is one of TUNERS, and the tensors of its file.

    Raises:
        FormatError: The tensors do not belong together.
        RefusedError: There are tensors that the tuner does not have.
    """
    tuner = TUNERS[config["peft_type"]]
    weights_location = f"{location}/{WEIGHTS}"
    _check_numbers(tuner, config, location)
    if tuner.method == "tinylora" and "base_model.tinylora_v.1" in tensors:
        problem = "which module has which tinylora_v depends on the order of the modules in peft's model, which is not saved"
        raise NotUnderstoodError(weights_location, problem)
    shared = {key.removeprefix("base_model."): tensor for key, tensor in tensors.items() if _is_shared(key, tuner)}
    modules: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, dict[str, np.ndarray]] = {"replaced": {}, "added": {}, "copy": {}}
    rows: dict[str, Rows] = {}
    unknown = []
    for key, tensor in tensors.items():
        kind, name, part = _classify(key, tuner)
        if kind == "part":
            modules.setdefault(name, {})[part] = tensor
        elif kind == "rows":
            rows[name] = _rows(name, tensor, config, location)
        elif kind in whole:
            whole[kind][name] = tensor.reshape(-1) if kind == "added" else tensor
        elif kind == "shared" and name in shared:
            if not np.array_equal(shared[name], tensor):
                raise FormatError(weights_location, f"{key} differs from {name}, which all modules share")
        else:
            unknown.append(f"tensor {key!r}: not a kind of tensor that {config['peft_type']} has")
    if unknown:
        raise refused_error(weights_location, unknown)
    _check_saved(tuner, modules, weights_location)
    tuned = {
        target: _change(target, {**_shared_by(target, tuner, shared), **parts}, config, weights_location)
        for target, parts in modules.items()
    }
    # Of X-LoRA's classifier, peft 0.21 saves a part.
    if not tuned and not rows and not any(whole.values()) and tuner.method != "xlora":
        raise FormatError(weights_location, f"there are no tensors of {config['peft_type']}")
    plain = meta_of(config)
    numbers = {key: value for key, value in _numbers(config).items() if isinstance(value, str | int | float)}
    meta = Meta(plain.base_model, plain.revision, plain.task_type, method=tuner.method, numbers=numbers)
    return Adapter({}, whole["replaced"], rows, meta, copies=whole["copy"], tuned=tuned, added=whole["added"])


def _check_numbers(tuner: Tuner, config: Mapping[str, Any], location: str) -> None:
    """Check the values of the tuner's own keys.

    Raises:
        FormatError: A value has another type than peft's default.
        NotUnderstoodError: peft computes with a value that is not known here.
    """
    numbers = {key: config.get(key, default) for key, default in tuner.numbers.items()}
    for key, default in tuner.numbers.items():
        value = numbers[key]
        if not _is_like(value, default, is_seed=key.endswith("seed")):
            raise FormatError(
                f"{location}/{CONFIG}", f'"{key}" is {str(value)[:40]}, which has the wrong type or is out of range'
            )
    if reason := tuner.refuse(numbers):
        raise NotUnderstoodError(f"{location}/{CONFIG}", reason)


def _is_like(value: object, default: object, *, is_seed: bool) -> bool:
    """Return whether a value has the type of peft's default and, unless it is a seed, is a number in range."""
    if isinstance(value, bool | str) or isinstance(default, bool | str):
        return isinstance(value, type(default)) or (isinstance(value, str) and isinstance(default, bool))
    return (value is None and default is None) or (json_file.is_number(value) and (is_seed or abs(value) <= 2**40))


def _check_saved(tuner: Tuner, modules: Mapping[str, Mapping[str, np.ndarray]], location: str) -> None:
    """Refuse an adapter of whose parts peft saved some only as the seed that made them, or in the order of its model."""
    for part, key in tuner.unsaved.items():
        if (target := next((target for target, parts in modules.items() if part not in parts), None)) or not modules:
            problem = f"{target or 'each module'}.{part} was not saved; peft makes it anew when it loads the adapter"
            raise NotUnderstoodError(location, problem, f"Save it again with {key}=True")


def _is_shared(key: str, tuner: Tuner) -> bool:
    """Return whether a tensor is shared by all modules, or by those of its category."""
    name = key.removeprefix("base_model.")
    names = (name, name.rpartition(".")[0]) if tuner.category else (name,)
    return name != key and not key.startswith(PREFIX) and any(shared_name in tuner.shared for shared_name in names)


def _shared_by(target: str, tuner: Tuner, shared: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the shared tensors that a module uses, by the tuner's names of them."""
    end = f".{tuner.category(target)}" if tuner.category else ""
    return {name: shared[name + end] for name in tuner.shared if name + end in shared}


def _classify(key: str, tuner: Tuner) -> tuple[str, str, str]:
    """Return the kind, name and part of a tensor.

    It is a `part` of a module, `shared`, `rows` of a table, `replaced`, `added` to a parameter, a `copy` of the base's, or
    `unknown`.
    """
    name, last = key.removeprefix(PREFIX), key.rpartition(".")[2]
    # RandLora saves what is shared with each module as well.
    if _is_shared(key, tuner) or last in tuner.shared:
        return "shared", key.removeprefix("base_model.") if _is_shared(key, tuner) else last, ""
    # The tensors of prompts and of X-LoRA's classifier have no module, and so no prefix.
    if beside := _beside_model(key, last, tuner):
        return beside
    is_known = key.startswith(PREFIX) and tuner.method != "xlora"
    return _of_model(name, tuner) if is_known else ("unknown", key, "")


def _of_model(name: str, tuner: Tuner) -> tuple[str, str, str]:
    """Classify a tensor of the model, by its name in it and, behind that, the tuner's own."""
    parts = {*tuner.tensor_names, *tuner.optional, *(part for variant in tuner.variants for part in variant)} - {PROMPTS}
    if part := next((part for part in parts if name.endswith(f".{part}")), ""):
        module = name.removesuffix(f".{part}")
        return ("added", f"{module}.bias", "") if tuner.method == "beft" else ("part", module, part)
    for method, kind, mark in (("trainable_tokens", "rows", _ROWS), ("ln_tuning", "replaced", _NORMS)):
        if tuner.method == method and mark in name:
            return kind, name.replace(mark, ""), ""
    saved = name.endswith((".weight", ".bias")) and "lora_" not in name  # by modules_to_save
    # peft saves a copy of the base's table beside a change of it.
    kind = "copy" if _COPY in name else "replaced" if saved else "unknown"
    return kind, name.replace(_COPY, "."), ""


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
    if all(set(parts) - {*tuner.optional} != set(names) for names in (tuner.tensor_names, *tuner.variants)):
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
    # An embedding table is never transposed.
    transposed = bool(config.get("fan_in_fan_out")) and "hira_embedding_A" not in parts
    return TunedModule(tuner, parts, _numbers(config), shared, transposed)


def _rows(table: str, tensor: np.ndarray, config: Mapping[str, Any], location: str) -> Rows:
    ids = config.get("token_indices")
    if not isinstance(ids, list) or not all(type(number) is int for number in ids):
        raise FormatError(f"{location}/{CONFIG}", '"token_indices" is not a list of token ids')
    if tensor.ndim != 2 or len(ids) != len(tensor):
        problem = f"{table}: shape {tensor.shape} are not the rows of {len(ids)} tokens"
        raise FormatError(f"{location}/{WEIGHTS}", problem)
    return Rows(tuple(ids), tensor)
