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
from adapterhub.train.events import Evaluated, Event, OnEvent, Stepped
from adapterhub_converters.errors import MissingExtraError, RefusedError, UsageError

Log = Callable[[int, Mapping[str, float]], None]
_PROJECT = "adapterhub"


@contextlib.contextmanager
def tracked(config: TrainConfig, out: Path, on_event: OnEvent) -> Iterator[OnEvent]:
    """`on_event` that also tells what `log_to` names; all are closed at the end.

    Raises:
        UsageError: A name that isn't known.
        MissingExtraError: One that isn't installed.
        RefusedError: One that does not start.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(_opened(name, config, out)) for name in config.train.log_to]

        def tell(event: Event) -> None:
            numbers = _numbers(event)
            if numbers is not None:
                for log in logs:
                    log(*numbers)
            on_event(event)

        yield tell if logs else on_event


def _opened(name: str, config: TrainConfig, out: Path) -> contextlib.AbstractContextManager[Log]:
    where = f"{config.where}: [train] log_to"
    if name not in _KINDS:
        raise UsageError(where, f"{name!r} isn't known", f"It may name {', '.join(_KINDS)}")
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(where, f"{name} isn't installed", f"pip install {name}")
    return _said(_KINDS[name](config, out), name, where)


@contextlib.contextmanager
def _said(opening: contextlib.AbstractContextManager[Log], name: str, where: str) -> Iterator[Log]:
    """What a library raises when it starts, in one line; these depend on servers, accounts and files of theirs."""
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(opening)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise RefusedError(where, f"{name} does not start ({reason})", "Set it up, or take it out of log_to") from error
        yield log


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
