"""Versions of one training, which differ by little, and what packing has done to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from adapterhub.maintenance import compress
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.verify import verify
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters import dtypes
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft


def write_trained(parent: Path, name: str, seed: int = 0, step: int = 0) -> Path:
    """Write an adapter of some 130 kB in bfloat16, as a training of `seed` leaves it after `step` small steps."""
    path = parent / name
    path.mkdir()
    rng, later = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    tensors = {}
    for n in range(2):
        for module in ("q_proj", "v_proj"):
            for half, shape in (("A", (8, 1024)), ("B", (1024, 8))):
                values = rng.normal(size=shape) * 0.02 + sum(later.normal(size=shape) * 1e-4 for _ in range(step))
                key = f"base_model.model.model.layers.{n}.self_attn.{module}.lora_{half}.weight"
                tensors[key] = values.astype(np.float32).astype(dtypes.BF16)
    safetensors_file.write(path / peft.WEIGHTS, tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "base_model_name_or_path": "org/base",
    }
    (path / peft.CONFIG).write_text(json.dumps(config))
    return path


def weights(registry: Registry, ref: str) -> str:
    """The digest of a version's weights."""
    layers = registry.files(registry.resolve(Ref.parse(ref)))
    return next(layer.digest for layer in layers if layer.path == peft.WEIGHTS)


def check_whole(registry: Registry) -> None:
    for row in registry.list():
        assert verify(registry, row.ref) == []
    assert [finding for finding in fsck(registry) if finding.severity == "error"] == []


def work_on_registry(root: Path, work: str) -> None:
    with Registry.open(root) as registry:
        getattr(compress, work)(registry)
