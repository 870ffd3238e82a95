"""The PostgreSQL of the tests: databases of their own, and the insert on which the log of a registry relies."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer


def test_every_test_has_a_database_of_its_own(postgres: Postgres) -> None:
    first, second = postgres.database(), postgres.database()
    postgres.sql(first, "CREATE TABLE entries (name text)")
    assert postgres.sql(first, "SELECT count(*) FROM entries") == "0"
    assert postgres.sql(second, "SELECT to_regclass('entries') IS NULL") == "t"


def test_of_racing_inserts_of_one_key_exactly_one_wins(postgres: Postgres) -> None:
    url = postgres.database()
    postgres.sql(url, "CREATE TABLE entries (name text, seq int, entry text, PRIMARY KEY (name, seq))")

    def insert(racer: int) -> str:
        text = f"INSERT INTO entries VALUES ('team/sql', 1, 'entry {racer}') ON CONFLICT DO NOTHING RETURNING entry"
        return postgres.sql(url, text)

    with ThreadPoolExecutor(8) as pool:
        won = [*filter(None, pool.map(insert, range(8)))]
    assert won == [postgres.sql(url, "SELECT entry FROM entries")]
