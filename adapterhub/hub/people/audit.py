"""The audit log: who changed what, and who was refused, each row with a hash over itself and the hash before it.

A row that was changed, removed or inserted breaks the chain at that place. Rows cut off at the end do not: a checkpoint
(`adapterhub.auditing`) notes the newest row elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from adapterhub.hub.database import HubDatabase
from adapterhub.store.chain import CHANGED, REMOVED, TRUNCATED, Fault

_COLUMNS = "id, time, account, token, action, name, detail, address, hash"
_START = "0" * 64
_MAX = 500  # characters of a text


@dataclass(frozen=True, slots=True)
class Event:
    """A row: what was done, to what, by which account, by the token with which first characters, from where.

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
    kept = tuple(text.encode("utf-8", "replace").decode()[:_MAX] for text in texts)
    with database.transaction():
        rows = database.select("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1")
        ident, before = (rows[0][0] + 1, rows[0][1]) if rows else (1, _START)
        values = (ident, round(time.time(), 3), *kept)
        database.execute(f"INSERT INTO audit ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", *values, _hash(before, values))  # noqa: S608 - ours


def _hash(before: str, values: tuple[Any, ...]) -> str:
    # Of a type that JSON has not, only somebody else wrote a value, and no hash of it is right.
    return hashlib.sha256((before + json.dumps(values, separators=(",", ":"), default=repr)).encode()).hexdigest()


def events(database: HubDatabase, *, name: str = "", account: str = "", limit: int = 100) -> list[Event]:
    """Return the newest rows, those of a name (or of a namespace) and of an account if these are given."""
    sql = (
        f"SELECT {_COLUMNS} FROM audit WHERE (? = '' OR name = ? OR substr(name, 1, length(?) + 1) = ? || '/')"  # noqa: S608 - ours
        " AND (? = '' OR account = ?) ORDER BY id DESC LIMIT ?"
    )
    return [_event(row) for row in database.select(sql, name, name, name, name, account, account, limit)]


def _event(row: tuple[Any, ...]) -> Event:
    ident, moment, account, token, action, name, detail, address, found = row
    return Event(action, name, detail, account, token, address, ident, moment, found)


def follow(database: HubDatabase, noted: tuple[int, str] | None = None) -> tuple[tuple[int, str] | None, Fault | None]:
    """Read all rows, each of which must follow from the one before it, and pass one that was noted before.

    Args:
        database: The hub's.
        noted: The number and the hash of a row that was the newest once.

    Returns:
        The number and the hash of the newest row, None without any; and the first row that is not as it was written, None if
        all are.
    """

    def fault(kind: str, what: str) -> Fault:
        return Fault(f"audit row {following}", kind, what)

    newest, before, following = None, _START, 1
    recorded = database.has_table("audit")  # hub.db had none in its first versions
    sql = f"SELECT {_COLUMNS} FROM audit WHERE id >= ? ORDER BY id LIMIT 1000"  # noqa: S608 - ours
    while recorded and (rows := database.select(sql, following)):
        for *values, found in rows:
            if values[0] != following:
                return newest, fault(REMOVED, "is missing, and later rows are there")
            if _hash(before, tuple(values)) != found:
                return newest, fault(CHANGED, "does not follow from the one before it")
            if noted and noted[0] == following and noted[1] != found:
                return newest, fault(CHANGED, "is not the row that the checkpoint has, or follows other rows")
            newest, before, following = (following, found), found, following + 1
    if noted and noted[0] >= following:
        return newest, fault(TRUNCATED, f"is missing, and the checkpoint has {noted[0]} rows")
    return newest, None
