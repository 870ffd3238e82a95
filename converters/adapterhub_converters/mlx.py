"""mlx-lm's adapters: `adapter_config.json` beside `adapters.safetensors`.

mlx-lm adds `scale * (x @ lora_a) @ lora_b` with `lora_a` `(in, r)` and `lora_b` `(r, out)`, one scale and one rank for
the whole file (mlx-lm, `tuner/lora.py`, `tuner/utils.py`), and names modules as Hugging Face does. Modules that need
another scale have the difference multiplied into `lora_b`. The source's config rides in the header's metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import dtypes, json_file, rider, safetensors_file, scales
from .adapter import Adapter, Kept, Loss, LossReport, LowRank, LowRankEmbedding, Meta, Pair, plain_pairs
from .base import BaseSpec
from .errors import FormatError, NotFoundError, RefusedError, refused
from .names import in_layer

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
_TOP = ("model.embed_tokens", "lm_head")


def sniff(path: Path) -> bool:
    """Whether `path` is a folder that holds an mlx-lm adapter."""
    config = path / CONFIG
    if not config.is_file():
        return False
    text = json_file.read_text(config)
    return '"peft_type"' not in text and ('"lora_parameters"' in text or '"fine_tune_type"' in text)


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write into the existing, empty folder `path`; RefusedError names what mlx-lm cannot say."""
    problems = _problems(adapter, tied=base is not None and base.tied)
    if problems:
        raise refused("mlx", problems)
    needed = {target: delta.scaling for target, delta in adapter.deltas.items()}
    plan = scales.plan(needed, np.dtype(np.float64), "scale") or scales.Plan(0.0, dict.fromkeys(needed, 1.0))
    tensors: dict[str, np.ndarray] = {}
    kept: list[Kept] = []
    lines: list[rider.Line] = []
    ulps: list[np.ndarray] = []
    for target, delta in sorted(plain_pairs(adapter).items()):
        folded = scales.folded(f"{target}.lora_B", delta.lora_B, plan.factors[target])
        tensors[f"{target}.lora_a"] = np.ascontiguousarray(delta.lora_A.T)
        tensors[f"{target}.lora_b"] = np.ascontiguousarray(folded.lora_B.T)
        kept += [Kept(f"{target}.lora_A", Loss.EXACT), folded.kept]
        ulps += [] if folded.ulps is None else [folded.ulps]
        lines.append(
            rider.Line(target, target, plan.factors[target], dtypes.name_of(delta.lora_B.dtype), 0, folded.ulps is not None)
        )
    config = _config(adapter, plan.common)
    digest = _payload_digest(config, tensors)
    safetensors_file.write(path / WEIGHTS, tensors, {"format": "mlx", **rider.keys(adapter, lines, digest, ulps)})
    json_file.write_text(path / CONFIG, json.dumps(config, indent=4))
    return LossReport(tuple(kept), (*adapter.notes, *plan.notes))


def _problems(adapter: Adapter, *, tied: bool) -> list[str]:
    found = [] if adapter.deltas else ["there is no low-rank delta to write"]
    if adapter.meta.init != "default":
        found.append(f"its factors began as {adapter.meta.init}, which changed the base when training began")
    found += [f"{name}: a replaced parameter cannot be said in an mlx-lm adapter" for name in sorted(adapter.replaced)]
    found += [f"{target}: replaced rows cannot be said in an mlx-lm adapter" for target in sorted(adapter.rows)]
    for target, delta in sorted(plain_pairs(adapter).items()):
        if isinstance(delta, LowRank) and not delta.plain:
            found.append(f"{target}: DoRA or a bias cannot be said in an mlx-lm LoRA adapter")
        if in_layer(target) is None and target not in _TOP:
            found.append(f"{target}: not a module whose name mlx-lm is known to share")
        if tied and target == "lm_head":
            found.append(f"{target}: a model that ties it to the embedding table has none in mlx-lm")
        if isinstance(delta, LowRankEmbedding) != (target == _TOP[0]) or (isinstance(delta, LowRank) and delta.transposed_base):
            found.append(f"{target}: an embedding or transposed module where mlx-lm has none")
    ranks = sorted({delta.r for delta in adapter.deltas.values()})
    if len(ranks) > 1:
        found.append(f"ranks {', '.join(map(str, ranks))}: an mlx-lm adapter has one rank for all modules")
    return found


