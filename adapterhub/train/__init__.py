"""QLoRA on one machine: an NF4 base, LoRA on its linear layers, and an adapter that says how it came to be.

Read in the order things happen: `config`; `corpus`, from files to rows of tokens; `layers`, what a model learns with; `model`,
the base with these; `steps`, the loop and what is in it; `records`, what is written. `trainer` ties them together. `costs` says
what a training will take and what it took; `model.given` is an adapter to go on from, or to `evaluate`. Importing this package
imports no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from adapterhub.train.cost.memory import plan
from adapterhub_converters.errors import MissingExtraError

from .config import TrainConfig
from .config import read as read_config
from .events import (
    Evaluated,
    Event,
    Given,
    Loading,
    Measured,
    Measuring,
    MemoryPlan,
    OnEvent,
    Ready,
    Report,
    Result,
    Resumed,
    Saved,
    Stepped,
    Untracked,
)

__all__ = [
    "Evaluated", "Event", "Given", "Loading", "Measured", "Measuring", "MemoryPlan", "OnEvent", "Ready", "Report", "Result",
    "Resumed", "Saved", "Stepped", "TrainConfig", "Untracked", "evaluate", "plan", "read_config", "run",
]  # fmt: skip

_EXTRA = ("torch", "transformers", "tokenizers", "matplotlib")


def run(
    config: TrainConfig,
    out: Path,
    *,
    on_event: OnEvent | None = None,
    force: bool = False,
    start: Given | None = None,
    cache: Path | None = None,
) -> Result:
    """Train the adapter that `config` describes into the folder `out`, which appears whole or not at all.

    `start`: An adapter whose factors are the first ones; it becomes the parent of the result.
    `cache`: A folder for quantized bases and digests of files that don't change; None keeps nothing.

    The same config, data, base, machine and library versions give the same bytes. SIGTERM and SIGINT end the run
    after the current step with a checkpoint beside `out`; the same call then goes on from it to those same bytes.

    Raises:
        MissingExtraError: torch or another library of the extra isn't installed.
        StoppedError: A signal came; the checkpoint is written.
        RefusedError: The data teach nothing, the base isn't understood, or memory will not do; that last unless `force`.
    """
    _check_extra()
    from . import distributed
    from .artifacts import tracking
    from .trainer import train

    with distributed.joined():
        said = on_event if on_event and distributed.first() else lambda _: None
        if not distributed.first():
            return train(config, out, said, force=force, start=start, cache=cache)
        with tracking.tracked(config, out, said) as tell:
            return train(config, out, tell, force=force, start=start, cache=cache)


def evaluate(
    start: Given,
    base: Path,
    files: list[Path],
    asked: Measuring,
    *,
    progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> Measured:
    """The loss of the base model at `base` with and without an adapter, on the documents of `files`.

    The model is loaded once, as `asked` says; without the adapter its deltas count nothing. `progress(done, all)` of loading;
    `cache` as in `run`.

    Raises:
        MissingExtraError: torch or another library of the extra isn't installed.
        RefusedError: The adapter is for another base, or has what the layers here cannot hold.
    """
    _check_extra()
    from .evaluation import evaluate as measure

    return measure(start, base, files, asked, progress=progress, cache=cache)


def _check_extra() -> None:
    for name in _EXTRA:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError("", f"training needs {name}, which isn't installed", 'pip install "adapterhub[train]"')
