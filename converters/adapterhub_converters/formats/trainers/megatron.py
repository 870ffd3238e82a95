"""Megatron's adapters, as Megatron-Bridge and NeMo 2 name them: `….linear_qkv.adapter.linear_in.weight`, whole or in shards.

Queries, keys and values are one module whose rows are group after group of heads, gate and up are one module of the two
after one another, and one `linear_in` serves both or all three (LoRA); or each has its own, `adapter_q` to `adapter_up`
(CanonicalLoRA). Follows Megatron-Bridge 067f987 (`models/conversion/peft_bridge.py`, `param_mapping.py`, `peft/utils.py`).
A folder of `mp_rank_00_001` has the parts of each rank: of tensors (each half of gate and up on each), of layers, which count
from 0 on each rank, and of experts. Its scale is alpha / dim, and `run_config.yaml` says both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters.adapter import Adapter, Delta, LossReport, LowRank
from adapterhub_converters.architectures import names
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import FormatError, RefusedError, refused
from adapterhub_converters.formats import source_config

from . import fused, megatron_shards

_CLASSES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
)  # fmt: skip
# Where the experts of a layer are, and what their gate, up and down are called.
_EXPERTS = {
    "MixtralForCausalLM": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "Qwen2MoeForCausalLM": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "Qwen3MoeForCausalLM": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
_KEY = re.compile(
    r"(?:decoder\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.)?"
    r"(?P<path>self_attention\.linear_(?:qkv|proj)|output_layer"
    r"|mlp\.(?:experts\.(?:local_experts\.(?P<expert>0|[1-9][0-9]{0,4})\.)?)?linear_fc[12])"
    r"\.adapter(?:\.(?P<own>adapter_(?:q|k|v|gate|up)))?\.linear_(?P<half>in|out)\.weight"
)
_OPTIONS_FILE = "run_config.yaml"


def sniff(path: Path) -> bool:
    """Whether `path` is a safetensors file with Megatron's names of factors, or a folder of shards with them."""
    if path.is_dir():
        return any(_ours(name) for file in megatron_shards.files(path).values() for name in fused.names_in(file))
    return any(map(_ours, fused.names_in(path)))


def _ours(name: str) -> bool:
    return name.endswith(".linear_in.weight") and ".adapter." in name


