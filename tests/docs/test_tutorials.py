"""Every step of the tutorials works, and prints what they show; those that start servers or train are in tests/peers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import adapterhub as ah
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from tests.conftest import CHECKING, ROOT, _environment
from tests.support import pages
from tests.support.adapters import write_adapter
from tests.support.forked import Forked
from tests.training.conftest import tiny_base

__all__ = ["tiny_base"]
LIGHT = ("laptop", "ci", "deploy", "air-gap")
HEAVY = ("team-hub", "serve-many", "train-publish")
REAL = ("release",)
"""Those whose answers have to be right, which takes a real model."""


def fill(folder: Path, base: Path, *ignored: str) -> None:
    """What `make demo` leaves behind, tiny: an adapter of every linear layer, its base but for files `ignored`, and data."""

    demo = folder / "demo"
    shutil.copytree(base, demo / "base", ignore=shutil.ignore_patterns(*ignored))
    widths = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64, "gate_proj": 96, "up_proj": 96, "down_proj": 64}
    write_adapter(demo / "legal", 0, r=16, lora_alpha=32, target_modules=list(widths), task_type="CAUSAL_LM")
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for module, wide in widths.items():
            part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(16, 96 if module == "down_proj" else 64)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(wide, 16)).astype(np.float32)
    safetensors_file.write(demo / "legal" / peft.WEIGHTS, tensors, {"format": "pt"})
    config = json.loads((demo / "legal" / peft.CONFIG).read_text())
    (demo / "legal" / peft.CONFIG).write_text(json.dumps(config, indent=1))
    ah.describe(demo / "legal", base=demo / "base")
    (demo / "data").mkdir()
    for name, text in (("train", "abcdefgh" * 40), ("heldout", "cdef" * 40)):
        (demo / "data" / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n' * 8)


def test_every_tutorial_is_run() -> None:
    assert {path.stem for path in (ROOT / "docs/tutorials").glob("*.md")} == {*LIGHT, *HEAVY, *REAL}


@pytest.mark.parametrize("name", LIGHT)
def test_every_step_works_as_printed(name: str, tiny_base: Path, tmp_path: Path, servers: Callable[..., Forked]) -> None:
    fill(tmp_path, tiny_base, "token*", "special_tokens*")  # whose kind no GGUF of llama.cpp has
    server = servers(*CHECKING)

    def run(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return server.run(words, folder, environment)

    with pages.Session(tmp_path, _environment(tmp_path, None), {"8090": 0, "8000": 0}, run) as session:
        for step in pages.steps(pages.page(f"tutorials/{name}.md")):
            session.perform(step)
