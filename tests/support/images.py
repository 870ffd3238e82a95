"""Tiny adapters of image models, as their trainers save them, and what they add to a weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters.adapter import Adapter, Delta, Factored
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
SDXL = {f"{ATTENTION}.to_q": (16, 16), f"{ATTENTION}.to_out.0": (16, 16), "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3)}
SDXL |= {f"mid_block.attentions.0.transformer_blocks.3.{name}": (16, 12) for name in ("attn2.to_k", "ff.net.0.proj")}
FLUX = {f"transformer_blocks.0.attn.to_{name}": (16, 16) for name in "qkv"} | {"transformer_blocks.0.ff.net.2": (16, 64)}
FLUX |= {f"single_transformer_blocks.1.attn.to_{name}": (16, 16) for name in "qkv"}
FLUX |= {"single_transformer_blocks.1.proj_mlp": (64, 16), "norm_out.linear": (32, 16)}


class Numbers:
    """Random numbers that are the same every time."""

    def __init__(self, dtype: Any = np.float16) -> None:
        self._rng, self._dtype = np.random.default_rng(0), dtype

    def __call__(self, *shape: int) -> np.ndarray:
        return self._rng.normal(size=shape).astype(self._dtype)


def pair(numbers: Numbers, shape: tuple[int, ...], r: int) -> tuple[np.ndarray, np.ndarray]:
    """Two factors for a weight of this shape."""
    return numbers(r, *shape[1:]), numbers(shape[0], r, *(1,) * (len(shape) - 2))


def kohya_file(
    path: Path, modules: Mapping[str, tuple[int, ...]], header: dict[str, str] | None = None, **alphas: float
) -> Path:
    """A file as sd-scripts saves it: by the name of each module there, with an alpha of 3 or another."""
    numbers, tensors = Numbers(), {}
    for stem, shape in modules.items():
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = pair(numbers, shape, 4)
        tensors[f"{stem}.alpha"] = np.asarray(alphas.get(stem, 3), np.float16)
    safetensors_file.write(path, tensors, header)
    return path


def peft_folder(path: Path, modules: Mapping[str, tuple[int, ...]], ranks: dict[str, int] | None = None, **config: Any) -> Path:
    """A folder as peft saves it."""
    path.mkdir()
    numbers, tensors = Numbers(), {}
    for target, shape in modules.items():
        stem = f"base_model.model.{target}"
        lora_A, lora_B = pair(numbers, shape, (ranks or {}).get(target, 4))
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = lora_A, lora_B
        if config.get("use_dora"):
            tensors[f"{stem}.lora_magnitude_vector"] = numbers(1, shape[0], 1, 1) if len(shape) > 2 else numbers(shape[0])
    safetensors_file.write(path / peft.WEIGHTS, tensors, {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "target_modules": sorted(modules), "rank_pattern": ranks or {}}
    (path / peft.CONFIG).write_text(json.dumps(settings | config))
    return path


def files(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def dense(delta: Delta) -> np.ndarray:
    """What a delta adds to its weight, in float64."""
    plain: Any = delta.as_low_rank() if isinstance(delta, Factored) else delta
    lora_A, lora_B = plain.lora_A.astype(np.float64), plain.lora_B.astype(np.float64)
    product: np.ndarray = plain.scaling * lora_B.reshape(len(lora_B), -1) @ lora_A.reshape(len(lora_A), -1)
    return product.reshape(plain.shape)


def merged(adapter: Adapter, target: str, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight and the bias that an adapter makes of a module's, in float64."""
    changed_weight, found_bias = weight.astype(np.float64), bias.astype(np.float64)
    if (delta := adapter.deltas.get(target)) is not None:
        plain: Any = delta.as_low_rank() if isinstance(delta, Factored) else delta
        changed_weight = changed_weight + dense(plain)
        if plain.magnitude is not None:  # DoRA: rows of the sum with these norms
            norms = np.sqrt(np.sum(np.square(changed_weight), axis=tuple(range(1, changed_weight.ndim)), keepdims=True))
            changed_weight = changed_weight * plain.magnitude.reshape(norms.shape) / norms
        if plain.bias is not None:
            found_bias = found_bias + plain.scaling * plain.bias
    return changed_weight + adapter.added.get(f"{target}.weight", 0), found_bias + adapter.added.get(f"{target}.bias", 0)
