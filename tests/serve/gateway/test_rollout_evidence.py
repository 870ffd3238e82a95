"""What a pair of requests says of a candidate, for each bound; feedback counts once for a request."""

from __future__ import annotations

import pytest

from adapterhub.evidence import rollout_rules
from adapterhub.evidence.rollout_rules import LONGER, SHORTER
from adapterhub.evidence.sequential_test import PairCounts
from adapterhub.serve.gateway.rollout_evidence import AnswerOutcome, Evidence

LIMITS = {"errors": 5.0, "stops": 5.0, "first_token": 1.5, "tokens_per_second": 1.5, "length": 2.0}
STABLE = AnswerOutcome(first=1.0, seconds=3.0, tokens=10, by_length=False)
WORSE, SAME, BETTER = PairCounts(worse=1), PairCounts(same=1), PairCounts(better=1)
ALIKE = {"errors": SAME, "stops": SAME, "first_token": BETTER, "tokens_per_second": BETTER, LONGER: BETTER, SHORTER: BETTER}
ROWS: dict[str, tuple[AnswerOutcome, dict[str, PairCounts | None]]] = {
    "a failure says nothing else": (AnswerOutcome(failed=True), {**dict.fromkeys(ALIKE), "errors": WORSE}),
    "an answer that was too long": (AnswerOutcome(False, 1.0, 3.0, 10, True), {"stops": WORSE}),
    "an end that is unknown": (AnswerOutcome(False, 1.0, 3.0, 10, None), {"stops": None}),
    "a first token within its bound": (AnswerOutcome(False, 1.4, 3.0, 10, False), {}),
    "a first token beyond it": (AnswerOutcome(False, 1.6, 3.0, 10, False), {"first_token": WORSE}),
    "an answer as a whole": (AnswerOutcome(False, None, 3.0, 10, False), {"first_token": None}),
    "tokens that take longer": (AnswerOutcome(False, 1.0, 4.6, 10, False), {"tokens_per_second": WORSE}),
    "an answer more than twice as long": (AnswerOutcome(False, 1.0, 3.0, 21, False), {LONGER: WORSE}),
    "an answer less than half as long": (AnswerOutcome(False, 1.0, 1.2, 4, False), {SHORTER: WORSE}),
    "no tokens": (AnswerOutcome(False, 1.0, 3.0, 0, False), {"tokens_per_second": None, SHORTER: WORSE}),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_pair_is_worse_in_what_is_beyond_its_bound_and_in_nothing_else(name: str) -> None:
    candidate, differences = ROWS[name]
    expected = {test: pair for test, pair in {**ALIKE, **differences}.items() if pair is not None}
    for is_candidate_first in (False, True):
        evidence = Evidence(LIMITS)
        for is_candidate in (is_candidate_first, not is_candidate_first):
            trial = evidence.admit("", "", "", is_candidate=is_candidate)
            assert trial is not None
            if is_candidate:
                candidate_trial = trial
            else:
                stable_trial = trial
        evidence.finish(stable_trial, STABLE)
        assert evidence.counts == {}
        evidence.finish(candidate_trial, candidate)
        assert evidence.counts == expected


def test_every_bound_has_a_pair_that_breaks_it() -> None:
    assert {"feedback", *LIMITS} == {*rollout_rules.SHARES, *rollout_rules.RATIOS}
    broken = {test for _, differences in ROWS.values() for test, pair in differences.items() if pair == WORSE}
    assert broken == {*rollout_rules.tests_of(LIMITS)}


def test_feedback_counts_once_for_an_id_that_a_client_uses_again() -> None:
    evidence = Evidence({"feedback": 5.0})
    for is_candidate in (True, False):
        evidence.admit("", "", "same" if is_candidate else "other", is_candidate=is_candidate)
    evidence.add_feedback("", "same", is_candidate=True, is_bad=True)
    evidence.admit("", "", "same", is_candidate=True)
    evidence.add_feedback("", "same", is_candidate=True, is_bad=True)
    evidence.add_feedback("", "other", is_candidate=False, is_bad=False)
    evidence.add_feedback("", "never asked", is_candidate=False, is_bad=False)
    assert evidence.counts == {"feedback": WORSE}
