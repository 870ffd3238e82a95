"""The same golden tests by two versions: which flipped, whether that could be chance, and what may be claimed of them.

The test is McNemar's, exact: of tests that flipped, each is as likely to have got better as worse if the versions are alike
(McNemar 1947). The interval is Agresti and Min's for paired proportions (Stat. Med. 2005, "Simple improved confidence
intervals"): half a test is added to each cell, so that it has a width also where nothing flipped. The tests are taken for a
sample of the prompts that matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .golden_tests import TestReport
from .sample_estimates import needed_text

MARGIN = 0.02
"""The difference of pass rates that `pass>=against` allows: without any, no number of tests shows that equal is not worse."""
_Z = 1.959964  # of 95 %


@dataclass(frozen=True)
class PairedTests:
    """Two versions on the same tests; the first is the one that is judged.

    Attributes:
        count: The number of tests.
        difference: The pass rate of the first less that of the other.
        low: The lower end of its 95 % interval; `high` the upper end.
        better: The names of the tests that only the first passes; `worse` of those that only the other does.
        p_value: Of McNemar's exact test, two-sided; 1 if nothing flipped.
        squares: The sum of the squared differences of all tests, by which the interval of other numbers can be told.
    """

    count: int
    difference: float
    low: float
    high: float
    better: tuple[str, ...]
    worse: tuple[str, ...]
    p_value: float
    squares: float

    @property
    def interval_text(self) -> str:
        """The difference and its interval, for people."""
        return f"{self.difference:+.1%}, 95 % interval {self.low:+.1%} to {self.high:+.1%}"

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {
            "cases": self.count,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "better": list(self.better),
            "worse": list(self.worse),
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class Claim:
    """What a gate claims of the pass rate against another version's: it is not lower by `margin`, or with 0 it is higher."""

    text: str
    margin: float

    def verdict(self, pair: PairedTests) -> tuple[bool, str]:
        """Return whether the interval allows the claim, and the reason in a line."""
        if pair.low > -self.margin:
            return True, pair.interval_text
        if pair.high < -self.margin:
            return False, pair.interval_text
        return False, f"cannot tell yet: {pair.count} of {_needed_text(pair, self.margin)} needed ({pair.interval_text})"


def compare(report: TestReport, against: TestReport) -> PairedTests:
    """Compare two reports on the same tests; RefusedError if their file was changed in between."""
    if report.file.digest != against.file.digest:
        raise RefusedError(
            report.file.name, "was changed while its tests were answered", "Start again", code="changed-meanwhile"
        )
    passed, other_passed = ({result.case.id: result.ok for result in item.results} for item in (report, against))
    better = tuple(name for name, ok in passed.items() if ok and not other_passed[name])
    worse = tuple(name for name, ok in passed.items() if not ok and other_passed[name])
    return _pair(report.rates, against.rates, better, worse)


def compare_rates(rates: Mapping[str, float], other_rates: Mapping[str, float]) -> PairedTests:
    """Compare the pass rates of two versions on the same tests, as they were recorded; there is at least one test."""
    better = tuple(name for name, rate in rates.items() if rate > other_rates[name])
    worse = tuple(name for name, rate in rates.items() if rate < other_rates[name])
    return _pair(rates, other_rates, better, worse)


def _pair(
    rates: Mapping[str, float], other_rates: Mapping[str, float], better: tuple[str, ...], worse: tuple[str, ...]
) -> PairedTests:
    differences = [rates[name] - other_rates[name] for name in rates]
    count, total, squares = len(differences), math.fsum(differences), math.fsum(item * item for item in differences)
    low, high = _interval(count, total, squares)
    p_value = mcnemar(len(better), len(worse))
    return PairedTests(count, total / count, low, high, better, worse, p_value, squares)


def _interval(count: float, total: float, squares: float) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `count` differences, by their sum and the sum of their squares."""
    # Half a test more in each of four cells: two more tests, whose differences are 1, -1, 0 and 0 for half a test each.
    padded, center = count + 2, total / (count + 2)
    width = _Z * math.sqrt(max((squares + 1) / padded - center**2, 0.0) / padded)
    return max(center - width, -1.0), min(center + width, 1.0)


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value, by the exact binomial distribution, of the numbers of tests that flipped each way."""
    flipped = better + worse
    tail = sum(math.comb(flipped, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / (1 << flipped))


def parse_claim(text: str) -> Claim | None:
    """Parse `pass>against`, `pass>=against` or `pass>=against-0.05`; None for any other gate."""
    words = text.replace(" ", "")
    if words == "pass>against":
        return Claim(text, 0.0)
    start, margin_text = words[: len("pass>=against")], words[len("pass>=against") :]
    if start != "pass>=against" or not (margin_text == "" or margin_text.startswith("-")):
        return None
    if not margin_text:
        return Claim(text, MARGIN)
    number = margin_text[1:]
    is_decimal = number.replace(".", "", 1).isdecimal() and number.isascii()
    return Claim(text, float(number)) if is_decimal and 0 < float(number) < 1 else None


def _needed_text(pair: PairedTests, margin: float) -> str:
    """Return about how many tests would tell, if the difference and the share of those that flip stay as they are."""

    def suffices(count: int) -> bool:
        low, high = _interval(count, pair.difference * count, pair.squares / pair.count * count)
        return low > -margin or high < -margin

    return needed_text(pair.count, suffices)
