"""Promotions and rollbacks: each is one entry of the log, and those who come second are told."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.manifest.measurement import Evaluation
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.project import PROJECT, settings_file
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves
from adapterhub_converters.errors import AdapterhubError, ConflictError, RefusedError, UsageError
from tests.registry.forks import finished, fork
from tests.registry.releases.test_tag_requirements import GOOD, PROD, SQL, prod, require, v
from tests.support.adapters import Make


@pytest.fixture
def registry(tmp_path: Path, make: Make) -> Iterator[Registry]:
    """Three versions by ana, the first of which is prod."""
    with Registry.init(tmp_path / "registry") as opened:
        opened.author = "ana"
        for seed in (1, 2, 3):
            opened.push(make(f"a{seed}", seed), PROD if seed == 1 else SQL)
        yield opened


def test_a_promotion_moves_the_tag_with_its_reason(registry: Registry) -> None:
    require(registry, 'eval = { tests = "pass>=0.95" }')
    measurement_log.record(registry, v(2), GOOD)
    assessment, version = registry.promote(v(2), "prod", "as agreed")
    assert (assessment.missing, version.number, prod(registry)) == ([], 2, 2)
    entry = registry.log(PROD)[0]
    assert (entry.op, entry.message, entry.author) == ("tag", "as agreed", "ana")


def test_latest_has_no_requirements_and_is_promoted_to_by_nobody(registry: Registry) -> None:
    with pytest.raises(UsageError, match="is always the newest push"):
        settings_file.parse("[promote.latest]\n", Path(PROJECT))
    with pytest.raises(RefusedError) as refused:
        registry.promote(v(1), "latest")
    assert refused.value.code == "latest-tag"


def test_who_looked_before_another_moved_the_tag_is_told(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    look = registry.assess

    def and_another_moves(ref: Ref, tag: str) -> object:
        assessment = look(ref, tag)
        registry.tag(v(3), "prod")
        return assessment

    monkeypatch.setattr(registry, "assess", and_another_moves)
    with pytest.raises(ConflictError, match="moved in the meantime: it is sha256:"):
        registry.promote(v(2), "prod")
    assert prod(registry) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_of_ten_promoters_at_once_each_move_is_in_the_log_and_the_losers_are_told(registry: Registry) -> None:
    require(registry, 'eval = { tests = "pass>=0.95" }')
    for number in (2, 3):
        measurement_log.record(registry, v(number), GOOD)
    root = registry.root
    before = len(registry.log(SQL))

    def promote(number: int) -> Callable[[], None]:
        def work() -> None:
            with Registry.open(root) as opened:
                opened.author = f"promoter {number}"
                try:
                    opened.promote(v(2 + number % 2), "prod")
                except ConflictError:
                    os._exit(7)

        return work

    codes = finished([fork(promote(number)) for number in range(10)])
    assert set(codes) <= {0, 7}
    moves = registry.log(SQL)[: len(registry.log(SQL)) - before]
    # Those who found the tag where they wanted it moved nothing, and nobody moved it unseen.
    assert 1 <= len(moves) <= codes.count(0)
    assert all(newer.number != older.number for newer, older in itertools.pairwise(moves))
    assert prod(registry) == moves[0].number


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_storm_of_moves_approvals_and_rollbacks_loses_nothing(registry: Registry) -> None:
    rounds = 6
    for turn in range(rounds):
        registry.tag(v(2 + turn % 2), "back")
    registry.tag(v(1), "back")
    root, before = registry.root, len(registry.log(SQL))
    moves: list[Callable[[Registry, int], object]] = [
        lambda opened, turn: release_moves.approve(opened.ledger, v(2), "prod", ReleaseStatement(f"{turn}", "", "")),
        lambda opened, turn: opened.tag(v(2 + turn % 2), "other"),
        lambda opened, _: release_moves.rollback(opened.ledger, Ref("team/sql", tag="back"), "wrong"),
        lambda opened, turn: measurement_log.record(opened, v(1), Evaluation(f"e{turn}", {"loss": float(turn)})),
        lambda opened, turn: measurement_log.record(opened, v(1), Evaluation(f"f{turn}", {"loss": float(turn)})),
    ]

    def work(move: Callable[[Registry, int], object]) -> Callable[[], None]:
        def repeat() -> None:
            with Registry.open(root) as opened:
                for turn in range(rounds):
                    move(opened, turn)

        return repeat

    assert finished([fork(work(move)) for move in moves]) == [0] * len(moves)
    entries = registry.log(SQL)
    assert len(entries) == before + len(moves) * rounds
    assert Counter(entry.op for entry in entries[: len(moves) * rounds]) == {
        "approve": rounds, "tag": rounds, "rollback": rounds, "evaluate": 2 * rounds,
    }  # fmt: skip
    assert registry.rebuild_index() == []
    assert queries.tags(registry.index, "team/sql")["back"] == 2  # as it was before all that it was rolled back from


def test_a_rollback_goes_one_step_back_and_never_forth(registry: Registry) -> None:
    registry.tag(v(2), "prod")
    registry.tag(v(3), "prod")
    require(registry, "approvals = 1")
    assert [version.number for version in release_moves.rollback(registry.ledger, PROD, "wrong dates")] == [3, 2]
    entry = registry.log(PROD)[0]
    assert (entry.op, entry.message, prod(registry)) == ("rollback", "wrong dates", 2)
    release_moves.rollback(registry.ledger, PROD, "")
    assert prod(registry) == 1
    with pytest.raises(AdapterhubError, match="had no other version before that can be used"):
        release_moves.rollback(registry.ledger, PROD, "")
    assert registry.rebuild_index() == []
    assert prod(registry) == 1


def test_a_rollback_skips_what_was_withdrawn_and_a_protected_tag_stays(registry: Registry) -> None:
    registry.tag(v(2), "prod")
    registry.tag(v(3), "prod")
    release_moves.withdraw(registry.ledger, v(2), ReleaseStatement("leaked"))
    registry.protect(PROD)
    with pytest.raises(RefusedError) as refused:
        release_moves.rollback(registry.ledger, PROD, "")
    assert refused.value.code == "protected"
    registry.protect(PROD, on=False)
    assert release_moves.rollback(registry.ledger, PROD, "")[1].number == 1
