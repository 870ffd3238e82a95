"""Whether a bound holds of a metric that was measured on a sample, or whether the sample is too small to tell.

A share of tests has Wilson's score interval, which has a width also where all tests passed (Wilson 1927); a mean with a known
standard error the normal one. The tests are taken for a sample of the prompts that matter. A bound that no sample can show,
that all pass (`pass>=1`), is about these tests alone, and so is a number without a sample, like a perplexity or a count.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

from adapterhub_converters.lazy_dataclass import dataclass

from .sample_estimates import needed_text

_Z = 1.959964  # of 95 %
COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
}  # fmt: skip
# A share, and the metrics that may have the number of its samples.
_SHARES: Mapping[str, tuple[str, ...]] = {"pass_rate": ("cases", "samples"), "accuracy": ("pairs", "samples")}


@dataclass(frozen=True)
class SampledValue:
    """A metric as it was measured.

    Attributes:
        value: The value.
        count: The number of samples; 0 if it is not the mean of any.
        error: Its standard error; 0 for a share of `count`, whose interval follows from both.
    """

    value: float
    count: int = 0
    error: float = 0.0

    @property
    def text(self) -> str:
        """The value for people, with the number of its samples."""
        return f"{self.value:.4g} ({self.count:,} samples)" if self.count else f"{self.value:.4g}"

    def interval(self, count: float) -> tuple[float, float]:
        """Return the 95 % interval that the same value would have on `count` samples."""
        if not self.count:
            return self.value, self.value
        if self.error:
            width = _Z * self.error * math.sqrt(self.count / count)
            return self.value - width, self.value + width
        center = (self.value + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
        spread = self.value * (1 - self.value) / count + _Z**2 / (4 * count**2)
        width = _Z * math.sqrt(max(spread, 0.0)) / (1 + _Z**2 / count)
        return center - width, center + width


def sampled_value(metrics: Mapping[str, float], metric: str) -> SampledValue:
    """Return a metric with its number of samples and its error, as far as the same evaluation has them."""
    value, error = metrics[metric], metrics.get(f"{metric}_stderr", 0.0)
    has_error = math.isfinite(error) and f"{metric}_stderr" in metrics
    counts = ("samples",) if has_error else _SHARES.get(metric, ())
    count = next((int(metrics[key]) for key in counts if metrics.get(key, 0) >= 1), 0)
    # Without any spread an error of 0 says only that all samples are alike: then they are a share of them.
    if not count or (not error and not 0 <= value <= 1):
        return SampledValue(value)
    return SampledValue(value, count, max(error, 0.0) if has_error else 0.0)


def verdict(measured: SampledValue, bounds: Sequence[tuple[str, float]]) -> tuple[bool, str]:
    """Return whether all bounds, each an operator and a number, hold, and the value or why that cannot be told."""
    reasons = [_reason(measured, *bound) for bound in bounds]
    problem = next((reason for reason in reasons if reason), "")
    return not problem, problem or measured.text


def _reason(measured: SampledValue, sign: str, bound: float) -> str:
    """Return why a bound does not hold, or cannot be told to; empty if it holds."""
    compare = COMPARISONS[sign]
    if not compare(measured.value, bound):
        return measured.text
    is_exact = not measured.count or sign == "=" or (not measured.error and bound in (0, 1))
    if is_exact or all(compare(end, bound) for end in measured.interval(measured.count)):
        return ""
    # If the value stays as it is.
    needed = needed_text(measured.count, lambda count: all(compare(end, bound) for end in measured.interval(count)))
    return f"cannot tell yet: {measured.count:,} of {needed} needed ({measured.value:.4g} so far)"
