"""Bounds of the metrics of an evaluation, as `eval --gate` and the requirements of a tag write them."""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub.evidence.sampled_bounds import COMPARISONS
from adapterhub.index.version_search import Bounds, parse_metric
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

# Name of a gate to its metric; `ppl/base` is short for the ratio.
DATA_GATES: Mapping[str, str] = {
    "ppl": "perplexity", "perplexity": "perplexity", "loss": "loss", "ppl/base": "perplexity_ratio",
    "perplexity/base": "perplexity_ratio", "base": "base_perplexity", "tokens": "tokens",
    "accuracy": "accuracy", "margin": "margin", "pairs": "pairs",
}  # fmt: skip
"""The names that a gate on data may bound, and their metrics."""
TEST_GATES: Mapping[str, str] = {"pass": "pass_rate", "pass_rate": "pass_rate", "passed": "passed", "cases": "cases"}
"""The names that a gate on golden tests may bound, and their metrics."""
_PAIR_METRICS = ("accuracy", "margin", "pairs")
_MAX_NAMES = 20  # in an error


@dataclass(frozen=True)
class Gate:
    """Bounds of a metric; `text` is the gate as typed, `names` those that it could have bound (`parse_gate`)."""

    text: str
    metric: str
    bounds: Bounds
    names: Mapping[str, str] | None = None

    def passes(self, metrics: Mapping[str, float]) -> bool:
        """Return True if all bounds hold; UsageError if the metric was not measured: documents have no accuracy, pairs have."""
        if self.metric not in metrics:
            is_of_pairs = self.names is DATA_GATES and self.metric in _PAIR_METRICS
            problem = f"{self.metric} was not measured{', which needs data of preference pairs alone' * is_of_pairs}"
            names = metrics if self.names is None else [name for name, metric in self.names.items() if metric in metrics]
            hint = f"{'Evaluate pairs, or bound' if is_of_pairs else 'Bound'} one of {', '.join([*names][:_MAX_NAMES])}"
            raise UsageError(self.text, problem, hint, code="metric-not-measured")
        return all(COMPARISONS[bound.operator](metrics[self.metric], bound.value) for bound in self.bounds)


def parse_gate(text: str, location: str, names: Mapping[str, str] | None = DATA_GATES) -> Gate:
    """Parse a gate such as `ppl<12`, `ppl/base<0.9` or `loss<=2.1`.

    Args:
        text: The gate as typed.
        location: The option, for errors.
        names: The names that it may bound, and their metrics; None for any metric by its own name.

    Raises:
        UsageError: It is not a comparison, or no such name is measured.
    """
    name, bounds = parse_metric(text, location)
    metric = name if names is None else names.get(name.replace(" ", "").lower())
    if metric is None:
        raise UsageError(location, f"{name[:60]!r} is not measured", f"Choose one of {', '.join(names or ())}")
    return Gate(text, metric, bounds, names)
