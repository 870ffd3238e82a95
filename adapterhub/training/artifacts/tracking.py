"""Trackers, which get the numbers of a run as well: TensorBoard and W&B; others take them from a program's own `on_event`.

Each takes numbers by name for a step; this is the adapter between that and the trainer's events.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub.training.events import EvaluationEvent, Event, OnEvent, StepEvent, TrackerFailureEvent
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters.errors import MissingExtraError, RefusedError, UsageError

Log = Callable[[int, Mapping[str, float]], None]
_PROJECT = "adapterhub"


@contextlib.contextmanager
def with_trackers(config: TrainConfig, out: Path, on_event: OnEvent) -> Iterator[OnEvent]:
    """Yield an `on_event` that also logs to the trackers of `log_to`, and close them at the end; one that fails is dropped.

    Raises:
        UsageError: The name of a tracker is unknown.
        MissingExtraError: A tracker is not installed.
        RefusedError: A tracker does not start, or W&B's settings in the working folder name a server.
    """
    with contextlib.ExitStack() as stack:
        logs = {name: stack.enter_context(_open_tracker(name, config, out, on_event)) for name in config.train.log_to}
        yield logging_to(logs, on_event) if logs else on_event


def logging_to(logs: dict[str, Log], on_event: OnEvent) -> OnEvent:
    """Return an `on_event` that also calls `logs`, the trackers by name; one that fails is removed from them."""

    def log_and_pass_on(event: Event) -> None:
        if numbers := _numbers(event):
            # A copy, because trackers that fail are removed in the loop.
            for name, log in list(logs.items()):
                try:
                    log(*numbers)
                except Exception as error:  # noqa: BLE001 - anything may fail, from a server to a full disk
                    del logs[name]
                    on_event(TrackerFailureEvent(name, _reason(error)))
        on_event(event)

    return log_and_pass_on


def _open_tracker(name: str, config: TrainConfig, out: Path, on_event: OnEvent) -> contextlib.AbstractContextManager[Log]:
    location = f"{config.location}: [train] log_to"
    if name not in _TRACKERS:
        hint = f"Use {' or '.join(_TRACKERS)}; from Python, on_event hands the numbers to any other"
        raise UsageError(location, f"unknown tracker {name!r}", hint)
    # A file in the working folder could send the user's key elsewhere, so it is checked before wandb reads it.
    if name == "wandb":
        _check_workspace(location)
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(location, f"{name} is not installed", f"Run `pip install {name}`")
    return _report_errors(_TRACKERS[name](config, out), name, location, on_event)


def _check_workspace(location: str) -> None:
    """Refuse `wandb/settings` in the working folder: it may name the server that gets the key, a proxy, certificates."""
    for folder in ("wandb", ".wandb"):
        path = Path(folder, "settings")
        if os.path.lexists(path):
            hint = "Remove the file; WANDB_ENTITY, WANDB_PROJECT, WANDB_MODE and WANDB_BASE_URL say the same"
            raise RefusedError(location, f"{path} is in the working folder, and W&B would follow it with your key", hint)


@contextlib.contextmanager
def _report_errors(
    tracker: contextlib.AbstractContextManager[Log], name: str, location: str, on_event: OnEvent
) -> Iterator[Log]:
    """Report in one line what a tracker raises when it starts or ends; it depends on servers, accounts and files."""
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(tracker)
        except Exception as error:
            problem = f"{name} does not start ({_reason(error)})"
            raise RefusedError(location, problem, "Set it up, or remove it from log_to") from error
        yield log
        try:
            stack.close()
        except Exception as error:  # noqa: BLE001 - the adapter has been written already
            on_event(TrackerFailureEvent(name, _reason(error)))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _numbers(event: Event) -> tuple[int, dict[str, float]] | None:
    if isinstance(event, StepEvent):
        return event.step, {
            "train/loss": event.loss, "train/learning_rate": event.learning_rate, "train/gradient_norm": event.gradient_norm,
            "train/tokens": event.tokens, "train/tokens_per_second": event.tokens_per_second,
        }  # fmt: skip
    if isinstance(event, EvaluationEvent):
        metrics = {"loss": event.loss, "perplexity": event.perplexity, "accuracy": event.accuracy, "margin": event.margin}
        return event.step, {f"heldout/{name}": value for name, value in metrics.items() if value is not None}
    return None


@contextlib.contextmanager
def _tensorboard(_: TrainConfig, out: Path) -> Iterator[Log]:
    """Write event files into the folder OUT.tensorboard, next to the adapter, whose bytes must not depend on the time."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out.with_name(out.name + ".tensorboard"))) as writer:

        def log(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield log


@contextlib.contextmanager
def _wandb(config: TrainConfig, out: Path) -> Iterator[Log]:
    library: Any = importlib.import_module("wandb")
    run = library.init(project=_PROJECT, name=out.name, config=config.document())
    try:
        yield lambda step, numbers: run.log(dict(numbers), step=step)
    finally:
        run.finish()


_TRACKERS: dict[str, Callable[[TrainConfig, Path], contextlib.AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
