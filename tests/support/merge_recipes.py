"""A base and an adapter of it, tiny enough to be merged many times, and the command that keeps the merge as a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from tests.conftest import Run

Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False}
KEEP = ("merge", "team/a", "--into", "base", "--recipe-only", "-o", "a.json")


def write_base(folder: Path, seed: int = 1) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {f"{Q}.weight": rng.normal(size=(64, 64)).astype(dtypes.BF16), "model.norm.weight": np.ones(64, dtypes.BF16)}
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def mergeable(folder: Path, run: Run) -> None:
    """Write a base, and an adapter beside it that is `team/a` in the registry as well."""
    write_base(folder / "base")
    rng = np.random.default_rng(2)
    lora_A, lora_B = rng.normal(size=(4, 64)), 0.03 * rng.normal(size=(64, 4))
    (folder / "a").mkdir()
    peft.write(Adapter({Q: LowRank(lora_A.astype(np.float32), lora_B.astype(np.float32), alpha=4)}), folder / "a")
    run("push", "./a", "team/a", cwd=folder)
