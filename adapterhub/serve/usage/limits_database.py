"""usage.limits.db: the requests and tokens of keys in the windows of their limits, and the requests that run, by gateway."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterhub.sqlite_file import UNTRUSTED, SqliteFile

DEAD_SECONDS = 10.0
"""A gateway that has said nothing for so long was killed."""
_LOCK_SECONDS = 0.5  # every request of this process waits meanwhile
MIGRATIONS = (
    """
    CREATE TABLE windows (
        key TEXT NOT NULL, kind TEXT NOT NULL, most INTEGER NOT NULL, seconds INTEGER NOT NULL,
        ends REAL NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (key, kind, most, seconds)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE running (
        key TEXT NOT NULL, gateway TEXT NOT NULL, count INTEGER NOT NULL, seen REAL NOT NULL, PRIMARY KEY (key, gateway)
    ) STRICT, WITHOUT ROWID
    """,
)
# A window that ends over ten seconds later than a new one would began before the clock was set back. With less, another gateway
# began it between the moment that this one read the clock and that in which it got the lock.
_CLOCK_SECONDS = 10
_COUNT = """
    INSERT INTO windows (key, kind, most, seconds, ends, count) VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (key, kind, most, seconds) DO UPDATE SET
        count = excluded.count + CASE WHEN windows.ends > ? AND windows.ends <= ? THEN windows.count ELSE 0 END,
        ends = CASE WHEN windows.ends > ? AND windows.ends <= ? THEN windows.ends ELSE excluded.ends END
    RETURNING count, ends
"""
_GIVE_BACK = """
    UPDATE windows SET count = CASE WHEN count > ? THEN count - ? ELSE 0 END
    WHERE key = ? AND kind = ? AND most = ? AND seconds = ? AND ends > ? AND ends <= ? RETURNING count, ends
"""
_LOOK = "SELECT count, ends FROM windows WHERE key = ? AND kind = ? AND most = ? AND seconds = ? AND ends > ? AND ends <= ?"
_ELSEWHERE = "SELECT key, sum(count) FROM running WHERE gateway <> ? AND abs(seen - ?) < ? GROUP BY key"
_UPDATE = "ON CONFLICT (key, gateway) DO UPDATE SET count = excluded.count, seen = excluded.seen"
_BEGIN = f"""
    INSERT INTO running (key, gateway, count, seen) SELECT ?, ?, ?, ?
    WHERE (SELECT coalesce(sum(count), 0) FROM running WHERE key = ? AND gateway <> ? AND abs(seen - ?) < ?) < ?
    {_UPDATE}
"""  # noqa: S608
_SET = f"INSERT INTO running (key, gateway, count, seen) VALUES (?, ?, ?, ?) {_UPDATE}"  # noqa: S608


class LimitsDatabase(SqliteFile):
    """An open usage.limits.db, created if missing."""

    _pragmas = ("journal_mode = WAL", "synchronous = OFF", UNTRUSTED)

    def __init__(self, path: Path) -> None:
        super().__init__(path, MIGRATIONS, lock_seconds=_LOCK_SECONDS)

    def delete_old(self, now: float) -> None:
        """Delete the rows that count no longer."""
        self.execute("DELETE FROM windows WHERE ends <= ?", now)
        self.execute("DELETE FROM running WHERE abs(seen - ?) >= ?", now, DEAD_SECONDS)

    def count(self, window: Sequence[object], ends: float, now: float, events: int) -> tuple[int, float] | None:
        """Count events in a window, or 0 to look at it; return its count and end, None if none has begun.

        A negative number gives events back to a window that has begun.

        Args:
            window: Its key, kind, limit and seconds.
            ends: The end of one that begins now.
        """
        latest = ends + _CLOCK_SECONDS
        sql, values = _LOOK, [*window, now, latest]
        if events > 0:
            sql, values = _COUNT, [*window, ends, events, now, latest, now, latest]
        elif events < 0:
            sql, values = _GIVE_BACK, [-events, -events, *values]
        rows = self.select(sql, *values)
        return rows[0] if rows else None

    def begin(self, key: str, gateway: str, count: int, now: float, max_running: int) -> bool:
        """Record that `count` requests of a key run at a gateway, unless they are too many with those of the others."""
        others = max_running - count + 1  # fewer than which may run at the others
        return self.execute(_BEGIN, key, gateway, count, now, key, gateway, now, DEAD_SECONDS, others) == 1

    def set_running(self, key: str, gateway: str, count: int, now: float) -> None:
        """Record that `count` requests of a key run at a gateway."""
        self.execute(_SET, key, gateway, count, now)

    def refresh(self, gateway: str, now: float) -> None:
        """Record that a gateway lives."""
        self.execute("UPDATE running SET seen = ? WHERE gateway = ?", now, gateway)

    def running_elsewhere(self, gateway: str, now: float) -> dict[str, int]:
        """Return how many requests of each key run at the gateways other than one."""
        rows = self.select(_ELSEWHERE, gateway, now, DEAD_SECONDS)
        return {key: int(count) for key, count in rows}

    def leave(self, gateway: str) -> None:
        """Delete what runs at a gateway."""
        self.execute("DELETE FROM running WHERE gateway = ?", gateway)
