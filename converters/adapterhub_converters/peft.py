"""PEFT: `adapter_config.json` beside `adapter_model.safetensors`.

Follows peft 0.21 where it computes (`tuners/lora`): the rank is what the tensors say, the scale comes from
`lora_alpha`, `alpha_pattern` and `use_rslora`. A config key or tensor that changes the mathematics in a way not
modelled here is refused by name; keys that are null, false or empty change nothing and pass.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import json_file, safetensors_file
from .adapter import Adapter, Kept, Loss, LossReport, LowRank, LowRankEmbedding, Meta, Pair, Rows, Source, plain_pairs
from .base import BaseSpec
from .errors import FormatError, NotFoundError, RefusedError
from .patterns import matching_keys

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Keys whose every value leaves the delta alone: bookkeeping, or already settled by the tensors.
_INERT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying", "runtime_config", "bias", "lora_bias", "use_dora",
}  # fmt: skip
# Keys read below.
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
    "init_lora_weights", "trainable_token_indices",
}  # fmt: skip
# Inits that leave the base as it is (peft, `LoraConfig.init_lora_weights`).
_PLAIN_INITS = {"gaussian", "orthogonal", "eva", "mica"}


def sniff(path: Path) -> bool:
    """Whether `path` is a folder that holds a PEFT adapter."""
    config = path / CONFIG
    if not config.is_file():
        return False
    # mlx-lm uses the same file name; only PEFT's has a `peft_type`.
    return '"peft_type"' in json_file.read_text(config)


def read(path: Path, *, base: BaseSpec | None = None) -> Adapter:
    """The adapter in a PEFT folder; the base isn't needed."""
    if not (path / CONFIG).is_file():
        raise NotFoundError(str(path), f"not a PEFT adapter: there is no {CONFIG}")
    text = json_file.read_text(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        raise _no_weights(path)
    with safetensors_file.SafetensorsFile(path / WEIGHTS) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = file.header.metadata
    return parse(text, tensors, metadata, where=str(path))


def _no_weights(path: Path) -> Exception:
    pickles = sorted(item.name for item in path.glob("adapter_model*.bin"))
    if pickles:
        return RefusedError(
            str(path / pickles[0]),
            "a pickle can run code when it is loaded",
            "Save the adapter again with safe_serialization=True",
        )
    return NotFoundError(str(path), f"not a PEFT adapter: there is no {WEIGHTS}")


def parse(text: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, where: str) -> Adapter:
    """The adapter that a config's text and the tensors of its weights file make together."""
    config = json_file.parse_object(text, f"{where}/{CONFIG}")
    check_config(config, f"{where}/{CONFIG}")
    parts = _sort_tensors(tensors, f"{where}/{WEIGHTS}")
    notes: list[str] = []
    scales = _Scales(config, f"{where}/{CONFIG}", notes)
    deltas: dict[str, Pair] = {}
    for target, part in parts.pairs.items():
        deltas[target] = _delta(target, part, scales, f"{where}/{WEIGHTS}", bool(config.get("fan_in_fan_out")))
    return Adapter(
        deltas=deltas,
        replaced=parts.replaced,
        rows={target: _rows(target, values, config, where) for target, values in parts.rows.items()},
        meta=_meta(config),
        source=Source("peft", text, dict(metadata)),
        notes=tuple(notes),
    )


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that asks for mathematics not modelled here, or whose numbers make no sense."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RefusedError(where, f"peft_type {kind!r} is not read yet, only LORA")
    for key in sorted(set(config) - _INERT - _READ):
        value = config[key]
        if value not in (None, False, 0, "", [], {}):
            raise RefusedError(where, f"{key} = {json.dumps(value)[:80]} changes what the adapter computes and is not read yet")
    numbers = {
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "lora_dropout": config.get("lora_dropout") or 0,
    }
    for key, value in numbers.items():
        if not _is_number(value):
            raise FormatError(where, f'"{key}" is {json.dumps(value)[:40]}, not a number that makes sense')
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_number, value.values())):
            raise FormatError(where, f'"{key}" is not a map of patterns to numbers')
    for key, kinds in _KINDS.items():
        if not isinstance(config.get(key), kinds):
            raise FormatError(where, f'"{key}" is {json.dumps(config[key])[:40]}, not what it should be')


# What keys that are read may be; any may be null or absent.
_TEXT, _SWITCH = str | None, bool | None
_KINDS = {
    "base_model_name_or_path": _TEXT, "revision": _TEXT, "task_type": _TEXT, "use_rslora": _SWITCH,
    "fan_in_fan_out": _SWITCH, "init_lora_weights": bool | str | None,
}  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**40


