"""Reading of an mlx-lm folder as an `Adapter`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import FULL, MAX_EXPERTS, Adapter, Delta, LowRank, LowRankEmbedding, Meta
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, NotUnderstoodError, RefusedError
from adapterhub_converters.formats import peft, source_config
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.lazy_dataclass import dataclass

from . import full_tuning
from .folder_layout import CONFIG, RANKS, WEIGHTS, payload_digest
from .module_names import expert_number, expert_place, in_base

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_HEAD = "lm_head"
_VLM_SCALE = "of mlx-vlm, which scales by alpha / rank; its first versions multiplied by alpha itself"


def read(path: Path | Candidate, *, base: BaseSpec | None = None) -> Adapter:
    """Return the adapter in an mlx-lm folder: the source's own if its config is in the file.

    Without a source's config, a delta on the embedding table needs `base`, which tells whether it acts on the output layer too.
    """
    candidate = Candidate.of(path)
    path, config_name = candidate.path, f"{candidate.path}/{CONFIG}"
    text = candidate.config or json_file.read_text(path / CONFIG)
    config, by_vlm = _normalize_vlm_config(json_file.parse_object(text, config_name), config_name)
    is_whole = config.get("fine_tune_type") == FULL
    scale = 0.0 if is_whole else _scale(config, config_name)
    if not (path / WEIGHTS).is_file():
        raise NotFoundError(str(path), f"not an mlx-lm adapter: there is no {WEIGHTS}", code="no-adapter")
    location = f"{path}/{WEIGHTS}"
    with candidate.file(WEIGHTS).open_safetensors() as file:
        tensors = {_mlx_lm_name(name) if by_vlm else name: file.tensor(name) for name in file.tensors}
        metadata = file.header.metadata
    if is_whole:
        return full_tuning.read(config, tensors, location, base)
    modules = _modules(tensors, location, dora=config.get("fine_tune_type") == "dora")
    if source_config.matches_payload(metadata, payload_digest(config, tensors, metadata)):
        return _restore(metadata, modules, scale, location)
    rank = config["lora_parameters"].get("rank")
    deltas: dict[str, Delta] = {}
    for name, module in modules.items():
        r = module.lora_A.shape[-2]
        if r != rank or module.lora_B.shape[-1] != r:
            shapes = f"lora_a {module.shapes[0]}, lora_b {module.shapes[1]}"
            raise FormatError(location, f"{name}: {shapes} but rank {rank}")
        deltas |= _read_module(name, module, scale * r, base, location)
    model = config.get("model")
    meta = Meta(base_model=model if isinstance(model, str) and model else None)
    notes = [source_config.IGNORED] if source_config.has_source_config(metadata) else []
    notes += [_VLM_SCALE] if by_vlm else []
    deltas = {in_base(target, base): delta for target, delta in deltas.items()}
    return peft.stack_transposed_experts(Adapter(deltas, meta=meta, notes=tuple(notes)), base)


def _normalize_vlm_config(config: dict[str, Any], location: str) -> tuple[dict[str, Any], bool]:
    """Return a config in mlx-lm's form, and whether it was one of mlx-vlm's own, which has only `rank` and `alpha`."""
    if "lora_parameters" in config or "fine_tune_type" in config:
        return config, False
    rank, alpha = config.get("rank"), config.get("alpha")
    if not json_file.is_integer(rank) or not 0 < rank < 2**20:
        raise FormatError(location, f'"rank" is {json.dumps(rank)[:40]}, not a rank')
    if not json_file.is_number(alpha):
        raise FormatError(location, f'"alpha" is {json.dumps(alpha)[:40]}, not a number')
    return {"lora_parameters": {"rank": rank, "scale": alpha / rank}}, True


def _mlx_lm_name(name: str) -> str:
    module, _, half = name.rpartition(".")
    return f"{module}.lora_{half.lower()}" if half in ("A", "B") else name


@dataclass(frozen=True, eq=False)
class _Module:
    """A module of the file: its factors in the canonical form (three-dimensional if stacked), and its magnitude."""

    lora_A: np.ndarray
    lora_B: np.ndarray
    magnitude: np.ndarray | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


def _read_module(name: str, module: _Module, alpha: float, base: BaseSpec | None, location: str) -> dict[str, Delta]:
    if module.lora_A.ndim == 3:
        place = expert_place(name)
        if not place:
            raise RefusedError(location, f"{name}: the names of these experts in Hugging Face's model are not known")
        experts, part = place
        return {
            f"{experts}.{e}.{part}": LowRank(lora_A, lora_B, alpha)
            for e, (lora_A, lora_B) in enumerate(zip(module.lora_A, module.lora_B, strict=True))
        }
    if not name.endswith("embed_tokens"):
        return {name: LowRank(module.lora_A, module.lora_B, alpha, magnitude=module.magnitude)}
    if module.magnitude is not None:
        raise RefusedError(location, f"{name}: DoRA on an embedding table is not supported")
    if base is None:
        reason = "mlx-lm also applies it to the output layer if the base ties the two"
        raise RefusedError(location, f"{name}: {reason}", "Name its base model", code="base-required")
    deltas: dict[str, Delta] = {name: LowRankEmbedding(module.lora_A, module.lora_B, alpha)}
    # mlx-lm then computes the output with the table's own module, adapter included.
    if base.tied:
        deltas[_HEAD] = LowRank(np.ascontiguousarray(module.lora_B.T), np.ascontiguousarray(module.lora_A.T), alpha)
    return deltas


def _scale(config: Mapping[str, Any], location: str) -> float:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise NotUnderstoodError(location, f"fine_tune_type {str(kind)[:40]!r} is not supported, only lora, dora and full")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(location, "there are no lora_parameters")
    scale = parameters.get("scale")
    if not json_file.is_number(scale) or not math.isfinite(scale) or abs(scale) > 2**40:
        raise FormatError(location, f'"scale" is {json.dumps(scale)[:40]}, not a number in range')
    return float(scale)


def _modules(tensors: Mapping[str, np.ndarray], location: str, *, dora: bool) -> dict[str, _Module]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        target, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b", "m"):
            raise RefusedError(location, f"tensor {name!r} is not a lora_a, lora_b or m, and not supported")
        wrong_ndim = array.ndim not in ((1,) if part == "m" else (2, 3))
        if wrong_ndim or 0 in array.shape or dtypes.name_of(array.dtype) not in dtypes.FLOATS:
            raise FormatError(location, f"tensor {name!r} is {array.dtype} {array.shape}, which is not a factor")
        parts.setdefault(target, {})[part] = array
    return {target: _module(target, part, location, dora=dora) for target, part in sorted(parts.items())}


def _module(target: str, part: Mapping[str, np.ndarray], location: str, *, dora: bool) -> _Module:
    missing = [name for name in ("lora_a", "lora_b") if name not in part]
    if missing:
        raise FormatError(location, f"{target} has {next(iter(part))} alone; its counterpart is missing")
    lora_a, lora_b, magnitude = part["lora_a"], part["lora_b"], part.get("m")
    if lora_a.ndim != lora_b.ndim or (lora_a.ndim == 3 and (len(lora_a) != len(lora_b) or len(lora_a) > MAX_EXPERTS)):
        raise FormatError(location, f"{target}: lora_a {lora_a.shape} and lora_b {lora_b.shape} are not a pair")
    if (magnitude is not None) != dora or (magnitude is not None and lora_a.ndim == 3):
        raise FormatError(location, f"{target}: {'m is missing in a DoRA' if dora else 'there is an m in a LoRA'} adapter")
    transposed = [array if array.ndim == 3 else np.ascontiguousarray(array.T) for array in (lora_a, lora_b)]
    if magnitude is not None and magnitude.shape != transposed[1].shape[:1]:
        raise FormatError(
            location, f"{target}: m {magnitude.shape} is not one number for each of {transposed[1].shape[0]} rows"
        )
    return _Module(transposed[0], transposed[1], magnitude, (lora_a.shape, lora_b.shape))


def _restore(metadata: Mapping[str, Any], modules: Mapping[str, _Module], scale: float, location: str) -> Adapter:
    lines = source_config.parse_lines(metadata, location)
    ranks = json_file.parse_object(str(metadata.get(RANKS, "{}")), f"{location}: {RANKS}")
    if not all(json_file.is_integer(r) and r > 0 for r in ranks.values()):
        raise FormatError(location, f"{RANKS} is not a map of modules to ranks")
    # Every pair of the file must be accounted for: a config that skips one would hide part of the function.
    used: set[tuple[str, int]] = set()

    def pair(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        name, expert = line.stem, expert_number(line.target)
        module = modules.get(name)
        if module is None or expert >= (len(module.lora_A) if module.lora_A.ndim == 3 else 1):
            raise FormatError(location, f"adapterhub.source.tensors names {line.target!r}, which is not in the file")
        used.add((name, expert))
        lora_A, lora_B = module.lora_A, module.lora_B
        if lora_A.ndim == 3:
            lora_A, lora_B = lora_A[expert], lora_B[expert]
        r = ranks.get(line.target, lora_A.shape[0])
        if r > lora_A.shape[0] or lora_A[r:].tobytes().strip(b"\0") or lora_B[:, r:].tobytes().strip(b"\0"):
            raise FormatError(location, f"{line.target}: it is not a pair of rank {r} padded with zeros")
        return np.ascontiguousarray(lora_A[:r]), np.ascontiguousarray(lora_B[:, :r])

    adapter = source_config.restore_adapter(metadata, lines, pair, lambda _: scale, location)
    for name, module in modules.items():
        for expert in range(len(module.lora_A) if module.lora_A.ndim == 3 else 1):
            if (name, expert) not in used and (module.lora_A.ndim == 2 or module.lora_B[expert].tobytes().strip(b"\0")):
                raise FormatError(
                    location, f"adapterhub.source.tensors lacks {name!r}, which has a delta", source_config.CONVERT_AGAIN
                )
    targets = {line.stem: line.target for line in lines}
    magnitudes = {targets[name]: module.magnitude for name, module in modules.items() if module.magnitude is not None}
    return source_config.with_magnitudes(adapter, magnitudes)
