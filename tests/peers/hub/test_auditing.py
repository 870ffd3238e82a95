"""The logs of a hub in PostgreSQL are verified as those of a folder are, and checkpoints of them are signed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.hub.accounts import audit_log
from adapterhub.hub.storage.postgres import PostgresDatabase
from adapterhub.hub.storage.shared_storage import SharedStorage
from adapterhub.ref import Ref
from adapterhub.trust import keys
from adapterhub_converters.errors import NotFoundError
from tests.conftest import Run
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer
Open = Callable[..., SharedStorage]
TABLES = ("entries", "audit")


@pytest.fixture
def logged(opened: Open, places: dict[str, Any], adapter: Callable[..., Path], tmp_path: Path) -> str:
    """The database of a hub with two names, three entries and three rows, and a checkpoint of them by `audit.key`."""
    keys.generate(tmp_path / "audit", keys.ED25519)
    storage = opened()
    with storage.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
        registry.push(adapter(2), Ref("team/sql"))
        registry.push(adapter(1), Ref("team/other"))
    for number in range(3):
        audit_log.record(storage.database, audit_log.Event("push", f"team/{number}"))
    checkpoint = ah.sign_checkpoint(places["database"], tmp_path / "ends.json", tmp_path / "audit.key")
    assert (checkpoint.names, checkpoint.entries, checkpoint.rows) == (2, 3, 3)
    return str(places["database"])


def faults(url: str, tmp_path: Path) -> list[tuple[str, str]]:
    audit = ah.audit(url, checkpoint=tmp_path / "ends.json", keys=tmp_path / "audit.pub")
    return [(fault.where, fault.kind) for fault in audit.faults]


def test_logs_that_went_on_after_a_checkpoint_are_whole_and_are_not_changed(
    logged: str, opened: Open, adapter: Callable[..., Path], postgres: Postgres, tmp_path: Path
) -> None:
    with opened("other").registry() as registry:
        registry.push(adapter(3), Ref("team/sql"))
    before = [postgres.sql(logged, f"SELECT * FROM {table} ORDER BY id") for table in TABLES]
    assert faults(logged, tmp_path) == []
    audit = ah.audit(logged)
    assert (audit.ok, audit.entries, audit.rows) == (True, 4, 3)
    assert audit.where == logged.replace("postgres@", "")
    assert before == [postgres.sql(logged, f"SELECT * FROM {table} ORDER BY id") for table in TABLES]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DELETE FROM entries WHERE name = 'team/sql' AND seq = 2", ("refs/team/sql/00000002.json", "truncated")),
        ("DELETE FROM entries WHERE name = 'team/sql' AND seq = 1", ("refs/team/sql/00000001.json", "removed")),
        ("DELETE FROM entries WHERE name = 'team/other'", ("refs/team/other/00000001.json", "truncated")),
        (
            "UPDATE entries SET entry = entry || ' ' WHERE name = 'team/sql' AND seq = 1",
            ("refs/team/sql/00000001.json", "changed"),
        ),
        ("UPDATE entries SET entry = '{}' WHERE name = 'team/sql' AND seq = 2", ("refs/team/sql/00000002.json", "unreadable")),
        (
            (
                "UPDATE entries SET entry = (SELECT entry FROM entries WHERE name = 'team/sql' AND seq = 1)"
                " WHERE name = 'team/sql' AND seq = 2"
            ),
            ("refs/team/sql/00000002.json", "reordered"),
        ),
        ("UPDATE audit SET name = 'team/9' WHERE id = 2", ("audit row 2", "changed")),
        ("DELETE FROM audit WHERE id = 2", ("audit row 2", "removed")),
        ("DELETE FROM audit WHERE id = 3", ("audit row 3", "truncated")),
    ],
)
def test_the_first_entry_or_row_that_is_not_as_it_was_written_is_named(
    logged: str, postgres: Postgres, tmp_path: Path, statement: str, expected: tuple[str, str]
) -> None:
    postgres.sql(logged, statement)
    assert faults(logged, tmp_path) == [expected]


def test_the_commands_take_the_database_unless_a_folder_with_a_registry_is_named(
    run: Run, logged: str, postgres: Postgres, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    env = {"ADAPTERHUB_DATABASE": logged}
    words = ("--checkpoint", "ends.json", "--key", "audit.pub")
    assert "3 entries of 2 logs and 3 rows of the hub follow" in run("audit", "verify", *words, env=env).stdout
    run("audit", "checkpoint", "-o", "more.json", "--key", "audit.key", "--registry", "one", env=env)
    run("push", adapter(1), "team/sql", "--registry", "folder")
    assert "1 entry of 1 log follow" in run("audit", "verify", "--registry", "folder", env=env).stdout

    postgres.sql(logged, "UPDATE audit SET name = 'team/9' WHERE id = 2")
    result = run("audit", "verify", *words, env=env, code=1)
    assert "error[changed] audit row 2: does not follow from the one before it" in result.stdout
    assert "postgres@" not in result.stdout
    assert "audit row 2 does not follow" in run("hub", "log", "--verify", "--registry", "one", env=env, code=4).stderr


def test_a_database_without_a_hub_is_left_without_one(postgres: Postgres) -> None:
    url = postgres.database()
    with pytest.raises(NotFoundError, match="has no tables of a hub"):
        ah.audit(url)
    assert postgres.sql(url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0"
    with closing(PostgresDatabase(url)):
        pass
    assert ah.audit(url).ok
