"""How much of a log is read to compare a version of the index with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.index import queries
from adapterhub.ref import Ref
from adapterhub.registry import log_check
from adapterhub.registry.registry import Registry
from adapterhub.store.ref_log import Entry, RefLog
from adapterhub_converters.errors import IntegrityError
from tests.support.adapters import Make

SQL = Ref.parse("team/sql")
NAMES = ("prod", "dev", "old")


class Counted(RefLog):
    """A log that remembers which entries were read."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry.store.files)
        self.read: list[int] = []

    def entry(self, name: str, seq: int, *, log: str = "refs") -> tuple[Entry, Digest] | None:
        """Read an entry."""
        self.read.append(seq)
        return super().entry(name, seq, log=log)


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Registry:
    """A log of 23 entries: `old` is v1, then `prod` and `dev` move back and forth between v1 and v2."""
    registry = Registry.init(tmp_path / "r")
    registry.push(make("a1", 1), Ref(SQL.name, tag="old"))
    registry.push(make("a2", 2), SQL)
    for n in range(20):
        registry.tag(Ref(SQL.name, number=1 + n // 2 % 2), NAMES[n % 2])
    registry.protect(Ref(SQL.name, tag="prod"))
    return registry


def read(registry: Registry, tag: str | None, number: int, verified_head: Digest = "") -> list[int]:
    """The entries that are read to check a version."""
    log = Counted(registry)
    state, row = queries.name(registry.index, SQL.name), registry.row(Ref(SQL.name, number=number))
    pushed, database = queries.push_entry_number(registry.index, row), Path("registry.db")
    log_check.check_row(log, state, row, tag, pushed=pushed, database=database, verified_head=verified_head)
    return log.read


def head(registry: Registry) -> Digest:
    """The end of the log."""
    return queries.name(registry.index, SQL.name).head


def test_a_version_by_its_number_takes_the_last_entry_and_its_own(registry: Registry) -> None:
    assert (read(registry, None, 1), read(registry, None, 2)) == ([23, 1], [23, 2])


def test_a_tag_takes_the_entries_since_its_last_move(registry: Registry) -> None:
    assert read(registry, "prod", 2) == [23, 22, 21, 2]
    assert read(registry, "old", 1) == [*range(23, 0, -1), 1]


def test_what_was_removed_and_restored_is_read_at_its_first_push(registry: Registry) -> None:
    registry.protect(Ref(SQL.name, tag="prod"), on=False)
    registry.rm(SQL)
    registry.restore(SQL.name)
    assert read(registry, None, 1) == [26, 1]
    assert read(registry, "dev", 2) == [26, 25, 24, 23, 22, 2]


def test_a_tag_that_was_checked_takes_the_entries_since_then(registry: Registry) -> None:
    verified_head = head(registry)
    assert read(registry, "old", 1, verified_head) == [23, 1]
    registry.protect(Ref(SQL.name, tag="dev"))
    assert read(registry, "old", 1, verified_head) == [24, 23, 1]


def test_a_process_reads_the_entries_behind_a_tag_once(registry: Registry, make: Make) -> None:
    old = Ref(SQL.name, tag="old")
    assert registry.resolve(old).number == 1
    registry.store.log.path(SQL.name, 10).unlink()
    registry.push(make("a3", 3), SQL)
    assert registry.resolve(old).number == 1
    with Registry.open(registry.root) as other_registry, pytest.raises(IntegrityError, match="another entry 10"):
        other_registry.resolve(old)


def test_what_was_checked_does_not_hold_for_a_log_that_came_in_its_place(registry: Registry, tmp_path: Path) -> None:
    assert read(registry, "old", 1, sha256_bytes(b"of another log")) == [*range(23, 0, -1), 1]


def test_what_was_checked_before_a_removal_holds_after_it_is_undone(registry: Registry) -> None:
    verified_head = head(registry)
    registry.protect(Ref(SQL.name, tag="prod"), on=False)
    registry.rm(SQL)
    between = head(registry)
    registry.restore(SQL.name)
    assert read(registry, "old", 1, verified_head) == [26, 25, 24, 23, 1]
    assert read(registry, "old", 1, between) == [*range(26, 0, -1), 1]


def test_a_move_reads_the_entries_since_the_last_one_of_its_process(registry: Registry) -> None:
    log, state = Counted(registry), queries.name(registry.index, SQL.name)
    log_check.check_end(log, state, Path("registry.db"))
    assert log.read == [*range(23, 1, -1)]
    log.read.clear()
    log_check.check_end(log, state, Path("registry.db"), verified_state=state)
    assert log.read == [23]


@pytest.mark.parametrize("wrong", [{"number": 1}, {"deleted": True}])
def test_a_state_that_differs_from_the_log_is_refused_though_its_end_is_known(registry: Registry, wrong: Any) -> None:
    state = queries.name(registry.index, SQL.name)
    with pytest.raises(IntegrityError, match="another state"):
        log_check.check_end(registry.store.log, replace(state, **wrong), Path("registry.db"), verified_state=state)
