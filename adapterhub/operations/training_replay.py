"""Replay of a part of a training, between two states that were kept of it: what a reader can afford of a large one.

adapter.json has the digest of each checkpoint that was kept, and the last of them leads to the weights. The part to repeat is
drawn at random, so that nobody can know in advance which part has to be genuine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import sha256_file
from adapterhub_converters.containers.json_file import is_integer
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import retrain
from . import train as train_operation
from .rebuild import RebuildResult, version_to_rebuild
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.manifest.document import KeptCheckpoint, Training
    from adapterhub.registry.adapter_recipe import RebuildDifference

Steps = int | tuple[int, int]
"""The most steps to repeat, or the completed steps at both ends of a part."""


@dataclass(frozen=True)
class _Part:
    """The part of a training from one state that was kept to the next; None for the first and for the finished adapter."""

    before: KeptCheckpoint | None
    after: KeptCheckpoint | None
    start: int
    end: int

    @property
    def length(self) -> int:
        """The number of steps."""
        return self.end - self.start


def replay(
    ref: str,
    workspace: Workspace,
    *,
    base: StrPath,
    data: Sequence[StrPath],
    steps: Steps,
    checkpoints: StrPath | None = None,
) -> RebuildResult:
    """Repeat a part of the training of a version from its record, and compare the state at its end with the recorded one.

    Args:
        ref: A version of the registry, which must also have the version that it continues, if any.
        workspace: The registry.
        base: As for `retrain.rebuild`, and so is `data`.
        data: The files of the training and the held-out data.
        steps: Which part.
        checkpoints: The folder of the kept checkpoints, `OUT.checkpoints` of the training; the first part needs none of them.

    Raises:
        RefusedError: No checkpoint was kept, no part is that short, or an input is not the recorded one. Nothing was trained.
    """
    from adapterhub.training import check_extra

    check_extra()
    folder = Path(checkpoints) if checkpoints is not None else None
    with version_to_rebuild(ref, workspace, None) as (registry, version, temporary):
        location, stored = str(version.ref), temporary / "stored"
        inputs = retrain.recorded_inputs(registry, version, stored, retrain.Inputs(base, data), workspace)
        part = _choose(_parts(inputs.training, location), steps, folder, location)
        begin = _checkpoint_path(part.before, folder, location)
        out = temporary / "trained"
        with train_operation.open_trainer(inputs.config, out, start=inputs.start, workspace=workspace) as trainer:
            if begin is not None:
                trainer.continue_after(begin, part.start)
            if part.after is None:
                trainer.run()
                trainer.save()
                differences = retrain.differences(stored, out)
            else:
                trainer.run(until=part.end)
                expected = _path(folder, part.after) if folder else None
                differences = _checkpoint_differences(part.after, expected, trainer.keep_checkpoint())
    return RebuildResult(version, tuple(differences), (part.start, part.end))


def _parts(training: Training, location: str) -> list[_Part]:
    """Return the parts of a training in order; RefusedError if no checkpoint was kept of it."""
    checkpoints = sorted({item.step: item for item in training.checkpoints or ()}.values(), key=lambda item: item.step)
    if not checkpoints:
        problem = "no checkpoint was kept of its training, so no part of it can be repeated alone"
        raise RefusedError(location, problem, "Repeat all of it", code="no-kept-checkpoint")
    states: list[KeptCheckpoint | None] = [None, *checkpoints]
    parts = [_Part(before, after, before.step if before else 0, after.step) for before, after in pairwise(states) if after]
    # Always there, whatever the record says of its length: only it compares the weights.
    last, recorded_steps = checkpoints[-1], (training.metrics or {}).get("train_steps")
    end = max(last.step, recorded_steps) if is_integer(recorded_steps) else last.step
    return [*parts, _Part(last, None, last.step, end)]


def _choose(parts: Sequence[_Part], steps: Steps, folder: Path | None, location: str) -> _Part:
    """Return a part that `steps` allow and whose first state is at hand, one of several at random."""
    if isinstance(steps, tuple):
        allowed, wanted = [part for part in parts if (part.start, part.end) == steps], f"from step {steps[0]} to {steps[1]}"
    else:
        allowed, wanted = [part for part in parts if part.length <= steps], f"of at most {steps} steps"
    if not allowed:
        ranges = ", ".join(f"{part.start}-{part.end}" for part in parts[:3]) + (", …" if len(parts) > 3 else "")
        problem = f"has no part {wanted} between states that were kept, which are {ranges}"
        raise RefusedError(location, problem, "Name one of these", code="no-such-part")
    at_hand = [part for part in allowed if part.before is None or (folder and _path(folder, part.before).is_file())]
    if not at_hand:
        problem = f"the checkpoint of step {allowed[0].start} is not at hand"
        raise RefusedError(location, problem, "Name the folder that has it", code="checkpoint-elsewhere")
    return random.SystemRandom().choice(at_hand)


def _path(folder: Path, checkpoint: KeptCheckpoint) -> Path:
    from adapterhub.training.artifacts import training_checkpoint

    return folder / training_checkpoint.kept_name(checkpoint.step)


def _checkpoint_path(checkpoint: KeptCheckpoint | None, folder: Path | None, location: str) -> Path | None:
    """Return the file of a checkpoint, which has the recorded digest; None for the state before the first step."""
    if checkpoint is None or folder is None:
        return None
    path = _path(folder, checkpoint)
    if path.stat().st_size != checkpoint.size or sha256_file(path) != checkpoint.digest:
        problem = f"{path} is not the checkpoint of step {checkpoint.step} with the digest {checkpoint.digest[:19]}…"
        raise RefusedError(location, problem, "Name the folder that has it", code="checkpoint-elsewhere")
    return path


def _checkpoint_differences(recorded: KeptCheckpoint, expected: Path | None, repeated: Path) -> list[RebuildDifference]:
    """Compare a repeated state with the recorded one, tensor by tensor if the file of that one is at hand."""
    from adapterhub.registry import adapter_recipe
    from adapterhub_converters.containers.safetensors_file import SafetensorsFile

    if sha256_file(repeated) == recorded.digest:
        return []
    differences: list[RebuildDifference] = []
    if expected is not None and expected.is_file() and sha256_file(expected) == recorded.digest:
        with SafetensorsFile(expected) as before, SafetensorsFile(repeated) as after:
            tensors = ({name: file.tensor(name) for name in file.header.tensors} for file in (before, after))
            differences = list(adapter_recipe.tensor_differences(*tensors))
    return differences or [adapter_recipe.RebuildDifference(repeated.name, "bytes differ")]
