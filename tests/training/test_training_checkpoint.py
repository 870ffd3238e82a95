"""A checkpoint is on disk completely or not at all, no matter when the process dies or the disk fails; the next one works."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapterhub.training.artifacts import finished_folder, training_checkpoint  # noqa: E402
from adapterhub.training.layers.lora import trained_parameters  # noqa: E402
from adapterhub.training.loop.state import State, new_state  # noqa: E402
from adapterhub_converters.containers import safetensors_file  # noqa: E402
from adapterhub_converters.errors import FormatError, LocalIOError  # noqa: E402
from tests.registry.forks import under_strace  # noqa: E402
from tests.training.test_kinds import loaded, whole  # noqa: E402

if TYPE_CHECKING:
    from torch import nn

CALLS = ("mkdir", "write", "fsync", "rename", "link", "unlink")


class Progress:
    """A model whose trained parameters all have the number of its last step."""

    def __init__(self, base: Path, path: Path) -> None:
        config = whole(base)
        self.model: nn.Module = loaded(config).model
        self.state: State = new_state(self.model, config.train)
        self.path = path

    def save(self, step: int) -> None:
        self.state.step = step
        with torch.no_grad():
            for _, parameter in trained_parameters(self.model):
                parameter.fill_(step)
        training_checkpoint.save(self.path, self.model, self.state, "run")

    def restored_step(self) -> int:
        """The step that the checkpoint has, all of whose parameters are of it."""
        assert training_checkpoint.restore(self.path, self.model, self.state, "run")
        assert all((parameter == self.state.step).all() for _, parameter in trained_parameters(self.model))
        return self.state.step


@pytest.fixture
def progress(tiny_base: Path, tmp_path: Path) -> Progress:
    return Progress(tiny_base, tmp_path / "out.checkpoint.safetensors")


def leftovers(folder: Path) -> list[str]:
    """The names of all files; an empty folder that a process had no time to lock is removed a day later (`atomic`)."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".new-" not in path.name)


def exit_codes_at_each(call: str, fault: str, progress: Progress) -> list[int]:
    """The exit codes of a save of step 2 with a fault at the first such call, at the second …, each in place of step 1."""
    codes = []
    for count in itertools.count(1):
        progress.save(1)
        codes.append(under_strace(f"{call}:{fault}:when={count}", lambda: progress.save(2)))
        assert progress.restored_step() == 2 if codes[-1] == 0 else progress.restored_step() in (1, 2)
        if codes[-1] == 0:
            return codes
    raise AssertionError("unreachable")


@pytest.mark.peer
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_at_any_system_call_leaves_one_whole_checkpoint(progress: Progress) -> None:
    kills = {call: exit_codes_at_each(call, "signal=SIGKILL", progress)[:-1] for call in CALLS}
    assert all(set(codes) <= {-signal.SIGKILL} for codes in kills.values())
    assert all(kills[call] for call in ("write", "fsync", "rename"))
    # The file and its folder are flushed, the first before the rename and the second after it.
    assert len(kills["fsync"]) == 2
    training_checkpoint.remove(progress.path)
    assert leftovers(progress.path.parent) == []


@pytest.mark.peer
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_save_on_a_failing_disk_is_an_error_that_leaves_the_last_checkpoint(progress: Progress, error: str) -> None:
    for call in ("write", "fsync", "rename"):
        codes = exit_codes_at_each(call, f"error={error}", progress)
        assert set(codes[:-1]) == {LocalIOError.exit_code}
    assert leftovers(progress.path.parent) == [progress.path.name]


def forge(path: Path, shape: tuple[int, ...] | None = None, **metadata: str) -> None:
    """Write a checkpoint again, as somebody may who knows its training; with tensors of a shape."""
    with safetensors_file.SafetensorsFile(path) as file:
        tensors = {name: file.tensor(name).copy() for name in file.header.tensors}
        changed = {**file.header.metadata, **metadata}
    safetensors_file.write(path, tensors if shape is None else {name: np.ones(shape, np.float32) for name in tensors}, changed)


@pytest.mark.parametrize("date", ["9999-99-99", "<|im_end|>", "2026-01-01T25:00", "tomorrow"])
def test_a_checkpoint_without_a_real_date_has_none(progress: Progress, date: str) -> None:
    progress.save(1)
    forge(progress.path, date=date)
    assert training_checkpoint.date(progress.path) is None
    forge(progress.path, date="9999-12-31")
    assert training_checkpoint.date(progress.path) == "9999-12-31"


@pytest.mark.parametrize(
    "changes",
    [
        {"log": "5"},
        {"log": "[5]"},
        {"log": "{"},
        {"scale": "5"},
        {"scale": "[1]"},
        {"step": "x"},
        {"read": ""},
        {"shape": (1,)},
        {"shape": (1, 1)},
    ],
)
def test_a_forged_checkpoint_is_refused(progress: Progress, changes: dict[str, Any]) -> None:
    progress.save(1)
    forge(progress.path, **changes)
    with pytest.raises(FormatError, match=rf"{progress.path.name}: (not a checkpoint of this training|not valid JSON)"):
        training_checkpoint.restore(progress.path, progress.model, progress.state, "run")


def test_a_disk_without_room_for_the_checkpoints_is_an_error_before_the_first_step(tiny_base: Path, tmp_path: Path) -> None:
    config = whole(tiny_base)
    finished_folder.check_space(config, tmp_path / "out", 1000)
    with pytest.raises(LocalIOError, match="take 28000000000.00 GB, and the disk has .* GB left"):
        finished_folder.check_space(config, tmp_path / "out", 10**18)
