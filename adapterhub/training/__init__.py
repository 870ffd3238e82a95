"""QLoRA on one machine: LoRA on an NF4 base, and an adapter with a record of its training.

`trainer` is a training from its config to the finished folder, in the order in which things happen: `config`; `model`, the
base with the `layers` that are trained; `data`, from files to rows of tokens; `loop`, the steps; `artifacts`, what is written.
`cost` predicts and measures time and memory; `outlook` tells of data and steps beforehand; `evaluation` compares an adapter
with its base. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.training.cost.memory import plan
from adapterhub_converters.errors import MissingExtraError

from .config import TrainConfig
from .config_file import read as read_config
from .events import (
    Evaluated,
    EvaluationOptions,
    EvaluationResult,
    Event,
    InitialAdapter,
    Loading,
    MemoryPlan,
    Noted,
    OnEvent,
    Ready,
    Report,
    Result,
    Resumed,
    Saved,
    Stepped,
    Untracked,
)

if TYPE_CHECKING:
    from .outlook import Preview
    from .trainer import Trainer

__all__ = [
    "Evaluated", "EvaluationOptions", "EvaluationResult", "Event", "InitialAdapter", "Loading", "MemoryPlan", "Noted",
    "OnEvent", "Ready", "Report", "Result", "Resumed", "Saved", "Stepped", "TrainConfig", "Untracked", "card_memory",
    "evaluate", "open_trainer", "plan", "preview", "read_config", "run",
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
) -> Result:
    """Train the adapter that `config` describes into the folder `out`, which is written whole or not at all.

    The same config, data, base, machine and library versions give the same bytes. SIGTERM and SIGINT end the run after the
    current step with a checkpoint next to `out`; the same call then resumes from it and gives the same bytes.

    Args:
        on_event: Called with every event, in this process.
        force: Train even if memory will not suffice.
        start: An adapter to train further; it becomes the parent of the result.
        cache: The folder for quantized bases and digests of unchanged files; None for no cache.

    Raises:
        MissingExtraError: torch or another library of the extra is not installed.
        StoppedError: A signal came; the checkpoint is written.
        RefusedError: The data have nothing to train on, the base is not supported, or memory does not suffice.

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
    """Load a training for a program that does its steps, such as with a loss of its own; arguments are those of `run`.

    Example:
        `with open_trainer(config, Path("sql")) as trainer: trainer.forward_backward(next(trainer.batches()))`
    """
    check_extra()
    from . import distributed
    from .artifacts import tracking
    from .trainer import opened

    with distributed.joined(), ExitStack() as stack:
        report = on_event if on_event and distributed.first() else lambda _: None
        if distributed.first():
            report = stack.enter_context(tracking.tracked(config, out, report))
        more = {"force": force, "start": start, "cache": cache, "replace": replace}
        yield stack.enter_context(opened(config, out, report, **more))  # type: ignore[arg-type]


def evaluate(
    adapter: InitialAdapter,
    base: Path,
    files: list[Path],
    options: EvaluationOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> EvaluationResult:
    """Return the loss of the base model at `base` with and without an adapter, on the documents of `files`.

    The model is loaded once; for the base's loss the adapter's deltas are disabled.

    Args:
        progress: Called with the layers that are loaded, and with how many there are.
        cache: As in `run`.

    Raises:
        MissingExtraError: torch or another library of the extra is not installed.
        RefusedError: The adapter is for another base, or has parts that the layers cannot represent.

    Example:
        `evaluate(adapter, Path("Qwen3-0.6B"), [Path("heldout.jsonl")], EvaluationOptions()).metrics["perplexity"]`
    """
    check_extra()
    from .evaluation import evaluate as evaluate_here

    return evaluate_here(adapter, base, files, options, progress=progress, cache=cache)


def card_memory(config: TrainConfig) -> int | None:
    """Return the bytes of memory of the CUDA device that would train; None where a CPU would, or torch is not installed."""
    if config.base.device == "cpu" or _missing() is not None:
        return None
    import torch

    from . import devices

    return devices.memory(devices.chosen(config.base.device)) if torch.cuda.is_available() else None


def preview(config: TrainConfig, *, here: bool = True) -> Preview:
    """Return what a training will read and do: its data are read and checked, and nothing is trained.

    Of large data a part is encoded, evenly from all documents. Tokens, steps and time need the libraries of the extra; without
    them the data are read all the same. The time is that of this machine, and unknown unless it is the one that trains, `here`.

    Raises:
        AdapterhubError: Whatever the training would refuse of its data; `problems` has all of a file at once.

    Example:
        `preview(read_config(Path("sql.toml"))).data.count.steps`
    """
    from .outlook import preview as preview_here

    return preview_here(config, can_train=_missing() is None, here=here)


def _missing() -> str | None:
    """The first library of the extra that is not installed."""
    return next((name for name in _EXTRA if importlib.util.find_spec(name) is None), None)


def check_extra(work: str = "training") -> None:
    """MissingExtraError where a library of the extra is not installed."""
    if name := _missing():
        raise MissingExtraError("", f"{work} needs {name}, which is not installed", "Run `pip install 'adapterhub[train]'`")
