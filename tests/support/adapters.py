"""Tiny real adapters: PEFT folders of rank 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adapterhub.manifest import derive
from adapterhub.manifest.document import Parent
from adapterhub.registry.version_lookup import Version
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft

Make = Callable[..., Path]


def write_adapter(path: Path, seed: int = 0, **config: object) -> Path:
    """A PEFT folder of rank 2 on two 8x8 layers, with a README."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.model.layers.{n}.self_attn.{module}.lora_{half}.weight": rng.normal(
            size=(2, 8) if half == "A" else (8, 2)
        ).astype(np.float32)
        for n in range(2)
        for module in ("q_proj", "v_proj")
        for half in "AB"
    }
    safetensors_file.write(path / peft.WEIGHTS, tensors, {"format": "pt"})
    settings: dict[str, object] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    settings |= {"base_model_name_or_path": "org/base", "target_modules": ["q_proj", "v_proj"]}
    (path / peft.CONFIG).write_text(json.dumps({**settings, **config}))
    (path / "README.md").write_text("# A test\n")
    return path


def write_large_adapter(path: Path, seed: int = 0, layers: int = 2) -> Path:
    """A PEFT folder of rank 128 with 8 MiB of weights a layer: with two, too large for a commit of the Hugging Face Hub."""
    write_adapter(path, seed, r=128, lora_alpha=128)
    rng = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{half}.weight": rng.normal(
            size=(128, 8192) if half == "A" else (8192, 128)
        ).astype(np.float32)
        for n in range(layers)
        for half in "AB"
    }
    safetensors_file.write(path / peft.WEIGHTS, tensors, {"format": "pt"})
    return path


def made_from(make: Make, name: str, seed: int, *parents: Version) -> Path:
    """An adapter whose adapter.json has others as its parents."""
    folder = make(name, seed)
    derive.describe(folder, parents=[Parent(parent.digest, str(parent.ref), 1.0, "cat") for parent in parents]).write(folder)
    return folder
