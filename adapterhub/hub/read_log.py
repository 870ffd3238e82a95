"""Who read which digest of a name: the log of reads, one row for a day, an account and a protocol, with a count.

Every read of a private or gated name is logged, and the first one of a minute before its bytes are sent; of other names, one in
SAMPLE. What is counted within seconds is written together. The rows are no part of the audit log and its chain, so that readers
cannot push changes out of it; of too many, the oldest are removed, and none of a namespace that has few. Of a client without an
account, only the network is kept: it says where reads came from, and the admins of a namespace are not to learn who a stranger
is.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Collection

from adapterhub.digest import Digest
from adapterhub.http_server.request_bodies import shared_network
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import request_context
from .hub_database import HubDatabase

SAMPLE = 20
"""Reads of names that everybody may read, of which one is logged."""
MAX_ROWS = 200_000
"""Rows that are kept."""
_INTERVAL = 5.0  # seconds between two writes
_MAX_DIGITS = 20  # of a time
_FRESH = 60.0  # seconds in which a further read of the same kind is counted later
_MAX_PENDING = 10_000  # kinds of reads in memory
_KEY_COLUMNS = ("name", "day", "digest", "account", "protocol")  # in the order of the rows of one time
_Key = tuple[str, str, str, str, str]
_Reads = tuple[str, int, float]  # the address of the last one, their count, and the time of the last one


@dataclass(frozen=True, slots=True)
class Read:
    """Reads of a digest on a day (YYYY-MM-DD, UTC); `address` and `time`, in seconds since the epoch, are of the last one.

    `account` is empty for clients without one, whose `address` is a network. `digest` is that of a version, or of a blob that
    was asked for by its digest.
    """

    day: str
    name: str
    digest: str
    account: str
    protocol: str
    address: str
    count: int
    time: float


class ReadLog:
    """The log of reads of a hub."""

    def __init__(self, database: HubDatabase) -> None:
        self._database, self._lock = database, threading.Lock()
        self._pending: dict[_Key, _Reads] = {}
        self._written: dict[_Key, float] = {}
        self._due = time.monotonic() + _INTERVAL

    def record(self, name: str, digest: Digest, protocol: str, *, always: bool) -> None:
        """Log a read by the client of this request: in any case, or if it is drawn."""
        if not always and random.randrange(SAMPLE):  # noqa: S311 - a sample
            return
        call, now = request_context.current(), time.time()
        key = (time.strftime("%Y-%m-%d", time.gmtime(now)), name, digest, call.account, protocol)
        with self._lock:
            _, count, _ = self._pending.get(key, ("", 0, 0.0))
            self._pending[key] = call.address if call.account else shared_network(call.address), count + 1, now
            is_due = self._due < time.monotonic() or len(self._pending) >= _MAX_PENDING
            is_new = always and self._written.get(key, 0.0) < now - _FRESH
        if is_due or is_new:
            self.write()

    def write(self) -> None:
        """Write what was counted since the last time."""
        with self._lock:
            pending, self._pending = self._pending, {}
            self._due = time.monotonic() + _INTERVAL
        if not pending:
            return
        sql = (
            "INSERT INTO reads (day, name, digest, account, protocol, address, count, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (day, name, digest, account, protocol) DO UPDATE"
            " SET count = reads.count + excluded.count, address = excluded.address, time = excluded.time"
        )
        try:
            self._database.execute_many(sql, [(*key, *values) for key, values in sorted(pending.items())])
        except BaseException:
            self._keep(pending)
            raise
        with self._lock:
            if len(self._written) + len(pending) > _MAX_PENDING:
                self._written.clear()
            self._written |= {key: read_at for key, (_, _, read_at) in pending.items()}

    def _keep(self, unwritten: dict[_Key, _Reads]) -> None:
        """Count what could not be written with what comes next, as far as there is room."""
        with self._lock:
            for key, (address, count, read_at) in unwritten.items():
                if key in self._pending or len(self._pending) < _MAX_PENDING:
                    last_address, later_count, last_read_at = self._pending.get(key, (address, 0, read_at))
                    self._pending[key] = last_address, count + later_count, last_read_at

    def trim(self) -> None:
        """Write what was counted, and remove the oldest rows of too many, from the namespaces that have the most.

        Who reads much in one namespace thus pushes out no rows of another.
        """
        self.write()
        counts: Counter[str] = Counter()
        for name, count in self._database.select("SELECT name, count(*) FROM reads GROUP BY name"):
            counts[str(name).partition("/")[0]] += int(count)
        share = _fair_share(counts.values(), MAX_ROWS)
        sql = (
            "DELETE FROM reads WHERE name >= ? AND name < ? AND time <="
            " (SELECT time FROM reads WHERE name >= ? AND name < ? ORDER BY time DESC LIMIT 1 OFFSET ?)"
        )
        for namespace in (namespace for namespace, count in counts.items() if count > share):
            names = f"{namespace}/", f"{namespace}0"  # "0" follows "/"
            self._database.execute(sql, *names, *names, share)


def _fair_share(counts: Collection[int], total: int) -> int:
    """Return the most that each may keep of its count so that together they keep at most `total`."""
    for place, count in enumerate(sorted(counts)):
        share = total // (len(counts) - place)
        if count > share:
            return share
        total -= count
    return max(counts, default=0)


@dataclass(frozen=True, slots=True)
class ReadPosition:
    """Where a list of reads goes on: after the row with this time and key; without a key, after all rows of this time."""

    time: float
    key: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ReadPosition | None:
        """Parse `str()` of a position, or a time alone; None for an empty text. UsageError for any other."""
        time_text, *key = text.split(",")
        is_time = len(time_text) <= _MAX_DIGITS and time_text.isascii() and time_text.replace(".", "", 1).isdecimal()
        if text and not (is_time and len(key) in (0, len(_KEY_COLUMNS))):
            raise UsageError("before", "is neither a time in seconds nor the position of a row", "Take the position of a list")
        return cls(float(time_text), tuple(key)) if text else None

    @classmethod
    def of_row(cls, row: Read) -> ReadPosition:
        """Return the position of a row."""
        return cls(row.time, tuple(getattr(row, column) for column in _KEY_COLUMNS))

    def __str__(self) -> str:
        return ",".join((repr(self.time), *self.key))


def reads(
    database: HubDatabase, *, name: str = "", account: str = "", before: ReadPosition | None = None, limit: int = 100
) -> list[Read]:
    """Return the rows with the last reads, filtered by name (or namespace) and by account, and after a position, if given."""
    columns = ", ".join(_KEY_COLUMNS)
    conditions, values = ["1 = 1"], list[object]()
    if "/" in name:
        conditions.append("name = ?")
        values.append(name)
    elif name:
        conditions.append("name >= ? AND name < ?")
        values += [f"{name}/", f"{name}0"]  # "0" follows "/"
    if account:
        conditions.append("account = ?")
        values.append(account)
    if before and before.key:
        marks = ", ".join("?" * len(before.key))
        conditions.append(f"(time < ? OR (time = ? AND ({columns}) > ({marks})))")
        values += [before.time, before.time, *before.key]
    elif before:
        conditions.append("time < ?")
        values.append(before.time)
    sql = (
        f"SELECT day, name, digest, account, protocol, address, count, time FROM reads WHERE {' AND '.join(conditions)}"  # noqa: S608
        f" ORDER BY time DESC, {columns} LIMIT ?"
    )
    return [Read(*row) for row in database.select(sql, *values, limit)]
