"""Events of a training, for progress bars and logs; and the values that go into and come out of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter to train further or to evaluate.

    Attributes:
        path: The file or folder for a format's reader.
        folder: The folder that contains it.
        digest: Of its manifest.
        where: The adapter, in messages.
        ref: Its name in a registry.
    """

    path: Path
    folder: Path
    digest: str
    where: str
    ref: str | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a training will need, in bytes, by purpose; `runtime` is Python with its libraries."""

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
        """The sum: the expected peak."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return purpose to bytes, in order."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Loading:
    """`done` of `total` linear layers of the base are loaded."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """Everything is loaded, and the first step follows.

    Attributes:
        parameters: How many are trained, besides `base_parameters` that are not.
        base_in_16_bits: Bytes of the base in 16 bits; `base_in_4_bits` with linear layers in NF4.
        documents: Of the training data, with `tokens` in `rows`.
        notes: For the user, one line each.
        checkpointing: Whether it is on, also where it was `auto`.
    """

    parameters: int
    base_parameters: int
    base_in_16_bits: int
    base_in_4_bits: int
    documents: int
    tokens: int
    rows: int
    steps: int
    memory: MemoryPlan
    notes: tuple[str, ...]
    checkpointing: bool = False


@dataclass(frozen=True)
class Resumed:
    """An interrupted run resumes after `step`; `tokens` were trained on so far."""

    step: int
    tokens: int
    path: Path


@dataclass(frozen=True)
class Stepped:
    """One optimizer step.

    Attributes:
        loss: In nats a token.
        tokens: Trained on so far.
        tokens_per_second: Tokens read: prompts count, and padding does not.
        memory: In bytes, 0 if unknown.
        read: The tokens that this step read.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    memory: int
    read: int = 0


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on the held-out data after `step` steps; loss in nats a token. `samples` are prompts and answers.

    Of preference pairs, the loss is that of a pair, and instead of a perplexity there are the share of pairs whose chosen side
    is preferred, `accuracy`, and the mean `margin` by which.
    """

    step: int
    steps: int
    loss: float
    perplexity: float | None
    samples: tuple[tuple[str, str], ...] = ()
    accuracy: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Saved:
    """The finished adapter, or with `step` below the last one a checkpoint, has been written to `path`."""

    step: int
    path: Path


@dataclass(frozen=True)
class Noted:
    """Something that was found out while the training runs, for the user: one line."""

    text: str


@dataclass(frozen=True)
class Untracked:
    """The tracker `name` of `log_to` failed for a `reason`; the training continues without it."""

    name: str
    reason: str


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of an evaluation; None is the value of the adapter's training, else a training's default.

    Attributes:
        tokens: Use about so many tokens, evenly from all of the data; None for all.
        rows: Rows in memory at once.
        threads: Threads to compute with; None is torch's number.
        trained_on: Data that the adapter was trained on: what the evaluated data share with them is noted.
    """

    quantize: str | None = None
    dtype: str | None = None
    sequence: int | None = None
    loss: str | None = None
    tokens: int | None = None
    rows: int | None = None
    threads: int | None = None
    trained_on: tuple[Path, ...] = ()


@dataclass(frozen=True)
class EvaluationResult:
    """A base with and without an adapter on the same `tokens`.

    Attributes:
        loss: With the adapter, in nats a token; `base_loss` without.
        data: Name and digest of each file.
        base: Quantization, dtype, and name and digest of each weight file.
        notes: For the user, one line each.
        digest: Of the manifest of the adapter; `ref` is the ref or the address that it came from.
        recorded: Whether the result is in the log of the version.
    """

    loss: float
    base_loss: float
    tokens: int
    data: tuple[dict[str, Any], ...]
    base: dict[str, Any]
    sequence: int
    notes: tuple[str, ...] = ()
    digest: str = ""
    ref: str | None = None
    recorded: bool = False

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
        """The metrics, under the names of `adapterhub.manifest.measurement`."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "base_perplexity": _exp(self.base_loss),
            "base_loss": self.base_loss,
            "perplexity_ratio": _exp(self.loss - self.base_loss),
            "tokens": self.tokens,
        }


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond, a float overflows


Event = Loading | Ready | Resumed | Stepped | Evaluated | Saved | Noted | Untracked
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Report:
    """The time and memory of a training; only steps of this process count.

    Attributes:
        parameters: How many are trained, besides `base_parameters` that are not.
        predicted: The expected peak of memory, in bytes.
        peak: The most memory that this process held, in bytes; 0 if unknown.
        full_fine_tuning: The least memory of training every parameter in float32, in bytes.
        seconds: Of steps; without loading, evaluations and checkpoints.
        tokens_per_second: Tokens read: prompts count, and padding does not.
        flops: Floating-point operations of the steps, by the model's arithmetic (`memory.flops`).
        matmul: Floating-point operations a second of a matrix product on this machine, at best.
        utilization: The share of that which the steps reached.
        card: The name of the graphics card; None for a CPU.
        peak_rate: Floating-point operations a second of its data sheet; None where unknown.
        checkpointing: Whether activations were computed again in the backward pass.
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
    card: str | None = None
    peak_rate: float | None = None

    @property
    def mfu(self) -> float | None:
        """The share of the data sheet's rate that the steps reached (MFU); None where that is unknown."""
        return self.flops / self.seconds / self.peak_rate if self.peak_rate and self.seconds else None

    @property
    def share(self) -> float:
        """The trained share of all parameters."""
        return self.parameters / max(1, self.parameters + self.base_parameters)


@dataclass(frozen=True)
class Result:
    """A finished training.

    Attributes:
        tokens: Trained on.
        loss: Over the last steps, in nats a token.
        perplexity_before: Of the held-out data; None without any, and of preference pairs, which have an accuracy.
        kept_step: The step whose parameters are the adapter: the last one, or with `keep_best` the best.
    """

    folder: Path
    steps: int
    tokens: int
    loss: float
    perplexity_before: float | None
    perplexity_after: float | None
    report: Report | None = None
    kept_step: int | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
