"""Tinker's archives (Thinking Machines), which are almost PEFT folders.

Their config says `all-linear`, or only `r` and `lora_alpha`. All experts of a layer are one tensor `experts.w1`, `w2` or `w3`
`(experts, r, in)`, one half of which may be shared by all experts (`(1, r, in)`); the output layer is `unembed_tokens`; q, k
and v of Qwen3.5's linear attention are trained separately, and gpt-oss's attention is called `attn` (tinker-cookbook 0.6,
`weights/_adapter.py`, `weights/_merge_*.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import MAX_EXPERTS, Adapter, Delta, LowRank, Meta, factored_deltas
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats.candidate import Candidate

from .adapter_config import CONFIG, WEIGHTS
from .stacks import stack_transposed_experts
from .tensor_keys import PREFIX
from .tinker_names import is_archive

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_EXPERTS = safe_regex.Pattern(r"(.+\.experts)\.(w1|w2|w3)")
_ATTENTION = safe_regex.Pattern(r"(.+)\.attn\.([qkvo]_proj)")
_SPLIT = safe_regex.Pattern(r"(.+\.linear_attn)\.in_proj_([qkv])")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_HEAD = "model.unembed_tokens"
Pair = tuple[np.ndarray, np.ndarray]
Pairs = dict[str, Pair]


def sniff(candidate: Candidate) -> bool:
    """Return whether a folder is an archive of Tinker, judging by its config and its tensor names."""
    return is_archive(candidate.config, lambda: candidate.file(WEIGHTS).tensors)


def read(path: Path | Candidate, *, base: BaseSpec | None = None) -> Adapter:
    """Return the adapter in an archive, under the names that the model has in transformers.

    Args:
        path: The folder.
        base: The base model, whose experts may be in stacks and whose text model may be under a prefix.

    Raises:
        FormatError: The archive is malformed.
        RefusedError: A part of it cannot be expressed for this base.
    """
    candidate = Candidate.of(path)
    path = candidate.path
    config = json_file.parse_object(candidate.config or json_file.read_text(path / CONFIG), f"{path}/{CONFIG}")
    r, alpha = (_number(config, key, f"{path}/{CONFIG}") for key in ("r", "lora_alpha"))
    if r < 1:
        raise FormatError(f"{path}/{CONFIG}", f'"r" is {r:g}')
    location = f"{path}/{WEIGHTS}"
    with candidate.file(WEIGHTS).open_safetensors() as file:
        pairs = _pairs({name: file.tensor(name) for name in file.tensors}, location)
    deltas: dict[str, Delta] = {}
    scale, named_pairs = alpha / r, _transformers_pairs(pairs, location)
    _check_shared(named_pairs, location)
    for target, (lora_A, lora_B) in sorted(named_pairs.items()):
        name = _name_in_whole_model(target, base)
        if match := _EXPERTS.fullmatch(name):
            deltas |= _experts(match[1], match[2], (lora_A, lora_B), scale, base)
        elif lora_A.ndim != 2:
            raise FormatError(location, f"{target}: lora_A {lora_A.shape} is neither a matrix nor a stack for experts")
        else:
            deltas[name] = LowRank(lora_A, lora_B, scale * len(lora_A))
    base_model = config.get("base_model_name_or_path")
    meta = Meta(
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        task_type="CAUSAL_LM",
        parameters=sum(half.size for pair in pairs.values() for half in pair),
    )
    notes = ("an archive of Tinker, read under the names of transformers",)
    return stack_transposed_experts(Adapter(deltas, meta=meta, notes=notes), base)


def _number(config: Mapping[str, Any], key: str, location: str) -> float:
    value = config.get(key)
    if not json_file.is_number(value) or abs(value) > 2**40:
        raise FormatError(location, f'"{key}" is not a number in range')
    return float(value)


def _pairs(tensors: Mapping[str, np.ndarray], location: str) -> Pairs:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        module, dot, half = name.removesuffix(".weight").rpartition(".lora_")
        if not dot or half not in ("A", "B") or not module.startswith(PREFIX) or array.ndim not in (2, 3):
            raise RefusedError(location, f"tensor {name!r} is not half of a pair, and not supported in an archive of Tinker")
        halves.setdefault(module.removeprefix(PREFIX), {})[half] = array
    pairs: Pairs = {}
    for module, parts in halves.items():
        if len(parts) < 2:
            raise FormatError(location, f"{module} has lora_{next(iter(parts))} alone; its counterpart is missing")
        lora_A, lora_B = parts["A"], parts["B"]
        if lora_A.size == lora_B.size == 0:  # the gate of experts that have none
            continue
        if lora_A.ndim != lora_B.ndim or lora_A.shape[-2] != lora_B.shape[-1] or 0 in (*lora_A.shape, *lora_B.shape):
            raise FormatError(location, f"{module}: lora_A {lora_A.shape} and lora_B {lora_B.shape} do not share a rank")
        pairs[module] = lora_A, lora_B
    return pairs


def _check_shared(pairs: Pairs, location: str) -> None:
    """Raise RefusedError if halves shared by all experts would become far more numbers, with one copy per expert."""
    stored_size = sum(half.size for pair in pairs.values() for half in pair)
    stacks = [pair for pair in pairs.values() if pair[0].ndim == 3]
    expanded_size = sum(max(map(len, pair)) * sum(half[0].size for half in pair) for pair in stacks)
    factored_deltas.check_growth(stored_size, expanded_size, location)


def _transformers_pairs(pairs: Pairs, location: str) -> Pairs:
    """Return the pairs by transformers' names, in which q, k and v of a linear attention are one module."""
    by_name: Pairs = {}
    linear_attention: dict[str, Pairs] = {}
    for target, pair in pairs.items():
        if part := _SPLIT.fullmatch(target):
            linear_attention.setdefault(part[1], {})[part[2]] = pair
        elif attention := _ATTENTION.fullmatch(target):
            by_name[f"{attention[1]}.self_attn.{attention[2]}"] = pair
        else:
            by_name["lm_head" if target == _HEAD else target] = pair
    for module, parts in linear_attention.items():
        if missing := sorted(set("qkv") - set(parts)):
            raise RefusedError(location, f"{module}: in_proj_{missing[0]} has no delta, and its rows are not known without it")
        by_name[f"{module}.in_proj_qkv"] = _block_diagonal([parts[part] for part in "qkv"], module)
    return by_name


