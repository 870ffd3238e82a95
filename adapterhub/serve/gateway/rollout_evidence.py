"""The evidence of a rollout: requests of both arms in pairs, and how the candidate did in each.

A request is paired when it is admitted, with the newest request of the other arm that has no partner. Neither answer has begun
then, so slow or failing answers do not decide which requests are compared. A client that stays with one arm (a "unit") counts
once, because its requests are alike: a hundred of them are not a hundred facts about the candidate. So does its feedback, and
only on a request that counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from adapterhub.evidence import rollout_rules
from adapterhub.evidence.rollout_rules import LONGER, SHORTER
from adapterhub.evidence.sequential_test import PairCounts
from adapterhub_converters.lazy_dataclass import dataclass

_MAX_UNITS = 200_000  # clients that are remembered, by 8 bytes each; one that was forgotten may count again
_MAX_REQUESTS = 100_000  # requests that are remembered for their feedback
_WORSE, _SAME, _BETTER = PairCounts(worse=1), PairCounts(same=1), PairCounts(better=1)


@dataclass(frozen=True, slots=True)
class AnswerOutcome:
    """How a request was answered.

    Attributes:
        failed: Whether the gateway or its engine failed, also in the middle of a stream.
        first: Seconds until the first event of a stream; None for an answer as a whole.
        seconds: Seconds until the end.
        tokens: Tokens of the answer.
        by_length: Whether the answer ended because it was too long; None if its end is unknown.
    """

    failed: bool = False
    first: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    by_length: bool | None = None


class Trial:
    """A request that may become half of a pair."""

    __slots__ = ("is_candidate", "outcome", "partner")

    def __init__(self, *, is_candidate: bool) -> None:
        self.is_candidate = is_candidate
        self.outcome: AnswerOutcome | None = None
        self.partner: Trial | None = None


class Evidence:
    """The pairs of one candidate at one gateway.

    Args:
        bounds: The bounds by name, as a rollout has them.

    Attributes:
        counts: Pairs by test that are not in the log yet.
    """

    def __init__(self, bounds: Mapping[str, float]) -> None:
        self._bounds = bounds
        self.counts: dict[str, PairCounts] = {}
        # Without a partner yet, by `is_candidate`.
        self._waiting: dict[bool, Trial] = {}
        self._waiting_feedback: dict[bool, bool] = {}
        self._units = _NewestNames(_MAX_UNITS)
        self._requests = _NewestNames(_MAX_REQUESTS)  # by whether their feedback has counted; clients may use an id again

    def admit(self, key: str, unit: str, request: str, *, is_candidate: bool) -> Trial | None:
        """Return the trial of a request that is about to be answered; None if its client has counted before.

        Args:
            key: The name of the client's key; empty without keys.
            unit: What the client is kept with one arm by; empty if it is not.
            request: The id of the request, by which feedback finds it.
        """
        if unit and not self._units.add(key, unit):
            return None
        if "feedback" in self._bounds:
            self._requests.add(key, request)
        trial = Trial(is_candidate=is_candidate)
        if partner := self._waiting.pop(not is_candidate, None):
            trial.partner, partner.partner = partner, trial
        else:
            self._waiting[is_candidate] = trial
        return trial

    def finish(self, trial: Trial, outcome: AnswerOutcome) -> None:
        """Record how a request was answered; its pair counts once both are. A request whose client left is never finished."""
        trial.outcome = outcome
        partner = trial.partner
        if partner is None or partner.outcome is None:
            return
        candidate, stable = (outcome, partner.outcome) if trial.is_candidate else (partner.outcome, outcome)
        for test in rollout_rules.tests_of(self._bounds):
            if pair := _compare(test, candidate, stable, self._bounds.get(rollout_rules.bound_of(test), 1.0)):
                self.add(test, pair)

    def add(self, test: str, pair: PairCounts) -> None:
        """Count a pair."""
        self.counts[test] = self.counts.get(test, PairCounts()) + pair

    def add_feedback(self, key: str, request: str, *, is_candidate: bool, is_bad: bool) -> None:
        """Count feedback on an answer, in a pair with the last feedback on the other arm that has no partner."""
        if not self._requests.mark(key, request):
            return
        if (partner_is_bad := self._waiting_feedback.pop(not is_candidate, None)) is None:
            self._waiting_feedback[is_candidate] = is_bad
            return
        candidate, stable = (is_bad, partner_is_bad) if is_candidate else (partner_is_bad, is_bad)
        self.add("feedback", _pair(candidate, stable))

    def forget(self, counts: Mapping[str, PairCounts]) -> None:
        """Subtract pairs that are in the log now."""
        for test, total in counts.items():
            self.counts[test] -= total


class _NewestNames:
    """Names that clients choose, each with a mark. Of too many, the key that has the most of them forgets its oldest."""

    def __init__(self, limit: int) -> None:
        self._limit, self._count = limit, 0
        self._by_key: dict[str, dict[bytes, bool]] = {}

    def add(self, key: str, name: str) -> bool:
        """Add a name; return whether it was new."""
        names, digest = self._by_key.setdefault(key, {}), _digest(name)
        if digest in names:
            return False
        names[digest] = False
        if self._count == self._limit:
            largest = max(self._by_key.values(), key=len)
            del largest[next(iter(largest))]
        else:
            self._count += 1
        return True

    def mark(self, key: str, name: str) -> bool:
        """Mark a name; return whether it is one that had no mark."""
        names, digest = self._by_key.get(key, {}), _digest(name)
        if names.get(digest, True):
            return False
        names[digest] = True
        return True


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _pair(candidate: float, stable: float) -> PairCounts:
    """Compare two numbers, of which the smaller is better."""
    return _SAME if candidate == stable else _WORSE if candidate > stable else _BETTER


def _compare(test: str, candidate: AnswerOutcome, stable: AnswerOutcome, bound: float) -> PairCounts | None:
    """Return how the candidate did in a pair; None if the pair says nothing for this test."""
    if test == "errors":
        return _pair(candidate.failed, stable.failed)
    if candidate.failed or stable.failed:
        return None
    if test == SHORTER:
        return _pair(stable.tokens, bound * candidate.tokens)
    candidate_number, stable_number = _number(test, candidate), _number(test, stable)
    if candidate_number is None or stable_number is None:
        return None
    return _pair(candidate_number, stable_number if test in rollout_rules.SHARES else bound * stable_number)


def _number(test: str, outcome: AnswerOutcome) -> float | None:
    """Return the number of an answer that a test is about, of which the smaller is better; None if it has none."""
    if test == "stops":
        return outcome.by_length
    if test == "first_token":
        return outcome.first
    if test == "tokens_per_second":
        return outcome.seconds / outcome.tokens if outcome.tokens else None
    return outcome.tokens if test == LONGER else None
