"""The rules of a rollout: which state follows by time, pairs and people."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapterhub.evidence import rollout_rules
from adapterhub.evidence.rollout_rules import BROKEN, HOLDS, UNKNOWN
from adapterhub.evidence.sequential_test import PairCounts
from adapterhub.manifest.rollout_state import DONE, PAUSED, ROLLED_BACK, RUNNING, RolloutState, RolloutStep

STATE = RolloutState("legal", "team/legal@sha256:0", (RolloutStep(5, 600), RolloutStep(25)), {"errors": 10.0, "length": 2.0})
ENOUGH = {test: PairCounts(0, 1000, 0) for test in ("errors", "length", "length (shorter)")}


def verdicts_of(state: RolloutState) -> dict[str, str]:
    return {verdict.name: verdict.verdict for verdict in rollout_rules.verdicts(state)}


def test_too_few_pairs_tell_nothing_and_say_how_many_would() -> None:
    few_pairs = rollout_rules.with_evidence(STATE, 0, {"errors": PairCounts(0, 40, 0)})
    [errors, longer, shorter] = rollout_rules.verdicts(few_pairs)
    assert {errors.verdict, longer.verdict, shorter.verdict} == {UNKNOWN}
    assert errors.text.startswith("cannot tell yet: 40 of about ")
    assert errors.needed > 40


def test_a_step_ends_when_both_its_time_and_the_pairs_suffice() -> None:
    late = rollout_rules.with_evidence(STATE, 700, {})
    assert rollout_rules.next_state(late) == late
    early = rollout_rules.with_evidence(STATE, 500, ENOUGH)
    assert rollout_rules.next_state(early) == early
    second = rollout_rules.next_state(rollout_rules.with_evidence(STATE, 600, ENOUGH))
    assert (second.state, second.step, second.seconds, second.share) == (RUNNING, 1, 0, 25)
    assert set(verdicts_of(second).values()) == {HOLDS}


def test_a_step_without_a_time_waits_for_a_person_and_the_last_leads_to_all() -> None:
    waiting = rollout_rules.next_state(replace(STATE, step=1))
    assert (waiting.state, waiting.share) == (PAUSED, 25)
    assert rollout_rules.next_state(rollout_rules.with_evidence(waiting, 1e6, ENOUGH)).state == PAUSED
    finished = rollout_rules.resume(waiting)
    assert (finished.state, finished.share) == (DONE, 100)


@pytest.mark.parametrize("state", [STATE, replace(STATE, step=1, state=PAUSED)])
def test_a_broken_bound_leads_back_with_its_reason(state: RolloutState) -> None:
    worse = rollout_rules.with_evidence(state, 1, {"errors": PairCounts(60, 240, 0)})
    assert verdicts_of(worse)["errors"] == BROKEN
    back = rollout_rules.next_state(worse)
    assert (back.state, back.share) == (ROLLED_BACK, 0)
    assert back.reason == "errors: requests fail more often: in 60 of 300 pairs, and less often in 0"
    assert back.summary == f"legal: rolled back: {back.reason}"
    again = rollout_rules.resume(back)
    assert (again.state, again.step, again.counts) == (RUNNING, 0, {})


def test_a_number_may_be_worse_up_to_its_bound() -> None:
    within = rollout_rules.with_evidence(STATE, 1, {"length": PairCounts(40, 0, 60)})
    beyond = rollout_rules.with_evidence(STATE, 1, {"length": PairCounts(90, 0, 10)})
    assert (verdicts_of(within)["length"], verdicts_of(beyond)["length"]) == (UNKNOWN, BROKEN)


def test_a_log_with_a_bound_that_nobody_knows_is_read_without_it() -> None:
    assert verdicts_of(replace(STATE, bounds={"errors": 10.0, "tone": 3.0})).keys() == {"errors"}


def test_a_bound_near_0_needs_more_pairs_than_there_are() -> None:
    [verdict] = rollout_rules.verdicts(replace(STATE, bounds={"errors": 1e-320}))
    assert (verdict.verdict, verdict.needed) == (UNKNOWN, 10_000_000)
