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

_MAX_UNITS = 200_000  # clients that are remembered, in 8 bytes each; requests of further ones are no evidence
_MAX_REQUESTS = 100_000  # requests that are remembered for their feedback, the newest
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
        self._units: set[bytes] = set()
        self._requests: dict[bytes, bool] = {}  # whether their feedback has counted; clients may use an id again

    def admit(self, unit: str, request: str, *, is_candidate: bool) -> Trial | None:
        """Return the trial of a request that is about to be answered; None if its client has counted before.

        Args:
            unit: What the client is kept with one arm by; empty if it is not.
            request: The key of the client and the id of the request, by which feedback finds it.
        """
        if unit and not self._is_new(unit):
            return None
        if "feedback" in self._bounds:
            self._requests.setdefault(_digest(request), False)
            if len(self._requests) > _MAX_REQUESTS:
                del self._requests[next(iter(self._requests))]
        trial = Trial(is_candidate=is_candidate)
        if partner := self._waiting.pop(not is_candidate, None):
            trial.partner, partner.partner = partner, trial
        else:
            self._waiting[is_candidate] = trial
        return trial

    def _is_new(self, unit: str) -> bool:
        digest = _digest(unit)
        if digest in self._units or len(self._units) >= _MAX_UNITS:
            return False
        self._units.add(digest)
        return True

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

    def add_feedback(self, request: str, *, is_candidate: bool, is_bad: bool) -> None:
        """Count feedback on an answer, in a pair with the last feedback on the other arm that has no partner."""
        digest = _digest(request)
        if self._requests.get(digest, True):
            return
        self._requests[digest] = True
        if (partner_is_bad := self._waiting_feedback.pop(not is_candidate, None)) is None:
            self._waiting_feedback[is_candidate] = is_bad
            return
        candidate, stable = (is_bad, partner_is_bad) if is_candidate else (partner_is_bad, is_bad)
        self.add("feedback", _pair(candidate, stable))

    def forget(self, counts: Mapping[str, PairCounts]) -> None:
        """Subtract pairs that are in the log now."""
        for test, total in counts.items():
            self.counts[test] -= total


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
