"""What a training says while it runs; whoever draws a progress bar or writes a log picks from these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Given:
    """An adapter to start from or to measure.

    `path` is what a format reader takes, `folder` what holds it, `digest` its manifest's, `where` what its user called it.
    """

    path: Path
    folder: Path
    digest: str
    where: str
    ref: str | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What a training will hold, in bytes, by what it is for; `runtime` is Python with its libraries."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    data: int
    runtime: int

    @property
    def total(self) -> int:
        """All of it: the peak to expect."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Part to bytes, in order."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Loading:
    """`done` of `total` linear layers of the base are read and quantized."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """All is loaded. `parameters` learn, beside those of the base; `tokens` are those of the training data.

    `notes` are worth showing, one line each; `checkpointing` is what `auto` came to.
    """

    parameters: int
    base_parameters: int
    documents: int
    tokens: int
    rows: int
    steps: int
    memory: MemoryPlan
    notes: tuple[str, ...]
    checkpointing: bool = False


@dataclass(frozen=True)
class Resumed:
    """An interrupted run goes on after `step`, in which `tokens` were learned."""

    step: int
    tokens: int
    path: Path


@dataclass(frozen=True)
class Stepped:
    """One optimizer step. `loss` in nats a token; `tokens` learned so far; `memory` resident bytes, 0 if unknown."""

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


@dataclass(frozen=True)
class Untracked:
    """What `log_to` names as `name` takes no more numbers, for a `reason`; the training goes on without."""

    name: str
    reason: str


@dataclass(frozen=True)
class Measuring:
    """How an adapter is to be measured; None is as it was trained, or as a training would be.

    `rows` are in memory at once; of the data about `tokens` are asked about, evenly, or all.
    """

    quantize: str | None = None
    dtype: str | None = None
    sequence: int | None = None
    loss: str | None = None
    tokens: int | None = None
    rows: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Measured:
    """A base with and without an adapter on the same `tokens`; losses are nats a token. `notes` are one line each."""

    loss: float
    base_loss: float
    tokens: int
    data: tuple[dict[str, Any], ...]
    base: dict[str, Any]
    sequence: int
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """With the adapter."""
        return _exp(self.loss)

    @property
    def base_perplexity(self) -> float:
        """Without it."""
        return _exp(self.base_loss)

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers under the names of `adapterhub.manifest.measurement`."""
        return {
            "perplexity": _exp(self.loss),
            "loss": self.loss,
            "base_perplexity": _exp(self.base_loss),
            "base_loss": self.base_loss,
            "perplexity_ratio": _exp(self.loss - self.base_loss),
            "tokens": self.tokens,
        }


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond that no float holds it


Event = Loading | Ready | Resumed | Stepped | Evaluated | Saved | Untracked
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Report:
    """What a training took; only the steps of this process count.

    Attributes:
        parameters: How many learn, beside `base_parameters` that don't.
        predicted: The peak of memory that was expected, in bytes.
        peak: The most that this process held, 0 if unknown.
        full_fine_tuning: What training every parameter in float32 would hold at least.
        seconds: In steps; loading, evaluations and checkpoints are not in it.
        tokens_per_second: All that went through the model, prompts and padding too.
        flops: Floating-point operations of the steps, by the model's arithmetic (`memory.flops`).
        matmul: Such operations a second of a plain matrix product on this machine, at best.
        utilization: The share of that which the steps reached.
        checkpointing: Whether activations were computed again rather than kept.
    """

    parameters: int
    base_parameters: int
    predicted: int
    peak: int
    full_fine_tuning: int
    seconds: float
    tokens_per_second: float
    flops: int
    matmul: float
    utilization: float
    checkpointing: bool = False

    @property
    def share(self) -> float:
        """Of all parameters, what learns."""
        return self.parameters / max(1, self.parameters + self.base_parameters)


@dataclass(frozen=True)
class Result:
    """How a training ended: perplexities of the held-out data, None if there is none; the step `kept` is the adapter's."""

    folder: Path
    steps: int
    tokens: int
    loss: float
    perplexity_before: float | None
    perplexity_after: float | None
    report: Report | None = None
    kept: int | None = None
