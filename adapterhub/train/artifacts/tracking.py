"""Where else the numbers of a run go: TensorBoard, W&B, MLflow or trackio, whichever is asked for and installed.

Every one of them takes numbers by name for a step; this is the one small seam between that and the trainer's events.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub.train.config import TrainConfig
from adapterhub.train.events import Evaluated, Event, OnEvent, Stepped, Untracked
from adapterhub_converters.errors import MissingExtraError, RefusedError, UsageError

Log = Callable[[int, Mapping[str, float]], None]
_PROJECT = "adapterhub"


@contextlib.contextmanager
def tracked(config: TrainConfig, out: Path, on_event: OnEvent) -> Iterator[OnEvent]:
    """`on_event` that also tells what `log_to` names; all are closed at the end. One that fails meanwhile is told no more.

    Raises:
        UsageError: A name that isn't known.
        MissingExtraError: One that isn't installed.
        RefusedError: One that does not start.
    """
    with contextlib.ExitStack() as stack:
        logs = {name: stack.enter_context(_opened(name, config, out, on_event)) for name in config.train.log_to}
        yield telling(logs, on_event) if logs else on_event


def telling(logs: dict[str, Log], on_event: OnEvent) -> OnEvent:
    """`on_event` that also tells `logs` by their names, of which those that fail are taken out."""

    def tell(event: Event) -> None:
        if numbers := _numbers(event):
            for name, log in list(logs.items()):
                try:
                    log(*numbers)
                except Exception as error:  # noqa: BLE001 - whatever somebody else's server makes of it
                    del logs[name]
                    on_event(Untracked(name, _reason(error)))
        on_event(event)

    return tell


def _opened(name: str, config: TrainConfig, out: Path, on_event: OnEvent) -> contextlib.AbstractContextManager[Log]:
    where = f"{config.where}: [train] log_to"
    if name not in _KINDS:
        raise UsageError(where, f"{name!r} isn't known", f"It may name {', '.join(_KINDS)}")
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(where, f"{name} isn't installed", f"pip install {name}")
    return _said(_KINDS[name](config, out), name, where, on_event)


@contextlib.contextmanager
def _said(opening: contextlib.AbstractContextManager[Log], name: str, where: str, on_event: OnEvent) -> Iterator[Log]:
    """What a library raises when it starts or ends, in one line; these depend on servers, accounts and files of theirs."""
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(opening)
        except Exception as error:
            what = f"{name} does not start ({_reason(error)})"
            raise RefusedError(where, what, "Set it up, or take it out of log_to") from error
        yield log
        try:
            stack.close()
        except Exception as error:  # noqa: BLE001 - the adapter is written by now
            on_event(Untracked(name, _reason(error)))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _numbers(event: Event) -> tuple[int, dict[str, float]] | None:
    if isinstance(event, Stepped):
        return event.step, {
            "train/loss": event.loss, "train/learning_rate": event.learning_rate, "train/gradient_norm": event.gradient_norm,
            "train/tokens": event.tokens, "train/tokens_per_second": event.tokens_per_second,
        }  # fmt: skip
    if isinstance(event, Evaluated):
        return event.step, {"heldout/loss": event.loss, "heldout/perplexity": event.perplexity}
    return None


@contextlib.contextmanager
def _tensorboard(_: TrainConfig, out: Path) -> Iterator[Log]:
    """Event files in the folder OUT.tensorboard, beside the adapter, whose bytes must not depend on a clock."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out.with_name(out.name + ".tensorboard"))) as writer:

        def log(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield log


def _run_of(module: str) -> Callable[[TrainConfig, Path], contextlib.AbstractContextManager[Log]]:
    """W&B's way, which trackio has taken over: `init`, `log`, `finish`."""

    @contextlib.contextmanager
    def opened(config: TrainConfig, out: Path) -> Iterator[Log]:
        library: Any = importlib.import_module(module)
        run = library.init(project=_PROJECT, name=out.name, config=config.document())
        try:
            yield lambda step, numbers: run.log(dict(numbers), step=step)
        finally:
            run.finish()

    return opened


@contextlib.contextmanager
def _mlflow(config: TrainConfig, out: Path) -> Iterator[Log]:
    library: Any = importlib.import_module("mlflow")
    with library.start_run(run_name=out.name):
        sections = config.document()
        library.log_params({f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()})
        yield lambda step, numbers: library.log_metrics(dict(numbers), step=step)


_KINDS: dict[str, Callable[[TrainConfig, Path], contextlib.AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _run_of("wandb"),
    "trackio": _run_of("trackio"),
    "mlflow": _mlflow,
}
