"""`rebuild --steps`: a part of a training is repeated between two states that were kept, and compared byte by byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapterhub import training
from adapterhub.digest import sha256_bytes
from adapterhub.manifest.document import AdapterManifest
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import OutputExistsError
from tests.conftest import Run
from tests.training.test_trainer import contents, settings

INPUTS = ("--data", "train.jsonl", "--data", "heldout.jsonl")
# Everything that a later step may depend on: an evaluation at each end of a part, a best before it, noise, and a patience.
KEYS = {"keep_every": 3, "evaluate_every": 3, "keep_best": True, "neftune": 5.0, "steps": 7, "patience": 3}


@pytest.fixture
def pushed(tmp_path: Path, tiny_base: Path, run: Run) -> Path:
    """A folder with a trained `out`, which is team/sql:v1, its kept checkpoints, and the base."""
    path = settings(tmp_path, tiny_base, **KEYS)
    shutil.copytree(tiny_base, tmp_path / "base")
    training.run(training.read_config(path), tmp_path / "out")
    run("push", "out", "team/sql")
    return tmp_path


def recorded(folder: Path) -> Any:
    manifest = AdapterManifest.read(folder)
    assert manifest
    assert manifest.training
    return manifest.training.checkpoints


def rebuild(run: Run, steps: str, *options: str, code: int = 0) -> Any:
    return run("rebuild", "team/sql", "--base", "base", *INPUTS, "--steps", steps, *options, code=code)


def test_every_part_of_a_training_is_repeated_from_the_state_before_it(pushed: Path, run: Run) -> None:
    assert [item.step for item in recorded(pushed / "out")] == [3, 6]
    checkpoint_options = ("--checkpoints", "out.checkpoints")
    assert rebuild(run, "0-3").stdout == "team/sql:v1: steps 0 to 3 repeated, every byte matches\n"
    assert rebuild(run, "3-6", *checkpoint_options).stdout == "team/sql:v1: steps 3 to 6 repeated, every byte matches\n"
    (pushed / "out.checkpoints" / "step-3.safetensors").unlink()
    document = json.loads(rebuild(run, "1", *checkpoint_options, "--json").stdout)  # the one part that is so short
    assert (document["steps"], document["same"], document["differences"]) == ([6, 7], True, [])
    # Of the parts of three steps, only the first one can be begun.
    assert json.loads(rebuild(run, "3", "--json").stdout)["steps"] == [0, 3]


def test_the_weights_are_compared_whatever_the_record_says_of_the_length(pushed: Path, run: Run) -> None:
    document = json.loads((pushed / "out" / "adapter.json").read_text())
    document["training"]["metrics"]["train_steps"] = 6  # that of the last checkpoint: no step would lead to the weights
    (pushed / "out" / "adapter.json").write_text(json.dumps(document))
    run("push", "out", "team/sql")
    result = json.loads(rebuild(run, "1", "--checkpoints", "out.checkpoints", "--json").stdout)
    assert (result["ref"], result["steps"], result["same"]) == ("team/sql:v2", [6, 6], True)


def test_what_was_not_trained_as_recorded_is_found_in_the_part_where_it_happened(pushed: Path, run: Run) -> None:
    document = json.loads((pushed / "out" / "adapter.json").read_text())
    document["training"]["config"]["train"]["learning_rate"] = 0.02
    (pushed / "out" / "adapter.json").write_text(json.dumps(document))
    run("push", "out", "team/sql")
    text = rebuild(run, "0-3", "--checkpoints", "out.checkpoints", code=1).stdout
    assert text.startswith("team/sql:v2: steps 0 to 3 repeated, ")
    assert ".lora_B" in text
    assert "numbers differ" in text
    # Without the file of the state at the end there is its digest.
    assert "step-3.safetensors: bytes differ" in rebuild(run, "0-3", code=1).stdout
    assert "adapter_model" not in rebuild(run, "6-7", "--checkpoints", "out.checkpoints", code=1).stdout


def test_a_part_that_cannot_be_repeated_is_refused_in_words(pushed: Path, run: Run) -> None:
    (pushed / "other").mkdir()
    shutil.copy(pushed / "out.checkpoints" / "step-6.safetensors", pushed / "other" / "step-3.safetensors")
    parts = "between states that were kept, which are 0-3, 3-6, 6-7. Pass one of these as --steps  [no-such-part]"
    not_at_hand = "step 3 is not at hand. Name the folder that has it with --checkpoints  [checkpoint-elsewhere]"
    for options, code, text in (
        (("2-5",), 6, f"has no part from step 2 to 5 {parts}"),
        (("0",), 6, f"has no part of at most 0 steps {parts}"),
        (("3-6",), 6, not_at_hand),
        (("3-6", "--checkpoints", "other"), 6, "is not the checkpoint of step 3 with the digest sha256:"),
        (("3-6-9",), 2, "is no number of steps"),
        (("3", "-o", "again"), 2, "writes no adapter"),
    ):
        assert text in rebuild(run, *options, code=code).stderr


@pytest.mark.parametrize(
    "change",
    [
        {"log": "[3]"},
        {"log": '[{"step": 1, "loss": "x"}]'},
        {"log": '[{"step": 1, "heldout_loss": 800}]'},
        {"log": '[{"step": 1, "heldout_accuracy": 1}]'},
        {"scale": "[1]"},
        {"step": "5"},
    ],
)
def test_a_checkpoint_of_a_stranger_is_refused_by_name(pushed_once: Path, run: Run, change: dict[str, str]) -> None:
    """Its digest is the recorded one, and its content is not what a trainer writes."""
    path, folder = pushed_once / "out.checkpoints" / "step-3.safetensors", pushed_once / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with SafetensorsFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.header.tensors}
        safetensors_file.write(folder / path.name, tensors, {**file.header.metadata, **change})
    document = json.loads((pushed_once / "out" / "adapter.json").read_text())
    raw = (folder / path.name).read_bytes()
    document["training"]["checkpoints"][0] |= {"digest": sha256_bytes(raw), "size": len(raw)}
    (pushed_once / "out" / "adapter.json").write_text(json.dumps(document))
    run("push", "out", "team/sql", cwd=pushed_once)
    words = ("rebuild", "team/sql", "--base", "base", *INPUTS, "--steps", "3-6", "--checkpoints", "hostile")
    assert "step-3.safetensors: " in run(*words, cwd=pushed_once, code=4).stderr


@pytest.fixture(scope="module")
def pushed_once(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a trained `out`, its kept checkpoints, and the base, for tests that push it themselves."""
    folder = tmp_path_factory.mktemp("replay")
    shutil.copytree(tiny_base, folder / "base")
    training.run(training.read_config(settings(folder, tiny_base, **KEYS)), folder / "out")
    return folder


