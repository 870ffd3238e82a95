"""The tables of a hub, whatever keeps them: these tests run over hub.db, and in `tests/peers` over PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.hub import hub_database as module
from adapterhub.hub.administration import own_tokens
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.people import access_tokens, accounts, admissions, sessions
from adapterhub.hub.people.id_tokens import IdToken
from adapterhub.sqlite_file import ConstraintError
from adapterhub_converters.errors import RefusedError

UPSERT = "INSERT INTO uploaded VALUES (?, ?, ?) ON CONFLICT (name, digest) DO UPDATE SET time = excluded.time"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[HubDatabase]:
    """An empty database."""
    with closing(HubDatabase(tmp_path)) as found:
        yield found


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
    made = [access_tokens.create(database, account, "write") for account in ("alice", "bob")]
    assert [(token.account, token.role) for token in access_tokens.list_tokens(database)] == [
        ("alice", "write"),
        ("bob", "write"),
    ]
    for token, account in zip(made, ("alice", "bob"), strict=True):
        found = access_tokens.identify(database, token)
        assert found
        assert found.account == account
    with pytest.raises(ConstraintError):
        database.execute("UPDATE tokens SET account = 'nobody'")


def test_who_is_admitted_enters_as_one_account_and_leaves(database: HubDatabase) -> None:
    rule = admissions.add(database, "https://login.example", {"groups": "ml"}, namespace="team", role="write")
    who = IdToken("https://login.example", {"sub": "1", "preferred_username": "ada", "groups": ["ml"]}, "", 0.0)
    assert [admissions.admit(database, who, ("bob",)) for _ in range(2)] == ["ada", "ada"]
    session = sessions.sign_in(database, "ada")
    found = sessions.session_identity(database, session)
    assert found
    assert (found.role_in("team"), found.role_in("other")) == ("write", "")
    accounts.add(database, "root")
    admissions.link(database, "root", "https://login.example", "1")
    admissions.remove(database, rule)
    assert admissions.admit(database, who, ()) == "root"
    assert accounts.roles(database, "ada") == {"ada": "admin"}
    sessions.end(database, session)
    assert (sessions.session_identity(database, session), access_tokens.list_tokens(database)) == (None, [])


def test_who_is_no_longer_admitted_loses_the_tokens_made_meanwhile_and_who_is_disabled_does_not_sign_in(
    database: HubDatabase,
) -> None:
    rule = admissions.add(database, "https://login.example", {"groups": "ml"}, namespace="team", role="write")
    who = IdToken("https://login.example", {"sub": "1", "preferred_username": "ada", "groups": ["ml"]}, "", 0.0)
    admissions.admit(database, who, ())
    session = access_tokens.identify_by_id(database, access_tokens.issue(database, "ada", "admin", kind="browser")[1])
    secret, _ = own_tokens.create_token(database, session, own_tokens.TokenOptions("laptop", "write", ("team",)))
    accounts.set_disabled(database, "ada", disabled=True)
    assert access_tokens.identify(database, secret) is None
    with pytest.raises(RefusedError, match="this account was disabled"):
        admissions.admit(database, who, ())
    accounts.set_disabled(database, "ada", disabled=False)
    assert access_tokens.identify(database, secret)
    admissions.remove(database, rule)
    with pytest.raises(RefusedError, match="no rule of this hub admits you"):
        admissions.admit(database, who, ())
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
