"""An empty model of any family that transformers knows, and which families cannot be adapted here, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from adapterhub.train.layers import attention, experts
from adapterhub_converters.errors import RefusedError

# peft, `tuners/tuners_utils.py`, `_check_lora_target_modules_mamba`.
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_POSITIONS = re.compile(r"(^|\.)(wpe|position\w*|embed_positions?)$")
_TAKEN = {"mixtral": {"gate", "w1", "w2", "w3"}, "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}}


def empty(config: Any, dtype: Any, device: Any) -> Any:
    """The causal model of `config` without weights; for a CPU with the attention for short rows, where the family lets it be
    chosen."""
    import transformers

    family = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    own = {"attn_implementation": attention.register()} if device.type == "cpu" and family._supports_attention_backend else {}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **own)
    name = experts.register()
    for module in model.modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            module.config._experts_implementation = name
    return model


def check(model: Any, where: str) -> None:
    """RefusedError for a model whose experts compute in a way of their own, or that has no output layer."""
    if model.get_output_embeddings() is None:
        raise RefusedError(where, f"{type(model).__name__} has no output layer to learn from")
    known = experts.stacks(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and ".experts." in f".{name}" and name not in known:
            what = f"{type(model).__name__} computes with all experts in a way of its own, which isn't trained through"
            raise RefusedError(f"{where}: {name}", what)


def check_targets(model: Any, targets: Iterable[str], where: str) -> None:
    """RefusedError for layers that a model of Mamba's kind multiplies with by itself, as peft refuses them."""
    kind = model.config.model_type
    for path in targets:
        if kind in _MAMBA and path.rpartition(".")[2] == "out_proj":
            what = f"{path}: {kind} takes the weight itself where its fast kernels run, and no delta would be in it"
            raise RefusedError(f"{where}: [lora] targets", what, 'Set exclude = ["out_proj"]')


def notes(model: Any, targets: Iterable[str]) -> Iterator[str]:
    """A line where peft 0.20 and 0.21 will not load what is trained: they take these names for the experts', as they were in
    transformers 4 (`utils/transformers_weight_conversion.py`)."""
    from transformers import conversion_mapping

    kind = model.config.model_type
    alike = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    like = "mixtral" if kind == "mixtral" else alike.get(kind)
    found = [path for path in targets if path.rpartition(".")[2] in _TAKEN.get(like or "", ()) and ".experts." not in path]
    if found:
        yield (
            f"peft 0.21 does not load the delta of {found[0]} onto {kind}: it takes the name for that of an expert. "
            f"Leave {', '.join(sorted({path.rpartition('.')[2] for path in found}))} out where peft is to load it"
        )


def check_length(model: Any, tokens: int, where: str) -> list[str]:
    """RefusedError where rows are longer than a table of positions; a line where they are longer than the model is made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or tokens <= limit:
        return []
    tables = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding) and _POSITIONS.search(path)]
    if tables:
        what = f"rows of {tokens} tokens, and the model knows {limit} positions ({tables[0]})"
        raise RefusedError(f"{where}: [data] sequence", what, f"Set it to {limit} at most")
    return [f"rows are {tokens} tokens long, and the base was made for {limit}"]
