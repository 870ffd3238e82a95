"""Megatron's adapters, as Megatron-Bridge and NeMo 2 name them: `….linear_qkv.adapter.linear_in.weight`, whole or in shards.

Queries, keys and values are one module, whose rows are group after group of heads; gate and up are one module, in
this order. With LoRA, one `linear_in` serves all parts of a module; with CanonicalLoRA each has its own, `adapter_q`
to `adapter_up`. Follows Megatron-Bridge 067f987 (`models/conversion/peft_bridge.py`, `param_mapping.py`,
`peft/utils.py`, `peft/canonical_lora.py`). A folder of `mp_rank_00_001` has the shards of each rank
(`megatron_shards`). The scale is alpha / dim, both of which are in `run_config.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import linear
from adapterhub_converters.adapter import Adapter, Delta, LossReport, LowRank
from adapterhub_converters.architectures import names
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import FormatError, RefusedError, refused
from adapterhub_converters.formats import source_config
from adapterhub_converters.formats.candidate import Candidate

from . import fused, megatron_shards

_CLASSES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
)  # fmt: skip
# The path of a layer's experts, and the names of their gate, up and down projections.
_EXPERTS = {
    "MixtralForCausalLM": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "Qwen2MoeForCausalLM": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "Qwen3MoeForCausalLM": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
_KEY = linear.Pattern(
    r"(?:decoder\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.)?"
    r"(?P<path>self_attention\.linear_(?:qkv|proj)|output_layer"
    r"|mlp\.(?:experts\.(?:local_experts\.(?P<expert>0|[1-9][0-9]{0,4})\.)?)?linear_fc[12])"
    r"\.adapter(?:\.(?P<own>adapter_(?:q|k|v|gate|up)))?\.linear_(?P<half>in|out)\.weight"
)
_OPTIONS_FILE = "run_config.yaml"


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a safetensors file with Megatron's names of factors, or a folder of shards with them."""
    if candidate.is_file:
        return any(map(_ours, candidate.tensors))
    shards = megatron_shards.files(candidate.path).values()
    return any(_ours(name) for file in shards for name in Candidate(file).tensors)


def _ours(name: str) -> bool:
    return name.endswith(".linear_in.weight") and ".adapter." in name


