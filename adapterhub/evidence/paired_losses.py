"""The same documents under two adapters: the ratio of the perplexities, its interval, and what may be claimed of it.

The interval is a bootstrap over documents, whose tokens are not independent of each other: documents are drawn with
replacement, each with its losses under both (paired). Its percentiles are those of Hesterberg's expanded interval (Am. Stat.
2015, "What Teachers Should Know About the Bootstrap", section 4.2), since plain ones are too narrow for few documents. The
documents are taken for a sample of the texts that matter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.lazy_dataclass import dataclass

from .sample_estimates import needed_text

MIN_DOCUMENTS = 10
"""Fewer have no interval that could be trusted."""
_DRAWS = 2000
_DOCUMENTS_AT_ONCE = 1 << 22  # in the draws that are in memory together, 8 bytes each
_MAX_LOG = 700.0  # beyond, a float overflows
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, "<": operator.lt}
_NAMES = ("ppl/against", "perplexity/against")


@dataclass(frozen=True)
class PairedLosses:
    """Two adapters on the same documents; the first is the one that is judged.

    Attributes:
        documents: The number of documents.
        ratio: The perplexity of the first divided by that of the other.
        low: The lower end of its 95 % interval, 0 if there are too few documents; `high` the upper end, then infinite.
    """

    documents: int
    ratio: float
    low: float
    high: float

    @property
    def interval_text(self) -> str:
        """The ratio and its interval, for people."""
        if self.documents < MIN_DOCUMENTS:
            return f"{self.ratio:.4g}, of too few documents for an interval"
        return f"{self.ratio:.4g}, 95 % interval {self.low:.4g} to {self.high:.4g}"

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        low, high = (self.low, self.high) if self.documents >= MIN_DOCUMENTS else (None, None)
        return {"documents": self.documents, "perplexity_ratio": self.ratio, "low": low, "high": high}


@dataclass(frozen=True)
class RatioClaim:
    """What a gate claims of the perplexity relative to another version's: it is below a bound."""

    text: str
    operator: str
    bound: float

    def verdict(self, pair: PairedLosses) -> tuple[bool, str]:
        """Return whether the interval allows the claim, and the reason in a line."""
        compared = _COMPARISONS[self.operator]
        if compared(pair.high, self.bound):
            return True, pair.interval_text
        if not compared(pair.low, self.bound):
            return False, pair.interval_text
        needed = f"at least {MIN_DOCUMENTS}" if pair.documents < MIN_DOCUMENTS else self._needed(pair)
        return False, f"cannot tell yet: {pair.documents:,} of {needed} documents needed ({pair.interval_text})"

    def _needed(self, pair: PairedLosses) -> str:
        """Return about how many documents would tell, if the ratio stays and the interval shrinks by their number's root."""

        def suffices(count: int) -> bool:
            shrunk = math.sqrt(pair.documents / count)
            low, high = (pair.ratio * (end / pair.ratio) ** shrunk for end in (pair.low, pair.high))
            return bool(high < self.bound or low > self.bound)

        return needed_text(pair.documents, suffices)


def compare(losses: NDArray[np.float64], against: NDArray[np.float64], tokens: NDArray[np.int64]) -> PairedLosses:
    """Compare the losses of the same documents.

    Args:
        losses: The sum of each document's losses in nats, `(documents,)`; `against` those under the other adapter.
        tokens: The number of tokens of each document that have a loss, above 0.
    """
    count, differences = len(tokens), losses - against
    ratio = _exp(float(differences.sum() / tokens.sum()))
    if count < MIN_DOCUMENTS:
        return PairedLosses(count, ratio, 0.0, math.inf)
    generator = np.random.Generator(np.random.PCG64(0))  # the same data give the same interval
    size = max(1, _DOCUMENTS_AT_ONCE // count)
    draws = [generator.integers(count, size=(min(size, _DRAWS - start), count)) for start in range(0, _DRAWS, size)]
    means = np.concatenate([differences[drawn].sum(axis=1) / tokens[drawn].sum(axis=1) for drawn in draws])
    tail = _expanded_tail(count)
    low, high = np.quantile(means, [tail, 1 - tail])
    return PairedLosses(count, ratio, _exp(float(low)), _exp(float(high)))


def _expanded_tail(count: int) -> float:
    """Return the share of the draws outside each end of the 95 % interval of a mean of `count` documents."""
    normal, freedom = NormalDist(), count - 1
    z = normal.inv_cdf(0.975)
    # Student's quantile by Cornish and Fisher's expansion: at 9 degrees of freedom 2.258 for 2.262.
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-student * math.sqrt(count / freedom))


def _exp(nats: float) -> float:
    return math.exp(max(-_MAX_LOG, min(nats, _MAX_LOG)))


def parse_claim(text: str) -> RatioClaim | None:
    """Parse `ppl/against<1.01` or `ppl/against<=1.01`; None for any other gate."""
    words = text.replace(" ", "").lower()
    name = next((name for name in _NAMES if words.startswith(f"{name}<")), None)
    if name is None:
        return None
    sign = "<=" if words.startswith(f"{name}<=") else "<"
    number = words[len(name) + len(sign) :]
    is_decimal = number.replace(".", "", 1).isdecimal() and number.isascii()
    return RatioClaim(text, sign, float(number)) if is_decimal else None
