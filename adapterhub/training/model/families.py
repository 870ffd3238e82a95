"""Support for the model families of transformers: checks, computed buffers, compiled blocks.

A family that cannot be adapted here is refused by name. Deltas that peft 0.20 and 0.21 do not load get a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.training.layers import expert_stacks
from adapterhub.training.layers.embeddings import LoRAEmbedding, TokenRows
from adapterhub.training.layers.lora import Frozen
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import RefusedError

# peft, `tuners/tuners_utils.py`, `_check_lora_target_modules_mamba`.
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_POSITION_TABLE = safe_regex.Pattern(r"(^|\.)(wpe|position\w*|embed_positions?)$")
_EXPERT_NAMES = {"mixtral": {"gate", "w1", "w2", "w3"}, "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}}
# Layers that stay outside of compiled graphs: NF4 is not a tensor, and compiling does not speed up matrix products.
_NOT_COMPILED = (Frozen, expert_stacks.Stack, LoRAEmbedding, TokenRows)


def check(model: nn.Module, location: str) -> None:
    """Refuse a model whose experts do not use transformers' experts interface, or that has no output layer."""
    if model.get_output_embeddings() is None:
        raise RefusedError(location, f"{type(model).__name__} has no output layer to train on")
    supported = expert_stacks.stacks(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and ".experts." in f".{name}" and name not in supported:
            raise RefusedError(
                f"{location}: {name}", f"{type(model).__name__} computes its experts in a way that is not supported"
            )


def check_targets(model: nn.Module, targets: Iterable[str], location: str) -> None:
    """Refuse layers whose weight a Mamba model uses directly, as peft does."""
    model_type = model.config.model_type
    for path in targets:
        if model_type in _MAMBA_TYPES and path.rpartition(".")[2] == "out_proj":
            problem = f"{path}: {model_type}'s fast kernels use the weight directly, so that a delta would have no effect"
            raise RefusedError(f"{location}: [lora] targets", problem, 'Set exclude = ["out_proj"]')


def notes(model: nn.Module, targets: Iterable[str]) -> Iterator[str]:
    """Yield a note if peft 0.20 and 0.21 do not load the trained delta.

    They take these names for names of experts in transformers 4 (`utils/transformers_weight_conversion.py`).
    """
    from transformers import conversion_mapping

    model_type = model.config.model_type
    patterns_by_type = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    names = _EXPERT_NAMES.get("mixtral" if model_type == "mixtral" else patterns_by_type.get(model_type) or "", set())
    affected = [path for path in targets if path.rpartition(".")[2] in names and ".experts." not in path]
    if affected:
        yield (
            f"peft 0.21 does not load the delta of {affected[0]} onto {model_type}: it reads the name as that of an expert. "
            f"Leave out {', '.join(sorted({path.rpartition('.')[2] for path in affected}))} if peft has to load it"
        )


def check_length(model: nn.Module, tokens: int, location: str) -> list[str]:
    """Refuse rows longer than a table of positions; return a note for rows longer than the model was made for."""
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(max_positions, int) or tokens <= max_positions:
        return []
    tables = [
        path for path, module in model.named_modules() if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(path)
    ]
    if tables:
        problem = f"rows of {tokens} tokens, but the model has {max_positions} positions ({tables[0]})"
        raise RefusedError(f"{location}: [data] sequence", problem, f"Set it to {max_positions} at most")
    return [f"rows are {tokens} tokens long, but the base was made for {max_positions}"]


# ---- Buffers that no file contains, such as rotary frequencies


def compute_buffers(model: nn.Module, location: str) -> None:
    """Compute every buffer that is still empty as transformers does when it loads a model; parameters stay unchanged.

    Each buffer is filled with a mark that no computation gives, then the model's own `_init_weights` is called; a buffer that
    still has the mark is refused by name.
    """
    for tensor in [*model.parameters(), *(buffer for buffer in model.buffers() if not buffer.is_meta)]:
        # transformers' own initialization skips tensors with this mark (`initialization.py`).
        tensor._is_hf_initialized = True
    modules = {path: module for path, module in model.named_modules() if any(b.is_meta for b in module.buffers(recurse=False))}
    for module in modules.values():
        module._buffers.update(
            {
                name: torch.full_like(buffer, _mark(buffer.dtype), device="cpu")
                for name, buffer in module._buffers.items()
                if buffer is not None and buffer.is_meta
            }
        )
    for path, module in modules.items():
        for model_above in _models_above(model, path):
            for initialized in (module, model_above):
                if _marked_buffers(module):
                    model_above._init_weights(initialized)
        _rebuild_buffers(module, f"{location}: {path}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise RefusedError(location, f"{name} is not in its files, and transformers computes no value for it")


def _models_above(model: nn.Module, path: str) -> list[Any]:
    """Return the models that contain or are a module, the innermost first; Falcon-H1's compute buffers of their layers."""
    segments = path.split(".")
    modules = [model.get_submodule(".".join(segments[:count])) for count in range(len(segments) + 1)]
    return [module for module in reversed(modules) if hasattr(module, "_init_weights")]


def _marked_buffers(module: nn.Module) -> list[str]:
    return [name for name, buffer in module._buffers.items() if buffer is not None and _is_marked(buffer)]


def _rebuild_buffers(module: nn.Module, location: str) -> None:
    """Take the remaining buffers from a new module of the same class, if it is built from its config alone."""
    for name in _marked_buffers(module):
        try:
            module._buffers[name] = type(module)(module.config)._buffers[name]
        except (AttributeError, TypeError, KeyError) as error:
            raise RefusedError(f"{location}.{name}", "cannot be computed without its checkpoint") from error


def _is_marked(buffer: Tensor) -> bool:
    mark = _mark(buffer.dtype)
    is_mark = buffer.isnan() if mark != mark else buffer == mark  # noqa: PLR0124 - NaN
    return bool(buffer.numel()) and bool(is_mark.all())


def _mark(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).min


# ---- torch.compile


def compile_blocks(model: nn.Module, location: str, *, backend: str = "inductor") -> None:
    """Compile every block of `model` at its first use, which fuses the operations between the layers.

    Raises:
        RefusedError: Nothing can be compiled on this machine, or transformers does not name the model's blocks.
    """
    location = f"{location}: [train] compile"
    blocks = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]
    if not blocks:
        raise RefusedError(location, f"{type(model).__name__} does not name its blocks", "Leave it out")
    try:
        # A trial, so that a missing compiler is reported now and in one line.
        torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(2))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        hint = "On a CPU it needs a C++ compiler, g++ or clang: install one, or leave it out"
        raise RefusedError(location, f"torch.compile fails on this machine ({lines[0][:200]})", hint) from error
    for module in model.modules():
        if isinstance(module, _NOT_COMPILED):
            setattr(module, "forward", torch.compiler.disable(module.forward))  # noqa: B010 - mypy takes it for a method
    for block in blocks:
        block.compile(backend=backend)
