"""Megatron's adapters, named as in Megatron-Bridge and NeMo 2: `….linear_qkv.adapter.linear_in.weight`, whole or in shards.

Queries, keys and values are one module, whose rows are group after group of heads; gate and up are one module, in
this order. With LoRA, one `linear_in` serves all parts of a module; with CanonicalLoRA each has its own, `adapter_q`
to `adapter_up`. Follows Megatron-Bridge 067f987 (`models/conversion/peft_bridge.py`, `param_mapping.py`,
`peft/utils.py`, `peft/canonical_lora.py`). A folder of `mp_rank_00_001` has the shards of each rank
(`megatron_shards`). The scale is alpha / dim, both of which are in `run_config.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import Adapter, Delta, LossReport, LowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.errors import FormatError, RefusedError, refused_error
from adapterhub_converters.formats import source_config
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.lazy_dataclass import dataclass

from . import fused_layers, megatron_shards

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_CLASSES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
)  # fmt: skip
# The path of a layer's experts, and the names of their gate, up and down projections.
_EXPERTS = {
    "MixtralForCausalLM": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "Qwen2MoeForCausalLM": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "Qwen3MoeForCausalLM": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
_KEY = safe_regex.Pattern(
    r"(?:decoder\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.)?"
    r"(?P<path>self_attention\.linear_(?:qkv|proj)|output_layer"
    r"|mlp\.(?:experts\.(?:local_experts\.(?P<expert>0|[1-9][0-9]{0,4})\.)?)?linear_fc[12])"
    r"\.adapter(?:\.(?P<own>adapter_(?:q|k|v|gate|up)))?\.linear_(?P<half>in|out)\.weight"
)
_OPTIONS_FILE = "run_config.yaml"


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a safetensors file with Megatron's names for factors, or a folder of shards with them."""
    if candidate.is_file:
        return any(map(_is_factor_name, candidate.tensors))
    shards = megatron_shards.files(candidate.path).values()
    return any(_is_factor_name(name) for file in shards for name in Candidate(file).tensors)


def _is_factor_name(name: str) -> bool:
    return name.endswith(".linear_in.weight") and ".adapter." in name


