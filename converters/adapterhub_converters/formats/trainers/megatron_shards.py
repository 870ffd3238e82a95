"""Assembly of a Megatron checkpoint from its shards, one folder each: `mp_rank_TT`, `mp_rank_TT_PPP`, `mp_rank_TT_PPP_EEE`.

Megatron splits a matrix over its tensor ranks, its layers over the pipeline ranks and its experts over the expert
ranks, and each rank counts its own layers and experts from 0 (Megatron-Core, `training/checkpointing.py`,
`get_checkpoint_name`). `linear_in` before a column-parallel module and every `linear_out` are split by rows,
`linear_in` before a row-parallel one by columns (Megatron-Bridge, `peft/utils.py`, `ParallelLinearAdapter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapterhub_converters import safe_regex
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import FormatError, RefusedError

from . import fused_layers

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_RANK = safe_regex.Pattern(r"mp_rank_([0-9]{2})(?:_([0-9]{3}))?(?:_([0-9]{3}))?")
_LAYER = safe_regex.Pattern(r"(decoder\.layers\.)([0-9]{1,6})(\..+)")
_EXPERT = safe_regex.Pattern(r"(.*\.local_experts\.)([0-9]{1,5})(\..+)")
_WRAPPER_PREFIX = safe_regex.Pattern(r"^(?:module\.|model\.)+")

_SAME_CHECKPOINT_HINT = "Take all shards from one checkpoint"
Rank = tuple[int, int, int]
"""The indices of a rank among the tensor, pipeline and expert ranks."""


def files(path: Path) -> dict[Rank, Path]:
    """Return the safetensors file of each rank's folder."""
    file_by_rank: dict[Rank, Path] = {}
    for folder in sorted(path.iterdir()) if path.is_dir() else ():
        match = _RANK.fullmatch(folder.name)
        inside = sorted(folder.glob("*.safetensors")) if match and folder.is_dir() else []
        if match and inside:
            if len(inside) > 1:
                raise RefusedError(str(folder), f"{inside[0].name} and {inside[1].name} are two files of one rank")
            file_by_rank[int(match[1]), int(match[2] or 0), int(match[3] or 0)] = inside[0]
    return file_by_rank


def without_wrappers(tensors: Mapping[str, np.ndarray], location: str) -> dict[str, np.ndarray]:
    """Return the tensors without the `module.` that wrappers put before names."""
    by_name = {_WRAPPER_PREFIX.sub("", name): array for name, array in tensors.items()}
    if len(by_name) < len(tensors):
        raise FormatError(location, "a tensor exists both with and without module. before its name")
    return by_name


def expert_count(base: BaseSpec) -> int:
    """Return the number of experts in a layer of the base."""
    return fused_layers.positive_number(base, "num_experts" if "num_experts" in base.config else "num_local_experts")


def gather(path: Path, base: BaseSpec) -> dict[str, np.ndarray]:
    """Return all tensors of the shards in the folder `path`, complete and under their names in the whole model."""
    shards = files(path)
    for folder in path.iterdir():
        if _RANK.fullmatch(folder.name) and folder.is_dir() and not any(file.parent == folder for file in shards.values()):
            raise FormatError(str(folder), "has no safetensors file, but the other ranks have one")
    sizes = tuple(max(rank[place] for rank in shards) + 1 for place in range(3))
    # A missing shard might otherwise be noticed only by wrong shapes, or not at all.
    missing = [
        (tp, pp, ep)
        for tp in range(sizes[0]) for pp in range(sizes[1]) for ep in range(sizes[2])
        if (tp, pp, ep) not in shards
    ]  # fmt: skip
    if missing:
        raise FormatError(
            str(path), f"the shard of mp_rank_{missing[0][0]:02}_{missing[0][1]:03}_{missing[0][2]:03} is missing"
        )
    read = {rank: _tensors(file) for rank, file in shards.items()}
    gathered_tensors: dict[str, np.ndarray] = {}
    for pp in range(sizes[1]):
        for ep in range(sizes[2]):
            ranks = [read[tp, pp, ep] for tp in range(sizes[0])]
            if len({frozenset(rank) for rank in ranks}) > 1:
                name = min(frozenset.union(*map(frozenset, ranks)) - frozenset.intersection(*map(frozenset, ranks)))
                problem = f"{name}: some tensor ranks of pipeline rank {pp} have it, and others do not"
                raise FormatError(str(path), problem, _SAME_CHECKPOINT_HINT)
            stage = {name: _join_shards(name, [rank[name] for rank in ranks], str(path)) for name in ranks[0]}
            layer_numbers, expert_numbers = _numbers(stage, _LAYER), _numbers(stage, _EXPERT)
            layer_offset = (
                _offset(layer_numbers, (pp, sizes[1]), fused_layers.positive_number(base, "num_hidden_layers"), "layers")
                if layer_numbers
                else 0
            )
            expert_offset = _offset(expert_numbers, (ep, sizes[2]), expert_count(base), "experts") if expert_numbers else 0
            for name, array in stage.items():
                _add(
                    gathered_tensors,
                    _shift_number(_shift_number(name, _LAYER, layer_offset), _EXPERT, expert_offset),
                    array,
                    stacks=sizes[2] > 1,
                    location=str(path),
                )
    return gathered_tensors


