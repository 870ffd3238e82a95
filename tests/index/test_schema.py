"""schema.sql against the migrations."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

from adapterhub.index import index_database, migrations, replay, schema


def _made_by(create: Callable[[sqlite3.Connection], None]) -> tuple[Any, ...]:
    """Every table, index and trigger, the recorded migrations, and the version of a new database."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("BEGIN")
        create(connection)
        connection.execute("COMMIT")
        objects = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
        applied = connection.execute("SELECT id, migration_set, name FROM _sqlite_migrations").fetchall()
        config = connection.execute("SELECT k, v FROM texts_fts_config").fetchall()
        return objects, applied, config, connection.execute("PRAGMA user_version").fetchone()


def test_a_new_database_is_what_the_migrations_make_of_an_empty_one() -> None:
    created = _made_by(schema.create)
    assert created == _made_by(migrations.apply)
    assert created[-1] == (index_database.VERSION,)


def test_the_digest_by_which_a_foreign_database_is_refused_is_that_of_a_new_one() -> None:
    with closing(index_database.connect_memory()) as connection:
        schema.create(connection)
        assert schema.digest(connection) == schema.DIGEST


def test_the_facets_of_one_name_are_looked_up_and_not_searched_for() -> None:
    with closing(index_database.connect_memory()) as connection:
        schema.create(connection)
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {replay.FACETS_OF_NEWEST}", ("team/sql",))]
    assert {"SCAN facets", "SCAN versions"}.isdisjoint(" ".join(step.split()[:2]) for step in plan)
    assert any(step.startswith("SEARCH facets USING PRIMARY KEY") for step in plan)
