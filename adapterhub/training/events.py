"""The events of a training run, for progress bars and logs, and the values that go into and come out of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from adapterhub_converters.lazy_dataclass import dataclass


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter to train further or to evaluate.

    Attributes:
        path: The file or folder for a format's reader.
        folder: The folder that contains it.
        digest: The digest of its manifest.
        location: The name of the adapter in messages.
        ref: Its name in a registry.
    """

    path: Path
    folder: Path
    digest: str
    location: str
    ref: str | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a training run will need, in bytes by purpose; `runtime` is Python with its libraries."""

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
        """The expected peak: the sum over all purposes."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes by purpose, in order."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Loading:
    """The progress of loading the base: `done` of `total` linear layers."""

    done: int
    total: int


@dataclass(frozen=True)
class Encoding:
    """The progress of encoding the data: `done` of `total` documents."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """The end of loading; the first step follows.

    Attributes:
        parameters: The number of trained parameters; the `base_parameters` are frozen.
        base_in_16_bits: Bytes of the base in 16 bits; `base_in_4_bits` with its linear layers in NF4.
        documents: The number of training documents; they have `tokens` tokens and fill `rows` rows.
        notes: Notes for the user, one line each.
        checkpointing: Whether it is on, even if it was `auto` in the config.
        dequantized: Whether the base was dequantized once, so that no step does it.
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
    dequantized: bool = False


@dataclass(frozen=True)
class ResumeEvent:
    """An interrupted run that resumes after `step`; `tokens` have been trained on so far."""

    step: int
    tokens: int
    path: Path


@dataclass(frozen=True)
class StepEvent:
    """A completed optimizer step.

    Attributes:
        loss: In nats per token.
        tokens: The number of tokens trained on so far.
        tokens_per_second: The rate of tokens read: prompts count, padding does not.
        memory: In bytes, 0 if unknown.
        read: The number of tokens that this step read.
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
class EvaluationEvent:
    """An evaluation on the held-out data after `step` steps; the loss is in nats per token. `samples` are prompts and answers.

    For preference pairs, the loss is that of a pair. Instead of a perplexity there are `accuracy`, the share of pairs whose
    chosen side is preferred, and `margin`, the mean difference between the sides.
    """

    step: int
    steps: int
    loss: float
    perplexity: float | None
    samples: tuple[tuple[str, str], ...] = ()
    accuracy: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class SaveEvent:
    """The finished adapter, or if `step` is not the last one a checkpoint, written to `path`."""

    step: int
    path: Path


@dataclass(frozen=True)
class NoteEvent:
    """A one-line note for the user about something that became known during the training."""

    text: str


@dataclass(frozen=True)
class TrackerFailureEvent:
    """The failure of the tracker `name` of `log_to`, with its `reason`; the training continues without that tracker."""

    name: str
    reason: str


Event = Loading | Encoding | Ready | ResumeEvent | StepEvent | EvaluationEvent | SaveEvent | NoteEvent | TrackerFailureEvent
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Report:
    """The time and memory of a training run; only steps of this process count.

    Attributes:
        parameters: The number of trained parameters; the `base_parameters` are frozen.
        predicted: The predicted peak of memory, in bytes.
        peak: The measured peak of this process, in bytes; 0 if unknown.
        full_fine_tuning: The minimum memory for training every parameter in float32, in bytes.
        seconds: The time of the steps, without loading, evaluations and checkpoints.
        tokens_per_second: The rate of tokens read: prompts count, padding does not.
        flops: Floating-point operations of the steps, by the model's arithmetic (`memory.flops`).
        matmul: Floating-point operations per second of a matrix product on this machine, at best.
        utilization: The share of that rate which the steps reached.
        card: The name of the graphics card; None for a CPU.
        peak_rate: Floating-point operations per second according to its data sheet; None if unknown.
        checkpointing: Whether activations were recomputed in the backward pass.
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
        """The share of the data sheet's rate that the steps reached (MFU); None if that rate is unknown."""
        return self.flops / self.seconds / self.peak_rate if self.peak_rate and self.seconds else None

    @property
    def share(self) -> float:
        """The trained share of all parameters."""
        return self.parameters / max(1, self.parameters + self.base_parameters)


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        tokens: The number of tokens trained on.
        loss: The loss over the last steps, in nats per token.
        perplexity_before: The perplexity of the held-out data; None without any. Preference pairs have an accuracy instead.
        kept_step: The step whose parameters the adapter has: the last one, or with `keep_best` the best.
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