class _Scales:
    """Rank and alpha of a module as peft resolves them: the first pattern of the file that matches wins."""

    def __init__(self, config: Mapping[str, Any], where: str, notes: list[str]) -> None:
        self._alpha = float(config.get("lora_alpha", 8))
        self._alphas: dict[str, float] = config.get("alpha_pattern") or {}
        self.rslora = bool(config.get("use_rslora"))
        self._where = where
        self._notes = notes

    def alpha(self, target: str) -> float:
        keys = matching_keys(self._alphas, target, self._where)
        if not keys:
            return self._alpha
        if len({self._alphas[key] for key in keys}) > 1:
            self._notes.append(
                f"{target}: alpha_pattern {keys[0]!r} and {keys[1]!r} both match and differ; peft sorts patterns when it "
                f"saves, so the first, {self._alphas[keys[0]]}, is what loading gives, not surely what was trained"
            )
        return float(self._alphas[keys[0]])


class _Parts:
    def __init__(self) -> None:
        self.pairs: dict[str, dict[str, np.ndarray]] = {}
        self.replaced: dict[str, np.ndarray] = {}
        self.rows: dict[str, np.ndarray] = {}


# Suffix of a key to the part of a pair it is (FORMATS: state-dict keys; peft, `utils/save_and_load.py`).
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "bias",
}
_ROWS = ".token_adapter.trainable_tokens_delta"


def classify(key: str) -> tuple[str, str, str]:
    """What a tensor's key says it is: `pair` (module path and part), `rows` (table), `replaced` (parameter) or `unknown`."""
    name = key.removeprefix(_PREFIX)
    if name == key:
        return "unknown", key, ""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    if suffix:
        return "pair", name.removesuffix(suffix), _SUFFIXES[suffix]
    if name.endswith(_ROWS):
        return "rows", name.removesuffix(_ROWS), ""
    if name.endswith((".weight", ".bias")) and "lora_" not in name and ".base_layer." not in name:
        return "replaced", name, ""
    return "unknown", name, ""


def _sort_tensors(tensors: Mapping[str, np.ndarray], where: str) -> _Parts:
    parts = _Parts()
    for key, tensor in tensors.items():
        kind, name, part = classify(key)
        if kind == "pair":
            parts.pairs.setdefault(name, {})[part] = tensor
        elif kind == "rows":
            parts.rows[name] = tensor
        elif kind == "replaced":
            parts.replaced[name] = tensor
        elif not key.startswith(_PREFIX):
            raise RefusedError(where, f"tensor {key!r} has no {_PREFIX} before its name")
        else:
            raise RefusedError(where, f"tensor {key!r} is of no kind that is read yet")
    return parts


def _delta(target: str, part: Mapping[str, np.ndarray], scales: _Scales, where: str, transposed_base: bool) -> Pair:
    embedding = "embedding_A" in part or "embedding_B" in part
    a_name, b_name = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for name, tensor_name in ((a_name, "lora_A"), (b_name, "lora_B")):
        if name not in part:
            raise FormatError(where, f"{target}: {tensor_name} is missing, its other half is there")
    lora_A, lora_B = part[a_name], part[b_name]
    if lora_A.ndim != 2 or lora_B.ndim != 2:
        raise RefusedError(where, f"{target}: lora_A of {lora_A.ndim} dimensions (a convolution) is not read yet")
    if 0 in lora_A.shape or 0 in lora_B.shape:
        raise FormatError(where, f"{target}: an empty tensor, as ZeRO-3 saves when weights were not gathered")
    if lora_A.shape[0] != lora_B.shape[1]:
        raise FormatError(where, f"{target}: lora_A {lora_A.shape} and lora_B {lora_B.shape} do not share a rank")
    alpha = scales.alpha(target)
    if embedding:
        if len(part) > 2:
            raise RefusedError(where, f"{target}: DoRA or a bias on an embedding is not read yet")
        return LowRankEmbedding(lora_A, lora_B, alpha, scales.rslora)
    return LowRank(lora_A, lora_B, alpha, scales.rslora, part.get("magnitude"), part.get("bias"), transposed_base)


def _rows(target: str, values: np.ndarray, config: Mapping[str, Any], where: str) -> Rows:
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, dict):
        ids = next((ids for key, ids in indices.items() if target == key or target.endswith("." + key)), None)
    else:
        ids = indices
    if not isinstance(ids, list) or len(ids) != len(values) or not all(isinstance(number, int) for number in ids):
        raise FormatError(f"{where}/{CONFIG}", f'"trainable_token_indices" does not name the {len(values)} rows of {target}')
    return Rows(tuple(ids), values)


