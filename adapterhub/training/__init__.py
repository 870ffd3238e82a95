"""QLoRA training on one machine: LoRA layers on an NF4 base, and an adapter with a record of its training.

`trainer` takes a training run from its config to the finished folder. The subpackages follow the order in which things happen:
`train_config`; `model`, the base with its trainable `layers`; `data`, from files to rows of tokens; `loop`, the steps;
`artifacts`, the files that are written. `cost` predicts and measures time and memory; `training_preview` previews data and
steps. Importing this package does not import torch.

`config_file` parses a config, `config_help` explains its keys; `events` are what a run reports; `compute_device` and
`distributed` say where it runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.training.cost.memory import plan
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import MissingExtraError

from .config_file import read as read_config
from .events import (
    Encoding,
    EvaluationEvent,
    Event,
    InitialAdapter,
    Loading,
    MemoryPlan,
    NoteEvent,
    OnEvent,
    Ready,
    Report,
    ResumeEvent,
    SaveEvent,
    StepEvent,
    TrackerFailureEvent,
    TrainingResult,
)
from .train_config import TrainConfig

if TYPE_CHECKING:
    from .trainer import Trainer
    from .training_preview import Preview

__all__ = [
    "Encoding", "EvaluationEvent", "Event", "InitialAdapter", "Loading", "MemoryPlan", "NoteEvent", "OnEvent", "Ready",
    "Report", "ResumeEvent", "SaveEvent", "StepEvent", "TrackerFailureEvent", "TrainConfig", "TrainingResult",
    "card_memory", "open_trainer", "plan", "preview", "read_config", "run",
]  # fmt: skip

_EXTRA = ("torch", "transformers", "tokenizers", "matplotlib")


def run(
    config: TrainConfig,
    out: Path,
    *,
    on_event: OnEvent | None = None,
    force: bool = False,
    start: InitialAdapter | None = None,
    cache: Path | None = None,
    replace: bool = False,
) -> TrainingResult:
    """Train the adapter that `config` describes and write it to the folder `out`, completely or not at all.

    The same config, data, base, machine and library versions give the same bytes. SIGTERM and SIGINT end the run after the
    current step and leave a checkpoint next to `out`, as do a kill or a loss of power, with the steps up to the last checkpoint
    by time; the same call then resumes from it and gives the same bytes.

    Args:
        on_event: Called with every event, in this process.
        force: Train even if memory will not suffice.
        start: An adapter to train further; it becomes the parent of the result.
        cache: The folder for quantized bases and digests of unchanged files; None for no cache.

    Raises:
        MissingExtraError: torch or another library of the extra is not installed.
        StoppedError: A signal arrived; the checkpoint is written.
        RefusedError: The data contain nothing to train on, the base is not supported, or memory does not suffice.

    Example:
        `run(read_config(Path("sql.toml")), Path("sql"), on_event=print)`
    """
    with open_trainer(config, out, on_event=on_event, force=force, start=start, cache=cache, replace=replace) as trainer:
        trainer.run()
        return trainer.save()


@contextmanager
def open_trainer(
    config: TrainConfig,
    out: Path,
    *,
    on_event: OnEvent | None = None,
    force: bool = False,
    start: InitialAdapter | None = None,
    cache: Path | None = None,
    replace: bool = False,
) -> Iterator[Trainer]:
    """Load a training run whose steps the caller runs, for example with its own loss; takes the arguments of `run`.

    Example:
        `with open_trainer(config, Path("sql")) as trainer: trainer.forward_backward(next(trainer.batches()))`
    """
    check_extra()
    from . import compute_device, distributed
    from .artifacts import finished_folder, tracking
    from .trainer import Trainer

    # Checked before anything is loaded: an hour of training must not end at an output folder that is taken.
    atomic.check_free(out, replace=replace)
    finished_folder.check_place(out)
    with distributed.process_group(), ExitStack() as stack:
        report = on_event if on_event and distributed.first() else lambda _: None
        if distributed.first():
            report = stack.enter_context(tracking.with_trackers(config, out, report))
        # Only the first process reports: the others would repeat every event.
        if config.train.deterministic:
            stack.enter_context(compute_device.deterministic(config.base.device))
        threads = stack.enter_context(compute_device.threads(config.train.threads))
        yield Trainer(config, out, report, force=force, start=start, cache=cache, replace=replace, thread_count=threads)


def card_memory(config: TrainConfig) -> int | None:
    """Return the memory in bytes of the CUDA device that would train; None if a CPU would, or if torch is not installed."""
    if config.base.device == "cpu" or _missing() is not None:
        return None
    import torch

    from . import compute_device

    return compute_device.memory(compute_device.select(config.base.device)) if torch.cuda.is_available() else None


def preview(config: TrainConfig, *, on_this_machine: bool = True) -> Preview:
    """Return what a training run will read and do. Its data are read and checked, and nothing is trained.

    Of large data, an evenly spaced sample of the documents is encoded. Counting tokens, steps and time needs the libraries of
    the extra; without them the data are still read and checked. The time is measured on this machine, so it is None unless
    `on_this_machine` is true: the training will run here.

    Raises:
        AdapterhubError: Any problem of the data that the training would refuse; `problems` lists all those of a file.

    Example:
        `preview(read_config(Path("sql.toml"))).data.count.steps`
    """
    from .training_preview import preview as preview_here

    return preview_here(config, can_train=_missing() is None, on_this_machine=on_this_machine)


def _missing() -> str | None:
    """Return the first library of the extra that is not installed."""
    # find_spec does not import the libraries, which would take seconds.
    return next((name for name in _EXTRA if importlib.util.find_spec(name) is None), None)


def check_extra(work: str = "training") -> None:
    """Raise MissingExtraError if a library of the extra is not installed."""
    if name := _missing():
        raise MissingExtraError("", f"{work} needs {name}, which is not installed", "Run `pip install 'adapterhub[train]'`")
