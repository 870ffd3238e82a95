"""The record of a training by another tool: read from what transformers' Trainer leaves, with that tool as its recorder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import derive
from adapterhub.manifest.document import LossPoint
from tests.conftest import Run

Make = Callable[..., Path]
LOG: list[Any] = [
    {"epoch": 0.5, "grad_norm": 1.2, "learning_rate": 2e-4, "loss": 2.5, "step": 10},
    {"epoch": 1.0, "eval_loss": 2.0, "eval_runtime": 1.1, "step": 20},
    {"epoch": 1.0, "loss": 1.5, "step": 20},
    {"epoch": 1.0, "step": 20, "total_flos": 1e12, "train_loss": 2.0, "train_runtime": 9.9},
]


def trained(folder: Path, log: Any = LOG, tags: str = "") -> Path:
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": log, "max_steps": 20}))
    (folder / "README.md").write_text(f"---\ntags: [{tags}]\n---\n# SQL\n")
    return folder


@pytest.mark.parametrize(
    ("tags", "recorder"),
    [
        ("trl, sft, lora", "trl"),
        ("axolotl, generated_from_trainer", "axolotl"),
        ("llama-factory, lora", "llama-factory"),
        ("unsloth, trl", "unsloth"),
        ("generated_from_trainer", "transformers"),
        ("", "transformers"),
    ],
)
def test_the_tool_that_trained_is_the_recorder(make: Make, tags: str, recorder: str) -> None:
    training = derive.describe(trained(make("sql"), tags=tags)).training
    assert training
    assert training.recorder == recorder
    assert training.metrics == {"train_steps": 20, "train_loss": 1.5, "heldout_loss": 2.0}
    assert training.curve == (LossPoint(10, loss=2.5), LossPoint(20, heldout_loss=2.0), LossPoint(20, loss=1.5))


def test_it_is_pushed_and_a_policy_can_ask_for_the_recorder(make: Make, run: Run, tmp_path: Path) -> None:
    run("push", trained(make("sql"), tags="trl"), "team/sql")
    (tmp_path / "adapterhub.toml").write_text('[policy]\nrecorders = ["trainer"]\n')
    assert "its training was recorded by trl, not trainer" in run("pull", "team/sql", "-o", "out", code=6).stderr
    assert "its training was recorded by trl, not trainer" in run("push", "sql", "team/other", code=6).stderr
    (tmp_path / "adapterhub.toml").write_text('[policy]\nrecorders = ["trainer", "trl"]\n')
    run("pull", "team/sql", "-o", "out")
    assert "was recorded by trl, and not by" not in run("push", "sql", "team/sql").stderr


def test_what_the_owner_declares_beside_it_makes_them_the_recorder(make: Make) -> None:
    folder = trained(make("sql"), tags="trl")
    (folder / "adapter.toml").write_text("[training.metrics]\nheldout_loss = 0.1\n")
    training = derive.describe(folder).training
    assert training
    assert (training.recorder, training.metrics) == ("owner", {"heldout_loss": 0.1})


def test_a_state_that_is_left_out_or_cannot_be_read_is_no_record(make: Make) -> None:
    folder = trained(make("sql"))
    (folder / ".adapterhubignore").write_text("trainer_state.json\n")
    assert derive.describe(folder).training is None
    (folder / ".adapterhubignore").unlink()
    for text in ("{", "[]", '{"global_step": -1, "log_history": 3}', '{"log_history": [{"step": 1, "loss": NaN}]}', "{}"):
        (folder / "trainer_state.json").write_text(text)
        assert derive.describe(folder).training is None


def test_a_hostile_log_is_cut(make: Make) -> None:
    log: list[Any] = [3, {"step": "x", "loss": 1}, {"step": 1, "loss": "x"}, {"step": -1, "loss": 1}, {"loss": 1}]
    log += [{"step": step, "loss": 1.0} for step in range(1000)]
    training = derive.describe(trained(make("sql"), log)).training
    assert training
    assert training.curve
    assert len(training.curve) == 100
    assert training.curve[-1].step == 999
