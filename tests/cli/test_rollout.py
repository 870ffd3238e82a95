"""`rollout show`, `resume` and `abort`: what they print, their documents, and how they end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.evidence import rollout_rules
from adapterhub.manifest.rollout_state import RolloutState, RolloutStep
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import rollouts
from tests.conftest import Run, Terminal
from tests.support.adapters import Make

STEPS = (RolloutStep(5, 600), RolloutStep(25))


@pytest.fixture
def place(tmp_path: Path, make: Make) -> Path:
    """A registry whose `team/sql:v2` is a candidate of the route `legal`, and waits at its second step."""
    with Registry.init(tmp_path) as registry:
        stable, candidate = (registry.push(make(f"a{seed}", seed), Ref("team/sql")).digest for seed in (1, 2))
        state = RolloutState("legal", f"team/sql@{stable}", STEPS, {"errors": 10.0}, step=1, counts={"errors": (1, 38, 1)})
        rollouts.change(registry.ledger, Ref("team/sql", digest=candidate), "legal", lambda _: state)
    return tmp_path


@pytest.mark.usefixtures("place")
def test_it_shows_the_step_and_what_each_bound_tells(run: Run, terminal: Terminal) -> None:
    text = terminal("rollout", "show", "team/sql")
    assert "legal: running at 25 %, step 2 of 2" in text
    assert "5 % -> [25 % 0 min, then a person] -> 100 %" in text
    assert text.count("cannot tell yet: 40 of about ") == text.count("cannot tell yet") == 1
    assert max(map(len, text.splitlines())) <= 80
    [rollout] = json.loads(run("rollout", "show", "team/sql:v2", "legal", "--json").stdout)["rollouts"]
    assert (rollout["route"], rollout["state"], rollout["step"], rollout["share"]) == ("legal", "running", 2, 25)
    assert (rollout["bounds"][0]["pairs"], rollout["bounds"][0]["verdict"]) == (40, "cannot tell yet")


def test_a_broken_bound_is_told_once_with_its_reason(place: Path, run: Run) -> None:
    with Registry.open(place) as registry:
        ref = Ref("team/sql", digest=registry.row(Ref("team/sql")).digest)

        def break_bound(state: RolloutState | None) -> RolloutState:
            assert state is not None
            return rollout_rules.next_state(replace(state, counts={"errors": (60, 20, 1)}))

        rollouts.change(registry.ledger, ref, "legal", break_bound)
    text = run("rollout", "show", "team/sql").stdout
    assert text.startswith("legal: rolled back: errors: requests fail more often: in 60 of 81 pairs")
    assert text.count("requests fail") == 1
    assert text.splitlines()[-1].split() == ["errors", "10", "points", "81", "broken"]


@pytest.mark.usefixtures("place")
def test_a_person_rolls_back_with_a_reason_and_lets_it_begin_again(run: Run) -> None:
    assert run("rollout", "abort", "team/sql", "-m", "customers complain").stdout == (
        "team/sql legal: rolled back: customers complain\n"
    )
    assert "rolled back: customers complain" in run("log", "team/sql").stdout
    assert run("rollout", "resume", "team/sql:v2").stdout == "team/sql legal: running at 5 %, step 1 of 2\n"


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("words", [("team/sql:v1",), ("team/sql", "other")])
def test_what_has_no_rollout_is_not_found(run: Run, words: tuple[str, ...]) -> None:
    for command in ("show", "resume", "abort"):
        assert "[no-rollout]" in run("rollout", command, *words, code=3).stderr


def test_a_candidate_that_was_withdrawn_after_its_rollout_is_rolled_back(place: Path, run: Run) -> None:
    with Registry.open(place) as registry:
        ref = Ref("team/sql", digest=registry.row(Ref("team/sql")).digest)
        rollouts.change(registry.ledger, ref, "legal", lambda state: state and replace(state, state="done"))
    for version, tag in (("v1", "prod"), ("v2", "prod")):
        run("tag", f"team/sql:{version}", tag)
    assert run("rollout", "show", "team/sql").stdout.startswith("legal: done\n")
    run("withdraw", "team/sql:v2", "-m", "a leak")
    run("rollback", "team/sql:prod")
    text = run("rollout", "show", "team/sql").stdout
    assert text.startswith("legal: rolled back: the candidate was withdrawn: a leak\n")
    assert "[100 %]" not in text
    [rollout] = json.loads(run("rollout", "show", "team/sql:v2", "--json").stdout)["rollouts"]
    assert (rollout["state"], rollout["share"]) == ("rolled back", 0)


def test_several_rollouts_must_be_named(place: Path, run: Run) -> None:
    with Registry.open(place) as registry:
        ref = Ref("team/sql", digest=registry.row(Ref("team/sql")).digest)
        state = RolloutState("tone", f"team/sql@{ref.digest}", STEPS)
        rollouts.change(registry.ledger, ref, "tone", lambda _: state)
    assert "has several rollouts" in run("rollout", "abort", "team/sql", code=2).stderr
    assert len(json.loads(run("rollout", "show", "team/sql", "--json").stdout)["rollouts"]) == 2
    assert run("rollout", "abort", "team/sql", "tone").stdout == "team/sql tone: rolled back: aborted\n"
