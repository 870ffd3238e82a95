"""The rules of a rollout: the verdict on each bound, and the state that follows. Pure functions, without a clock or a registry.

Each bound is a sequential test of its own, and all of them together have the error of the rollout. A bound in points limits a
share of requests (10 is a drop of ten points). A ratio limits a number: in a pair, the candidate is worse if its number is more
than that many times the stable arm's, and better if it is less. So a number may be a little worse, and breaks its bound only if
it is past the bound in more than half of the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from adapterhub.manifest.rollout_state import DONE, PAUSED, ROLLED_BACK, RUNNING, RolloutState
from adapterhub_converters.lazy_dataclass import dataclass

from . import sequential_test
from .sample_estimates import two_digits
from .sequential_test import PairCounts

SHARES = ("errors", "stops", "feedback")
"""Bounds in points: requests that fail, answers that end by length, answers that people find bad."""
RATIOS = ("first_token", "tokens_per_second", "length")
"""Bounds that are ratios: seconds to the first token, tokens a second, tokens of an answer, either way."""
LONGER, SHORTER = "length", "length (shorter)"
_RATIO_DROP = 1 / 3  # the drop that a ratio's number of pairs is planned for: two pairs of three are past the bound
BROKEN, HOLDS, UNKNOWN = "broken", "holds", "cannot tell yet"
"""The verdicts on a bound."""
_SYMPTOMS = {
    "errors": "requests fail", "stops": "answers end by length", "feedback": "answers are found bad",
    "first_token": "the first token comes late", "tokens_per_second": "tokens come slowly", LONGER: "answers are long",
    SHORTER: "answers are short",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BoundVerdict:
    """The verdict on a bound so far.

    Attributes:
        name: The name of the test.
        limit: The bound, for people.
        verdict: BROKEN, HOLDS or UNKNOWN.
        text: The reason, for people.
        pairs: Pairs of requests so far.
        needed: About how many pairs a verdict takes.
    """

    name: str
    limit: str
    verdict: str
    text: str
    pairs: int
    needed: int


def tests_of(bounds: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names of the tests of some bounds: one each, and two for a length."""
    return tuple(
        test for name in bounds if name in (*SHARES, *RATIOS) for test in ((LONGER, SHORTER) if name == LONGER else (name,))
    )


def bound_of(test: str) -> str:
    """Return the name of the bound that a test is for."""
    return LONGER if test == SHORTER else test


def _pair_counts(state: RolloutState, test: str) -> PairCounts:
    return PairCounts(*state.counts.get(test, (0, 0, 0)))


def verdicts(state: RolloutState) -> list[BoundVerdict]:
    """Return the verdict on each bound, by the pairs so far."""
    tests = tests_of(state.bounds)
    return [_verdict(test, state, state.error / len(tests)) for test in tests]


def _verdict(test: str, state: RolloutState, error: float) -> BoundVerdict:
    name = bound_of(test)
    bound, counts = state.bounds[name], _pair_counts(state, test)
    is_share = name in SHARES
    drop = bound / 100 if is_share else _RATIO_DROP
    # Until 50 pairs tell, assume that failing requests are rare, and that numbers differ in every pair.
    better = counts.better / counts.total if counts.total >= 50 else (0.0 if is_share else (1 - drop) / 2)
    needed = sequential_test.pairs_needed(drop, error, better)
    limit = f"{bound:g} points" if is_share else f"{bound:g} times"
    if sequential_test.is_worse(counts, error):
        text = (
            f"{_SYMPTOMS[test]} more often: in {counts.worse:,} of {counts.total:,} pairs, and less often in {counts.better:,}"
        )
        return BoundVerdict(test, limit, BROKEN, text, counts.total, needed)
    if counts.total < needed:
        text = f"{UNKNOWN}: {counts.total:,} of about {two_digits(needed):,} needed"
        return BoundVerdict(test, limit, UNKNOWN, text, counts.total, needed)
    text = f"no drop was found in {counts.total:,} pairs"
    return BoundVerdict(test, limit, HOLDS, text, counts.total, needed)


def with_evidence(state: RolloutState, seconds: float, counts: Mapping[str, PairCounts]) -> RolloutState:
    """Return the state with more time and pairs, still at its step."""
    tests = tests_of(state.bounds)
    totals = {test: _pair_counts(state, test) + counts.get(test, PairCounts()) for test in tests}
    triples = {test: (total.worse, total.same, total.better) for test, total in totals.items()}
    return replace(state, seconds=max(state.seconds, seconds), counts=triples)


def next_state(state: RolloutState) -> RolloutState:
    """Return the state that follows: rolled back for a broken bound, the next step once time and pairs suffice, or the same."""
    if state.state not in (RUNNING, PAUSED):
        return state
    bound_verdicts = verdicts(state)
    if broken := [verdict for verdict in bound_verdicts if verdict.verdict == BROKEN]:
        return roll_back(state, "; ".join(f"{verdict.name}: {verdict.text}" for verdict in broken))
    step = state.steps[state.step]
    if state.state == PAUSED or state.seconds < step.seconds:
        return state
    if not step.seconds:
        return replace(state, state=PAUSED, reason="this step waits for a person")
    return state if any(verdict.verdict == UNKNOWN for verdict in bound_verdicts) else next_step(state)


def next_step(state: RolloutState) -> RolloutState:
    """Return the state at the next step, whose share may be all."""
    is_last = state.step + 1 == len(state.steps) or state.steps[state.step + 1].share >= 100
    if is_last:
        return replace(state, state=DONE, seconds=0.0, reason="")
    return replace(state, state=RUNNING, step=state.step + 1, seconds=0.0, reason="")


def roll_back(state: RolloutState, reason: str) -> RolloutState:
    """Return the state in which the stable arm answers everything."""
    return replace(state, state=ROLLED_BACK, reason=reason)


def restart(state: RolloutState, stable: str = "") -> RolloutState:
    """Return the first step of the same rollout, without evidence; `stable` replaces the version that it compares with."""
    return replace(state, stable=stable or state.stable, state=RUNNING, step=0, seconds=0.0, counts={}, reason="")


def resume(state: RolloutState) -> RolloutState:
    """Return the state after a person lets it go on: the next step of one that waits, the first of one that was rolled back."""
    if state.state == PAUSED and not state.steps[state.step].seconds:
        return next_step(state)
    if state.state == PAUSED:
        return replace(state, state=RUNNING, reason="")
    return restart(state) if state.state == ROLLED_BACK else state


def document(state: RolloutState) -> dict[str, object]:
    """Return a state with the verdicts on its bounds, as JSON."""
    steps = [{"share": step.share, "seconds": step.seconds or None} for step in state.steps]
    bounds = [asdict(verdict) for verdict in verdicts(state)]
    facts = {"state": state.state, "step": state.step + 1, "steps": steps, "seconds": round(state.seconds, 1)}
    return {**facts, "reason": state.reason or None, "bounds": bounds}
