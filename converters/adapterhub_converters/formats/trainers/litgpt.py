"""litgpt's adapters: `transformer.h.0.attn.qkv.lora_A`, with one module for queries, keys and values.

litgpt saves a pickle, `lit_model.pth.lora`, with its options in `hyperparameters.yaml` next to it. Those of q, k and v that
have LoRA are concatenated: `lora_A` is `(r * number of them, in)`, `lora_B` is `(sum of their rows, r)` (litgpt 0.5.13,
`lora.py`, `LoRAQKVLinear`). Which ones have LoRA depends on the options; the shapes alone rarely determine it. Before 0.5.7
the module was `attn.attn`, in which the base has the rows of each group of heads together: there `lora_B` acts on rows in
that order if all three have LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import Adapter, Delta, LossReport, LowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.errors import FormatError, RefusedError, refused_error
from adapterhub_converters.formats import source_config
from adapterhub_converters.formats.candidate import Candidate

from . import fused_layers

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MODULES = {
    **dict.fromkeys(_QKV, "attn.qkv"), "self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj", "lm_head": "lm_head",
}  # fmt: skip
_KINDS = {module: kind for kind, module in _MODULES.items() if kind not in _QKV}
_CLASSES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
)  # fmt: skip
# litgpt's options, and the kinds of modules to which each adds LoRA.
_OPTIONS = {
    "lora_query": (_QKV[0],), "lora_key": (_QKV[1],), "lora_value": (_QKV[2],), "lora_projection": ("self_attn.o_proj",),
    "lora_mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "lora_head": ("lm_head",),
}  # fmt: skip
_KEY = safe_regex.Pattern(
    r"(?:transformer\.h\.(0|[1-9][0-9]{0,5})\.)?(attn\.qkv|attn\.attn|attn\.proj|mlp\.fc_1|mlp\.fc_2|mlp\.proj|lm_head)\.lora_([AB])"
)
_OPTIONS_FILE = "hyperparameters.yaml"


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a safetensors file with litgpt's names for factors."""
    tensor_names = candidate.tensors
    return any(name.startswith("transformer.h.") and _KEY.fullmatch(name) for name in tensor_names) or set(tensor_names) == {
        "lm_head.lora_A", "lm_head.lora_B",
    }  # fmt: skip


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`; RefusedError names what litgpt cannot express."""
    base = fused_layers.known_base(base, "litgpt", "litgpt", _CLASSES)
    problems = fused_layers.problems(adapter, "litgpt", _MODULES, dora=False, tied=False)
    if problems:
        raise refused_error("litgpt", problems)
    fused_adapter = fused_layers.fuse(adapter, lambda t: (_stem(t), 0), architecture_lookup.permute_rows, whole=True)
    fused_adapter = fused_layers.fill_missing_pairs(fused_adapter, base, _OPTIONS.values(), "litgpt")
    stems: dict[str, list[fused_layers.Pair]] = {}
    # q, k and v are concatenated in this order.
    for target in sorted(fused_adapter.pairs, key=_sort_key):
        stems.setdefault(_stem(target), []).append(fused_adapter.pairs[target])
    tensors: dict[str, np.ndarray] = {}
    for stem, pairs in stems.items():
        tensors[f"{stem}.lora_A"] = _one_dtype([pair.lora_A for pair in pairs])
        tensors[f"{stem}.lora_B"] = _one_dtype([pair.lora_B for pair in pairs])
    kinds = {fused_layers.kind_of(target) for target in fused_adapter.pairs}
    settings = {"lora_r": fused_adapter.rank, "lora_alpha": int(fused_adapter.alpha)}
    settings |= {option: bool(kinds & set(option_kinds)) for option, option_kinds in _OPTIONS.items()}
    fused_layers.write(path, tensors, adapter, fused_adapter, settings)
    options = ", ".join(f"{key}={str(value).lower()}" for key, value in settings.items())
    return LossReport(fused_adapter.losses, (*fused_adapter.notes, f"litgpt needs the options {options}"))


def _one_dtype(parts: list[np.ndarray]) -> np.ndarray:
    """Return all parts concatenated; if their dtypes differ, in float32, which can hold the numbers of each."""
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else np.dtype(np.float32)
    return np.concatenate([part.astype(dtype, copy=False) for part in parts])


def _sort_key(target: str) -> tuple[int, int]:
    return architecture_lookup.layer_of(target) or 0, list(_MODULES).index(fused_layers.kind_of(target))


def _stem(target: str) -> str:
    module, layer = _MODULES[fused_layers.kind_of(target)], architecture_lookup.layer_of(target)
    return module if layer is None else f"transformer.h.{layer}.{module}"


def read(path: Path | Candidate, *, base: BaseSpec | None = None, alpha: float | None = None) -> Adapter:
    """Return the adapter in a file: the source's own if its config is in the header, else under the names of `base`.

    Args:
        path: The file, with litgpt's `hyperparameters.yaml` next to it if available.
        base: The base; its config is enough.
        alpha: The alpha, if it is not recorded.
    """
    candidate = Candidate.of(path)
    path, file = candidate.path, fused_layers.open_file(candidate)
    stems = _stems(file)
    if file.has_source:
        return _restore(file, fused_layers.resolve_alpha(file, "lora_alpha", {}, alpha))
    base = fused_layers.known_base(base, file.location, "litgpt", _CLASSES)
    options = fused_layers.scalars(path.with_name(_OPTIONS_FILE))
    recorded = fused_layers.numbers(options, r="lora_r", alpha="lora_alpha")
    number = fused_layers.resolve_alpha(file, "lora_alpha", recorded, alpha)
    deltas: dict[str, Delta] = {}
    for stem in stems:
        lora_A, lora_B = file.tensors[f"{stem}.lora_A"], file.tensors[f"{stem}.lora_B"]
        if not stem.endswith((".qkv", ".attn.attn")):
            pair = fused_layers.check_pair(stem, lora_A, lora_B, file.location)
            fused_layers.check_rank(file, stem, len(pair[0]), recorded.get("r"))
            deltas[_target(stem)] = LowRank(*pair, number)
            continue
        fused_layers.check_rank(file, stem, lora_B.shape[-1], recorded.get("r"))
        layer = stem.split(".")[2]
        legacy = stem.endswith(".attn.attn")
        for kind, one_A, one_B in _split(file, stem, _enabled_kinds(file, stem, options, base), base, legacy=legacy):
            deltas[f"model.layers.{layer}.{kind}"] = LowRank(one_A, one_B, number * len(one_A) / lora_B.shape[1])
    return fused_layers.adapter_of(file, dict(sorted(deltas.items())), base)


def _stems(file: fused_layers.TrainerFile) -> list[str]:
    parts: dict[str, set[str]] = {}
    unknown = []
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if not match or (match[1] is None) != (match[2] == "lm_head"):
            unknown.append(f"tensor {name!r}: not a module that litgpt is known to have LoRA on")
        else:
            parts.setdefault(name[: -len(".lora_A")], set()).add(match[3])
    if unknown:
        raise refused_error(file.location, unknown)
    for stem, halves in parts.items():
        if halves != {"A", "B"}:
            raise FormatError(file.location, f"{stem} has lora_{min(halves)} alone; its counterpart is missing")
    return sorted(parts)


def _target(stem: str) -> str:
    parts = stem.split(".", 3)
    return f"model.layers.{parts[2]}.{_KINDS[parts[3]]}" if parts[0] == "transformer" else stem


def _rows(base: BaseSpec) -> dict[str, int]:
    queries, keys, size = fused_layers.heads(base)
    return {_QKV[0]: queries * size, _QKV[1]: keys * size, _QKV[2]: keys * size}


def _enabled_kinds(file: fused_layers.TrainerFile, stem: str, options: Mapping[str, str], base: BaseSpec) -> list[str]:
    """Return which of q, k and v a fused module has: as the options say, else the only choice with that many rows."""
    lora_A, lora_B = file.tensors[f"{stem}.lora_A"], file.tensors[f"{stem}.lora_B"]
    rows = _rows(base)
    if lora_A.ndim != 2 or lora_B.ndim != 2 or len(lora_A) % lora_B.shape[1]:
        raise FormatError(file.location, f"{stem}: {lora_A.shape} and {lora_B.shape} are not a pair")
    count = len(lora_A) // lora_B.shape[1]
    fits = [kinds for kinds in _choices() if len(kinds) == count and sum(rows[kind] for kind in kinds) == len(lora_B)]
    chosen = [kind for option, (kind, *_) in list(_OPTIONS.items())[:3] if _is_set(file, options, option)]
    shapes = f"{lora_A.shape} and {lora_B.shape}"
    if chosen and chosen not in fits:
        raise FormatError(file.location, f"{stem}: {shapes} do not match {_join_names(chosen)} of this base")
    if chosen or len(fits) == 1:
        return chosen or fits[0]
    if not fits:
        raise FormatError(file.location, f"{stem}: {shapes} do not match the heads of this base")
    choices = " or ".join(_join_names(kinds) for kinds in fits)
    raise RefusedError(file.location, f"{stem}: may be {choices}", f"Put litgpt's {_OPTIONS_FILE} next to it")


def _choices() -> Iterator[list[str]]:
    # Every non-empty subset of q, k and v.
    for mask in range(1, 8):
        yield [kind for place, kind in enumerate(_QKV) if mask >> place & 1]


def _is_set(file: fused_layers.TrainerFile, options: Mapping[str, str], option: str) -> bool:
    value = file.settings.get(option)
    return value if isinstance(value, bool) else options.get(option, "").lower() == "true"


def _join_names(kinds: Iterable[str]) -> str:
    return " and ".join(kind.removeprefix("self_attn.").removesuffix("_proj") for kind in kinds)


def _split(
    file: fused_layers.TrainerFile, stem: str, kinds: Sequence[str], base: BaseSpec, *, legacy: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each kind of a fused module with its own pair."""
    lora_A, lora_B = file.tensors[f"{stem}.lora_A"], file.tensors[f"{stem}.lora_B"]
    r, rows = lora_B.shape[1], _rows(base)
    if legacy and len(kinds) == 3:
        yield from _split_interleaved(lora_A, lora_B, base)
        return
    start = 0
    for place, kind in enumerate(kinds):
        yield kind, lora_A[place * r : (place + 1) * r], lora_B[start : start + rows[kind]]
        start += rows[kind]


def _split_interleaved(lora_A: np.ndarray, lora_B: np.ndarray, base: BaseSpec) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield q, k and v of an old fused module, all with rank 3 r.

    Its rows are group after group of heads, and use `lora_A` in three runs.
    """
    queries, keys, _ = fused_layers.heads(base)
    r = lora_B.shape[1]
    block_diagonal = np.zeros((len(lora_B), len(lora_A)), lora_B.dtype)
    start = 0
    for place, rows in enumerate(_rows(base).values()):
        block_diagonal[start : start + rows, place * r : (place + 1) * r] = lora_B[start : start + rows]
        start += rows
    block_diagonal = architecture_lookup.permute_rows(block_diagonal, (keys, queries // keys))
    start = 0
    for kind, rows in _rows(base).items():
        yield kind, lora_A, np.ascontiguousarray(block_diagonal[start : start + rows])
        start += rows


def _restore(file: fused_layers.TrainerFile, alpha: float) -> Adapter:
    lines = source_config.parse_lines(file.metadata, file.location)
    modules: dict[str, list[source_config.Line]] = {}
    for line in lines:
        kind = fused_layers.kind_of(line.target)
        if kind not in _MODULES or line.stem != _stem(line.target) or line.block is None or line.order:
            raise fused_layers.misplaced_error(file, line)
        modules.setdefault(line.stem, []).append(line)
    places = {stem: _line_places(file, stem, module_lines) for stem, module_lines in modules.items()}

    def read_padded_pair(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        rows_A, rows_B = places[line.stem][line.target]
        return fused_layers.check_pair(
            line.stem, file.tensor(f"{line.stem}.lora_A", rows_A), file.tensor(f"{line.stem}.lora_B", rows_B), file.location
        )

    return fused_layers.restore_adapter(file, read_padded_pair, alpha=alpha, tail=".lora_B")


def _line_places(
    file: fused_layers.TrainerFile, stem: str, lines: Sequence[source_config.Line]
) -> dict[str, tuple[slice, slice]]:
    """Return the place of each line in the tensors of its module, between the kinds that the header's options add."""
    blocks = {fused_layers.kind_of(line.target): (line, line.block) for line in lines if line.block}
    if not stem.endswith(".qkv"):
        return {line.target: (slice(None), slice(None)) for line in lines}
    kinds = [kind for option, (kind, *_) in list(_OPTIONS.items())[:3] if file.settings.get(option) is True]
    total = file.tensors[f"{stem}.lora_B"].shape[0] if f"{stem}.lora_B" in file.tensors else 0
    key_rows = next((block.rows for kind in _QKV[1:] if kind in blocks for _, block in [blocks[kind]]), None)
    query_rows = blocks[_QKV[0]][1].rows if _QKV[0] in blocks else None
    if query_rows is None:
        query_rows = total - (len(kinds) - 1) * (key_rows or 0)
    if key_rows is None:
        key_rows = (total - query_rows) // max(1, len(kinds) - 1)
    rows = {kind: query_rows if kind == _QKV[0] else key_rows for kind in _QKV}
    places: dict[str, tuple[slice, slice]] = {}
    start = 0
    for place, kind in enumerate(kinds):
        if kind in blocks:
            line, block = blocks[kind]
            places[line.target] = (slice(place * block.rank, (place + 1) * block.rank), slice(start, start + rows[kind]))
        start += rows[kind]
    if start != total or set(places) != {line.target for line in lines}:
        raise FormatError(file.location, f"adapterhub.source.tensors does not match {stem!r}")
    return places
