"""The state of a rollout is read as it was written, or there is none."""

from __future__ import annotations

from dataclasses import replace

from adapterhub.evidence import rollout_rules
from adapterhub.evidence.rollout_rules import UNKNOWN
from adapterhub.manifest import rollout_state
from tests.evidence.test_rollout_rules import ENOUGH, STATE, verdicts_of


def test_a_state_is_read_as_it_was_written_and_anything_else_is_none() -> None:
    state = rollout_rules.with_evidence(STATE, 12.5, ENOUGH)
    assert rollout_state.parse(state.dump()) == state
    text = state.dump()
    for malformed in (
        "", "{", "[]", "{}", text.replace("running", "flying"), text.replace('"step": 0', '"step": 7'),
        text.replace("12.5", "-1"), text.replace("12.5", "1e999"), text.replace("1000", "-1"), text.replace('"steps"', '"x"'),
        text.replace('"error": 0.01', '"error": 0'), text[:-1] + '"' + "x" * 20_000,
    ):  # fmt: skip
        assert rollout_state.parse(malformed) is None, malformed[:100]


def test_a_log_with_an_error_beyond_all_numbers_has_no_state() -> None:
    assert rollout_state.parse(replace(STATE, error=1e-320).dump()) is None
    smallest = rollout_state.parse(replace(STATE, error=1e-9).dump())
    assert smallest is not None
    assert set(verdicts_of(smallest).values()) == {UNKNOWN}
