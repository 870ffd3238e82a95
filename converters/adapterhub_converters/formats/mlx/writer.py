"""Writing of an `Adapter` as an mlx-lm folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import (
    MAX_EXPERTS,
    Adapter,
    Delta,
    Loss,
    LossReport,
    LowRank,
    LowRankEmbedding,
    StackedLowRank,
    TensorLoss,
    problems_beyond_deltas,
)
from adapterhub_converters.architectures.architecture import text_name
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import refused_error
from adapterhub_converters.formats import file_alpha, source_config
from adapterhub_converters.lazy_dataclass import dataclass

from .folder_layout import CONFIG, RANKS, WEIGHTS, payload_digest
from .module_names import Names

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_EMBED, _HEAD = "model.embed_tokens", "lm_head"
_TOP = (_EMBED, _HEAD)


@dataclass(frozen=True, eq=False)
class _WrittenPair:
    """One pair of the file, with its factors in the file's orientation; `lines` is empty if the way back is not exact."""

    name: str
    lora_a: np.ndarray
    lora_b: np.ndarray
    lines: tuple[source_config.Line, ...]
    losses: tuple[TensorLoss, ...]
    ulps: tuple[np.ndarray, ...] = ()


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write into the existing, empty folder `path`; RefusedError names what mlx-lm cannot express or does not have."""
    problems = _problems(adapter, base)
    if problems:
        raise refused_error("mlx", problems)
    names = Names(base)
    ranks = {target: delta.r for target, delta in adapter.deltas.items()}
    # The file has one rank, to which all smaller pairs are padded.
    rank = max(ranks.values())
    scales = {target: delta.scaling for target, delta in adapter.deltas.items()}
    plan = file_alpha.plan(scales, np.dtype(np.float64), "scale") or file_alpha.Plan(0.0, dict.fromkeys(scales, 1.0))
    written = list(_all_pairs(_written_deltas(adapter, base), plan, rank, names, experts=_expert_count(base)))
    tensors: dict[str, np.ndarray] = {}
    losses: list[TensorLoss] = []
    for pair in written:
        tensors[f"{pair.name}.lora_a"], tensors[f"{pair.name}.lora_b"] = pair.lora_a, pair.lora_b
        losses += pair.losses
    for target, magnitude in _magnitudes(adapter).items():
        tensors[f"{names.module(text_name(target))}.m"] = np.ascontiguousarray(magnitude.reshape(-1))
        losses.append(TensorLoss(f"{target}.magnitude", Loss.EXACT))
    config = _config(adapter, written, plan.common, rank)
    metadata = {"format": "mlx"}
    notes = [*adapter.notes, *plan.notes]
    if len(adapter.deltas) == sum(len(pair.lines) for pair in written):
        lines = [line for pair in written for line in pair.lines]
        padded_ranks = {target: r for target, r in sorted(ranks.items()) if r != rank}
        metadata |= {RANKS: json.dumps(padded_ranks, separators=(",", ":"))} if padded_ranks else {}
        digest = payload_digest(config, tensors, metadata)
        metadata |= source_config.keys(adapter, lines, digest, [ulps for pair in written for ulps in pair.ulps])
    else:
        notes.append("the source's config is not stored, as stacked and tied deltas are expressed differently here")
    safetensors_file.write(path / WEIGHTS, tensors, metadata)
    json_file.write_text(path / CONFIG, json.dumps(config, indent=4))
    return LossReport(tuple(losses), tuple(notes))


def _problems(adapter: Adapter, base: BaseSpec | None) -> list[str]:
    reasons = problems_beyond_deltas(adapter, "an mlx-lm adapter")
    dora, names = bool(_magnitudes(adapter)), Names(base)
    reasons += [names.unknown_reason] if names.unknown_reason else []
    for target, delta in sorted(adapter.deltas.items()):
        delta_reasons = (
            *_delta_problems(text_name(target), delta, names, dora=dora),
            *_table_problems(text_name(target), adapter, base),
        )
        reasons += [f"{target}: {reason}" for reason in delta_reasons]
    return reasons + list(_stack_problems(adapter, names))


def _delta_problems(target: str, delta: Delta, names: Names, *, dora: bool) -> Iterator[str]:
    if names.unknown_reason:
        return
    if isinstance(delta, StackedLowRank):
        if not names.parameter(target):
            yield "a delta of stacked experts that mlx-lm is not known to have under this name"
        elif target.endswith("gate_up_proj") and (delta.shape[1] % 2 or (delta.transposed_base and not names.is_known)):
            yield "the base decides whether gate and up alternate in experts that are stored (in, out): name it"
        if dora:
            yield "mlx-lm has no DoRA for experts"
    elif isinstance(delta, LowRank | LowRankEmbedding):
        yield from _part_problems(target, delta, names, dora=dora)
        yield from _name_problems(target, delta, names)
    else:
        yield f"a delta of kind {type(delta).__name__} cannot be expressed in an mlx-lm adapter"


def _part_problems(target: str, delta: LowRank | LowRankEmbedding, names: Names, *, dora: bool) -> Iterator[str]:
    if isinstance(delta, LowRank) and delta.bias is not None:
        yield "a bias cannot be expressed in an mlx-lm adapter"
    if isinstance(delta, LowRankEmbedding) and delta.magnitude is not None:
        yield "DoRA on an embedding table is not supported"
    elif dora and (delta.magnitude is None or names.expert(target)):
        yield "an mlx-lm adapter is DoRA in all its modules or in none, and never in experts"


def _name_problems(target: str, delta: LowRank | LowRankEmbedding, names: Names) -> Iterator[str]:
    if not names.module(target) and not names.expert(target):
        yield "not a module that mlx-lm is known to have under this name, or takes an adapter on"
    if isinstance(delta, LowRankEmbedding) != (target == _EMBED) or (isinstance(delta, LowRank) and delta.transposed_base):
        yield "an embedding or transposed module, which mlx-lm does not have here"


def _table_problems(target: str, adapter: Adapter, base: BaseSpec | None) -> Iterator[str]:
    """Yield the problem with a delta on a table that the base may tie to its output layer."""
    if target not in _TOP:
        return
    same_delta = _same_on_both(adapter)
    if base is None and target == _EMBED and _HEAD not in adapter.deltas:
        yield "mlx-lm also applies it to the output layer if the base ties the two: name the base, whose config has that"
    elif base is not None and base.tied and not same_delta:
        yield "the base ties embedding table and output layer, for which mlx-lm has one delta"


def _same_on_both(adapter: Adapter) -> bool:
    """Return whether the embedding table and the output layer have the same delta, bit for bit."""
    deltas = {text_name(target): delta for target, delta in adapter.deltas.items()}
    embed, head = deltas.get(_EMBED), deltas.get(_HEAD)
    return (
        isinstance(embed, LowRankEmbedding)
        and isinstance(head, LowRank)
        and head.plain
        and embed.scaling == head.scaling
        and embed.lora_A.dtype == head.lora_B.dtype
        and embed.lora_B.dtype == head.lora_A.dtype
        and embed.lora_A.shape == head.lora_B.shape[::-1]
        and embed.lora_B.shape == head.lora_A.shape[::-1]
        and np.ascontiguousarray(embed.lora_A.T).tobytes() == np.ascontiguousarray(head.lora_B).tobytes()
        and np.ascontiguousarray(embed.lora_B.T).tobytes() == np.ascontiguousarray(head.lora_A).tobytes()
    )


def _stack_problems(adapter: Adapter, names: Names) -> Iterator[str]:
    """Yield problems with experts that have to become one tensor."""
    groups = _expert_groups(adapter.deltas, names)
    for name, members in sorted(groups.items()):
        if len({(delta.lora_A.shape[1], delta.lora_B.shape[0]) for delta in members.values()}) > 1:
            yield f"{name}: its experts are of different shapes"
        elif len({delta.lora_A.dtype for delta in members.values()}) > 1:
            yield f"{name}: its experts are of different dtypes"
    stacked_names = [name for target in adapter.deltas for name in names.parameter(text_name(target))]
    for name in sorted(set(stacked_names) & set(groups)):
        yield f"{name}: there are both a stacked delta and deltas of single experts"


def _expert_groups(deltas: Mapping[str, Delta], names: Names) -> dict[str, dict[int, LowRank]]:
    groups: dict[str, dict[int, LowRank]] = {}
    for target, delta in deltas.items():
        switch = names.expert(text_name(target))
        if switch and isinstance(delta, LowRank):
            groups.setdefault(switch[0], {})[switch[1]] = delta
    return groups


def _expert_count(base: BaseSpec | None) -> int | None:
    if base is None:
        return None
    count = base.config.get("num_local_experts") or base.config.get("num_experts")
    return count if isinstance(count, int) and 0 < count <= MAX_EXPERTS else None


def _magnitudes(adapter: Adapter) -> dict[str, np.ndarray]:
    return {
        target: delta.magnitude
        for target, delta in sorted(adapter.deltas.items())
        if isinstance(delta, LowRank) and delta.magnitude is not None
    }


def _written_deltas(adapter: Adapter, base: BaseSpec | None) -> dict[str, Delta]:
    """Return the deltas to write: if the base ties the two tables, the embedding's delta serves both."""
    tied = base is not None and base.tied
    return {t: delta for t, delta in sorted(adapter.deltas.items()) if not (tied and text_name(t) == _HEAD)}


