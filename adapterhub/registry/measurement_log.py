"""Measurements of versions: recorded in the log of a name, and compared with bounds by gates.

`manifest.measurement` has the text form of one measurement.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adapterhub.index import queries
from adapterhub.index.queries import LogState
from adapterhub.index.version_search import Bounds, parse_metric
from adapterhub.manifest.measurement import Evaluation
from adapterhub.ref import Ref
from adapterhub.store.store import Entry
from adapterhub_converters.errors import UsageError

from .moves import now
from .registry import Registry

# Name of a gate to its metric; `ppl/base` is short for the ratio.
_GATES = {
    "ppl": "perplexity", "perplexity": "perplexity", "loss": "loss", "ppl/base": "perplexity_ratio",
    "perplexity/base": "perplexity_ratio", "base": "base_perplexity", "tokens": "tokens",
    "accuracy": "accuracy", "margin": "margin", "pairs": "pairs",
}  # fmt: skip
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """Bounds of a metric; `text` is the gate as typed."""

    text: str
    metric: str
    bounds: Bounds

    def passes(self, metrics: Mapping[str, float]) -> bool:
        """Return True if all bounds hold; UsageError if the metric was not measured: documents have no accuracy, pairs have."""
        if self.metric not in metrics:
            problem = f"{self.metric} was not measured, which needs data of preference pairs alone"
            measured = ", ".join(name for name, metric in _GATES.items() if metric in metrics)
            raise UsageError(self.text, problem, f"Evaluate pairs, or bound one of {measured}", code="metric-not-measured")
        return all(_COMPARE[bound.operator](metrics[self.metric], bound.value) for bound in self.bounds)


def parse_gate(text: str, location: str) -> Gate:
    """Parse a gate such as `ppl<12`, `ppl/base<0.9` or `loss<=2.1`; UsageError if its metric is not measured."""
    name, bounds = parse_metric(text, location)
    metric = _GATES.get(name.replace(" ", "").lower())
    if metric is None:
        raise UsageError(location, f"{name[:60]!r} is not measured", f"Choose one of {', '.join(_GATES)}")
    return Gate(text, metric, bounds)


def record(registry: Registry, ref: Ref, evaluation: Evaluation) -> bool:
    """Record a measurement in the log of a version; return False if the last one under its name is the same."""
    row = registry.row(ref)
    text = evaluation.dump()
    new = False

    def decide(state: LogState) -> Entry | None:
        nonlocal new
        # Looked up again under the lock: the version may have been removed since.
        registry.row(Ref(ref.name, number=row.number))
        new = queries.marks(registry.index, "evaluate", row.name).get(f"{row.number} {evaluation.name}") != text
        if not new:
            return None
        return Entry(row.name, state.seq + 1, "evaluate", now(), number=row.number, previous=state.head, message=text)

    registry.move(row.name, decide)
    return new
