"""The audit log: who changed what and who was refused, each row with a hash over itself and the previous hash.

A row changed, removed or inserted later breaks the chain at that point. Rows cut off at the end do not: a checkpoint
(`operations.audit`) records the newest row elsewhere.

The log is bounded: of MAX_ROWS rows, the older half is removed. A cut remains of it: the number and the hash of its
last row, signed with the hub's secret, from which the chain goes on. Backups have the rows before it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from typing import Any

from adapterhub.hub.hub_database import HubDatabase, hub_secret
from adapterhub.sqlite_file import SqliteFile, of_one_snapshot
from adapterhub.store.log_chain import CHANGED, REMOVED, TRUNCATED, Fault
from adapterhub_converters.lazy_dataclass import dataclass

_COLUMNS = "id, time, account, token, action, name, detail, address, hash"
_START = "0" * 64
_MAX_TEXT = 500  # bytes of a text
MAX_ROWS = 200_000
"""Rows of the log; a thousand more may be there for a moment."""
_CUT_INTERVAL = 1000  # rows between two looks at their number


@dataclass(frozen=True, slots=True)
class Event:
    """A row: action, name, detail, account, first characters of the token, and address.

    `id`, `time` (seconds since the epoch) and `hash` are set when it is recorded.
    """

    action: str
    name: str = ""
    detail: str = ""
    account: str = ""
    token: str = ""
    address: str = ""
    id: int = 0
    time: float = 0.0
    hash: str = ""


def record(database: HubDatabase, event: Event) -> None:
    """Add a row."""
    texts = (event.account, event.token, event.action, event.name, event.detail, event.address)
    stored_texts = tuple(text.encode("utf-8", "replace")[:_MAX_TEXT].decode("utf-8", "ignore") for text in texts)
    # Read the newest hash and add the next row in one step: the chain must not fork.
    with database.transaction():
        rows = database.select("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1")
        cut = newest_cut(database)
        last, previous_hash = rows[0] if rows else (cut.last, cut.hash)
        ident = last + 1
        values = (ident, round(time.time(), 3), *stored_texts)
        database.execute(
            f"INSERT INTO audit ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - our own columns
            *values,
            _hash(previous_hash, values),
        )
        if ident % _CUT_INTERVAL == 0 and ident - cut.last > MAX_ROWS:
            _cut(database, ident - MAX_ROWS // 2)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the log begins: the number and the hash of the last row that was removed, and when; 0 if none was."""

    last: int = 0
    hash: str = _START
    time: float = 0.0
    mac: str = ""

    def mac_by(self, secret: bytes) -> str:
        """Return the signature by the hub's secret."""
        message = json.dumps(["audit cut", self.last, self.hash, self.time]).encode()
        return hmac.new(secret, message, hashlib.sha256).hexdigest()


def newest_cut(database: SqliteFile) -> Cut:
    """Return where the log begins."""
    rows = database.select("SELECT last, hash, time, mac FROM audit_cuts ORDER BY last DESC LIMIT 1")
    return Cut(*rows[0]) if rows else Cut()


def _cut(database: HubDatabase, last: int) -> None:
    """Remove the rows up to a number, in a transaction."""
    ((row_hash,),) = database.select("SELECT hash FROM audit WHERE id = ?", last)
    cut = Cut(last, row_hash, round(time.time(), 3))
    values = (cut.last, cut.hash, cut.time, cut.mac_by(hub_secret(database)))
    database.execute("DELETE FROM audit_cuts")
    database.execute("INSERT INTO audit_cuts (last, hash, time, mac) VALUES (?, ?, ?, ?)", *values)
    database.execute("DELETE FROM audit WHERE id <= ?", last)


def _hash(previous_hash: str, values: tuple[Any, ...]) -> str:
    # The hub only writes JSON types. For any other type, written by somebody else, no hash is right.
    return hashlib.sha256((previous_hash + json.dumps(values, separators=(",", ":"), default=repr)).encode()).hexdigest()


def events(database: HubDatabase, *, name: str = "", account: str = "", before: int = 0, limit: int = 100) -> list[Event]:
    """Return the newest rows, filtered by name (or namespace) and by account, and before a row, if these are given."""
    sql = (
        f"SELECT {_COLUMNS} FROM audit WHERE (? = '' OR name = ? OR substr(name, 1, length(?) + 1) = ? || '/')"  # noqa: S608 - ours
        " AND (? = '' OR account = ?) AND id < ? ORDER BY id DESC LIMIT ?"
    )
    last = before or 1 << 60
    return [_event(row) for row in database.select(sql, name, name, name, name, account, account, last, limit)]


def _event(row: tuple[Any, ...]) -> Event:
    ident, time, account, token, action, name, detail, address, row_hash = row
    return Event(action, name, detail, account, token, address, ident, time, row_hash)


@of_one_snapshot
def verify_chain(
    database: SqliteFile, checkpoint: tuple[int, str] | None = None
) -> tuple[tuple[int, str] | None, Fault | None]:
    """Verify that each row follows from the previous one, and that a row recorded in a checkpoint is unchanged.

    The first row must follow from the cut of the log, which the hub has signed.

    Args:
        database: The hub's database.
        checkpoint: The number and hash of a row that was the newest at some time.

    Returns:
        The number and hash of the newest row, None if there are no rows; and the first broken row, None if all are intact.
    """

    def fault(kind: str, problem: str) -> Fault:
        return Fault(f"audit row {number}", kind, problem)

    cut = newest_cut(database) if database.has_table("audit_cuts") else Cut()
    newest, previous_hash, number = None, cut.hash, cut.last + 1
    if broken_cut := _cut_fault(database, cut, checkpoint):
        return None, broken_cut
    recorded = database.has_table("audit")  # the first versions of hub.db had no audit log
    sql = f"SELECT {_COLUMNS} FROM audit WHERE id >= ? ORDER BY id LIMIT 1000"  # noqa: S608 - ours
    while recorded and (rows := database.select(sql, number)):
        for *values, row_hash in rows:
            if values[0] != number:
                return newest, fault(REMOVED, "is missing, and later rows are there")
            if _hash(previous_hash, tuple(values)) != row_hash:
                return newest, fault(CHANGED, "does not follow from the one before it")
            if checkpoint and checkpoint[0] == number and checkpoint[1] != row_hash:
                return newest, fault(CHANGED, "is not the row that the checkpoint has, or follows other rows")
            newest, previous_hash, number = (number, row_hash), row_hash, number + 1
    if checkpoint and checkpoint[0] >= number:
        return newest, fault(TRUNCATED, f"is missing, and the checkpoint has {checkpoint[0]} rows")
    return newest, None


def _cut_fault(database: SqliteFile, cut: Cut, checkpoint: tuple[int, str] | None) -> Fault | None:
    """Return why the log cannot be verified from its cut on; None if it can."""
    secret = database.select("SELECT value FROM secrets WHERE name = 'uploads'") if cut.last else []
    if cut.last and not (secret and hmac.compare_digest(cut.mac, cut.mac_by(bytes(secret[0][0])))):
        return Fault(f"audit row {cut.last}", CHANGED, "is not the one at which the hub cut its log")
    if checkpoint and checkpoint[0] <= cut.last and checkpoint != (cut.last, cut.hash):
        day = time.strftime("%Y-%m-%d", time.gmtime(cut.time))
        problem = f"is older than the rows that the hub keeps, since it cut its log on {day}"
        return Fault(f"audit row {checkpoint[0]}", TRUNCATED, f"{problem}: use a newer checkpoint, or verify a backup")
    return None