def _all_pairs(
    deltas: Mapping[str, Delta], plan: file_alpha.Plan, rank: int, names: Names, *, experts: int | None
) -> Iterator[_WrittenPair]:
    groups: dict[str, dict[int, tuple[str, LowRank]]] = {}
    for target, delta in deltas.items():
        text = text_name(target)
        switch, name = names.expert(text), names.module(text)
        if isinstance(delta, StackedLowRank):
            yield from _stacked_pairs(target, delta, plan.factors[target], rank, names)
        elif switch and isinstance(delta, LowRank):
            groups.setdefault(switch[0], {})[switch[1]] = (target, delta)
        elif name and isinstance(delta, LowRank | LowRankEmbedding):
            yield _write_pair(name, target, delta, plan.factors[target], rank)
    for name, members in sorted(groups.items()):
        yield _expert_pair(name, members, plan, rank, experts)


def _write_pair(name: str, target: str, delta: LowRank | LowRankEmbedding, factor: float, rank: int) -> _WrittenPair:
    folded = file_alpha.fold(f"{target}.lora_B", delta.lora_B, factor)
    lora_a, lora_b = file_alpha.pad(delta.lora_A.T, rank, 1), file_alpha.pad(folded.lora_B.T, rank, 0)
    losses: tuple[TensorLoss, ...] = (TensorLoss(f"{target}.lora_A", Loss.EXACT), folded.loss)
    if delta.r != rank:
        losses = tuple(file_alpha.padded_loss(line, rank) for line in losses)
    ulps = () if folded.ulps is None else (folded.ulps,)
    line = source_config.Line(name, target, factor, dtypes.name_of(delta.lora_B.dtype), 0, folded.ulps is not None)
    return _WrittenPair(name, lora_a, lora_b, (line,), losses, ulps)