def _config(adapter: Adapter, scale: float) -> dict[str, Any]:
    rank = next(iter(adapter.deltas.values())).r
    keys = sorted({in_layer(target) or target for target in adapter.deltas})
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        # -1 is all layers; those without a delta get one of zero when mlx-lm loads the file.
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.meta.dropout, "keys": keys},
    }
    return config | ({"model": adapter.meta.base_model} if adapter.meta.base_model else {})


def _payload_digest(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """Digest of all that decides what mlx-lm computes."""
    facts = {key: config.get(key) for key in ("fine_tune_type", "num_layers", "lora_parameters")}
    return rider.payload_digest(dict(sorted(tensors.items())), json.dumps(facts, sort_keys=True))


def read(path: Path, *, base: BaseSpec | None = None) -> Adapter:
    """The adapter in an mlx-lm folder: the source's own where its config rode along. The base isn't needed."""
    config = json_file.read_object(path / CONFIG)
    scale = _scale(config, f"{path}/{CONFIG}")
    if not (path / WEIGHTS).is_file():
        raise NotFoundError(str(path), f"not an mlx-lm adapter: there is no {WEIGHTS}")
    where = f"{path}/{WEIGHTS}"
    with safetensors_file.SafetensorsFile(path / WEIGHTS) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = file.header.metadata
    pairs = _pairs(tensors, where)
    if rider.belongs(metadata, _payload_digest(config, tensors)):
        return _ridden(metadata, pairs, scale, where)
    rank = config["lora_parameters"].get("rank")
    deltas: dict[str, Pair] = {}
    for target, (lora_A, lora_B) in pairs.items():
        r = lora_A.shape[0]
        if r != rank or lora_B.shape[1] != r:
            raise FormatError(where, f"{target}: lora_a {lora_A.shape[::-1]}, lora_b {lora_B.shape[::-1]} but rank {rank}")
        kind = LowRankEmbedding if target.endswith("embed_tokens") else LowRank
        deltas[target] = kind(lora_A, lora_B, scale * r)
    model = config.get("model")
    meta = Meta(base_model=model if isinstance(model, str) and model else None)
    return Adapter(deltas, meta=meta, notes=(rider.IGNORED,) if rider.there(metadata) else ())


def _scale(config: Mapping[str, Any], where: str) -> float:
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise RefusedError(where, f"fine_tune_type {str(kind)[:40]!r} is not read yet, only lora")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(where, "there are no lora_parameters")
    scale = parameters.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or abs(scale) > 2**40:
        raise FormatError(where, f'"scale" is {json.dumps(scale)[:40]}, not a number that makes sense')
    return float(scale)


def _pairs(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Target to `lora_A` and `lora_B`, turned to the canonical orientation."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        target, _, half = name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            raise RefusedError(where, f"tensor {name!r} is no half of a low-rank pair (.m would be DoRA) and is not read yet")
        if array.ndim != 2 or 0 in array.shape or dtypes.name_of(array.dtype) not in dtypes.FLOATS:
            raise RefusedError(where, f"tensor {name!r}: {array.dtype} {array.shape} (experts?) is not read yet")
        halves.setdefault(target, {})[half] = np.ascontiguousarray(array.T)
    for target, pair in halves.items():
        if len(pair) < 2:
            raise FormatError(where, f"{target} has {next(iter(pair))} alone, its other half is missing")
    return {target: (pair["lora_a"], pair["lora_b"]) for target, pair in sorted(halves.items())}


def _ridden(
    metadata: Mapping[str, Any], pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], scale: float, where: str
) -> Adapter:
    lines = rider.lines_of(metadata, where)
    if {line.target for line in lines} != set(pairs):
        raise FormatError(where, "the source's list of tensors is not that of the file")
    return rider.restored(metadata, lines, lambda line: pairs[line.target], lambda _: scale, where)
