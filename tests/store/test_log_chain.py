"""Logs are chains: what was changed, removed, moved or cut off is named, and what was not is not."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.hub.accounts import audit_log as rows
from adapterhub.hub.hub_database import MIGRATIONS, HubDatabase
from adapterhub.trust import keys
from adapterhub_converters.errors import AdapterhubError
from tests.support.adapters import write_adapter


def write_logs(place: Path) -> Path:
    """Make a registry with two names, one of four entries, a hub's audit log of four rows, keys, and a checkpoint of three."""
    keys.generate(place / "audit", keys.ED25519)
    with ah.Registry(place / "r") as registry:
        for seed in (1, 2):
            registry.push(write_adapter(place / f"a{seed}", seed), "team/sql")
        registry.push(place / "a1", "team/other")
        registry.tag("team/sql:v1", "prod")
        database = HubDatabase(place / "r")
        for number in range(3):
            rows.record(database, rows.Event("push", f"team/{number}"))
        ah.sign_checkpoint(place / "r", place / "checkpoint.json", place / "audit.key")
        registry.tag("team/sql:v2", "prod")
        rows.record(database, rows.Event("push", "team/3"))
        database.close()
    return place


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_logs(tmp_path_factory.mktemp("logged"))


@pytest.fixture
def copy(logged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(logged, tmp_path / "copy"))


def entry(place: Path, seq: int, name: str = "team/sql") -> Path:
    return place / "r/.adapterhub/refs" / name / f"{seq:08}.json"


def faults(place: Path, *, checkpoint: bool = True) -> list[tuple[str, str]]:
    noted = {"checkpoint": place / "checkpoint.json", "keys": [place / "audit.pub"]} if checkpoint else {}
    return [(Path(fault.where).name, fault.kind) for fault in ah.audit(place / "r", **noted).faults]  # type: ignore[arg-type]


def test_logs_that_went_on_after_a_checkpoint_are_whole(copy: Path) -> None:
    audit = ah.audit(copy / "r", checkpoint=copy / "checkpoint.json", keys=[copy / "audit.pub"])
    assert (audit.ok, audit.names, audit.entries, audit.rows) == (True, 2, 5, 4)
    assert audit.checkpoint is not None
    assert audit.checkpoint.ends["refs"]["team/sql"][0] == 3
    assert audit.checkpoint.audit is not None
    assert audit.checkpoint.audit[0] == 3


def test_registry_db_is_not_needed_and_nothing_is_written(copy: Path) -> None:
    for path in (copy / "r").glob("registry.db*"):
        path.unlink()
    before = sorted((copy / "r").rglob("*"))
    assert ah.audit(copy / "r").ok
    assert sorted((copy / "r").rglob("*")) == before


def changed(path: Path) -> None:
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps({**document, "time": "2020-01-01T00:00:00Z"}))


def rewritten(place: Path) -> None:
    """The log of a name from its second entry on, written anew with right digests."""
    from adapterhub.digest import sha256_bytes

    before = ""
    for seq in range(1, 5):
        document = json.loads(entry(place, seq).read_bytes())
        document |= {"previous": before, **({"time": "2020-01-01T00:00:00Z"} if seq > 1 else {})}
        raw = json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        entry(place, seq).write_bytes(raw)
        before = sha256_bytes(raw)


def swapped(place: Path) -> None:
    first, second = entry(place, 2), entry(place, 3)
    spare = first.with_suffix(".x")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


# What is done, the fault with a checkpoint of three entries, and without.
DONE: dict[str, tuple[Callable[[Path], object], list[tuple[str, str]], list[tuple[str, str]]]] = {
    "first-changed": (lambda p: changed(entry(p, 1)), [("00000001.json", "changed")], [("00000001.json", "changed")]),
    "middle-changed": (lambda p: changed(entry(p, 2)), [("00000002.json", "changed")], [("00000002.json", "changed")]),
    "noted-end-changed": (lambda p: changed(entry(p, 3)), [("00000003.json", "changed")], [("00000003.json", "changed")]),
    "rewritten": (rewritten, [("00000003.json", "changed")], []),
    "middle-removed": (lambda p: entry(p, 2).unlink(), [("00000002.json", "removed")], [("00000002.json", "removed")]),
    "first-removed": (lambda p: entry(p, 1).unlink(), [("00000001.json", "removed")], [("00000001.json", "removed")]),
    "cut-behind-the-checkpoint": (lambda p: entry(p, 4).unlink(), [], []),
    "cut-before-the-checkpoint": (
        lambda p: [entry(p, seq).unlink() for seq in (3, 4)], [("00000003.json", "truncated")], []
    ),
    "name-removed": (lambda p: shutil.rmtree(entry(p, 1, "team/other").parent), [("00000001.json", "truncated")], []),
    "reordered": (swapped, [("00000002.json", "reordered")], [("00000002.json", "reordered")]),
    "of-another-name": (
        lambda p: shutil.copy(entry(p, 1, "team/other"), entry(p, 1)),
        [("00000001.json", "reordered")], [("00000001.json", "reordered")],
    ),
    "no-entry": (lambda p: entry(p, 2).write_text("{"), [("00000002.json", "unreadable")], [("00000002.json", "unreadable")]),
}  # fmt: skip