def _expert_pair(
    name: str, members: Mapping[int, tuple[str, LowRank]], plan: file_alpha.Plan, rank: int, count: int | None
) -> _WrittenPair:
    """Return the experts of one module as one pair of stacked factors; experts without a delta get zeros."""
    # Without a config of the base, the last expert with a delta bounds their number.
    count = max(count or 0, max(members) + 1)
    pairs = {e: _write_pair(name, target, delta, plan.factors[target], rank) for e, (target, delta) in sorted(members.items())}
    lora_a = [pairs[e].lora_a.T if e in pairs else None for e in range(count)]
    lora_b = [pairs[e].lora_b.T if e in pairs else None for e in range(count)]
    return _WrittenPair(
        name,
        _stack(lora_a),
        _stack(lora_b),
        tuple(line for pair in pairs.values() for line in pair.lines),
        tuple(line for pair in pairs.values() for line in pair.losses),
        tuple(ulps for pair in pairs.values() for ulps in pair.ulps),
    )


def _stack(arrays: list[np.ndarray | None]) -> np.ndarray:
    present = [array for array in arrays if array is not None]
    # Different dtypes become float32, as do factors that a scale was multiplied into.
    dtype = present[0].dtype if len({array.dtype for array in present}) == 1 else dtypes.F32
    stacked = np.zeros((len(arrays), *present[0].shape), dtype)
    for index, array in enumerate(arrays):
        if array is not None:
            stacked[index] = array
    return stacked


def _stacked_pairs(target: str, delta: StackedLowRank, factor: float, rank: int, names: Names) -> Iterator[_WrittenPair]:
    modules = names.parameter(text_name(target))
    folded = file_alpha.fold(f"{target}.lora_B", delta.lora_B, factor)
    lora_a, lora_b = file_alpha.pad(delta.lora_A, rank, 1), file_alpha.pad(folded.lora_B, rank, 2)
    rows = lora_b.shape[1] // len(modules)
    losses = (TensorLoss(f"{target}.lora_A", Loss.REWRITTEN, f"as {' and '.join(modules)}"), folded.loss)
    for n, name in enumerate(modules):
        row_slice = slice(n, None, len(modules)) if names.alternating else slice(n * rows, (n + 1) * rows)
        part = np.ascontiguousarray(lora_b[:, row_slice])
        yield _WrittenPair(name, lora_a, part, (), losses if n == 0 else ())


def _config(adapter: Adapter, written: list[_WrittenPair], scale: float, rank: int) -> dict[str, Any]:
    keys = sorted({_key(pair.name) for pair in written})
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if _magnitudes(adapter) else "lora",
        # -1 means all layers; mlx-lm fills those without a delta with zeros when it loads the file.
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.meta.dropout, "keys": keys},
    }
    return config | ({"model": adapter.meta.base_model} if adapter.meta.base_model else {})


def _key(name: str) -> str:
    """Return a module's entry in `keys`: its path within a layer, or its whole name outside the layers."""
    _, _, path = name.partition(".layers." if ".layers." in name else ".h.")
    return path.partition(".")[2] or name