# ---- Writing


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`: as LoRA if the parts of each fused module share their `lora_A`, else as CanonicalLoRA."""
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
    options = ", ".join(
        f"{key}={value}" for key, value in (settings | ({"moe_grouped_gemm": False} if of_experts else {})).items()
    )
    return LossReport(made.losses, (*made.notes, f"Megatron needs the options {options}"))


def _expert_kinds(base: BaseSpec) -> Iterator[str]:
    """Yield the kinds of modules of the base's experts."""
    if base.architecture in _EXPERTS:
        listed, ends = _EXPERTS[base.architecture]
        yield from (f"{listed}.{expert}.{end}" for expert in range(megatron_shards.experts(base)) for end in ends)


def _groups(base: BaseSpec) -> tuple[int, int]:
    """Return the number of groups of heads, and the number of queries in each."""
    queries, keys, _ = fused.heads(base)
    return keys, queries // keys


def _check_rows(targets: list[str], pairs: list[fused.Pair], base: BaseSpec) -> None:
    for target, pair in zip(targets, pairs, strict=True):
        wanted = fused.shape(base, fused.kind_of(target))
        if (len(pair.lora_B), pair.lora_A.shape[1]) != wanted:
            raise RefusedError(target, f"its delta is ({len(pair.lora_B)}, {pair.lora_A.shape[1]}), the base's weight {wanted}")


Parts = list[tuple[str, LowRank]]


def _shares(adapter: Adapter) -> bool:
    """Return whether each fused module has all of its parts, with one `lora_A`, or none."""
    parts: dict[str, Parts] = {}
    for target, delta in adapter.deltas.items():
        if place(fused.kind_of(target)).parts > 1 and isinstance(delta, LowRank):
            parts.setdefault(_stem(target, shared=True), []).append((target, delta))
    return all(map(_is_one, parts.values()))


def _is_one(own: Parts) -> bool:
    """Return whether these are all parts of a module, with one `lora_A` and one scale; gate and up with equally many rows."""
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
    """Return the module's name in the option `target_modules`."""
    there = place(fused.kind_of(target))
    if shared or not there.own:
        return there.path.rpartition(".")[2]
    part = there.own.removeprefix("adapter_")
    return f"linear_{part}" if there.path == QKV else f"linear_fc1_{part}"


# ---- Reading


def read(path: Path, *, base: BaseSpec | None = None, alpha: float | None = None) -> Adapter:
    """Return the adapter in a file or a folder of shards: the source's own if its config is in the header, else in `base`'s
    names.

    Args:
        path: The file or folder, with `run_config.yaml` in the folder or the one above if there is one.
        base: The base; its config is enough.
        alpha: The alpha, if it is not recorded.
    """
    if path.is_dir():
        base = fused.known_base(base, str(path), "Megatron", (*_CLASSES, *_EXPERTS))
        file = fused.file_of(str(path), megatron_shards.gathered(path, base), {})
    else:
        file = fused.opened(path)
    if file.has_source:
        return _restored(file, fused.settled_alpha(file, "alpha", {}, alpha), base)
    notes, file = file.notes, replace(file, tensors=megatron_shards.unwrapped(file.tensors, file.where), metadata={})
    base = fused.known_base(base, file.where, "Megatron", (*_CLASSES, *_EXPERTS))
    recorded = _recorded(path)
    number = fused.settled_alpha(file, "alpha", recorded, alpha)
    deltas: dict[str, Delta] = {}
    for module in _modules(file):
        if not module.match["path"].startswith("mlp.experts."):
            fused.check_rank(file, module.stem, module.lora_A.shape[0], recorded.get("r"))
        for target, one_A, one_B in _split(file, module, base):
            if target in deltas:
                raise FormatError(file.where, f"{module.stem}: there is another delta of {target}")
            deltas[target] = LowRank(*fused.pair(module.stem, one_A, one_B, file.where), number)
            _check_shape(file, target, one_A, one_B, base)
    found = fused.adapter_of(file, dict(sorted(deltas.items())), base)
    return replace(found, notes=(*notes, *_ending(path, found, base)))


def _ending(path: Path, adapter: Adapter, base: BaseSpec) -> Iterator[str]:
    """Yield a note if the shards end before the base's layers do: there is no other sign of a missing last one."""
    last = max((names.layer_of(target) or 0 for target in adapter.deltas), default=0) + 1
    layers = fused.number(base, "num_hidden_layers")
    if path.is_dir() and last < layers:
        yield f"layers {last} to {layers - 1} have no delta: is the shard of the last pipeline rank missing?"


@dataclass(frozen=True, eq=False)
class _Module:
    """A module of the file: the common prefix of its factors' names, the match of `_KEY`, and the factors."""

    stem: str
    match: linear.Match
    lora_A: np.ndarray
    lora_B: np.ndarray


def _recorded(path: Path) -> dict[str, float]:
    """alpha and dim of the options that Megatron-Bridge leaves in the folder of a checkpoint or in its parent."""
    folders = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
    found = next((folder / _OPTIONS_FILE for folder in folders if (folder / _OPTIONS_FILE).is_file()), None)
    return fused.numbers(fused.scalars(found, "peft"), r="dim", alpha="alpha") if found else {}


def _modules(file: fused.File) -> list[_Module]:
    stems: dict[str, dict[str, linear.Match]] = {}
    odd = []
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if not match or (match["layer"] is None) != (match["path"] == "output_layer"):
            odd.append(f"tensor {name!r}: not a module that Megatron is known to have LoRA on")
        else:
            stems.setdefault(name.removesuffix(f".linear_{match['half']}.weight"), {})[match["half"]] = match
    if odd:
        raise refused(file.where, odd)
    for stem, halves in stems.items():
        if len(halves) < 2:
            raise FormatError(file.where, f"{stem} has linear_{min(halves)} alone; its counterpart is missing")
    return [
        _Module(stem, halves["in"], *(file.tensors[f"{stem}.linear_{half}.weight"] for half in ("in", "out")))
        for stem, halves in sorted(stems.items())
    ]


def _split(file: fused.File, module: _Module, base: BaseSpec) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each target of a module and its own pair."""
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
        what = f"{len(lora_B)} rows, but {sum(sizes)} in this base. Is a shard missing?"
        raise FormatError(file.where, f"{module.stem}: {what}")
    if path == QKV:
        lora_B = names.permuted(lora_B, _groups(base))
    ends = np.cumsum(sizes).tolist()
    return {k: np.ascontiguousarray(lora_B[end - size : end]) for k, size, end in zip(kinds, sizes, ends, strict=True)}


def _experts(file: fused.File, module: _Module, base: BaseSpec) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the deltas of one expert or of all: all share a matrix, a stack has one for each."""
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
        raise FormatError(file.where, f"{stem}: {shapes} do not match {count} experts")
    for expert in chosen:
        one_A, one_B = (array[expert] if array.ndim == 3 else array for array in (module.lora_A, module.lora_B))
        fused.pair(stem, one_A, one_B, file.where)
        prefix = f"model.layers.{match['layer']}.{listed}.{expert}."
        if own or match["path"].endswith("fc2"):
            yield prefix + (own or down), one_A, one_B
            continue
        half, odd = divmod(len(one_B), 2)
        if odd:
            raise FormatError(file.where, f"{stem}: {len(one_B)} rows cannot be split into gate and up")
        yield prefix + gate, one_A, np.ascontiguousarray(one_B[:half])
        yield prefix + up, one_A, np.ascontiguousarray(one_B[half:])


def _check_shape(file: fused.File, target: str, lora_A: np.ndarray, lora_B: np.ndarray, base: BaseSpec) -> None:
    if ".experts." in target:
        return
    found, wanted = (lora_B.shape[0], lora_A.shape[1]), fused.shape(base, fused.kind_of(target))
    if found != wanted:
        raise FormatError(file.where, f"{target}: its delta is {found}, the base's weight {wanted}. Is a shard missing?")


def _restored(file: fused.File, alpha: float, base: BaseSpec | None) -> Adapter:
    shared = file.settings.get("peft") == "lora"
    blocks: dict[str, dict[int, int]] = {}
    for line in source_config.lines_of(file.metadata, file.where):
        there = place_of(fused.kind_of(line.target))
        if there is None or line.stem != _stem(line.target, shared=shared) or line.block is None:
            raise fused.misplaced(file, line)
        if isinstance(line.order, tuple) != (shared and there.path == QKV) or (isinstance(line.order, int) and line.order):
            raise fused.misplaced(file, line)
        if base is not None and isinstance(line.order, tuple) and line.order != _groups(base):
            raise RefusedError(
                file.where, f"{line.target}: its rows are in {line.order[0]} groups, but the base has another number"
            )
        blocks.setdefault(line.stem, {})[there.part] = line.block.rows

    def padded(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        lora_A = file.tensor(f"{line.stem}.linear_in.weight")
        rows = file.tensor(f"{line.stem}.linear_out.weight")
        part, own = place(fused.kind_of(line.target)).part, blocks[line.stem]
        if not names.divides(line.order, len(rows)) or sum(own.values()) != len(rows):
            raise FormatError(file.where, f"{line.target}: {len(rows)} rows do not match adapterhub.source.tensors")
        rows = names.permuted(rows, line.order)
        start = sum(size for other, size in own.items() if other < part)
        return fused.pair(line.stem, lora_A, rows[start : start + own[part]], file.where)

    return fused.restored(file, padded, alpha=alpha, tail=".linear_out.weight")


# ---- Names


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
_EXPERT = linear.Pattern(
    r"(?:mlp|block_sparse_moe)\.experts\.(0|[1-9][0-9]{0,4})\.(?:(gate_proj|w1)|(up_proj|w3)|(?:down_proj|w2))"
)


@dataclass(frozen=True)
class FusedPart:
    """A module of the base in Megatron: the path in a layer, its part there, the number of parts, and CanonicalLoRA's name."""

    path: str
    part: int
    parts: int
    own: str


def place_of(kind: str) -> FusedPart | None:
    """Return the place of a kind such as `mlp.experts.3.up_proj`; None if Megatron is not known to have LoRA on it."""
    if expert := _EXPERT.fullmatch(kind):
        gate, up = expert[2], expert[3]
        path = f"mlp.experts.local_experts.{expert[1]}.linear_fc{1 if gate or up else 2}"
        return FusedPart(path, 1 if up else 0, 2 if gate or up else 1, "adapter_gate" if gate else "adapter_up" if up else "")
    if kind not in MODULES:
        return None
    path = MODULES[kind]
    parts = PARTS.get(path, (kind,))
    return FusedPart(path, parts.index(kind), len(parts), OWN.get(kind, ""))


def place(kind: str) -> FusedPart:
    """As `place_of`, but RefusedError instead of None."""
    found = place_of(kind)
    if found is None:
        raise RefusedError(kind, "not a module that Megatron is known to have LoRA on")
    return found