# --- writing


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`, of LoRA where q, k and v share their `lora_A`, and gate and up; else of CanonicalLoRA."""
    base = fused.known_base(base, "megatron", "Megatron", (*_CLASSES, *_EXPERTS))
    found = fused.problems(adapter, "Megatron", (*MODULES, *_expert_kinds(base)), dora=False, tied=base.tied)
    if found:
        raise refused("megatron", found)
    shared, groups = _shares(adapter), _groups(base)

    def named(target: str) -> tuple[str, names.Order]:
        order = groups if shared and place(fused.kind_of(target)).path == QKV else 0
        return _stem(target, shared=shared), order

    made = fused.fuse(adapter, named, lambda rows, _: rows, whole=True)
    tensors: dict[str, np.ndarray] = {}
    for stem, targets in _by_stem(made, shared=shared).items():
        pairs = [made.pairs[target] for target in targets]
        tensors[f"{stem}.linear_in.weight"] = pairs[0].lora_A
        rows = np.concatenate([pair.lora_B for pair in pairs]) if len(pairs) > 1 else pairs[0].lora_B
        if len(pairs) == 3:
            _check_rows(targets, pairs, base)
            rows = names.unpermuted(rows, groups)
        tensors[f"{stem}.linear_out.weight"] = rows
    settings: dict[str, Any] = {
        "dim": made.rank,
        "alpha": int(made.alpha),
        "peft": "lora" if shared else "canonical_lora",
        "target_modules": sorted({_target_module(target, shared=shared) for target in made.pairs}),
    }
    fused.write(path, tensors, adapter, made, settings)
    of_experts = any(".experts." in target for target in made.pairs)
    said = ", ".join(
        f"{key}={value}" for key, value in (settings | ({"moe_grouped_gemm": False} if of_experts else {})).items()
    )
    return LossReport(made.kept, (*made.notes, f"Megatron has to be told: {said}"))


def _expert_kinds(base: BaseSpec) -> Iterator[str]:
    """The kinds of module that the experts of a base are."""
    if base.architecture in _EXPERTS:
        listed, ends = _EXPERTS[base.architecture]
        yield from (f"{listed}.{expert}.{end}" for expert in range(megatron_shards.experts(base)) for end in ends)


def _groups(base: BaseSpec) -> tuple[int, int]:
    """How many groups of heads there are, and how many queries one has."""
    queries, keys, _ = fused.heads(base)
    return keys, queries // keys


def _check_rows(targets: list[str], pairs: list[fused.Pair], base: BaseSpec) -> None:
    for target, pair in zip(targets, pairs, strict=True):
        wanted = fused.shape(base, fused.kind_of(target))
        if (len(pair.lora_B), pair.lora_A.shape[1]) != wanted:
            raise RefusedError(target, f"({len(pair.lora_B)}, {pair.lora_A.shape[1]}), the base has {wanted}")


Parts = list[tuple[str, LowRank]]


def _shares(adapter: Adapter) -> bool:
    """Whether each fused module has all of its parts, with one `lora_A`, or none of them."""
    parts: dict[str, Parts] = {}
    for target, delta in adapter.deltas.items():
        if place(fused.kind_of(target)).parts > 1 and isinstance(delta, LowRank):
            parts.setdefault(_stem(target, shared=True), []).append((target, delta))
    return all(map(_is_one, parts.values()))


def _is_one(own: Parts) -> bool:
    """Whether these are all the parts of a module, of one `lora_A` and one scale; gate and up are as many rows."""
    there = place(fused.kind_of(own[0][0]))
    factors = {(delta.lora_A.dtype, delta.lora_B.dtype, delta.lora_A.shape, delta.lora_A.tobytes()) for _, delta in own}
    even = there.path == QKV or len({delta.shape for _, delta in own}) == 1
    return even and len(own) == there.parts and len(factors) == 1 and len({delta.scaling for _, delta in own}) == 1


def _by_stem(made: fused.FusedAdapter, *, shared: bool) -> dict[str, list[str]]:
    def order(target: str) -> tuple[int, str, int]:
        there = place(fused.kind_of(target))
        return names.layer_of(target) or 0, there.path, there.part

    stems: dict[str, list[str]] = {}
    for target in sorted(made.pairs, key=order):
        stems.setdefault(_stem(target, shared=shared), []).append(target)
    return stems


def _stem(target: str, *, shared: bool) -> str:
    there, layer = place(fused.kind_of(target)), names.layer_of(target)
    own = f".{there.own}" if there.own and not shared else ""
    return f"{'' if layer is None else f'decoder.layers.{layer}.'}{there.path}.adapter{own}"


def _target_module(target: str, *, shared: bool) -> str:
    """What its option `target_modules` calls it."""
    there = place(fused.kind_of(target))
    if shared or not there.own:
        return there.path.rpartition(".")[2]
    part = there.own.removeprefix("adapter_")
    return f"linear_{part}" if there.path == QKV else f"linear_fc1_{part}"


# --- reading


def read(path: Path, *, base: BaseSpec | None = None, alpha: float | None = None) -> Adapter:
    """The adapter of a file or of a folder of shards; without what rides along, with a `base` that says the heads."""
    if path.is_dir():
        base = fused.known_base(base, str(path), "Megatron", (*_CLASSES, *_EXPERTS))
        file = fused.file_of(str(path), megatron_shards.gathered(path, base), {})
    else:
        file = fused.opened(path)
    if file.ridden:
        return _ridden(file, fused.settled_alpha(file, "alpha", {}, alpha), base)
    notes, file = file.notes, replace(file, tensors=megatron_shards.unwrapped(file.tensors, file.where), metadata={})
    base = fused.known_base(base, file.where, "Megatron", (*_CLASSES, *_EXPERTS))
    beside = _beside(path)
    number = fused.settled_alpha(file, "alpha", beside, alpha)
    deltas: dict[str, Delta] = {}
    for module in _modules(file):
        if not module.match["path"].startswith("mlp.experts."):
            fused.check_rank(file, module.stem, module.lora_A.shape[0], beside.get("r"))
        for target, one_A, one_B in _split(file, module, base):
            if target in deltas:
                raise FormatError(file.where, f"{module.stem}: there is another delta of {target}")
            deltas[target] = LowRank(*fused.pair(module.stem, one_A, one_B, file.where), number)
            _check_shape(file, target, one_A, one_B, base)
    found = fused.adapter_of(file, dict(sorted(deltas.items())), base)
    return replace(found, notes=(*notes, *_ending(path, found, base)))


def _ending(path: Path, adapter: Adapter, base: BaseSpec) -> Iterator[str]:
    """A word where shards end before the base's layers do: a missing last one leaves no other trace."""
    last = max((names.layer_of(target) or 0 for target in adapter.deltas), default=0) + 1
    layers = fused.number(base, "num_hidden_layers")
    if path.is_dir() and last < layers:
        yield f"layers {last} to {layers - 1} have no delta: is the shard of the last pipeline rank missing?"


@dataclass(frozen=True, eq=False)
class _Module:
    """A module of the file: the name before its factors, the parts of that name, and the factors."""

    stem: str
    match: re.Match[str]
    lora_A: np.ndarray
    lora_B: np.ndarray


def _beside(path: Path) -> dict[str, float]:
    """alpha and dim of the options that Megatron-Bridge leaves in the folder of a checkpoint or in the one above it."""
    folders = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
    found = next((folder / _OPTIONS_FILE for folder in folders if (folder / _OPTIONS_FILE).is_file()), None)
    return fused.numbers(fused.scalars(found, "peft"), r="dim", alpha="alpha") if found else {}


def _modules(file: fused.File) -> list[_Module]:
    stems: dict[str, dict[str, re.Match[str]]] = {}
    odd = []
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if not match or (match["layer"] is None) != (match["path"] == "output_layer"):
            odd.append(f"tensor {name!r}: no module that Megatron is known to have a LoRA on here")
        else:
            stems.setdefault(name.removesuffix(f".linear_{match['half']}.weight"), {})[match["half"]] = match
    if odd:
        raise refused(file.where, odd)
    for stem, halves in stems.items():
        if len(halves) < 2:
            raise FormatError(file.where, f"{stem} has linear_{min(halves)} alone, its other half is missing")
    return [
        _Module(stem, halves["in"], *(file.tensors[f"{stem}.linear_{half}.weight"] for half in ("in", "out")))
        for stem, halves in sorted(stems.items())
    ]


def _split(file: fused.File, module: _Module, base: BaseSpec) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each target of a module, with its own pair."""
    path, own, layer = module.match["path"], module.match["own"], module.match["layer"]
    if path.startswith("mlp.experts."):
        yield from _experts(file, module, base)
        return
    prefix = f"model.layers.{layer}." if layer else ""
    kinds = [kind for kind, name in MODULES.items() if name == path]
    if own:
        kind = next((kind for kind in kinds if OWN.get(kind) == own), None)
        if kind is None:
            raise FormatError(file.where, f"{module.stem}: {path} has no {own}")
        yield prefix + kind, module.lora_A, module.lora_B
        return
    fused.pair(module.stem, module.lora_A, module.lora_B, file.where)
    for kind, rows in _fused_rows(file, module, base).items():
        yield prefix + kind, module.lora_A, rows


def _fused_rows(file: fused.File, module: _Module, base: BaseSpec) -> dict[str, np.ndarray]:
    path, lora_B = module.match["path"], module.lora_B
    kinds = [kind for kind, name in MODULES.items() if name == path]
    sizes = [fused.shape(base, kind)[0] for kind in kinds]
    if sum(sizes) != len(lora_B):
        what = f"{len(lora_B)} rows, those of this base are {sum(sizes)}: is a shard missing?"
        raise FormatError(file.where, f"{module.stem}: {what}")
    if path == QKV:
        lora_B = names.permuted(lora_B, _groups(base))
    ends = np.cumsum(sizes).tolist()
    return {k: np.ascontiguousarray(lora_B[end - size : end]) for k, size, end in zip(kinds, sizes, ends, strict=True)}


def _experts(file: fused.File, module: _Module, base: BaseSpec) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The deltas of one expert, or of all: a matrix is shared by all of them, a stack has one for each."""
    match, stem = module.match, module.stem
    if base.architecture not in _EXPERTS:
        raise RefusedError(file.where, f"{stem}: {base.architecture} is not known to have experts")
    listed, (gate, up, down) = _EXPERTS[base.architecture]
    own = {"adapter_gate": gate, "adapter_up": up}.get(match["own"] or "")
    if match["own"] and (own is None or not match["expert"] or not match["path"].endswith("fc1")):
        raise RefusedError(file.where, f"{stem}: Megatron is not known to have {match['own']} there")
    count = megatron_shards.experts(base)
    chosen = [int(match["expert"])] if match["expert"] else list(range(count))
    stacks = [array for array in (module.lora_A, module.lora_B) if array.ndim == 3]
    if max(chosen) >= count or any(len(array) != count for array in stacks) or (stacks and match["expert"]):
        shapes = f"{module.lora_A.shape} and {module.lora_B.shape}"
        raise FormatError(file.where, f"{stem}: {shapes} are not those of {count} experts")
    for expert in chosen:
        one_A, one_B = (array[expert] if array.ndim == 3 else array for array in (module.lora_A, module.lora_B))
        fused.pair(stem, one_A, one_B, file.where)
        prefix = f"model.layers.{match['layer']}.{listed}.{expert}."
        if own or match["path"].endswith("fc2"):
            yield prefix + (own or down), one_A, one_B
            continue
        half, odd = divmod(len(one_B), 2)
        if odd:
            raise FormatError(file.where, f"{stem}: {len(one_B)} rows are not those of gate and up")
        yield prefix + gate, one_A, np.ascontiguousarray(one_B[:half])
        yield prefix + up, one_A, np.ascontiguousarray(one_B[half:])


def _check_shape(file: fused.File, target: str, lora_A: np.ndarray, lora_B: np.ndarray, base: BaseSpec) -> None:
    if ".experts." in target:
        return
    found, wanted = (lora_B.shape[0], lora_A.shape[1]), fused.shape(base, fused.kind_of(target))
    if found != wanted:
        raise FormatError(file.where, f"{target}: its delta is {found}, the base has {wanted}: is a shard missing?")


def _ridden(file: fused.File, alpha: float, base: BaseSpec | None) -> Adapter:
    shared = file.settings.get("peft") == "lora"
    blocks: dict[str, dict[int, int]] = {}
    for line in source_config.lines_of(file.metadata, file.where):
        there = place_of(fused.kind_of(line.target))
        if there is None or line.stem != _stem(line.target, shared=shared) or line.block is None:
            raise FormatError(file.where, f"the source's list of tensors calls {line.target!r} {line.stem[:80]!r}")
        if isinstance(line.order, tuple) != (shared and there.path == QKV) or (isinstance(line.order, int) and line.order):
            raise FormatError(file.where, f"the source's list of tensors has {line.target!r} in the order {line.order}")
        if base is not None and isinstance(line.order, tuple) and line.order != _groups(base):
            raise RefusedError(file.where, f"{line.target}: its rows are those of {line.order[0]} groups, the base has others")
        blocks.setdefault(line.stem, {})[there.part] = line.block.rows

    def padded(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        lora_A = file.tensor(f"{line.stem}.linear_in.weight")
        rows = file.tensor(f"{line.stem}.linear_out.weight")
        part, own = place(fused.kind_of(line.target)).part, blocks[line.stem]
        if not names.divides(line.order, len(rows)) or sum(own.values()) != len(rows):
            raise FormatError(file.where, f"{line.target}: {len(rows)} rows are not those the source's list says")
        rows = names.permuted(rows, line.order)
        start = sum(size for other, size in own.items() if other < part)
        return fused.pair(line.stem, lora_A, rows[start : start + own[part]], file.where)

    return fused.restored(file, padded, alpha=alpha, tail=".linear_out.weight")


# ---- What Megatron calls the modules of a layer, and which of a fused module's parts each of the base's is


QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
MODULES = {
    "self_attn.q_proj": QKV, "self_attn.k_proj": QKV, "self_attn.v_proj": QKV,
    "self_attn.o_proj": "self_attention.linear_proj", "mlp.gate_proj": FC1, "mlp.up_proj": FC1,
    "mlp.down_proj": "mlp.linear_fc2", "lm_head": "output_layer",
}  # fmt: skip
PARTS = {QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), FC1: ("mlp.gate_proj", "mlp.up_proj")}
OWN = {
    "self_attn.q_proj": "adapter_q", "self_attn.k_proj": "adapter_k", "self_attn.v_proj": "adapter_v",
    "mlp.gate_proj": "adapter_gate", "mlp.up_proj": "adapter_up",
}  # fmt: skip
_EXPERT = re.compile(
    r"(?:mlp|block_sparse_moe)\.experts\.(0|[1-9][0-9]{0,4})\.(?:(gate_proj|w1)|(up_proj|w3)|(?:down_proj|w2))"
)


@dataclass(frozen=True)
class Place:
    """Where a module of the base is: its path in a layer, which part of how many it is there, and CanonicalLoRA's word."""

    path: str
    part: int
    parts: int
    own: str


def place_of(kind: str) -> Place | None:
    """Of `self_attn.q_proj`, `lm_head` or `mlp.experts.3.up_proj`; None of what Megatron is not known to have a LoRA on."""
    if expert := _EXPERT.fullmatch(kind):
        gate, up = expert[2], expert[3]
        path = f"mlp.experts.local_experts.{expert[1]}.linear_fc{1 if gate or up else 2}"
        return Place(path, 1 if up else 0, 2 if gate or up else 1, "adapter_gate" if gate else "adapter_up" if up else "")
    if kind not in MODULES:
        return None
    path = MODULES[kind]
    parts = PARTS.get(path, (kind,))
    return Place(path, parts.index(kind), len(parts), OWN.get(kind, ""))


def place(kind: str) -> Place:
    """The same of a kind that has one; else RefusedError."""
    found = place_of(kind)
    if found is None:
        raise RefusedError(kind, "no module that Megatron is known to have a LoRA on")
    return found