# ---- Writing


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`: as LoRA if the parts of each fused module share their `lora_A`, else as CanonicalLoRA."""
    base = fused_layers.known_base(base, "megatron", "Megatron", (*_CLASSES, *_EXPERTS))
    problems = fused_layers.problems(adapter, "Megatron", (*MODULES, *_expert_kinds(base)), dora=False, tied=base.tied)
    if problems:
        raise refused_error("megatron", problems)
    # LoRA is the common form; CanonicalLoRA expresses parts with factors of their own.
    shared, groups = _can_share(adapter), _head_groups(base)

    def stem_and_order(target: str) -> tuple[str, architecture_lookup.Order]:
        order = groups if shared and fused_part(fused_layers.kind_of(target)).path == QKV else 0
        return _stem(target, shared=shared), order

    # Rows are reordered below, when all parts of a fused module are together.
    fused_adapter = fused_layers.fuse(adapter, stem_and_order, lambda rows, _: rows, whole=True)
    tensors: dict[str, np.ndarray] = {}
    for stem, targets in _by_stem(fused_adapter, shared=shared).items():
        pairs = [fused_adapter.pairs[target] for target in targets]
        tensors[f"{stem}.linear_in.weight"] = pairs[0].lora_A
        rows = np.concatenate([pair.lora_B for pair in pairs]) if len(pairs) > 1 else pairs[0].lora_B
        if len(pairs) == 3:
            _check_rows(targets, pairs, base)
            rows = architecture_lookup.unpermute_rows(rows, groups)
        tensors[f"{stem}.linear_out.weight"] = rows
    settings: dict[str, Any] = {
        "dim": fused_adapter.rank,
        "alpha": int(fused_adapter.alpha),
        "peft": "lora" if shared else "canonical_lora",
        "target_modules": sorted({_target_module(target, shared=shared) for target in fused_adapter.pairs}),
    }
    fused_layers.write(path, tensors, adapter, fused_adapter, settings)
    has_experts = any(".experts." in target for target in fused_adapter.pairs)
    options = ", ".join(
        f"{key}={value}" for key, value in (settings | ({"moe_grouped_gemm": False} if has_experts else {})).items()
    )
    return LossReport(fused_adapter.losses, (*fused_adapter.notes, f"Megatron needs the options {options}"))


def _expert_kinds(base: BaseSpec) -> Iterator[str]:
    """Yield the kinds of modules that the base's experts have."""
    if base.architecture in _EXPERTS:
        experts_path, ends = _EXPERTS[base.architecture]
        yield from (f"{experts_path}.{expert}.{end}" for expert in range(megatron_shards.expert_count(base)) for end in ends)


def _head_groups(base: BaseSpec) -> tuple[int, int]:
    """Return the number of groups of heads, and the number of queries in each."""
    queries, keys, _ = fused_layers.heads(base)
    return keys, queries // keys


def _check_rows(targets: list[str], pairs: list[fused_layers.Pair], base: BaseSpec) -> None:
    for target, pair in zip(targets, pairs, strict=True):
        base_shape = fused_layers.shape(base, fused_layers.kind_of(target))
        if (len(pair.lora_B), pair.lora_A.shape[1]) != base_shape:
            raise RefusedError(
                target, f"its delta is ({len(pair.lora_B)}, {pair.lora_A.shape[1]}), the base's weight {base_shape}"
            )


Parts = list[tuple[str, LowRank]]


def _can_share(adapter: Adapter) -> bool:
    """Return whether each fused module has either all of its parts, with one `lora_A`, or none."""
    parts: dict[str, Parts] = {}
    for target, delta in adapter.deltas.items():
        if fused_part(fused_layers.kind_of(target)).parts > 1 and isinstance(delta, LowRank):
            parts.setdefault(_stem(target, shared=True), []).append((target, delta))
    return all(map(_is_shareable, parts.values()))


def _is_shareable(parts: Parts) -> bool:
    """Return whether these are all parts of a module, with one `lora_A` and one scale; gate and up need equally many rows."""
    part = fused_part(fused_layers.kind_of(parts[0][0]))
    factors = {(delta.lora_A.dtype, delta.lora_B.dtype, delta.lora_A.shape, delta.lora_A.tobytes()) for _, delta in parts}
    same_rows = part.path == QKV or len({delta.shape for _, delta in parts}) == 1
    return same_rows and len(parts) == part.parts and len(factors) == 1 and len({delta.scaling for _, delta in parts}) == 1


def _by_stem(fused_adapter: fused_layers.FusedAdapter, *, shared: bool) -> dict[str, list[str]]:
    def order(target: str) -> tuple[int, str, int]:
        part = fused_part(fused_layers.kind_of(target))
        return architecture_lookup.layer_of(target) or 0, part.path, part.part

    stems: dict[str, list[str]] = {}
    for target in sorted(fused_adapter.pairs, key=order):
        stems.setdefault(_stem(target, shared=shared), []).append(target)
    return stems


def _stem(target: str, *, shared: bool) -> str:
    part, layer = fused_part(fused_layers.kind_of(target)), architecture_lookup.layer_of(target)
    suffix = f".{part.canonical_name}" if part.canonical_name and not shared else ""
    return f"{'' if layer is None else f'decoder.layers.{layer}.'}{part.path}.adapter{suffix}"


def _target_module(target: str, *, shared: bool) -> str:
    """Return the module's name in the option `target_modules`."""
    part = fused_part(fused_layers.kind_of(target))
    if shared or not part.canonical_name:
        return part.path.rpartition(".")[2]
    projection = part.canonical_name.removeprefix("adapter_")
    return f"linear_{projection}" if part.path == QKV else f"linear_fc1_{projection}"


# ---- Reading


def read(path: Path | Candidate, *, base: BaseSpec | None = None, alpha: float | None = None) -> Adapter:
    """Return the adapter in a file or a folder of shards.

    It is the source's own if its config is in the header, else it has the names of `base`.

    Args:
        path: The file or folder, with `run_config.yaml` in the folder or the one above if available.
        base: The base; its config is enough.
        alpha: The alpha, if it is not recorded.
    """
    candidate = Candidate.of(path)
    path = candidate.path
    if path.is_dir():
        base = fused_layers.known_base(base, str(path), "Megatron", (*_CLASSES, *_EXPERTS))
        file = fused_layers.check_file(str(path), megatron_shards.gather(path, base), {})
    else:
        file = fused_layers.open_file(candidate)
    if file.has_source:
        return _restore(file, fused_layers.resolve_alpha(file, "alpha", {}, alpha), base)
    # The note on an ignored config must be taken before the header is dropped.
    notes, file = file.notes, replace(file, tensors=megatron_shards.without_wrappers(file.tensors, file.location), metadata={})
    base = fused_layers.known_base(base, file.location, "Megatron", (*_CLASSES, *_EXPERTS))
    recorded = _recorded_numbers(path)
    number = fused_layers.resolve_alpha(file, "alpha", recorded, alpha)
    deltas: dict[str, Delta] = {}
    for module in _modules(file):
        if not module.match["path"].startswith("mlp.experts."):
            fused_layers.check_rank(file, module.stem, module.lora_A.shape[0], recorded.get("r"))
        for target, one_A, one_B in _split(file, module, base):
            if target in deltas:
                raise FormatError(file.location, f"{module.stem}: there is another delta of {target}")
            deltas[target] = LowRank(*fused_layers.check_pair(module.stem, one_A, one_B, file.location), number)
            _check_shape(file, target, one_A, one_B, base)
    adapter = fused_layers.adapter_of(file, dict(sorted(deltas.items())), base)
    return replace(adapter, notes=(*notes, *_missing_end_notes(path, adapter, base)))


def _missing_end_notes(path: Path, adapter: Adapter, base: BaseSpec) -> Iterator[str]:
    """Yield a note if the shards end before the base's layers do: a missing last shard leaves no other trace."""
    last = max((architecture_lookup.layer_of(target) or 0 for target in adapter.deltas), default=0) + 1
    layers = fused_layers.positive_number(base, "num_hidden_layers")
    if path.is_dir() and last < layers:
        yield f"layers {last} to {layers - 1} have no delta: is the shard of the last pipeline rank missing?"


@dataclass(frozen=True, eq=False)
class _Module:
    """A module of the file: the common prefix of its factors' names, the match of `_KEY`, and the factors."""

    stem: str
    match: safe_regex.Match
    lora_A: np.ndarray
    lora_B: np.ndarray


def _recorded_numbers(path: Path) -> dict[str, float]:
    """Return alpha and dim from the options that Megatron-Bridge leaves in a checkpoint's folder or in its parent."""
    folders = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
    options_file = next((folder / _OPTIONS_FILE for folder in folders if (folder / _OPTIONS_FILE).is_file()), None)
    return fused_layers.numbers(fused_layers.scalars(options_file, "peft"), r="dim", alpha="alpha") if options_file else {}


def _modules(file: fused_layers.TrainerFile) -> list[_Module]:
    stems: dict[str, dict[str, safe_regex.Match]] = {}
    unknown = []
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if not match or (match["layer"] is None) != (match["path"] == "output_layer"):
            unknown.append(f"tensor {name!r}: not a module that Megatron is known to have LoRA on")
        else:
            stems.setdefault(name.removesuffix(f".linear_{match['half']}.weight"), {})[match["half"]] = match
    if unknown:
        raise refused_error(file.location, unknown)
    for stem, halves in stems.items():
        if len(halves) < 2:
            raise FormatError(file.location, f"{stem} has linear_{min(halves)} alone; its counterpart is missing")
    return [
        _Module(stem, halves["in"], *(file.tensors[f"{stem}.linear_{half}.weight"] for half in ("in", "out")))
        for stem, halves in sorted(stems.items())
    ]


def _split(file: fused_layers.TrainerFile, module: _Module, base: BaseSpec) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each target of a module with its own pair."""
    path, canonical_name, layer = module.match["path"], module.match["own"], module.match["layer"]
    if path.startswith("mlp.experts."):
        yield from _expert_deltas(file, module, base)
        return
    prefix = f"model.layers.{layer}." if layer else ""
    kinds = [kind for kind, name in MODULES.items() if name == path]
    if canonical_name:
        kind = next((kind for kind in kinds if CANONICAL_NAMES.get(kind) == canonical_name), None)
        if kind is None:
            raise FormatError(file.location, f"{module.stem}: {path} has no {canonical_name}")
        yield prefix + kind, module.lora_A, module.lora_B
        return
    fused_layers.check_pair(module.stem, module.lora_A, module.lora_B, file.location)
    for kind, rows in _fused_rows(file, module, base).items():
        yield prefix + kind, module.lora_A, rows


def _fused_rows(file: fused_layers.TrainerFile, module: _Module, base: BaseSpec) -> dict[str, np.ndarray]:
    path, lora_B = module.match["path"], module.lora_B
    kinds = [kind for kind, name in MODULES.items() if name == path]
    sizes = [fused_layers.shape(base, kind)[0] for kind in kinds]
    if sum(sizes) != len(lora_B):
        problem = f"{len(lora_B)} rows, but {sum(sizes)} in this base. Is a shard missing?"
        raise FormatError(file.location, f"{module.stem}: {problem}")
    if path == QKV:
        lora_B = architecture_lookup.permute_rows(lora_B, _head_groups(base))
    ends = np.cumsum(sizes).tolist()
    return {k: np.ascontiguousarray(lora_B[end - size : end]) for k, size, end in zip(kinds, sizes, ends, strict=True)}


def _expert_deltas(
    file: fused_layers.TrainerFile, module: _Module, base: BaseSpec
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the deltas of one expert or of all; a matrix is shared by all, and a stack has one matrix for each."""
    match, stem = module.match, module.stem
    if base.architecture not in _EXPERTS:
        raise RefusedError(file.location, f"{stem}: {base.architecture} is not known to have experts")
    experts_path, (gate, up, down) = _EXPERTS[base.architecture]
    gate_or_up = {"adapter_gate": gate, "adapter_up": up}.get(match["own"] or "")
    if match["own"] and (gate_or_up is None or not match["expert"] or not match["path"].endswith("fc1")):
        raise RefusedError(file.location, f"{stem}: Megatron is not known to have {match['own']} there")
    count = megatron_shards.expert_count(base)
    chosen = [int(match["expert"])] if match["expert"] else list(range(count))
    stacks = [array for array in (module.lora_A, module.lora_B) if array.ndim == 3]
    if max(chosen) >= count or any(len(array) != count for array in stacks) or (stacks and match["expert"]):
        shapes = f"{module.lora_A.shape} and {module.lora_B.shape}"
        raise FormatError(file.location, f"{stem}: {shapes} do not match {count} experts")
    for expert in chosen:
        one_A, one_B = (array[expert] if array.ndim == 3 else array for array in (module.lora_A, module.lora_B))
        fused_layers.check_pair(stem, one_A, one_B, file.location)
        prefix = f"model.layers.{match['layer']}.{experts_path}.{expert}."
        if gate_or_up or match["path"].endswith("fc2"):
            yield prefix + (gate_or_up or down), one_A, one_B
            continue
        half, remainder = divmod(len(one_B), 2)
        if remainder:
            raise FormatError(file.location, f"{stem}: {len(one_B)} rows cannot be split into gate and up")
        yield prefix + gate, one_A, np.ascontiguousarray(one_B[:half])
        yield prefix + up, one_A, np.ascontiguousarray(one_B[half:])


def _check_shape(file: fused_layers.TrainerFile, target: str, lora_A: np.ndarray, lora_B: np.ndarray, base: BaseSpec) -> None:
    if ".experts." in target:
        return
    delta_shape, base_shape = (lora_B.shape[0], lora_A.shape[1]), fused_layers.shape(base, fused_layers.kind_of(target))
    if delta_shape != base_shape:
        raise FormatError(
            file.location, f"{target}: its delta is {delta_shape}, the base's weight {base_shape}. Is a shard missing?"
        )


def _restore(file: fused_layers.TrainerFile, alpha: float, base: BaseSpec | None) -> Adapter:
    shared = file.settings.get("peft") == "lora"
    blocks: dict[str, dict[int, int]] = {}
    for line in source_config.parse_lines(file.metadata, file.location):
        part = find_fused_part(fused_layers.kind_of(line.target))
        if part is None or line.stem != _stem(line.target, shared=shared) or line.block is None:
            raise fused_layers.misplaced_error(file, line)
        if isinstance(line.order, tuple) != (shared and part.path == QKV) or (isinstance(line.order, int) and line.order):
            raise fused_layers.misplaced_error(file, line)
        if base is not None and isinstance(line.order, tuple) and line.order != _head_groups(base):
            raise RefusedError(
                file.location, f"{line.target}: its rows are in {line.order[0]} groups, but the base has another number"
            )
        blocks.setdefault(line.stem, {})[part.part] = line.block.rows

    def read_padded_pair(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        lora_A = file.tensor(f"{line.stem}.linear_in.weight")
        rows = file.tensor(f"{line.stem}.linear_out.weight")
        part_index, rows_by_part = fused_part(fused_layers.kind_of(line.target)).part, blocks[line.stem]
        if not architecture_lookup.order_fits(line.order, len(rows)) or sum(rows_by_part.values()) != len(rows):
            raise FormatError(file.location, f"{line.target}: {len(rows)} rows do not match adapterhub.source.tensors")
        rows = architecture_lookup.permute_rows(rows, line.order)
        start = sum(size for index, size in rows_by_part.items() if index < part_index)
        return fused_layers.check_pair(line.stem, lora_A, rows[start : start + rows_by_part[part_index]], file.location)

    return fused_layers.restore_adapter(file, read_padded_pair, alpha=alpha, tail=".linear_out.weight")


# ---- Names


QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
MODULES = {
    "self_attn.q_proj": QKV, "self_attn.k_proj": QKV, "self_attn.v_proj": QKV,
    "self_attn.o_proj": "self_attention.linear_proj", "mlp.gate_proj": FC1, "mlp.up_proj": FC1,
    "mlp.down_proj": "mlp.linear_fc2", "lm_head": "output_layer",
}  # fmt: skip
PARTS = {QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), FC1: ("mlp.gate_proj", "mlp.up_proj")}
CANONICAL_NAMES = {
    "self_attn.q_proj": "adapter_q", "self_attn.k_proj": "adapter_k", "self_attn.v_proj": "adapter_v",
    "mlp.gate_proj": "adapter_gate", "mlp.up_proj": "adapter_up",
}  # fmt: skip
_EXPERT = safe_regex.Pattern(
    r"(?:mlp|block_sparse_moe)\.experts\.(0|[1-9][0-9]{0,4})\.(?:(gate_proj|w1)|(up_proj|w3)|(?:down_proj|w2))"
)


@dataclass(frozen=True)
class FusedPart:
    """A module of the base in Megatron: its path in a layer, its part there, the number of parts, and CanonicalLoRA's name."""

    path: str
    part: int
    parts: int
    canonical_name: str


def find_fused_part(kind: str) -> FusedPart | None:
    """Return the place of a kind such as `mlp.experts.3.up_proj`; None if Megatron is not known to have LoRA on it."""
    if expert := _EXPERT.fullmatch(kind):
        gate, up = expert[2], expert[3]
        path = f"mlp.experts.local_experts.{expert[1]}.linear_fc{1 if gate or up else 2}"
        return FusedPart(path, 1 if up else 0, 2 if gate or up else 1, "adapter_gate" if gate else "adapter_up" if up else "")
    if kind not in MODULES:
        return None
    path = MODULES[kind]
    parts = PARTS.get(path, (kind,))
    return FusedPart(path, parts.index(kind), len(parts), CANONICAL_NAMES.get(kind, ""))


def fused_part(kind: str) -> FusedPart:
    """Return the same as `find_fused_part`, but raise RefusedError instead of returning None."""
    part = find_fused_part(kind)
    if part is None:
        raise RefusedError(kind, "not a module that Megatron is known to have LoRA on")
    return part
