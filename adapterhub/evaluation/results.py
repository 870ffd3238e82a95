"""The settings and the results of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from adapterhub.evidence.paired_losses import PairedLosses
from adapterhub_converters.lazy_dataclass import dataclass


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of an evaluation; None takes the value of the adapter's training, or else a training run's default.

    Attributes:
        tokens: About how many tokens to use, evenly from all of the data; None for all.
        rows: Rows in memory at once.
        threads: Threads to compute with; None is torch's number.
        trained_on: Data that the adapter was trained on; an overlap with the evaluated data is noted.
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
class PairComparison:
    """The sides of preference pairs under a base with and without an adapter, by a method of `[preference]`.

    Attributes:
        accuracy: The share of the pairs whose chosen side is preferred; `base_accuracy` without the adapter.
        margin: The mean difference between the sides; `base_margin` without the adapter.
    """

    method: str
    beta: float
    count: int
    accuracy: float
    margin: float
    base_accuracy: float
    base_margin: float

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics; `dpo` compares with the base, so that the base has none."""
        with_adapter = {"accuracy": self.accuracy, "margin": self.margin, "pairs": self.count}
        if self.method == "dpo":
            return with_adapter
        return {**with_adapter, "base_accuracy": self.base_accuracy, "base_margin": self.base_margin}


@dataclass(frozen=True)
class EvaluationResult:
    """The losses of a base with and without an adapter on the same `tokens`.

    Attributes:
        loss: The loss with the adapter, in nats per token; `base_loss` without it.
        data: The name and digest of each file.
        base: The quantization, the dtype, and the name and digest of each weight file.
        notes: Notes for the user, one line each.
        pairs: Where all data are preference pairs, how they compare; the losses are those of the chosen sides.
        against: The perplexity relative to another adapter's, on the same documents, if it was asked for.
        digest: The digest of the adapter's manifest; `ref` is the ref or address that it came from.
        recorded: Whether the result is in the log of the version.
    """

    loss: float
    base_loss: float
    tokens: int
    data: tuple[dict[str, Any], ...]
    base: dict[str, Any]
    sequence: int
    notes: tuple[str, ...] = ()
    pairs: PairComparison | None = None
    against: PairedLosses | None = None
    digest: str = ""
    ref: str | None = None
    recorded: bool = False

    @property
    def perplexity(self) -> float:
        """The perplexity with the adapter."""
        return _exp(self.loss)

    @property
    def base_perplexity(self) -> float:
        """The perplexity without the adapter."""
        return _exp(self.base_loss)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics, with the names of `adapterhub.manifest.measurement`."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "base_perplexity": _exp(self.base_loss),
            "base_loss": self.base_loss,
            "perplexity_ratio": _exp(self.loss - self.base_loss),
            "tokens": self.tokens,
            **({"perplexity_against": self.against.ratio} if self.against else {}),
            **(self.pairs.metrics if self.pairs else {}),
        }


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond, a float overflows