def _block_diagonal(pairs: list[Pair], location: str) -> Pair:
    """Return one pair for modules whose rows follow each other; pairs of experts, which have a leading axis, work as well."""
    if len({(lora_A.shape[:-2], lora_A.shape[-1], lora_B.shape[:-2]) for lora_A, lora_B in pairs}) > 1:
        raise FormatError(location, "parts of one module have other columns, or another number of experts, than the rest")
    lora_A = np.concatenate([lora_A for lora_A, _ in pairs], axis=-2)
    rows, columns = (sum(lora_B.shape[axis] for _, lora_B in pairs) for axis in (-2, -1))
    lora_B = np.zeros((*pairs[0][1].shape[:-2], rows, columns), np.result_type(*(lora_B for _, lora_B in pairs)))
    row = column = 0
    for _, part in pairs:
        lora_B[..., row : row + part.shape[-2], column : column + part.shape[-1]] = part
        row, column = row + part.shape[-2], column + part.shape[-1]
    return lora_A, lora_B


def _name_in_whole_model(target: str, base: BaseSpec | None) -> str:
    """Return the name that a module of the text model has in the whole model."""
    is_nested = base is not None and any(name.startswith("model.language_model.") for name in base.tensors)
    return target.replace("model.", "model.language_model.", 1) if is_nested and target.startswith("model.layers.") else target


def _experts(module: str, part: str, pair: Pair, scale: float, base: BaseSpec | None) -> dict[str, Delta]:
    """Return the deltas of all experts of a layer, each with its own pair; a half with one expert belongs to every expert."""
    lora_A, lora_B = pair
    if lora_A.ndim != 3:
        raise FormatError(module, f"{part}: lora_A {lora_A.shape} is not a stack for all experts")
    count = max(len(lora_A), len(lora_B))
    if {len(lora_A), len(lora_B)} - {1, count} or count > MAX_EXPERTS:
        raise FormatError(module, f"{part}: {len(lora_A)} and {len(lora_B)} experts")
    lora_A, lora_B = (np.ascontiguousarray(np.broadcast_to(factor, (count, *factor.shape[1:]))) for factor in (lora_A, lora_B))
    alpha = scale * lora_A.shape[1]
    names = {"w1": "up_proj", "w2": "down_proj"} if base is not None and base.model_type == "nemotron_h" else _PARTS
    return {f"{module}.{e}.{names[part]}": LowRank(lora_A[e], lora_B[e], alpha) for e in range(count)}
