"""Rollouts in the log of a registry: nothing is lost between gateways, and the index says what the log says."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.hub import webhooks
from adapterhub.manifest import release_statement
from adapterhub.manifest.rollout_state import ROLLED_BACK, RolloutState, RolloutStep
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import rollouts
from tests.registry.forks import finished, fork
from tests.support.adapters import Make

STATE = RolloutState("legal", "team/sql@sha256:0", (RolloutStep(5, 600),), {"errors": 5.0})


@pytest.fixture
def place(tmp_path: Path, make: Make) -> tuple[Path, Ref]:
    """A registry with a version that is a candidate, and its ref."""
    with Registry.init(tmp_path / "registry") as registry:
        ref = Ref("team/sql", digest=registry.push(make("a1", 1), Ref("team/sql")).digest)
        rollouts.change(registry.ledger, ref, "legal", lambda _: STATE)
    return tmp_path / "registry", ref


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_writers_at_once_lose_no_pair(place: tuple[Path, Ref]) -> None:
    root, ref = place

    def one_more(state: RolloutState | None) -> RolloutState | None:
        return state and replace(state, counts={"errors": (0, state.counts.get("errors", (0, 0, 0))[1] + 1, 0)})

    def write() -> None:
        with Registry.open(root) as registry:
            for _ in range(3):
                rollouts.change(registry.ledger, ref, "legal", one_more)

    assert finished([fork(write) for _ in range(10)]) == [0] * 10
    with Registry.open(root) as registry:
        state = rollouts.state_of(registry.index, ref, "legal")
    assert state is not None
    assert state.counts == {"errors": (0, 30, 0)}


def test_an_index_that_is_built_again_has_the_same_states(place: tuple[Path, Ref]) -> None:
    root, ref = place
    with Registry.open(root) as registry:
        rollouts.change(registry.ledger, ref, "tone", lambda _: replace(STATE, route="tone"))
        before = rollouts.states(registry.index, "team/sql")
        assert registry.rebuild_index() == []
        assert rollouts.states(registry.index, "team/sql") == before
        assert {route for _, route in before} == {"legal", "tone"}


def test_a_state_that_stays_is_no_entry(place: tuple[Path, Ref]) -> None:
    root, ref = place
    with Registry.open(root) as registry:
        count = len([*registry.store.log.entries("team/sql")])
        assert rollouts.change(registry.ledger, ref, "legal", lambda state: state) == STATE
        assert rollouts.change(registry.ledger, ref, "other", lambda state: state) is None
        assert len([*registry.store.log.entries("team/sql")]) == count


def test_the_way_back_is_in_the_log_and_in_the_event_of_webhooks_with_its_reason(place: tuple[Path, Ref]) -> None:
    root, ref = place
    with Registry.open(root) as registry:
        rollouts.change(registry.ledger, ref, "legal", lambda _: replace(STATE, state=ROLLED_BACK, reason="errors: 9 of 90"))
        entry = [*registry.store.log.entries("team/sql")][-1]
    assert release_statement.log_summary(entry.op, entry.message) == "legal: rolled back: errors: 9 of 90"
    [(event, payload)] = webhooks.events(entry)
    assert event == "version.rollout"
    assert (payload["state"], payload["share"], payload["reason"]) == (ROLLED_BACK, 0.0, "errors: 9 of 90")
    assert (payload["digest"], payload["route"]) == (ref.digest, "legal")
    assert release_statement.log_summary("rollout", "{") == ""
    assert list(webhooks.events(replace(entry, message="{"))) == []
