"""The audit log: who changed what and who was refused, each row with a hash over itself and the previous hash.

A row changed, removed or inserted later breaks the chain at that point. Rows cut off at the end do not: a checkpoint
(`operations.audit`) records the newest row elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.sqlite_file import SqliteFile, of_one_snapshot
from adapterhub.store.log_chain import CHANGED, REMOVED, TRUNCATED, Fault

_COLUMNS = "id, time, account, token, action, name, detail, address, hash"
_START = "0" * 64
_MAX_TEXT = 500  # characters of a text


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
    stored_texts = tuple(text.encode("utf-8", "replace").decode()[:_MAX_TEXT] for text in texts)
    # Read the newest hash and add the next row in one step: the chain must not fork.
    with database.transaction():
        rows = database.select("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1")
        ident, previous_hash = (rows[0][0] + 1, rows[0][1]) if rows else (1, _START)
        values = (ident, round(time.time(), 3), *stored_texts)
        database.execute(
            f"INSERT INTO audit ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - our own columns
            *values,
            _hash(previous_hash, values),
        )


def _hash(previous_hash: str, values: tuple[Any, ...]) -> str:
    # The hub only writes JSON types. For any other type, written by somebody else, no hash is right.
    return hashlib.sha256((previous_hash + json.dumps(values, separators=(",", ":"), default=repr)).encode()).hexdigest()


def events(database: HubDatabase, *, name: str = "", account: str = "", limit: int = 100) -> list[Event]:
    """Return the newest rows, filtered by name (or namespace) and by account if these are given."""
    sql = (
        f"SELECT {_COLUMNS} FROM audit WHERE (? = '' OR name = ? OR substr(name, 1, length(?) + 1) = ? || '/')"  # noqa: S608 - ours
        " AND (? = '' OR account = ?) ORDER BY id DESC LIMIT ?"
    )
    return [_event(row) for row in database.select(sql, name, name, name, name, account, account, limit)]


def _event(row: tuple[Any, ...]) -> Event:
    ident, time, account, token, action, name, detail, address, row_hash = row
    return Event(action, name, detail, account, token, address, ident, time, row_hash)


@of_one_snapshot
def verify_chain(
    database: SqliteFile, checkpoint: tuple[int, str] | None = None
) -> tuple[tuple[int, str] | None, Fault | None]:
    """Verify that each row follows from the previous one, and that a row recorded in a checkpoint is unchanged.

    Args:
        database: The hub's database.
        noted: The number and hash of a row that was the newest at some time.

    Returns:
        The number and hash of the newest row, None if there are no rows; and the first broken row, None if all are intact.
    """

    def fault(kind: str, problem: str) -> Fault:
        return Fault(f"audit row {number}", kind, problem)

    newest, previous_hash, number = None, _START, 1
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
