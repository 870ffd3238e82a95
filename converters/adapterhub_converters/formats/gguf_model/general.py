"""What a GGUF says of a model beside its numbers: its name and size, how its makers sample it, and what it is stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapterhub_converters.containers.gguf_file import Value, f32, string, u32

# generation_config.json's keys (gguf-py, `metadata.py`, `Metadata.load`).
_SAMPLING = {
    "top_k": ("top_k", int), "top_p": ("top_p", float), "min_p": ("min_p", float), "temp": ("temperature", float),
    "penalty_repeat": ("repetition_penalty", float), "penalty_last_n": ("penalty_last_n", int),
    "xtc_probability": ("xtc_probability", float), "xtc_threshold": ("xtc_threshold", float),
}  # fmt: skip
_STEPS = ((1e12, 1e-12, "T"), (1e9, 1e-9, "B"), (1e6, 1e-6, "M"), (-1.0, 1e-3, "K"))  # more than, times, unit


def general(gguf: str, name: str, shapes: Mapping[str, tuple[int, ...]], generation: Mapping[str, Any]) -> dict[str, Value]:
    """The keys `general.*` but for the type that the tensors are stored in."""
    made = {"general.architecture": string(gguf), "general.type": string("model")}
    for key, (asked, kind) in _SAMPLING.items():
        value = generation.get(asked)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 31:
            made[f"general.sampling.{key}"] = Value("INT32", int(value)) if kind is int else f32(float(value))
    return made | {"general.name": string(name), "general.size_label": string(size_label(shapes))}


def size_label(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`1.1B`, or `8x7B` of a model with experts (gguf-py, `utility.py`, `size_label`)."""
    stacked = {name: shape for name, shape in shapes.items() if "_exps." in name and len(shape) > 2}
    counts = [shape[0] for shape in stacked.values()]
    expert = sum(math.prod(shape) // shape[0] for shape in stacked.values())
    shared = sum(math.prod(shape) for name, shape in shapes.items() if name not in stacked)
    number = sum(counts) // len(counts) if counts else 0
    return f"{number}x{_rounded(shared + expert)}" if number else _rounded(shared)


def _rounded(count: int) -> str:
    factor, unit = next((factor, unit) for least, factor, unit in _STEPS if count > least)
    scaled = count * factor
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{unit}"


def stored(wanted: str) -> dict[str, Value]:
    """What the file is mostly made of (llama.h, `llama_ftype`)."""
    return {"general.file_type": u32(FILE_TYPES[wanted]), "general.quantization_version": u32(2)}


FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