def _tensors(file: Path) -> dict[str, np.ndarray]:
    with safetensors_file.SafetensorsFile(file) as opened:
        return without_wrappers({name: opened.tensor(name) for name in opened.tensors}, str(file))


def _join_shards(name: str, parts: Sequence[np.ndarray], location: str) -> np.ndarray:
    """Return one tensor joined from its shards on all tensor ranks."""
    if len(parts) == 1:
        return parts[0]
    columns = name.endswith(".linear_in.weight") and (".linear_proj." in name or ".linear_fc2." in name)
    axis = parts[0].ndim - (1 if columns else 2)
    kinds = {(part.dtype, part.ndim, part.shape[:axis], part.shape[axis + 1 :]) for part in parts}
    if len(kinds) > 1 or parts[0].ndim not in (2, 3):
        shards = " and ".join(dict.fromkeys(f"{part.dtype} {part.shape}" for part in parts))
        raise FormatError(location, f"{name}: its shards, {shards}, are not parts of one matrix", _SAME_CHECKPOINT_HINT)
    if name.endswith(".linear_fc1.adapter.linear_out.weight"):
        if any(part.shape[axis] % 2 for part in parts):
            raise FormatError(location, f"{name}: a shard cannot be split into gate and up")
        # Each rank has its rows of gate above its rows of up; all of gate must come first in the whole matrix.
        halves = [np.split(part, 2, axis) for part in parts]
        return np.concatenate([half[place] for place in (0, 1) for half in halves], axis)
    return np.concatenate(list(parts), axis)


def _numbers(stage: Mapping[str, np.ndarray], pattern: safe_regex.Pattern) -> list[int]:
    return [int(match[2]) for name in stage if (match := pattern.fullmatch(name))]


def _offset(numbers: Sequence[int], rank: tuple[int, int], total: int, noun: str) -> int:
    """Return the number to add to a rank's layers or experts; 0 if the rank uses the numbers of the whole model already."""
    per_rank, remainder = divmod(total, rank[1])
    if remainder:
        reason = f"{total} {noun} cannot be divided evenly among {rank[1]} ranks"
        raise RefusedError(f"rank {rank[0]}", reason)
    if all(number < per_rank for number in numbers):
        return rank[0] * per_rank
    if all(rank[0] * per_rank <= number < (rank[0] + 1) * per_rank for number in numbers):
        return 0
    reason = f"it has {noun} {min(numbers)} to {max(numbers)}, but each rank has {per_rank} of {total}"
    raise FormatError(f"rank {rank[0]} of {rank[1]}", reason)


def _shift_number(name: str, pattern: safe_regex.Pattern, by: int) -> str:
    match = pattern.fullmatch(name)
    return f"{match[1]}{int(match[2]) + by}{match[3]}" if match and by else name


def _add(gathered_tensors: dict[str, np.ndarray], name: str, array: np.ndarray, *, stacks: bool, location: str) -> None:
    existing = gathered_tensors.get(name)
    if existing is None:
        gathered_tensors[name] = array
    elif stacks and ".mlp.experts.linear_fc" in name:
        # One matrix for each expert: they become one stack. One matrix for all experts of a rank has no equivalent.
        if array.ndim != 3 or existing.ndim != 3:
            raise RefusedError(location, f"{name}: each expert rank has one delta for its experts, which is not supported")
        gathered_tensors[name] = np.concatenate([existing, array])
    elif existing.dtype != array.dtype or existing.shape != array.shape or existing.tobytes() != array.tobytes():
        raise FormatError(location, f"{name}: two ranks have it with different values", _SAME_CHECKPOINT_HINT)
