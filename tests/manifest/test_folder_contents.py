"""The files of a folder are read in pieces, whatever their size."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np

from adapterhub.manifest import derive
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft


def test_a_large_adapter_is_described_in_little_memory(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    tensors = {f"{name}A.weight": np.zeros((64, 800_000), np.float32), f"{name}B.weight": np.zeros((8, 64), np.float32)}
    safetensors_file.write(tmp_path / peft.WEIGHTS, tensors)  # 205 MB
    del tensors
    (tmp_path / peft.CONFIG).write_text('{"peft_type": "LORA", "r": 64}')
    tracemalloc.start()
    derive.describe(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000  # bytes, most of them the first import of jsonschema
