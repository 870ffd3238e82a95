"""What a training says while it runs; whoever draws a progress bar or writes a log picks from these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MemoryPlan:
    """What a training will hold, in bytes, by what it is for."""

    base: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    runtime: int

    @property
    def total(self) -> int:
        """All of it: the peak to expect."""
        return self.base + self.adapter + self.gradients + self.optimiser + self.activations + self.logits + self.runtime


@dataclass(frozen=True)
class Loading:
    """`done` of `total` linear layers of the base are read and quantised."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """All is loaded. `notes` are worth showing, one line each; `tokens` are those of the training data."""

    parameters: int
    documents: int
    tokens: int
    rows: int
    steps: int
    memory: MemoryPlan
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Resumed:
    """An interrupted run goes on after `step`."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stepped:
    """One optimiser step. `loss` in nats a token; `tokens` learnt so far; `memory` resident bytes, 0 if unknown."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    memory: int


@dataclass(frozen=True)
class Evaluated:
    """The held-out data after `step` steps; loss in nats a token. `samples` are questions and what was answered."""

    step: int
    steps: int
    loss: float
    perplexity: float
    samples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Saved:
    """The finished adapter, or with `step` below the last one a checkpoint, lies at `path`."""

    step: int
    path: Path


Event = Loading | Ready | Resumed | Stepped | Evaluated | Saved
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Result:
    """How a training ended; perplexities are of the held-out data, None if there is none."""

    folder: Path
    steps: int
    tokens: int
    loss: float
    perplexity_before: float | None
    perplexity_after: float | None
