"""Metadata of a GGUF model, except for its vocabulary: `general.*` and the architecture's hyperparameters.

A model is refused if llama.cpp ignores something that changes the function, such as an activation or a rotary embedding for
which it has no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.containers.gguf_types import FILE_TYPES, MetadataValue, f32_value, string_value, u32_value
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import RefusedError

from .architecture_keys import EXTRA_KEYS, OWN_KEYS
from .model_config import Config
from .shared_keys import Numbers, shared_numbers

# The keys of generation_config.json (gguf-py, `metadata.py`, `Metadata.load`).
_SAMPLING = {
    "top_k": ("top_k", int), "top_p": ("top_p", float), "min_p": ("min_p", float), "temp": ("temperature", float),
    "penalty_repeat": ("repetition_penalty", float), "penalty_last_n": ("penalty_last_n", int),
    "xtc_probability": ("xtc_probability", float), "xtc_threshold": ("xtc_threshold", float),
}  # fmt: skip
_STEPS = ((1e12, 1e-12, "T"), (1e9, 1e-9, "B"), (1e6, 1e-6, "M"), (-1.0, 1e-3, "K"))  # above, factor, unit


def general(
    gguf: str, name: str, shapes: Mapping[str, tuple[int, ...]], generation: Mapping[str, Any]
) -> dict[str, MetadataValue]:
    """Return the keys `general.*`, except for those of the tensors' type."""
    metadata = {"general.architecture": string_value(gguf), "general.type": string_value("model")}
    for key, (option, kind) in _SAMPLING.items():
        value = generation.get(option)
        if is_number(value) and abs(value) < 1 << 31:
            metadata[f"general.sampling.{key}"] = MetadataValue("INT32", int(value)) if kind is int else f32_value(float(value))
    return metadata | {"general.name": string_value(name), "general.size_label": string_value(size_label(shapes))}


def size_label(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return `1.1B`, or `8x7B` for a model with experts (gguf-py, `utility.py`, `size_label`)."""
    stacked = {name: shape for name, shape in shapes.items() if "_exps." in name and len(shape) > 2}
    counts = [shape[0] for shape in stacked.values()]
    expert = sum(math.prod(shape) // shape[0] for shape in stacked.values())
    shared = sum(math.prod(shape) for name, shape in shapes.items() if name not in stacked)
    number = sum(counts) // len(counts) if counts else 0
    return f"{number}x{_scaled_count(shared + expert)}" if number else _scaled_count(shared)


def _scaled_count(count: int) -> str:
    factor, unit = next((factor, unit) for least, factor, unit in _STEPS if count > least)
    number = count * factor
    digits = max(2 - len(str(round(number)).lstrip("0")), 0)
    return f"{number:.{digits}f}{unit}"


def file_type_keys(file_type: str) -> dict[str, MetadataValue]:
    """Return the keys for the type of most tensors."""
    return {"general.file_type": u32_value(FILE_TYPES[file_type]), "general.quantization_version": u32_value(2)}


_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_ACTIVATIONS = {
    "gemma": _GELU, "gemma2": _GELU, "gemma3": _GELU, "starcoder2": _GELU, "gpt2": _GELU, "falcon": _GELU, "bloom": _GELU,
    "nemotron": ("relu2",), "arcee": ("relu2",), "phi2": _GELU, "apertus": ("xielu",),
}  # fmt: skip
"""The activations that llama.cpp computes (`src/models/*.cpp`); silu for all others. Its gelu is the tanh approximation."""
_SCALED = {
    **dict.fromkeys(
        ("llama", "granite", "smollm3", "arcee", "granitemoe", "mistral3", "apertus", "exaone4"),
        ("default", "linear", "yarn", "llama3"),
    ),
    "hunyuan-dense": ("default", "linear", "yarn", "dynamic"),
    **dict.fromkeys(("qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe"), ("default", "yarn")),
    "phi3": ("default", "longrope", "su"),
    **dict.fromkeys(("command-r", "cohere2"), ("default",)),
}
"""Types of scaled rotary embeddings that llama.cpp's conversion writes, as numbers or tensors."""


def hyperparameters(architecture: Architecture, config: Config) -> Numbers:
    """Return the hyperparameters: key under the architecture's prefix to value."""
    _check(architecture, config)
    special, extra = OWN_KEYS.get(architecture.gguf), EXTRA_KEYS.get(architecture.gguf)
    numbers = special(config) if special else shared_numbers(config) | (extra(config) if extra else {})
    if architecture.gguf in ("granite", "granitemoe"):  # llama.cpp has no head_dim for them
        numbers = {
            key: value for key, value in numbers.items() if key not in ("attention.key_length", "attention.value_length")
        }
    for key, value in numbers.items():
        elements = value.value if value.kind.startswith("[") else [value.value]
        holds = _RANGES.get(value.kind.strip("[]"))
        if holds is not None and not all(number in holds for number in elements):
            problem = f"config.json: {key} of the GGUF would be {str(value.value)[:40]}, which does not fit into {value.kind}"
            raise RefusedError(config.where, problem)
    return {"block_count": u32_value(config.count("num_hidden_layers"))} | numbers


_RANGES = {"UINT32": range(1 << 32), "INT32": range(-1 << 31, 1 << 31)}


def _check(architecture: Architecture, config: Config) -> None:
    activations = _ACTIVATIONS.get(architecture.gguf, ("silu", "swish"))
    # In an old Gemma hidden_act is "gelu", but in transformers hidden_activation takes precedence, even if it is null.
    key = next((key for key in ("hidden_activation", "hidden_act", "activation_function", "activation") if config.get(key)), "")
    if key and config.get(key) not in activations:
        problem = f"config.json: {key} is {config.get(key)}, but llama.cpp's {architecture.gguf} computes {activations[-1]}"
        raise RefusedError(config.where, problem)
    kind = config.rope["rope_type"]
    if kind not in _SCALED.get(
        architecture.gguf, ("default",) if architecture.gguf in OWN_KEYS else ("default", "linear", "yarn")
    ):
        problem = (
            f"a rotary embedding of the type {str(kind)[:40]!r}, which llama.cpp's conversion of {architecture.gguf} ignores"
        )
        raise RefusedError(config.where, problem)
    if config.sliding_rope.get("rope_type", "default") != "default":
        raise RefusedError(
            config.where, "the rotary embedding of the layers with a window is scaled, for which llama.cpp has no key"
        )
