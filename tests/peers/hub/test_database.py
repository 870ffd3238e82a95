"""The tables of a hub in PostgreSQL: the contract of `tests/hub/test_database.py`, and what only a server can do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from adapterhub.hub.hub_database import MIGRATIONS, HubDatabase
from adapterhub.hub.storage.postgres import PostgresDatabase
from adapterhub_converters.errors import RemoteError, UsageError
from tests.hub.test_database import *  # noqa: F403 - the contract
from tests.hub.test_database import Opener
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer


@pytest.fixture
def url(postgres: Postgres) -> str:
    """An empty database."""
    return postgres.database()


@pytest.fixture
def database(url: str) -> Iterator[HubDatabase]:
    """The tables of a hub in PostgreSQL."""
    with closing(PostgresDatabase(url)) as opened:
        yield opened


@pytest.fixture
def opener(url: str) -> Opener:
    """Opens the same database each time, as each process of a hub does."""
    return lambda: PostgresDatabase(url)


def test_a_second_process_finds_what_the_first_one_made(url: str, postgres: Postgres) -> None:
    with closing(PostgresDatabase(url)) as first, closing(PostgresDatabase(url)) as second:
        first.execute("INSERT INTO xet_epochs (id, since) VALUES ('a', 1)")
        assert second.select("SELECT id FROM xet_epochs") == [("a",)]
        assert first.identity == second.identity
    assert postgres.sql(url, "SELECT version FROM hub") == str(len(MIGRATIONS))


def test_of_racing_entries_one_is_in_the_log(url: str) -> None:
    with closing(PostgresDatabase(url)) as first, closing(PostgresDatabase(url)) as second:
        assert first.append("refs", "team/sql", 1, b"one")
        assert not second.append("refs", "team/sql", 1, b"other")
        assert second.append("bases", "team/sql", 1, b"\0")
        rows = second.rows_after(0, 10)
        assert [(row.log, row.seq, row.raw) for row in rows] == [("refs", 1, b"one"), ("bases", 1, b"\0")]
        assert first.rows_after(rows[0].id, 10) == rows[1:] == second.rows_of_name("bases", "team/sql", 1)


def test_reading_goes_on_after_the_server_closed_its_connections(database: HubDatabase, postgres: Postgres) -> None:
    postgres.sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'adapterhub'")
    assert database.select("SELECT id FROM xet_epochs") == []


def test_who_has_seen_a_row_has_seen_all_before_it(url: str) -> None:
    with closing(PostgresDatabase(url)) as first, closing(PostgresDatabase(url)) as second, ThreadPoolExecutor(8) as pool:
        appends = [pool.submit((first, second)[n % 2].append, "refs", f"team/a{n}", 1, b"x") for n in range(200)]
        names, last = [], 0
        while len(names) < 200:
            are_done = all(future.done() for future in appends)
            rows = first.rows_after(last, 50)
            assert rows or not are_done
            names += [row.name for row in rows]
            last = rows[-1].id if rows else last
        assert sorted(names) == sorted(f"team/a{n}" for n in range(200))


def test_a_statement_that_the_server_refuses_is_one_error(database: HubDatabase) -> None:
    with pytest.raises(RemoteError, match='the database refuses the request: relation "nowhere" does not exist$'):
        database.select("SELECT id FROM nowhere")


def test_a_server_that_is_not_there_is_an_error_without_the_password() -> None:
    with pytest.raises(RemoteError) as error:
        PostgresDatabase("postgresql://me:secret@127.0.0.1:9/hub?connect_timeout=1")
    assert "secret" not in str(error.value)
    with pytest.raises(UsageError):
        PostgresDatabase("mysql://me:secret@127.0.0.1/hub")
