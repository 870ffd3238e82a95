"""torchtune's own adapters: one file of `layers.0.attn.q_proj.lora_a.weight`, in which q and k have Meta's order of rows.

torchtune saves a pickle, `adapter_model.pt`, and can load a safetensors file too (`training/checkpointing/_utils.py`,
`safe_torch_load`). Next to it are an `adapter_config.json` with r and lora_alpha, and an export under peft's names
that `peft` reads. When it loads a base, torchtune permutes the rows of q and k so that the two halves of a head
alternate (`models/convert_weights.py`, `hf_to_tune`), except for Qwen2; `lora_b` and DoRA's magnitude have the order
of those rows. The export permutes `lora_b` back but not the magnitude, and it permutes Qwen2's too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import linear
from adapterhub_converters.adapter import Adapter, Delta, LossReport, LowRank
from adapterhub_converters.adapter_files import ADAPTER_CONFIG
from adapterhub_converters.architectures import names
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError, refused
from adapterhub_converters.formats import source_config
from adapterhub_converters.formats.candidate import Candidate

from . import fused

_MODULES = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w3", "mlp.down_proj": "mlp.w2",
    "lm_head": "output",
}  # fmt: skip
_KINDS = {own: kind for kind, own in _MODULES.items()}
# Classes that torchtune has under these names, and whether it permutes the rows of q and k when it loads a base.
_TURNED = {
    "LlamaForCausalLM": True, "MistralForCausalLM": True, "GemmaForCausalLM": True, "Gemma2ForCausalLM": True,
    "Qwen2ForCausalLM": False,
}  # fmt: skip
# Its options: `lora_attn_modules` one by one, the MLP as a whole, the output layer.
_GROUPS = (*((f"self_attn.{x}_proj",) for x in "qkvo"), ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ("lm_head",))
_KEY = linear.Pattern(
    r"(?:layers\.(0|[1-9][0-9]{0,5})\.)?(attn\.(?:q|k|v|output)_proj|mlp\.w[123]|output)\.(lora_a\.weight|lora_b\.weight|magnitude)"
)


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a safetensors file with torchtune's names of factors."""
    return any(name.endswith(".lora_a.weight") for name in candidate.tensors)


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`; RefusedError names what torchtune cannot express."""
    base = fused.known_base(base, "torchtune", "torchtune", _TURNED)
    found = fused.problems(adapter, "torchtune", _MODULES, dora=True, tied=base.tied)
    found += [
        f"{target}: {_BIASED}"
        for target, delta in sorted(adapter.deltas.items())
        if getattr(delta, "magnitude", None) is not None and _biased(target, base)
    ]
    if found:
        raise refused("torchtune", found)
    made = fused.fuse(adapter, lambda t: (_stem(t), _order(t, base)), names.permuted, whole=False)
    made = fused.everywhere(made, base, _GROUPS, "torchtune")
    tensors: dict[str, np.ndarray] = {}
    for target, pair in made.pairs.items():
        stem = _stem(target)
        tensors[f"{stem}.lora_a.weight"], tensors[f"{stem}.lora_b.weight"] = pair.lora_A, pair.lora_B
        if pair.magnitude is not None:
            tensors[f"{stem}.magnitude"] = pair.magnitude
    settings = _settings(made)
    fused.write(path, tensors, adapter, made, settings)
    options = ", ".join(f"{key}={value}" for key, value in settings.items())
    return LossReport(made.losses, (*made.notes, f"torchtune needs the options {options}"))


def _settings(made: fused.FusedAdapter) -> dict[str, Any]:
    kinds = {fused.kind_of(target) for target in made.pairs}
    attention = [_MODULES[kind].partition(".")[2] for kind in _MODULES if kind in kinds and kind.startswith("self_attn.")]
    dora = any(pair.magnitude is not None for pair in made.pairs.values())
    return {
        "lora_rank": made.rank,
        "lora_alpha": int(made.alpha) if made.alpha.is_integer() else made.alpha,
        "lora_attn_modules": attention,
        "apply_lora_to_mlp": "mlp.gate_proj" in kinds,
        "apply_lora_to_output": "lm_head" in kinds,
        "use_dora": dora,
    }


def _stem(target: str) -> str:
    own, layer = _MODULES[fused.kind_of(target)], names.layer_of(target)
    return own if layer is None else f"layers.{layer}.{own}"


def _order(target: str, base: BaseSpec) -> int:
    kind = fused.kind_of(target)
    if kind not in ("self_attn.q_proj", "self_attn.k_proj") or not _TURNED[base.architecture]:
        return 0
    queries, keys, _ = fused.heads(base)
    return queries if kind == "self_attn.q_proj" else keys


def read(path: Path, *, base: BaseSpec | None = None, alpha: float | None = None) -> Adapter:
    """Return the adapter in a file: the source's own if its config is in the header, else under the names of `base`.

    Args:
        path: The file, with torchtune's `adapter_config.json` next to it if there is one.
        base: The base; its config is enough.
        alpha: The alpha, if it is not recorded.
    """
    file = fused.opened(path)
    stems = _stems(file)
    magnitudes = {stem: f"{stem}.magnitude" for stem, parts in stems.items() if "magnitude" in parts}
    if magnitudes and len(magnitudes) < len(stems):
        raise FormatError(file.where, "torchtune's adapters have DoRA on all modules or on none, this one on some")
    recorded = _recorded(path)
    if file.has_source:
        return _restored(file, fused.settled_alpha(file, "lora_alpha", {}, alpha), base)
    base = fused.known_base(base, file.where, "torchtune", _TURNED)
    number = fused.settled_alpha(file, "lora_alpha", recorded, alpha)
    deltas: dict[str, Delta] = {}
    for stem, target in sorted((stem, _target(stem)) for stem in stems):
        pair = fused.pair(stem, file.tensors[f"{stem}.lora_a.weight"], file.tensors[f"{stem}.lora_b.weight"], file.where)
        fused.check_rank(file, stem, len(pair[0]), recorded.get("r"))
        order = _order(target, base)
        magnitude = file.tensors.get(f"{stem}.magnitude")
        if magnitude is not None and _biased(target, base):
            raise RefusedError(file.where, f"{stem}: {_BIASED}")
        if magnitude is not None and magnitude.shape != pair[1].shape[:1]:
            raise FormatError(
                file.where, f"{stem}: magnitude {magnitude.shape} is not one number for each of {len(pair[1])} rows"
            )
        turned = None if magnitude is None else _unturned(magnitude, order, stem, file.where)
        deltas[target] = LowRank(pair[0], _unturned(pair[1], order, stem, file.where), number, magnitude=turned)
    return fused.adapter_of(file, deltas, base)


_BIASED = "DoRA on a module with a bias rescales the bias too in torchtune, and in no other program"


def _biased(target: str, base: BaseSpec) -> bool:
    """Return whether a module of the base has a bias (torchtune, `modules/peft/dora.py`, `forward`)."""
    return base.architecture == "Qwen2ForCausalLM" and target.endswith((".q_proj", ".k_proj", ".v_proj"))


def _stems(file: fused.File) -> dict[str, set[str]]:
    stems: dict[str, set[str]] = {}
    odd = []
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if not match or (match[1] is None) != (match[2] == "output"):
            odd.append(f"tensor {name!r}: not a module that torchtune is known to have LoRA on")
        else:
            stems.setdefault(name[: -len(match[3]) - 1], set()).add(match[3].partition(".")[0])
    if odd:
        raise refused(file.where, odd)
    for stem, parts in stems.items():
        if not {"lora_a", "lora_b"} <= parts:
            raise FormatError(file.where, f"{stem} has {min(parts)} alone; its counterpart is missing")
    return stems


def _target(stem: str) -> str:
    parts = stem.split(".", 2)
    return f"model.layers.{parts[1]}.{_KINDS[parts[2]]}" if parts[0] == "layers" else _KINDS[stem]


def _unturned(rows: np.ndarray, order: int, stem: str, where: str) -> np.ndarray:
    if not names.divides(order, len(rows)):
        raise FormatError(where, f"{stem}: {len(rows)} rows do not match {order} heads. Was it trained on another base?")
    return np.ascontiguousarray(names.unpermuted(rows, order))


def _recorded(path: Path) -> dict[str, float]:
    """r and lora_alpha of the config that torchtune leaves next to its file."""
    config = path.with_name(ADAPTER_CONFIG)
    if not config.is_file():
        return {}
    found = json_file.read_object(config)
    numbers = {name: found.get(key) for name, key in (("r", "r"), ("alpha", "lora_alpha"))}
    return {name: value for name, value in numbers.items() if isinstance(value, int | float) and abs(value) <= 2**40}


def _restored(file: fused.File, alpha: float, base: BaseSpec | None) -> Adapter:
    orders: dict[str, names.Order] = {}

    def padded(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        if fused.kind_of(line.target) not in _MODULES or line.stem != _stem(line.target) or not isinstance(line.order, int):
            raise fused.misplaced(file, line)
        if base is not None and base.architecture in _TURNED and line.order != _order(line.target, base):
            raise RefusedError(
                file.where, f"{line.target}: its rows were permuted for {line.order} heads, but the base has another number"
            )
        orders[line.target] = line.order
        pair = fused.pair(
            line.stem, file.tensor(f"{line.stem}.lora_a.weight"), file.tensor(f"{line.stem}.lora_b.weight"), file.where
        )
        return pair[0], _unturned(pair[1], line.order, line.stem, file.where)

    adapter = fused.restored(file, padded, alpha=alpha, tail=".lora_b.weight")
    magnitudes = {
        target: _unturned(file.tensors[f"{_stem(target)}.magnitude"], order, target, file.where)
        for target, order in orders.items()
        if isinstance(order, int) and f"{_stem(target)}.magnitude" in file.tensors
    }
    return source_config.with_magnitudes(adapter, magnitudes)
