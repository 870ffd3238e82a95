"""Whether a candidate is worse than what it is compared with, by a test that may be looked at after every pair.

Requests are compared in pairs, one of each arm at the same time, so that traffic which changes over the day is no evidence. A
pair is worse, better or the same: +1, -1 or 0. While the candidate is no worse, the expectation of the next pair is at most 0,
whatever came before, and the capital of a gambler who bets a fraction f of it on "worse", the product of (1 + f * pair), is
expected never to grow. So it exceeds 1/error at any moment with a chance of at most `error` (Ville's inequality). The gambler
divides the capital among several fractions and keeps the counts only, which gateways can add up. (Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", JRSS-B 86, 2024.)
"""

from __future__ import annotations

import math

from adapterhub_converters.lazy_dataclass import dataclass

POWER = 0.9
"""The chance to find a drop of the size that was named, in as many pairs as `pairs_needed` says."""
_Z_POWER = 1.2816  # the normal quantile of POWER
# Fractions from nearly all, best where only worse pairs occur, to those for a drop of a point among many pairs that differ.
_FRACTIONS = tuple(0.95 * 2 ** (-index / 2) for index in range(13))
_MAX_NEEDED = 10_000_000  # pairs


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Pairs of requests by how the candidate did in them."""

    worse: int = 0
    same: int = 0
    better: int = 0

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(self.worse + other.worse, self.same + other.same, self.better + other.better)

    def __sub__(self, other: PairCounts) -> PairCounts:
        return PairCounts(self.worse - other.worse, self.same - other.same, self.better - other.better)

    @property
    def total(self) -> int:
        """The number of pairs."""
        return self.worse + self.same + self.better

    @property
    def drop(self) -> float:
        """How much more often the candidate was worse than better, from -1 to 1; 0 without a pair."""
        return (self.worse - self.better) / self.total if self.total else 0.0


def log_capital(counts: PairCounts) -> float:
    """Return the natural logarithm of the gambler's capital, which began with 1."""
    logs = [counts.worse * math.log1p(fraction) + counts.better * math.log1p(-fraction) for fraction in _FRACTIONS]
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs) / len(logs))


def is_worse(counts: PairCounts, error: float) -> bool:
    """Return whether the candidate is shown to be worse.

    Args:
        error: The chance that this is ever so for a candidate that is no worse, however often it is asked.
    """
    return log_capital(counts) >= -math.log(error)


def pairs_needed(drop: float, error: float, better: float = 0.0) -> int:
    """Return about how many pairs show a drop with the chance POWER, by the normal approximation of the best single bet.

    Args:
        drop: How much more often the candidate is worse than better: 0.05 for five points.
        error: As for `is_worse`.
        better: The share of pairs in which the candidate is better, by chance.
    """
    better = min(max(better, 0.0), (1.0 - drop) / 2)
    worse = better + drop
    target = math.log(len(_FRACTIONS) / error)
    counts = []
    for fraction in _FRACTIONS:
        win, loss = math.log1p(fraction), math.log1p(-fraction)
        growth = worse * win + better * loss
        if growth > 0:
            spread = math.sqrt(max(worse * win**2 + better * loss**2 - growth**2, 0.0))
            root = (_Z_POWER * spread + math.sqrt((_Z_POWER * spread) ** 2 + 4 * growth * target)) / (2 * growth)
            counts.append(min(root, _MAX_NEEDED) ** 2)  # the square of a larger one may overflow
    return min(math.ceil(min(counts, default=_MAX_NEEDED)), _MAX_NEEDED)
