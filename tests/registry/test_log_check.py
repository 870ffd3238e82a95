"""How much of a log is read to compare a version of the index with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.ref import Ref
from adapterhub.registry import log_check
from adapterhub.registry.registry import Registry
from adapterhub.store.ref_log import Entry, RefLog
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


def read(registry: Registry, tag: str | None, number: int) -> list[int]:
    """The entries that are read to check a version."""
    log = Counted(registry)
    state, row = queries.name(registry.index, SQL.name), registry.row(Ref(SQL.name, number=number))
    log_check.check_row(log, state, row, tag, pushed=queries.pushed_by(registry.index, row), database=Path("registry.db"))
    return log.read


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
