"""The canonical names and shapes of a base's tensors, those of the checkpoint on Hugging Face.

Files differ most in experts. A checkpoint has a tensor for each expert, or one for all (gpt-oss); transformers 5 may save
`experts.gate_up_proj` for all; GGUF has `ffn_gate_exps`, `ffn_up_exps`, and `ffn_down_exps`, or fuses the first two. A GGUF may
fuse q, k, and v or split them unlike its architecture's other files, and splits DeepSeek's kv_b_proj in two (llama.cpp,
conversion/base.py, `modify_tensors`; conversion/deepseek.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapterhub_converters.architectures.architecture import FUSED, Architecture, layer_of, text_name
from adapterhub_converters.containers import safetensors_header
from adapterhub_converters.lazy_dataclass import dataclass

from .names_in_memory import Renaming

PIPELINE_PARTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3",
    "text_conditioner", "connectors",
)  # fmt: skip
"""The models of a pipeline that adapters act on."""


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """One weight, from a header: its logical shape (in numpy's order) and the dtype as stored (`BF16`, `Q4_1`, …)."""

    shape: tuple[int, ...]
    dtype: str


# Model types for which peft skips an adapter with the old names, or finds no module for its target_modules.
PEFT_SKIPS_OLD_NAMES = frozenset({"qwen2_vl", "qwen2_5_vl"})
PEFT_REFUSES_OLD_NAMES = frozenset({"vit", "deit", "beit", "dinov2", "dinov2_with_registers"})

Tensors = Mapping[str, BaseTensor]


def rename_hf(architecture: Architecture, tensors: Tensors) -> dict[str, BaseTensor]:
    """Return the tensors of a Hugging Face folder under the names of the checkpoint."""
    renamed: dict[str, BaseTensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        stems = architecture.stems(name) if architecture.is_stacked(name) and architecture.lists_experts else ()
        if stems and _can_split_experts(tensor, stems, len(renamed)):
            renamed |= dict(_split_experts(architecture, stems, tensor))
        else:
            renamed[f"{architecture.first_name(module)}.{kind}" if module else name] = tensor
    return renamed


def rename_gguf(architecture: Architecture, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, BaseTensor]:
    """Return the tensors of a GGUF file under the names of the checkpoint; a tensor without one keeps its name."""
    renamed: dict[str, BaseTensor] = {}
    stacks: dict[str, dict[str, BaseTensor]] = {}
    pieces: dict[str, dict[str, BaseTensor]] = {}
    for name, tensor in _regroup(architecture, tensors, config).items():
        stem, _, kind = name.rpartition(".")
        stack = architecture.stacked_module(stem)
        if parameter := _falcon_norm(architecture, name, tensors) or architecture.parameter(name):
            # GPT-2's Conv1D stores `(in, out)`, GGUF `(out, in)`.
            is_transposed = kind == "weight" and architecture.transposed and layer_of(parameter) is not None
            renamed[parameter] = BaseTensor(tensor.shape[::-1] if is_transposed else tensor.shape, tensor.dtype)
        elif stack and architecture.lists_experts and kind == "weight" and _can_split_experts(tensor, (stem,), len(renamed)):
            renamed |= dict(_split_experts(architecture, (stem,), tensor))
        elif stack and not architecture.lists_experts:
            stacks.setdefault(stack if kind == "weight" else f"{stack}_{kind}", {})[name] = tensor
        elif module := architecture.split_module(stem):
            pieces.setdefault(f"{module}.{kind}", {})[name] = tensor
        else:
            renamed[name] = tensor
    for parameter, parts in pieces.items():
        can_join = _can_concatenate(parts.values(), axis=0)
        renamed |= {parameter: _concatenate(list(parts.values()), axis=0, transpose=False)} if can_join else parts
    # Stacks of gate and up are one parameter in the checkpoint, whose parts may be in two tensors of the GGUF.
    for parameter, parts in stacks.items():
        if not _can_concatenate(parts.values(), axis=1):
            renamed |= parts
            continue
        is_transposed = bool(architecture.experts and architecture.experts.transposed and not parameter.endswith("_bias"))
        renamed[parameter] = _concatenate(list(parts.values()), axis=1, transpose=is_transposed)
    return renamed


def _falcon_norm(architecture: Architecture, name: str, tensors: Tensors) -> str | None:
    """Return the name of Falcon's first norm if there are two (transformers, modeling_falcon.py); else None."""
    module, _, kind = (architecture.parameter(name) or "").rpartition(".")
    has_two_norms = "ln_mlp" in architecture.norms and name.replace(".attn_norm.", ".attn_norm_2.") != name
    if not has_two_norms or name.replace(".attn_norm.", ".attn_norm_2.") not in tensors:
        return None
    return f"{module.removesuffix('input_layernorm')}ln_mlp.{kind}"


def rename_for_text_model(tensors: Tensors, renaming: Renaming) -> dict[str, BaseTensor]:
    """Return the tensors under their names in the text model alone, both those of the file and those in memory."""
    return {
        text_name(name): tensors[file_name]
        for file_name, memory_name in renaming.names(tensors).items()
        for name in (file_name, memory_name)
    }


def lookup(architecture: Architecture, tensors: Tensors, name: str) -> BaseTensor | None:
    """Return the tensor called `name` in any version of transformers, from `tensors` by the checkpoint's names; else None."""
    module, _, kind = name.rpartition(".")
    if tensor := tensors.get(name) or tensors.get(f"{architecture.first_name(module)}.{kind}"):
        return tensor
    if not architecture.is_stacked(name):
        return None
    parts = [tensors.get(f"{architecture.listed_module(stem, 0)}.weight") for stem in architecture.stems(name)]
    present_parts = [part for part in parts if part]
    if len(present_parts) < len(parts):
        return None
    first, count = architecture.stems(name)[0], 0
    # The number of experts is not in the spec: count the modules.
    while f"{architecture.listed_module(first, count)}.weight" in tensors:
        count += 1
    experts = [BaseTensor((count, *part.shape), part.dtype) for part in present_parts]
    return _concatenate(experts, axis=1, transpose=False) if _can_concatenate(experts, axis=1) else None


def _can_split_experts(tensor: BaseTensor, stems: tuple[str, ...], tensor_count: int) -> bool:
    """Return whether a tensor is `(experts, …)` with rows shared by the stems, and few enough experts for one file's tensors.

    The limit counts the tensors that were split already (`tensor_count`): a shape in a header must not decide how much memory
    is used.
    """
    is_divisible = len(tensor.shape) == 3 and 0 not in tensor.shape and tensor.shape[1] % len(stems) == 0
    return is_divisible and tensor_count + tensor.shape[0] * len(stems) <= safetensors_header.MAX_TENSORS


def _split_experts(architecture: Architecture, stems: tuple[str, ...], tensor: BaseTensor) -> Iterable[tuple[str, BaseTensor]]:
    """Split a stack of experts into one tensor for each expert and stem."""
    rows = tensor.shape[1] // len(stems)
    for expert in range(tensor.shape[0]):
        for stem in stems:
            yield f"{architecture.listed_module(stem, expert)}.weight", BaseTensor((rows, tensor.shape[2]), tensor.dtype)


def _can_concatenate(parts: Iterable[BaseTensor], *, axis: int) -> bool:
    """Return whether tensors can be concatenated along an axis."""
    shapes = [part.shape for part in parts]
    return len(shapes[0]) > axis and len({(len(shape), *shape[:axis], *shape[axis + 1 :]) for shape in shapes}) == 1


def _concatenate(parts: list[BaseTensor], *, axis: int, transpose: bool) -> BaseTensor:
    """Concatenate tensors along an axis, then swap the last two axes if `transpose`."""
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    if transpose:
        shape[-2:] = shape[:-3:-1]
    return BaseTensor(tuple(shape), parts[0].dtype)


def _regroup(architecture: Architecture, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, BaseTensor]:
    """Split or fuse the tensors as the architecture usually does; a tensor whose parts are unknown is left alone."""
    regrouped = dict(tensors)
    for name in tensors:
        stem, _, kind = name.rpartition(".")
        prefix, _, last = stem.rpartition(".")
        # The file has fused tensors that the architecture usually splits.
        if last in FUSED and not architecture.has_tensor(stem):
            regrouped |= _split_fused(architecture, name, regrouped, config)
        fused_name = next((fused_name for fused_name, parts in FUSED.items() if last == parts[0]), None)
        # The file has split tensors that the architecture usually fuses.
        if fused_name and not architecture.has_tensor(stem) and architecture.has_tensor(f"{prefix}.{fused_name}"):
            parts = [f"{prefix}.{part}.{kind}" for part in FUSED[fused_name]]
            if all(part in regrouped for part in parts) and _can_concatenate([regrouped[part] for part in parts], axis=0):
                fused = _concatenate([regrouped.pop(part) for part in parts], axis=0, transpose=False)
                regrouped[f"{prefix}.{fused_name}.{kind}"] = fused
        value_tensor = regrouped.get(f"{prefix}.attn_v_b.weight") if last == "attn_k_b" else None
        if value_tensor and len(regrouped[name].shape) == len(value_tensor.shape) == 3:
            heads, latent, keys = regrouped.pop(name).shape
            del regrouped[f"{prefix}.attn_v_b.weight"]
            regrouped[f"{prefix}.attn_kv_b.weight"] = BaseTensor(
                (heads * (keys + value_tensor.shape[1]), latent), value_tensor.dtype
            )
    return regrouped


def _split_fused(
    architecture: Architecture, name: str, tensors: dict[str, BaseTensor], config: Mapping[str, Any]
) -> dict[str, BaseTensor]:
    """Return the parts of a fused tensor, which is removed from `tensors`; empty if they are unknown."""
    tensor = tensors[name]
    stem, _, kind = name.rpartition(".")
    prefix, dot, fused_name = stem.rpartition(".")
    prefix, parts = prefix + dot, FUSED[fused_name]
    axis = 1 if fused_name.endswith("_exps") else 0
    if len(tensor.shape) <= axis or not all(architecture.has_tensor(prefix + part) for part in parts):
        return {}
    rows = _row_counts(fused_name, tensor.shape[axis], config)
    if not rows or min(rows) < 1:
        return {}
    del tensors[name]
    shapes = [(*tensor.shape[:axis], count, *tensor.shape[axis + 1 :]) for count in rows]
    return {f"{prefix}{part}.{kind}": BaseTensor(shape, tensor.dtype) for part, shape in zip(parts, shapes, strict=True)}


def _row_counts(fused_name: str, total: int, config: Mapping[str, Any]) -> list[int] | None:
    """Return the number of rows of each part of a fused tensor with `total` rows; None if unknown."""
    if fused_name == "ffn_gate_up_exps":
        return [total // 2, total // 2] if total % 2 == 0 else None
    counts = [config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    if not all(isinstance(count, int) for count in counts):
        return None
    heads, kv_heads, size = (int(count) for count in counts if count is not None)
    return [heads * size, kv_heads * size, total - (heads + kv_heads) * size]
