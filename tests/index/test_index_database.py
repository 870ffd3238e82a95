"""registry.db as a database: one writer, readers of one moment, values of their kinds, and errors with a way out."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.index import index_database
from adapterhub.index.index_database import Index
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import IntegrityError, LocalIOError


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Registry.init(tmp_path / "registry") as registry:
        yield registry.index


def add(index: Index, name: str) -> None:
    index.execute("INSERT INTO names VALUES (?, 1, '', 1, 0)", name)


def names(index: Index) -> list[str]:
    return [name for (name,) in index.select("SELECT name FROM names ORDER BY name", kinds="s")]


def test_tables_are_strict_and_the_database_has_a_write_ahead_log(index: Index) -> None:
    listed = index.select("SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table'")
    assert {name for name, strict in listed if not strict} == {"sqlite_schema"}
    assert index.select("PRAGMA journal_mode") == [("wal",)]
    assert index_database.is_ours(index.path)
    assert not index_database.is_ours(index.path.parent / "none.db")


def test_an_error_takes_back_the_whole_transaction_and_nested_ones_belong_to_it(index: Index) -> None:
    with pytest.raises(ZeroDivisionError), index.transaction():  # noqa: PT012
        add(index, "team/a")
        with index.transaction():
            add(index, "team/b")
        assert index.in_transaction
        raise ZeroDivisionError
    assert (names(index), index.in_transaction) == ([], False)
    with index.transaction():
        add(index, "team/a")
    assert names(index) == ["team/a"]


def test_a_snapshot_does_not_see_what_is_written_meanwhile(index: Index) -> None:
    other_index = Index(index.path, index_database.connect(index.path, "rw"), index_database.identity(index.path))
    with index.snapshot():
        before = names(index)
        with other_index.transaction():
            add(other_index, "team/a")
        assert names(index) == before == []
    assert names(index) == ["team/a"]
    other_index.close()


def test_a_value_of_another_kind_is_damage_and_names_the_way_out(index: Index) -> None:
    for kind, value in (("i", "1"), ("s", 1), ("s", None), ("S", 1.5)):
        with pytest.raises(IntegrityError, match="wrong type") as broken:
            index.select("SELECT ?", value, kinds=kind)
        assert broken.value.code == "broken-index"
    assert index.select("SELECT ?", None, kinds="S") == [(None,)]


def test_names_that_are_left_out_are_skipped_by_a_query(index: Index) -> None:
    with index.transaction():
        add(index, "team/a")
        add(index, "team/b")
    index.left_out = {"team/a"}
    assert index.select("SELECT name FROM names WHERE NOT left_out(name)") == [("team/b",)]


def test_a_file_that_was_removed_or_replaced_is_noticed(index: Index) -> None:
    assert not index.is_replaced()
    index_database.rename(index.path, f"{index.path}.old")
    assert index.is_replaced()
    index.path.write_bytes(b"")
    assert index.is_replaced()


def test_a_lock_of_another_process_is_a_local_error_and_damage_is_one_of_integrity(tmp_path: Path) -> None:
    for text, error, hint in (
        ("database is locked", LocalIOError, "when the other adapterhub process has ended"),
        ("database or disk is full", LocalIOError, "Free some space"),
        ("no such table: names", IntegrityError, "Rebuild the index"),
    ):
        cause = sqlite3.OperationalError(text)
        cause.sqlite_errorname = {"locked": "SQLITE_BUSY", "full": "SQLITE_FULL"}.get(text.rpartition(" ")[2], "SQLITE_ERROR")
        with pytest.raises(error, match=hint), index_database.errors(tmp_path / "registry.db"):
            raise cause
