"""The audit log is bounded: the hub cuts its older half, signs where, and the chain goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.hub.accounts import audit_log
from adapterhub.hub.accounts.audit_log import Event
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.trust import keys

MAX_ROWS, INTERVAL = 40, 10


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDatabase]:
    """The tables of a hub, with a log of at most 40 rows, of which 95 were recorded."""
    monkeypatch.setattr(audit_log, "MAX_ROWS", MAX_ROWS)
    monkeypatch.setattr(audit_log, "_CUT_INTERVAL", INTERVAL)
    ah.Registry(tmp_path / "r").close()
    with closing(HubDatabase(tmp_path / "r")) as database:
        record(database, 95)
        yield database


def record(database: HubDatabase, count: int) -> None:
    for number in range(count):
        audit_log.record(database, Event("push", f"team/{number}"))


def fault(database: HubDatabase, checkpoint: tuple[int, str] | None = None) -> tuple[str, str] | None:
    broken = audit_log.verify_chain(database, checkpoint)[1]
    return (broken.where, broken.kind) if broken else None


def test_the_log_has_a_bound_and_is_verified_across_its_cuts(database: HubDatabase) -> None:
    for _ in range(5):
        record(database, 33)
        newest, broken = audit_log.verify_chain(database)
        ((count, last),) = database.select("SELECT count(*), max(id) FROM audit")
        assert broken is None
        assert newest is not None
        assert newest[0] == last
        assert count <= MAX_ROWS + INTERVAL
    assert last == 95 + 5 * 33
    assert database.select("SELECT count(*) FROM audit_cuts") == [(1,)]


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("UPDATE audit_cuts SET hash = 'changed'", "changed"),
        ("UPDATE audit_cuts SET last = last + 1, hash = (SELECT hash FROM audit WHERE id = last + 1)", "changed"),
        ("UPDATE audit_cuts SET time = time + 1", "changed"),
        ("DELETE FROM secrets", "changed"),
        ("DELETE FROM audit_cuts", "removed"),
        ("DELETE FROM audit WHERE id = (SELECT min(id) FROM audit)", "removed"),
        ("UPDATE audit SET name = 'team/x' WHERE id = (SELECT min(id) FROM audit)", "changed"),
    ],
)
def test_a_cut_that_the_hub_has_not_made_is_a_fault(database: HubDatabase, statement: str, kind: str) -> None:
    assert fault(database) is None
    database.execute(statement)
    chain_fault = fault(database)
    assert chain_fault is not None
    assert chain_fault[1] == kind


def test_a_checkpoint_holds_across_cuts_until_its_row_is_cut(database: HubDatabase, tmp_path: Path) -> None:
    keys.generate(tmp_path / "audit", keys.ED25519)
    signed = ah.sign_checkpoint(tmp_path / "r", tmp_path / "ends.json", tmp_path / "audit.key")
    assert signed.rows == 95
    checkpoint: dict[str, Any] = {"checkpoint": tmp_path / "ends.json", "keys": [tmp_path / "audit.pub"]}
    record(database, 20)
    assert ah.audit(tmp_path / "r", **checkpoint).ok
    record(database, 60)
    assert ah.audit(tmp_path / "r").ok
    (chain_fault,) = ah.audit(tmp_path / "r", **checkpoint).faults
    assert (chain_fault.where, chain_fault.kind) == ("hub.db: audit row 95", "truncated")
    assert "is older than the rows that the hub keeps" in chain_fault.what


def test_a_checkpoint_of_the_last_row_that_was_cut_is_that_of_the_cut(database: HubDatabase) -> None:
    cut = audit_log.newest_cut(database)
    assert cut.last
    assert fault(database, (cut.last, cut.hash)) is None
    assert fault(database, (cut.last, "0" * 64)) == (f"audit row {cut.last}", "truncated")


def test_a_log_whose_rows_are_all_gone_goes_on_after_its_cut(database: HubDatabase) -> None:
    cut = audit_log.newest_cut(database)
    database.execute("DELETE FROM audit")
    record(database, 1)
    assert database.select("SELECT id FROM audit") == [(cut.last + 1,)]
    assert fault(database) is None


def test_a_row_has_a_bound_whatever_a_client_writes(database: HubDatabase) -> None:
    audit_log.record(database, Event("push", "🦊" * 10_000, "é" * 10_000))
    (event,) = audit_log.events(database, limit=1)
    assert (len(event.name.encode()), len(event.detail.encode())) == (500, 500)
    assert fault(database) is None
