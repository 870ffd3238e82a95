"""usage.limits.db: what keys have used of their limits, counted once for all gateways of a machine.

One statement counts a request and says whether it was one too many, so two gateways never both answer the last one. All of it
is about the next minutes, so it is never flushed to the disk. While the file cannot be used, a gateway counts for itself, as it
does anyway, and logs why.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from adapterhub.http_server.rate_windows import Window, Windows
from adapterhub.sqlite_file import UNTRUSTED, SqliteFile
from adapterhub_converters.errors import AdapterhubError

T = TypeVar("T")
log = logging.getLogger("adapterhub.serve.usage")
REFRESH_SECONDS = 2.0
"""Seconds between two calls of `SharedLimits.refresh`."""
_DEAD_SECONDS = 10.0  # a gateway that has said nothing for so long was killed
_LOCK_SECONDS = 0.5  # every request of this process waits meanwhile
_RETRY_SECONDS = 5.0  # between a failure and the next try
_LOG_SECONDS = 300.0  # between two lines about the same failure
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
_COUNT = """
    INSERT INTO windows (key, kind, most, seconds, ends, count) VALUES (?1, ?2, ?3, ?4, ?5 + ?4, ?6)
    ON CONFLICT (key, kind, most, seconds) DO UPDATE SET
        count = excluded.count + CASE WHEN ends > ?5 AND ends <= ?5 + ?4 + 10 THEN count ELSE 0 END,
        ends = CASE WHEN ends > ?5 AND ends <= ?5 + ?4 + 10 THEN ends ELSE excluded.ends END
    RETURNING count, ends
"""
_LOOK = """
    SELECT count, ends FROM windows WHERE key = ?1 AND kind = ?2 AND most = ?3 AND seconds = ?4
        AND ends > ?5 AND ends <= ?5 + ?4 + 10
"""
_BEGIN = """
    INSERT INTO running (key, gateway, count, seen) SELECT ?1, ?2, ?3 + 1, ?4
    WHERE ?3 + (
        SELECT coalesce(sum(count), 0) FROM running
        WHERE key = ?1 AND gateway <> ?2 AND abs(seen - ?4) < ?5
    ) < ?6
    ON CONFLICT (key, gateway) DO UPDATE SET count = excluded.count, seen = excluded.seen
"""
_END = "UPDATE running SET count = ?3, seen = ?4 WHERE key = ?1 AND gateway = ?2"


class _LimitsDatabase(SqliteFile):
    """An open file of limits, created if missing, without rows that count no longer."""

    _pragmas = ("journal_mode = WAL", "synchronous = OFF", UNTRUSTED)

    def __init__(self, path: Path, now: float) -> None:
        super().__init__(path, MIGRATIONS, lock_seconds=_LOCK_SECONDS)
        self.execute("DELETE FROM windows WHERE ends <= ?", now)
        self.execute("DELETE FROM running WHERE abs(seen - ?) >= ?", now, _DEAD_SECONDS)


class SharedLimits:
    """What keys have used of their limits at this gateway, and at all others with the same file.

    Args:
        path: The file, which is opened for the first key with a limit; None to count for this gateway alone.
        clock: The time in seconds of Unix time, which all gateways share.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._gateway = uuid.uuid4().hex
        self._running: Counter[str] = Counter()  # requests of this gateway that run, by key
        self._database: _LimitsDatabase | None = None
        self._retry_at = -math.inf
        self._logged_at = -math.inf

    def count(self, key: str, kind: str, windows: Windows, events: int = 1) -> Window:
        """Count events of a key, or 0 to see what is left.

        Args:
            kind: What is counted: `requests` or `tokens`.
            windows: The limit, and what this gateway has counted by itself.
        """
        own_window = windows.count(key, events)
        now = self._clock()
        values = [key, kind, windows.limit, windows.seconds, now, *([events] if events else [])]
        rows = self._ask(lambda file: file.select(_COUNT if events else _LOOK, *values))
        if rows is None:
            return own_window
        [(count, ends)] = rows or [(0, now + windows.seconds)]
        seconds = max(math.ceil(ends - now), 1)
        return Window(max(windows.limit - count, 0), seconds, over=count - events >= windows.limit)

    def begin(self, key: str, max_running: int) -> bool:
        """Count a request of a key that begins to run, unless so many run already; return whether it may."""
        running = self._running[key]
        values = (key, self._gateway, running, self._clock(), _DEAD_SECONDS, max_running)
        admitted = self._ask(lambda file: file.execute(_BEGIN, *values) == 1)
        if admitted is None:
            admitted = running < max_running
        self._running[key] += admitted
        return admitted

    def end(self, key: str) -> None:
        """Count a request no longer, which has ended."""
        self._running[key] -= 1
        self._ask(lambda file: file.execute(_END, key, self._gateway, self._running[key], self._clock()))

    def refresh(self) -> None:
        """Tell the others that this gateway lives, so that its running requests count."""
        if self._database is not None:
            sql = "UPDATE running SET seen = ? WHERE gateway = ?"
            self._ask(lambda file: file.execute(sql, self._clock(), self._gateway))

    def close(self) -> None:
        """Leave the file."""
        if self._database is not None:
            self._ask(lambda file: file.execute("DELETE FROM running WHERE gateway = ?", self._gateway))
        if self._database is not None:
            self._database.close()

    def _ask(self, ask: Callable[[_LimitsDatabase], T]) -> T | None:
        """Return what the file says; None while it cannot be used."""
        now = time.monotonic()
        if self._path is None or now < self._retry_at:
            return None
        try:
            if self._database is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._database = _LimitsDatabase(self._path, self._clock())
            return ask(self._database)
        except (AdapterhubError, OSError) as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            if self._database is not None:
                self._database.close()
                self._database = None
            if now - self._logged_at >= _LOG_SECONDS:
                self._logged_at = now
                log.error("limits of keys are counted for this gateway alone: %s", error)
            return None
