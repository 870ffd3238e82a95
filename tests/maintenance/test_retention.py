"""Versions are dropped where that is requested, and nowhere else."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance import name_moves, retention
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.manifest.keep_rule import KeepRule
from adapterhub.ref import Ref, RefError
from adapterhub.registry.registry import Registry
from adapterhub.store.ref_log import entries_in_force
from adapterhub_converters.errors import NotFoundError
from tests.conftest import Run
from tests.maintenance.test_gc import PROD, SQL
from tests.support.adapters import Make


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened


def test_versions_are_dropped_only_where_requested(registry: Registry, make: Make) -> None:
    for seed, tag in enumerate(["prod", "", "", ""], 1):
        registry.push(make(f"a{seed}", seed), Ref("team/sql", tag=tag or None))
        registry.push(make(f"a{seed}", seed), Ref("team/all", tag=tag or None))
    registry.deprecate(Ref.parse("team/sql:v2"), "old")
    assert gc(registry, grace=0).dropped == []
    retention.keep(registry, SQL, KeepRule(2))
    assert retention.chosen_rule(registry, SQL) == KeepRule(2)
    assert list(map(str, gc(registry, grace=0, dry_run=True).dropped)) == ["team/sql:v2"]
    assert list(map(str, gc(registry, grace=0).dropped)) == ["team/sql:v2"]
    assert [row.number for row in registry.list("team/sql")] == [4, 3, 1]
    assert len(registry.list("team/all")) == 4
    assert registry.deprecations(["team/sql"]) == {}
    with pytest.raises(NotFoundError, match="no such version"):
        registry.resolve(Ref.parse("team/sql:v2"))
    assert list(map(str, gc(registry, grace=0, last=1).dropped)) == [
        "team/all:v2",
        "team/all:v3",
    ]  # said of team/sql: 2
    retention.keep(registry, SQL, None)
    retention.keep(registry, Ref.parse("team/all"), KeepRule(0))
    assert gc(registry, grace=0).dropped == []
    assert [entry.op for entry in registry.log(SQL)][:3] == ["keep-all", "drop", "keep"]
    assert registry.rebuild_index() == fsck(registry) == []
    assert registry.push(make("a2", 2), SQL).number == 5  # what was dropped may come again
    with pytest.raises(RefError, match="is set for a whole name"):
        retention.keep(registry, PROD, KeepRule(1))


def test_a_choice_of_all_versions_wins_over_the_options_of_a_gc(registry: Registry, make: Make) -> None:
    for seed in (1, 2, 3):
        registry.push(make(f"a{seed}", seed), SQL)
    retention.keep(registry, SQL, None)
    retention.keep(registry, SQL, None)
    assert [entry.op for entry in registry.log(SQL)] == ["keep-all", "push", "push", "push"]
    assert gc(registry, grace=0, last=1).dropped == []
    assert registry.rebuild_index() == fsck(registry) == []
    retention.keep(registry, SQL, KeepRule(2))
    assert list(map(str, gc(registry, grace=0, last=1).dropped)) == ["team/sql:v1"]


def test_a_gc_reads_the_log_of_a_name_once_for_its_choice(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2, 3):
        registry.push(make(f"a{seed}", seed), SQL)
    retention.keep(registry, SQL, None)
    reads: list[int] = []
    monkeypatch.setattr(retention, "entries_in_force", lambda entries: reads.append(1) or entries_in_force(entries))
    assert gc(registry, grace=0, last=1).dropped == []
    assert len(reads) == 1


def test_a_dry_run_foretells_the_bytes_of_dropped_versions(registry: Registry, make: Make) -> None:
    for seed in (1, 2, 3):
        registry.push(make(f"a{seed}", seed), SQL)
    dry = gc(registry, grace=0, last=1, dry_run=True)
    assert len(registry.list()) == 3
    swept = gc(registry, grace=0, last=1)
    assert (dry.dropped, dry.blobs, dry.size) == (swept.dropped, swept.blobs, swept.size)
    assert swept.blobs == 8


def test_versions_of_an_age_are_dropped_except_the_newest_the_tagged_and_those_of_names_with_a_choice(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in (1, 2, 3):
        monkeypatch.setattr("adapterhub.registry.moves.now", lambda day=day: f"2026-01-0{day}T00:00:00Z")
        for name in ("sql", "old", "kept"):
            if (name, day) != ("old", 3):
                registry.push(
                    make(f"{name}{day}", day), Ref(f"team/{name}", tag="prod" if day == 1 and name == "sql" else None)
                )
    monkeypatch.undo()
    retention.keep(registry, Ref("team/kept"), KeepRule(5))
    name_moves.move(registry, "team/old", "team/other")  # which makes no version younger
    ttl = int(time.time() - datetime.datetime(2026, 1, 3, tzinfo=datetime.UTC).timestamp())
    expected = ["team/other:v1", "team/sql:v2"]
    assert list(map(str, gc(registry, grace=0, ttl=ttl, dry_run=True).dropped)) == expected
    assert list(map(str, gc(registry, grace=0, ttl=ttl, last=2, dry_run=True).dropped)) == []
    assert list(map(str, gc(registry, grace=0, ttl=ttl).dropped)) == expected
    assert [row.number for row in registry.list("team/other")] == [2]  # the newest, though it is old
    assert fsck(registry) == []


def test_an_age_is_an_option_of_a_gc(run: Run, make: Make) -> None:
    run("push", make("a", 1), "team/sql")
    run("push", make("b", 2), "team/sql")
    assert json.loads(run("gc", "--ttl", "1d", "--json").stdout)["dropped"] == []
    assert json.loads(run("gc", "--ttl", "0h", "--json", "--dry-run").stdout)["dropped"] == ["team/sql:v1"]
    assert "--ttl: 'old' is not an age" in run("gc", "--ttl", "old", code=2).stderr


def test_a_name_keeps_its_newest_versions_and_those_younger_than_an_age(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = datetime.datetime.now(datetime.UTC)
    for number, days in enumerate((400, 300, 200, 100, 80, 10), 1):
        pushed = (today - datetime.timedelta(days=days)).isoformat(timespec="seconds")
        monkeypatch.setattr("adapterhub.registry.moves.now", lambda pushed=pushed: pushed)
        for name in ("sql", "young", "last"):
            registry.push(make(f"{name}{number}", number), Ref(f"team/{name}", tag="prod" if number == 1 else None))
    monkeypatch.undo()
    retention.keep(registry, SQL, KeepRule(3, 90 * 86400))  # v4 is old, and the third
    retention.keep(registry, Ref("team/young"), KeepRule(1, 90 * 86400))
    retention.keep(registry, Ref("team/last"), KeepRule(1))
    retention.keep(registry, SQL, KeepRule(3, 90 * 86400))  # no further entry
    assert retention.chosen_rule(registry, SQL) == KeepRule(3, 90 * 86400)
    assert [(entry.op, entry.keep, entry.ttl) for entry in registry.log(SQL)][:2] == [("keep", 3, 7776000), ("push", 0, 0)]
    assert b'"version":8' in registry.store.log.path("team/sql", 8 - 1).read_bytes()
    assert b'"version":2' in registry.store.log.path("team/last", 7).read_bytes()  # which older programs read
    gc(registry, grace=0, last=5, ttl=10**9)  # a choice wins
    kept_numbers = {name: [row.number for row in registry.list(f"team/{name}")] for name in ("sql", "young", "last")}
    assert kept_numbers == {"sql": [6, 5, 4, 1], "young": [6, 5, 1], "last": [6, 1]}
    assert registry.rebuild_index() == fsck(registry) == []
    assert retention.chosen_rule(registry, SQL) == KeepRule(3, 90 * 86400)


def test_the_rule_of_a_name_is_said_in_words(run: Run, make: Make) -> None:
    run("push", make("a", 1), "team/sql")
    words = "team/sql: the 3 newest, those of the last 90 days, and tagged versions\n"
    assert run("keep", "team/sql", "--last", "3", "--for", "90d").stdout == words
    assert run("keep", "team/sql").stdout == words
    assert "the last 90 days" in run("log", "team/sql").stdout
    assert json.loads(run("log", "team/sql", "--json").stdout)["entries"][0]["ttl"] == 7776000
    assert json.loads(run("keep", "team/sql", "--for", "1w", "--json").stdout) == {
        "name": "team/sql",
        "last": 1,
        "ttl": 604800,
        "tagged": True,
    }
    assert run("keep", "team/sql", "--tagged", "--for", "2d").stdout == (
        "team/sql: those of the last 2 days and tagged versions\n"
    )
    assert run("keep", "team/sql", "--all").stdout == "team/sql: every version\n"
    assert "[conflicting-options]" in run("keep", "team/sql", "--all", "--for", "2d", code=2).stderr
    assert "--for: '3 years' is not an age" in run("keep", "team/sql", "--for", "3 years", code=2).stderr
