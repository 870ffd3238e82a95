"""The tables of a hub, whatever keeps them: these tests run over hub.db, and in `tests/peers` over PostgreSQL."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from adapterhub.hub import hub_database as module
from adapterhub.hub.accounts import access_tokens, accounts, admissions, sessions
from adapterhub.hub.accounts.id_tokens import IdToken
from adapterhub.hub.administration import own_tokens
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.sqlite_file import ConstraintError
from adapterhub_converters.errors import RefusedError

Opener = Callable[[], HubDatabase]
UPSERT = "INSERT INTO uploaded VALUES (?, ?, ?) ON CONFLICT (name, digest) DO UPDATE SET time = excluded.time"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[HubDatabase]:
    """An empty database."""
    with closing(HubDatabase(tmp_path)) as opened:
        yield opened


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    """Opens the same database each time, as each process of a hub does."""
    return lambda: HubDatabase(tmp_path)


def test_every_value_comes_back_as_it_went_in(database: HubDatabase) -> None:
    time, secret = 1732617600.123456, bytes(range(256))
    database.execute("INSERT INTO secrets VALUES (?, ?)", "100 % of 'all'", secret)
    database.execute("INSERT INTO xet_epochs (id, since) VALUES (?, ?)", "ärger 🦊", time)
    assert database.select("SELECT name, value FROM secrets") == [("100 % of 'all'", secret)]
    assert database.select("SELECT id, since FROM xet_epochs") == [("ärger 🦊", time)]


def test_a_statement_says_how_many_rows_it_changed(database: HubDatabase) -> None:
    rows = [("team/sql", digest, 1.0) for digest in "abc"]
    database.execute_many(UPSERT, rows)
    assert database.execute("DELETE FROM uploaded WHERE digest <= ?", "b") == 2
    assert database.execute("DELETE FROM uploaded WHERE digest = ?", "nothing") == 0


def test_a_second_insert_of_a_key_replaces_leaves_or_fails_as_it_asks(database: HubDatabase) -> None:
    database.execute(UPSERT, "team/sql", "a", 1.0)
    database.execute(UPSERT, "team/sql", "a", 2.0)
    assert database.execute("INSERT INTO uploaded VALUES (?, ?, ?) ON CONFLICT DO NOTHING", "team/sql", "a", 3.0) == 0
    with pytest.raises(ConstraintError):
        database.execute("INSERT INTO uploaded VALUES (?, ?, ?)", "team/sql", "a", 4.0)
    assert database.select("SELECT time FROM uploaded") == [(2.0,)]


def test_a_failed_transaction_leaves_nothing(database: HubDatabase) -> None:
    def fail() -> None:
        with database.transaction():
            database.execute(UPSERT, "team/sql", "a", 1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(ConstraintError):
        database.execute_many("INSERT INTO uploaded VALUES (?, ?, ?)", [("team/sql", "a", 1.0), ("team/sql", "a", 2.0)])
    assert database.select("SELECT * FROM uploaded") == []


def test_transactions_wait_for_each_other(database: HubDatabase) -> None:
    database.execute("INSERT INTO xet_epochs (id, since) VALUES ('count', 0)")

    def count() -> None:
        for _ in range(10):
            with database.transaction():
                before = database.select("SELECT since FROM xet_epochs")[0][0]
                database.execute("UPDATE xet_epochs SET since = ?", before + 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert database.select("SELECT since FROM xet_epochs") == [(40.0,)]


def test_numbers_are_given_and_references_are_held(database: HubDatabase) -> None:
    tokens = [access_tokens.create(database, account, "write") for account in ("alice", "bob")]
    assert [(token.account, token.role) for token in access_tokens.list_tokens(database)] == [
        ("alice", "write"),
        ("bob", "write"),
    ]
    for token, account in zip(tokens, ("alice", "bob"), strict=True):
        identity = access_tokens.identify(database, token)
        assert identity
        assert identity.account == account
    with pytest.raises(ConstraintError):
        database.execute("UPDATE tokens SET account = 'nobody'")


def test_who_is_admitted_enters_as_one_account_and_leaves(database: HubDatabase) -> None:
    rule = admissions.add(database, "https://login.example", {"groups": "ml"}, namespace="team", role="write")
    id_token = IdToken("https://login.example", {"sub": "1", "preferred_username": "ada", "groups": ["ml"]}, "", 0.0)
    assert [admissions.admit(database, id_token, ("bob",)) for _ in range(2)] == ["ada", "ada"]
    session = sessions.sign_in(database, "ada")
    identity = sessions.session_identity(database, session)
    assert identity
    assert (identity.role_in("team"), identity.role_in("other")) == ("write", "")
    accounts.add(database, "root")
    admissions.link(database, "root", "https://login.example", "1")
    admissions.remove(database, rule)
    assert admissions.admit(database, id_token, ()) == "root"
    assert accounts.roles(database, "ada") == {"ada": "admin"}
    sessions.end(database, session)
    assert (sessions.session_identity(database, session), access_tokens.list_tokens(database)) == (None, [])


def test_who_is_no_longer_admitted_loses_the_tokens_made_meanwhile_and_who_is_disabled_does_not_sign_in(
    database: HubDatabase,
) -> None:
    rule = admissions.add(database, "https://login.example", {"groups": "ml"}, namespace="team", role="write")
    id_token = IdToken("https://login.example", {"sub": "1", "preferred_username": "ada", "groups": ["ml"]}, "", 0.0)
    admissions.admit(database, id_token, ())
    session = access_tokens.identify_by_id(database, access_tokens.issue(database, "ada", "admin", kind="browser")[1])
    secret, _ = own_tokens.create_token(database, session, own_tokens.TokenOptions("laptop", "write", ("team",)))
    accounts.set_disabled(database, "ada", disabled=True)
    assert access_tokens.identify(database, secret) is None
    with pytest.raises(RefusedError, match="this account was disabled"):
        admissions.admit(database, id_token, ())
    accounts.set_disabled(database, "ada", disabled=False)
    assert access_tokens.identify(database, secret)
    admissions.remove(database, rule)
    with pytest.raises(RefusedError, match="no rule of this hub admits you"):
        admissions.admit(database, id_token, ())
    assert access_tokens.identify(database, secret) is None


def test_texts_compare_by_their_bytes(database: HubDatabase) -> None:
    names = ["B/x", "a-b/x", "a.b/x", "a/x", "a0/x", "é/x"]
    database.execute_many(UPSERT, [(name, "a", 1.0) for name in names[::-1]])
    assert [name for (name,) in database.select("SELECT name FROM uploaded ORDER BY name")] == names
    assert database.select("SELECT name FROM uploaded WHERE name >= ? AND name < ?", "a/", "a0") == [("a/x",)]


def test_no_text_that_a_client_can_send_is_an_error(database: HubDatabase) -> None:
    assert access_tokens.identify(database, "hf_\0\x7f%s?'") is None
    assert database.select("SELECT 1 FROM uploaded WHERE name = ?", "a\0b") == []


def test_statements_are_in_words_that_both_databases_know() -> None:
    folder = Path(module.__file__).parent
    for path in folder.rglob("*.py"):
        assert "INSERT OR " not in path.read_text().replace("`INSERT OR …`", ""), path


def test_statements_name_their_columns_so_that_a_process_can_go_on_while_a_newer_one_adds_some() -> None:
    insert = re.compile(r"INSERT INTO (\w+) (?!\()")
    folder = Path(module.__file__).parent
    violations = {f"{path.name}: {match[0]}" for path in folder.rglob("*.py") for match in insert.finditer(path.read_text())}
    assert violations == set()


def columns_at(version: int) -> dict[str, dict[str, str]]:
    """The type of each column of each table, in a database of that version."""
    with closing(sqlite3.connect(":memory:")) as scratch:
        for script in module.MIGRATIONS[:version]:
            scratch.executescript(script)
        names = [name for (name,) in scratch.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")]
        return {
            name: {column: kind for _, column, kind, *_ in scratch.execute(f"PRAGMA table_info({name})")}
            for name in names
            if not name.startswith("sqlite_")
        }


def row_of(table: str, columns: dict[str, str], number: int) -> list[object]:
    """A row that differs from those of other numbers, and whose references lead to the rows of that number."""
    values: dict[str, object] = {"TEXT": f"text-{number}", "INTEGER": number, "REAL": number + 0.5, "BLOB": bytes([number, 0])}
    return [values[kind] for kind in columns.values()]


def insert_rows(database: HubDatabase, tables: dict[str, dict[str, str]], number: int) -> None:
    """Insert one row into each table, as a process does that knows these tables and columns."""
    for table, columns in tables.items():
        marks = ", ".join("?" * len(columns))
        database.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", *row_of(table, columns, number))


@pytest.mark.parametrize("version", range(1, len(module.MIGRATIONS)))
def test_a_database_of_each_earlier_version_is_upgraded_while_a_process_of_that_version_goes_on(
    version: int, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, tables = columns_at(version), columns_at(len(module.MIGRATIONS))
    later = "".join(module.MIGRATIONS[version:])
    emptied = {table for table in earlier if f"DELETE FROM {table}" in later}
    with ExitStack() as processes:
        with monkeypatch.context() as older:
            for place in ("hub.hub_database", "hub.storage.postgres"):
                older.setattr(f"adapterhub.{place}.MIGRATIONS", module.MIGRATIONS[:version])
            old = processes.enter_context(closing(opener()))
        insert_rows(old, earlier, 1)
        new = processes.enter_context(closing(opener()))
        for table, columns in earlier.items():
            rows = [] if table in emptied else [tuple(row_of(table, columns, 1))]
            assert new.select(f"SELECT {', '.join(columns)} FROM {table}") == rows, table
        # Both write and read the same tables from now on.
        insert_rows(old, earlier, 2)
        insert_rows(new, tables, 3)
        for table, columns in earlier.items():
            rows = [tuple(row_of(table, columns, number)) for number in (1, 2, 3)][table in emptied :]
            for process in (old, new):
                assert sorted(process.select(f"SELECT {', '.join(columns)} FROM {table}")) == rows, table


def test_a_version_before_the_first_is_an_empty_database_and_a_later_one_is_refused(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(opener()):
        pass
    for place in ("hub.hub_database", "hub.storage.postgres"):
        monkeypatch.setattr(f"adapterhub.{place}.MIGRATIONS", module.MIGRATIONS[:-1])
    with pytest.raises(RefusedError, match="a newer adapterhub made it") as error:
        opener()
    assert error.value.code == "newer-store"
