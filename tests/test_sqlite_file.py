"""A database that several processes open at the same moment."""

from __future__ import annotations

import functools
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.sqlite_file import SqliteFile
from adapterhub_converters.errors import LocalIOError

MIGRATIONS = ("CREATE TABLE t (x INTEGER) STRICT",)


class Hasty(sqlite3.Connection):
    """A connection that does not wait for the mode of a file, as SQLite does not while another process changes it."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        super().execute(f"PRAGMA busy_timeout = {0 if 'journal_mode' in sql else 1000}")
        return super().execute(sql, parameters)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sqlite3.Connection:
    """Another connection that reads a file, whose mode cannot be changed until it ends."""
    connection = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    connection.execute("CREATE TABLE other (x INTEGER)")
    connection.execute("BEGIN")
    connection.execute("SELECT * FROM other")
    monkeypatch.setattr("adapterhub.sqlite_file.sqlite3.connect", functools.partial(sqlite3.connect, factory=Hasty))
    return connection


def test_opening_waits_until_the_mode_of_the_file_can_be_changed(
    tmp_path: Path, reader: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def end_reading(seconds: float) -> None:
        pauses.append(seconds)
        reader.rollback()

    monkeypatch.setattr("adapterhub.sqlite_file.time.sleep", end_reading)
    with closing(SqliteFile(tmp_path / "x.db", MIGRATIONS)) as database:
        assert database.select("PRAGMA journal_mode") == [("wal",)]
    assert len(pauses) == 1


def test_opening_waits_no_longer_than_it_may(tmp_path: Path, reader: sqlite3.Connection) -> None:
    with pytest.raises(LocalIOError, match="database is locked"):
        SqliteFile(tmp_path / "x.db", MIGRATIONS, lock_seconds=0.05)
    reader.close()