@pytest.mark.parametrize("tampering", DONE)
def test_the_first_bad_entry_is_named(copy: Path, tampering: str) -> None:
    act, noted, alone = DONE[tampering]
    act(copy)
    assert faults(copy) == noted
    assert faults(copy, checkpoint=False) == alone


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE audit SET name = 'x' WHERE id = 2", ("hub.db: audit row 2", "changed")),
        ("DELETE FROM audit WHERE id = 2", ("hub.db: audit row 2", "removed")),
        ("DELETE FROM audit WHERE id >= 3", ("hub.db: audit row 3", "truncated")),
        ("DELETE FROM audit", ("hub.db: audit row 1", "truncated")),
    ],
)
def test_the_first_bad_row_of_a_hub_is_named(copy: Path, statement: str, fault: tuple[str, str]) -> None:
    database = HubDatabase(copy / "r")
    database.execute(statement)
    database.close()
    assert faults(copy) == [fault]


def test_a_row_of_another_type_than_the_hub_writes_is_one_that_was_changed(copy: Path) -> None:
    with closing(sqlite3.connect(copy / "r/hub.db")) as database:
        database.execute("ALTER TABLE audit RENAME TO strict")
        database.execute("CREATE TABLE audit AS SELECT * FROM strict")
        database.execute("UPDATE audit SET name = x'00' WHERE id = 2")
        database.commit()
    assert faults(copy) == [("hub.db: audit row 2", "changed")]


def test_rows_of_a_hub_that_were_written_anew_are_not_those_of_the_checkpoint(copy: Path) -> None:
    database = HubDatabase(copy / "r")
    database.execute("DELETE FROM audit WHERE id >= 2")
    for number in range(3):
        rows.record(database, rows.Event("pull", f"team/{number}"))
    database.close()
    assert faults(copy, checkpoint=False) == []
    assert faults(copy) == [("hub.db: audit row 3", "changed")]


def test_a_hub_whose_database_is_gone_is_a_fault(copy: Path) -> None:
    for path in (copy / "r").glob("hub.db*"):
        path.unlink()
    assert faults(copy) == [("hub.db", "removed")]


# ---- hub.db is only read


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def at_version(place: Path, version: int) -> None:
    """Have hub.db be as an earlier adapterhub made it."""
    (place / "r/hub.db").unlink()
    with closing(sqlite3.connect(place / "r/hub.db")) as database:
        database.execute("PRAGMA journal_mode = WAL")
        for script in MIGRATIONS[:version]:
            database.executescript(script)
        database.execute(f"PRAGMA user_version = {version}")


@pytest.mark.parametrize("version", [0, 6, 7])
def test_an_audit_leaves_an_old_hub_db_as_it_is(copy: Path, version: int) -> None:
    at_version(copy, version)
    before = files_in(copy / "r")
    assert ah.audit(copy / "r").ok
    assert faults(copy) == [("hub.db: audit row 1", "truncated")]
    assert files_in(copy / "r") == before


def test_an_audit_of_a_copy_that_nobody_may_write_to_changes_nothing(copy: Path) -> None:
    for path in (copy / "r", copy / "r/hub.db"):
        path.chmod(path.stat().st_mode & 0o555)
    before = files_in(copy / "r")
    assert faults(copy) == []
    assert files_in(copy / "r") == before
    (copy / "r").chmod(0o755)


def test_rows_that_a_copied_log_of_writes_has_are_read_and_it_stays_as_it_is(copy: Path, tmp_path: Path) -> None:
    database = HubDatabase(copy / "r")
    rows.record(database, rows.Event("push", "team/late"))
    shutil.copytree(copy / "r", tmp_path / "other", ignore=shutil.ignore_patterns("*-shm"))
    before = files_in(tmp_path / "other")
    assert "hub.db-wal" in before
    assert ah.audit(tmp_path / "other").rows == 5
    assert files_in(tmp_path / "other") == before
    assert ah.audit(copy / "r").rows == 5  # while it is open
    rows.record(database, rows.Event("push", "team/later"))
    database.close()


def test_a_hub_db_that_is_a_link_or_none_is_refused(copy: Path) -> None:
    (copy / "r/hub.db").rename(copy / "hub.db")
    (copy / "r/hub.db").symlink_to(copy / "hub.db")
    with pytest.raises(AdapterhubError, match="is no regular file"):
        ah.audit(copy / "r")
    (copy / "r/hub.db").unlink()
    (copy / "r/hub.db").write_text("not a database, but long enough to be read as the head of one, which it is not" * 9)
    with pytest.raises(AdapterhubError, match="file is not a database"):
        ah.audit(copy / "r")


def test_a_view_in_place_of_the_rows_is_not_read(copy: Path) -> None:
    with closing(sqlite3.connect(copy / "r/hub.db")) as database:
        database.execute("DROP TABLE audit")
        endless = (
            "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT id, 1, '', '', '', '', '', '', '' FROM n"
        )
        database.execute(f"CREATE VIEW audit (id, time, account, token, action, name, detail, address, hash) AS {endless}")
    assert faults(copy) == [("hub.db: audit row 1", "truncated")]
