"""The tensors that llama.cpp's conversion computes from the config: how much slower each pair of a head turns.

Of Llama 3 (conversion/llama.py, `generate_extra_tensors`) and Phi-3 (conversion/phi.py).
"""

from __future__ import annotations

import math

import numpy as np

from adapterhub_converters.containers.gguf_file import Value, f32
from adapterhub_converters.errors import RefusedError

from .arrangement import Arranged
from .configured import Config
from .usual import head_size, rotated


def rope_tensors(gguf: str, config: Config) -> tuple[tuple[Arranged, ...], dict[str, Value]]:
    """The tensors, and the keys that go with them."""
    if config.rope["rope_type"] == "llama3":
        return (_constant("rope_freqs.weight", _llama3(config)),), {}
    if gguf == "phi3" and config.rope.get("long_factor"):
        return _phi3(config)
    return (), {}


def _constant(name: str, numbers: np.ndarray) -> Arranged:
    return Arranged(name, numbers.shape, (), constant=numbers)


def _llama3(config: Config) -> np.ndarray:
    size = head_size(config)
    # In float32, as llama.cpp has it from torch.
    powers = np.float32(config.rope_number("rope_theta")) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    frequencies = np.float32(1.0) / powers.astype(np.float32)
    usual = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
    factor, low, high, original = (config.rope_number(key, default) for key, default in usual.items())
    if low == high or not low or not high or not factor:
        raise RefusedError(config.where, "config.json: the factors of the rotary embedding leave no way from slow to fast")
    factors = []
    for frequency in frequencies:
        wave = np.float32(2 * math.pi) / frequency
        if wave < original / high:
            factors.append(np.float32(1))
        elif wave > original / low:
            factors.append(np.float32(factor))
        else:
            smooth = (np.float32(original) / wave - np.float32(low)) / np.float32(high - low)
            factors.append(np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth))
    return np.array(factors, np.float32)


def _phi3(config: Config) -> tuple[tuple[Arranged, ...], dict[str, Value]]:
    rope, half = config.rope, rotated(config) // 2
    said = {kind: rope.get(f"{kind}_factor") for kind in ("long", "short")}
    for numbers in said.values():
        if not isinstance(numbers, list) or len(numbers) != half or not all(isinstance(one, int | float) for one in numbers):
            raise RefusedError(config.where, f"config.json: long_factor and short_factor are not {half} numbers each")
    factors = {kind: np.array(numbers, np.float32) for kind, numbers in said.items()}
    original = config.count("original_max_position_embeddings")
    scale = config.count("max_position_embeddings") / original
    attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
    tensors = tuple(_constant(f"rope_factors_{kind}.weight", found) for kind, found in factors.items())
    return tensors, {"rope.scaling.attn_factor": f32(attention)}