def test_a_training_without_checkpoints_names_the_way_to_keep_some(tmp_path: Path, tiny_base: Path, run: Run) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    training.run(training.read_config(settings(tmp_path, tiny_base, steps=1)), tmp_path / "out")
    assert recorded(tmp_path / "out") is None
    run("push", "out", "team/sql")
    error = rebuild(run, "1", code=6).stderr
    assert "no checkpoint was kept of its training, so no part of it can be repeated alone. Leave out --steps" in error
    assert error.endswith("train with [train] keep_every to keep some  [no-kept-checkpoint]\n")
    assert "requires --data" in run("rebuild", "team/sql", "--steps", "1", code=2).stderr
    assert "requires --steps" in run("rebuild", "team/sql", "--base", "base", *INPUTS, "--checkpoints", "x", code=2).stderr


def test_a_resumed_training_keeps_the_same_checkpoints(tmp_path: Path, tiny_base: Path) -> None:
    config = training.read_config(settings(tmp_path, tiny_base, **KEYS))
    training.run(config, tmp_path / "whole")

    def stop(event: object) -> None:
        if isinstance(event, training.StepEvent) and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.run(config, tmp_path / "out", on_event=stop)
    training.run(config, tmp_path / "out")
    for name in ("", ".checkpoints"):
        assert contents(tmp_path / f"out{name}") == contents(tmp_path / f"whole{name}")


def test_checkpoints_of_another_run_are_replaced_only_on_request(tmp_path: Path, tiny_base: Path) -> None:
    config = training.read_config(settings(tmp_path, tiny_base, steps=2, keep_every=1))
    training.run(config, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "earlier")
    with pytest.raises(OutputExistsError):
        training.run(config, tmp_path / "out")
    training.run(config, tmp_path / "out", replace=True)
    assert [item.step for item in recorded(tmp_path / "out")] == [1]