def _meta(config: Mapping[str, Any]) -> Meta:
    init = config.get("init_lora_weights", True)
    return Meta(
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        task_type=config.get("task_type") or None,
        dropout=float(config.get("lora_dropout") or 0.0),
        init=str(init) if residual_init(init) else "default",
    )


def residual_init(init: object) -> bool:
    """Whether an `init_lora_weights` took part of the base into the factors, so that the delta needs the initial ones."""
    return not (isinstance(init, bool) or init is None or (isinstance(init, str) and init in _PLAIN_INITS))


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write a PEFT folder into the existing, empty folder `path`: the source's own bytes where they came from PEFT."""
    text = adapter.source.config if adapter.source and adapter.source.format == "peft" else config_text(adapter)
    metadata = adapter.source.metadata if adapter.source and adapter.source.format == "peft" else {"format": "pt"}
    tensors = state_dict(adapter)
    safetensors_file.write(path / WEIGHTS, tensors, metadata)
    json_file.write_text(path / CONFIG, text)
    return LossReport(tuple(Kept(name, Loss.EXACT) for name in sorted(tensors)), adapter.notes)


def state_dict(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors under the names peft saves them by."""
    tensors: dict[str, np.ndarray] = {}
    for target, delta in plain_pairs(adapter).items():
        stem = _PREFIX + target
        if isinstance(delta, LowRankEmbedding):
            tensors[f"{stem}.lora_embedding_A"] = delta.lora_A
            tensors[f"{stem}.lora_embedding_B"] = delta.lora_B
            continue
        tensors[f"{stem}.lora_A.weight"] = delta.lora_A
        tensors[f"{stem}.lora_B.weight"] = delta.lora_B
        if delta.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = delta.magnitude
        if delta.bias is not None:
            tensors[f"{stem}.lora_B.bias"] = delta.bias
    tensors.update({_PREFIX + name: tensor for name, tensor in adapter.replaced.items()})
    for target, rows in adapter.rows.items():
        tensors[f"{_PREFIX}{target}.token_adapter.trainable_tokens_delta"] = rows.values
    return tensors


def config_text(adapter: Adapter) -> str:
    """An `adapter_config.json` that peft reads back to the same function, laid out as peft lays it out.

    Targets are full paths and patterns are whole, escaped paths, so that neither a deeper base nor the order of
    keys, which peft loses when it saves, can change which module gets which rank and alpha.
    """
    deltas = plain_pairs(adapter)
    rslora = {delta.rslora for delta in deltas.values()}
    if len(rslora) > 1:
        raise RefusedError("peft", "some modules scale by rsLoRA and some do not; PEFT has one switch for all")
    transposed = {delta.transposed_base for delta in deltas.values() if isinstance(delta, LowRank)}
    if len(transposed) > 1:
        raise RefusedError("peft", "some bases are stored transposed and some are not; PEFT has one switch for all")
    r = _most_common(delta.r for delta in deltas.values())
    alpha = _most_common(delta.alpha for delta in deltas.values())
    linear = [delta for delta in deltas.values() if isinstance(delta, LowRank)]
    config = {
        "alpha_pattern": {_exactly(t): _number(d.alpha) for t, d in deltas.items() if d.alpha != alpha},
        "base_model_name_or_path": adapter.meta.base_model,
        "bias": "none",
        "fan_in_fan_out": transposed == {True},
        "inference_mode": True,
        "init_lora_weights": True if adapter.meta.init == "default" else adapter.meta.init,
        "lora_alpha": _number(alpha),
        "lora_bias": any(delta.bias is not None for delta in linear),
        "lora_dropout": adapter.meta.dropout,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.replaced}) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {_exactly(target): delta.r for target, delta in deltas.items() if delta.r != r},
        "revision": adapter.meta.revision,
        "target_modules": sorted(deltas),
        "task_type": adapter.meta.task_type,
        "trainable_token_indices": {target: list(rows.ids) for target, rows in adapter.rows.items()} or None,
        "use_dora": any(delta.magnitude is not None for delta in linear),
        "use_rslora": rslora == {True},
    }
    return json.dumps(config, indent=2, sort_keys=True)


def _most_common(values: Any) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value)) if counts else 8


def _exactly(target: str) -> str:
    # peft matches `(.*\.)?(KEY)$` against the path; ^ inside would pin nothing more, the path is whole already.
    return re.escape(target)


def _number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
