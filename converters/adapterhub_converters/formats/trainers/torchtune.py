"""torchtune's own adapters: one file of `layers.0.attn.q_proj.lora_a.weight`, in which q and k have Meta's order of rows.

torchtune saves a pickle, `adapter_model.pt`, and can load a safetensors file too (`training/checkpointing/_utils.py`,
`safe_torch_load`). Next to it are an `adapter_config.json` with r and lora_alpha, and an export under peft's names, which
`peft` reads. When it loads a base, torchtune permutes the rows of q and k so that the two halves of a head alternate
(`models/convert_weights.py`, `hf_to_tune`), except for Qwen2; `lora_b` and DoRA's magnitude have the order of those rows. The
export permutes `lora_b` back but not the magnitude, and it permutes Qwen2's too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import Adapter, Delta, LossReport, LowRank
from adapterhub_converters.adapter_files import ADAPTER_CONFIG
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError, refused_error
from adapterhub_converters.formats import source_config
from adapterhub_converters.formats.candidate import Candidate

from . import fused_layers

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_MODULES = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w3", "mlp.down_proj": "mlp.w2",
    "lm_head": "output",
}  # fmt: skip
_KINDS = {module: kind for kind, module in _MODULES.items()}
# The classes for which torchtune's names are known, and whether it permutes the rows of q and k when it loads a base.
_PERMUTES_QK = {
    "LlamaForCausalLM": True, "MistralForCausalLM": True, "GemmaForCausalLM": True, "Gemma2ForCausalLM": True,
    "Qwen2ForCausalLM": False,
}  # fmt: skip
# torchtune's options: `lora_attn_modules` one by one, the MLP as a whole, the output layer.
_GROUPS = (*((f"self_attn.{x}_proj",) for x in "qkvo"), ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ("lm_head",))
_KEY = safe_regex.Pattern(
    r"(?:layers\.(0|[1-9][0-9]{0,5})\.)?(attn\.(?:q|k|v|output)_proj|mlp\.w[123]|output)\.(lora_a\.weight|lora_b\.weight|magnitude)"
)


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a safetensors file with torchtune's names for factors."""
    return any(name.endswith(".lora_a.weight") for name in candidate.tensors)


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`; RefusedError names what torchtune cannot express."""
    base = fused_layers.known_base(base, "torchtune", "torchtune", _PERMUTES_QK)
    problems = fused_layers.problems(adapter, "torchtune", _MODULES, dora=True, tied=base.tied)
    problems += [
        f"{target}: {_BIAS_PROBLEM}"
        for target, delta in sorted(adapter.deltas.items())
        if getattr(delta, "magnitude", None) is not None and _has_bias(target, base)
    ]
    if problems:
        raise refused_error("torchtune", problems)
    fused_adapter = fused_layers.fuse(
        adapter, lambda t: (_stem(t), _order(t, base)), architecture_lookup.permute_rows, whole=False
    )
    fused_adapter = fused_layers.fill_missing_pairs(fused_adapter, base, _GROUPS, "torchtune")
    tensors: dict[str, np.ndarray] = {}
    for target, pair in fused_adapter.pairs.items():
        stem = _stem(target)
        tensors[f"{stem}.lora_a.weight"], tensors[f"{stem}.lora_b.weight"] = pair.lora_A, pair.lora_B
        if pair.magnitude is not None:
            tensors[f"{stem}.magnitude"] = pair.magnitude
    settings = _settings(fused_adapter)
    fused_layers.write(path, tensors, adapter, fused_adapter, settings)
    options = ", ".join(f"{key}={value}" for key, value in settings.items())
    return LossReport(fused_adapter.losses, (*fused_adapter.notes, f"torchtune needs the options {options}"))


def _settings(fused_adapter: fused_layers.FusedAdapter) -> dict[str, Any]:
    kinds = {fused_layers.kind_of(target) for target in fused_adapter.pairs}
    attention = [_MODULES[kind].partition(".")[2] for kind in _MODULES if kind in kinds and kind.startswith("self_attn.")]
    dora = any(pair.magnitude is not None for pair in fused_adapter.pairs.values())
    return {
        "lora_rank": fused_adapter.rank,
        "lora_alpha": int(fused_adapter.alpha) if fused_adapter.alpha.is_integer() else fused_adapter.alpha,
        "lora_attn_modules": attention,
        "apply_lora_to_mlp": "mlp.gate_proj" in kinds,
        "apply_lora_to_output": "lm_head" in kinds,
        "use_dora": dora,
    }


def _stem(target: str) -> str:
    module, layer = _MODULES[fused_layers.kind_of(target)], architecture_lookup.layer_of(target)
    return module if layer is None else f"layers.{layer}.{module}"


def _order(target: str, base: BaseSpec) -> int:
    kind = fused_layers.kind_of(target)
    if kind not in ("self_attn.q_proj", "self_attn.k_proj") or not _PERMUTES_QK[base.architecture]:
        return 0
    queries, keys, _ = fused_layers.heads(base)
    return queries if kind == "self_attn.q_proj" else keys


def read(path: Path | Candidate, *, base: BaseSpec | None = None, alpha: float | None = None) -> Adapter:
    """Return the adapter in a file: the source's own if its config is in the header, else under the names of `base`.

    Args:
        path: The file, with torchtune's `adapter_config.json` next to it if available.
        base: The base; its config is enough.
        alpha: The alpha, if it is not recorded.
    """
    candidate = Candidate.of(path)
    path, file = candidate.path, fused_layers.open_file(candidate)
    stems = _stems(file)
    magnitudes = {stem: f"{stem}.magnitude" for stem, parts in stems.items() if "magnitude" in parts}
    # One option turns DoRA on for every module, so a mixture is a damaged file.
    if magnitudes and len(magnitudes) < len(stems):
        raise FormatError(file.location, "torchtune's adapters have DoRA on all modules or on none, this one on some")
    recorded = _recorded_numbers(path)
    if file.has_source:
        return _restore(file, fused_layers.resolve_alpha(file, "lora_alpha", {}, alpha), base)
    base = fused_layers.known_base(base, file.location, "torchtune", _PERMUTES_QK)
    number = fused_layers.resolve_alpha(file, "lora_alpha", recorded, alpha)
    deltas: dict[str, Delta] = {}
    for stem, target in sorted((stem, _target(stem)) for stem in stems):
        pair = fused_layers.check_pair(
            stem, file.tensors[f"{stem}.lora_a.weight"], file.tensors[f"{stem}.lora_b.weight"], file.location
        )
        fused_layers.check_rank(file, stem, len(pair[0]), recorded.get("r"))
        order = _order(target, base)
        magnitude = file.tensors.get(f"{stem}.magnitude")
        if magnitude is not None and _has_bias(target, base):
            raise RefusedError(file.location, f"{stem}: {_BIAS_PROBLEM}")
        if magnitude is not None and magnitude.shape != pair[1].shape[:1]:
            raise FormatError(
                file.location, f"{stem}: magnitude {magnitude.shape} is not one number for each of {len(pair[1])} rows"
            )
        unpermuted = None if magnitude is None else _unpermute(magnitude, order, stem, file.location)
        deltas[target] = LowRank(pair[0], _unpermute(pair[1], order, stem, file.location), number, magnitude=unpermuted)
    return fused_layers.adapter_of(file, deltas, base)


_BIAS_PROBLEM = "DoRA on a module with a bias rescales the bias too in torchtune, and in no other program"


def _has_bias(target: str, base: BaseSpec) -> bool:
    """Return whether a module of the base has a bias (torchtune, `modules/peft/dora.py`, `forward`)."""
    return base.architecture == "Qwen2ForCausalLM" and target.endswith((".q_proj", ".k_proj", ".v_proj"))


def _stems(file: fused_layers.TrainerFile) -> dict[str, set[str]]:
    stems: dict[str, set[str]] = {}
    unknown = []
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if not match or (match[1] is None) != (match[2] == "output"):
            unknown.append(f"tensor {name!r}: not a module that torchtune is known to have LoRA on")
        else:
            stems.setdefault(name[: -len(match[3]) - 1], set()).add(match[3].partition(".")[0])
    if unknown:
        raise refused_error(file.location, unknown)
    for stem, parts in stems.items():
        if not {"lora_a", "lora_b"} <= parts:
            raise FormatError(file.location, f"{stem} has {min(parts)} alone; its counterpart is missing")
    return stems


def _target(stem: str) -> str:
    parts = stem.split(".", 2)
    return f"model.layers.{parts[1]}.{_KINDS[parts[2]]}" if parts[0] == "layers" else _KINDS[stem]


def _unpermute(rows: np.ndarray, order: int, stem: str, location: str) -> np.ndarray:
    if not architecture_lookup.order_fits(order, len(rows)):
        raise FormatError(location, f"{stem}: {len(rows)} rows do not match {order} heads. Was it trained on another base?")
    return np.ascontiguousarray(architecture_lookup.unpermute_rows(rows, order))


def _recorded_numbers(path: Path) -> dict[str, float]:
    """Return r and lora_alpha from the config that torchtune leaves next to its file."""
    config_path = path.with_name(ADAPTER_CONFIG)
    if not config_path.is_file():
        return {}
    config = json_file.read_object(config_path)
    numbers = {name: config.get(key) for name, key in (("r", "r"), ("alpha", "lora_alpha"))}
    return {name: value for name, value in numbers.items() if isinstance(value, int | float) and abs(value) <= 2**40}


def _restore(file: fused_layers.TrainerFile, alpha: float, base: BaseSpec | None) -> Adapter:
    orders: dict[str, architecture_lookup.Order] = {}

    def read_padded_pair(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        if (
            fused_layers.kind_of(line.target) not in _MODULES
            or line.stem != _stem(line.target)
            or not isinstance(line.order, int)
        ):
            raise fused_layers.misplaced_error(file, line)
        if base is not None and base.architecture in _PERMUTES_QK and line.order != _order(line.target, base):
            raise RefusedError(
                file.location, f"{line.target}: its rows were permuted for {line.order} heads, but the base has another number"
            )
        # Needed again for the magnitudes, which have the same order of rows.
        orders[line.target] = line.order
        pair = fused_layers.check_pair(
            line.stem, file.tensor(f"{line.stem}.lora_a.weight"), file.tensor(f"{line.stem}.lora_b.weight"), file.location
        )
        return pair[0], _unpermute(pair[1], line.order, line.stem, file.location)

    adapter = fused_layers.restore_adapter(file, read_padded_pair, alpha=alpha, tail=".lora_b.weight")
    magnitudes = {
        target: _unpermute(file.tensors[f"{_stem(target)}.magnitude"], order, target, file.location)
        for target, order in orders.items()
        if isinstance(order, int) and f"{_stem(target)}.magnitude" in file.tensors
    }
    return source_config.with_magnitudes(adapter, magnitudes)
