"""QLoRA on one machine: an NF4 base, LoRA on its linear layers, and an adapter that says how it came to be.

Read in the order things happen: `config`, `data` (with `sources` and `examples`), `base` (with `nf4`, `lora` and its
kinds), `loop` (with `loss` and `attention`), `learnt`, `artifact`; `trainer` ties them together. Importing this package
imports no torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from adapterhub_converters.errors import MissingExtraError

from .config import TrainConfig
from .config import read as read_config
from .events import Evaluated, Event, Loading, MemoryPlan, OnEvent, Ready, Result, Resumed, Saved, Stepped
from .memory import plan

__all__ = [
    "Evaluated", "Event", "Loading", "MemoryPlan", "OnEvent", "Ready", "Result", "Resumed", "Saved", "Stepped",
    "TrainConfig", "plan", "read_config", "run",
]  # fmt: skip

_EXTRA = ("torch", "transformers", "tokenizers", "matplotlib")


def run(config: TrainConfig, out: Path, *, on_event: OnEvent | None = None) -> Result:
    """Train the adapter that `config` describes into the folder `out`, which appears whole or not at all.

    The same config, data, base, machine and library versions give the same bytes. SIGTERM and SIGINT end the run
    after the current step with a checkpoint beside `out`; the same call then goes on from it to those same bytes.

    Raises:
        MissingExtraError: torch or another library of the extra isn't installed.
        StoppedError: A signal came; the checkpoint is written.
        RefusedError: The data teach nothing, or the base isn't understood.
    """
    for name in _EXTRA:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError("", f"training needs {name}, which isn't installed", 'pip install "adapterhub[train]"')
    from . import ranks, tracking
    from .trainer import train

    with ranks.joined():
        said = on_event if on_event and ranks.first() else lambda _: None
        if not ranks.first():
            return train(config, out, said)
        with tracking.tracked(config, out, said) as tell:
            return train(config, out, tell)
