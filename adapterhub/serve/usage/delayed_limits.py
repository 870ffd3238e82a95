"""What keys have used of their limits, counted together by gateways on several machines, with a delay of half a second.

Requests never wait for the database: a thread adds what this gateway has counted, and reads what all have. Together, gateways
can exceed a limit by what they answer in half a second. While the database cannot be reached, each counts for itself, and
later adds what is not older than the window of its limit.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from adapterhub.http_server.rate_windows import Window, Windows
from adapterhub_converters.errors import AdapterhubError

from .limits_database import DEAD_SECONDS
from .postgres_record import PostgresLimits
from .record_place import PostgresAddress

log = logging.getLogger("adapterhub.serve.usage")
FLUSH_SECONDS = 0.5
_LOG_SECONDS = 300.0  # between two lines about the same failure
_END_SECONDS = 2.0  # that the end of a gateway waits for the thread
_WindowKey = tuple[str, str, int, int]  # key, kind, limit, seconds


class DelayedLimits:
    """What keys have used of their limits at this gateway, and at all others with the same database.

    Windows begin and end by the time of the database, whatever the clocks of the machines say.

    Args:
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, address: PostgresAddress, clock: Callable[[], float] = time.monotonic) -> None:
        self._address, self._clock = address, clock
        self._gateway = uuid.uuid4().hex
        self._lock = threading.Lock()  # held for moments only, never while the database is asked
        self._counted: dict[
            _WindowKey, tuple[int, float]
        ] = {}  # as the database said last: the count, and when it ends by our clock
        self._unwritten: Counter[_WindowKey] = Counter()
        self._in_writing: Counter[_WindowKey] = Counter()
        self._unwritten_since: dict[_WindowKey, float] = {}  # when the first of them was counted
        self._running: Counter[str] = Counter()  # requests of this gateway that run, by key
        self._elsewhere: dict[str, int] = {}  # those of the other gateways, as last read
        self._read_at = -math.inf
        self._database: PostgresLimits | None = None
        self._logged_at = -math.inf
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="limits", daemon=True)

    def count(self, key: str, kind: str, windows: Windows, events: int = 1) -> Window:
        """Count events of a key, or 0 to see what is left; a negative number gives events of the same window back.

        Args:
            kind: What is counted: `requests` or `tokens`.
            windows: The limit, and what this gateway has counted by itself.
        """
        own_window = windows.count(key, events)
        now, window = self._clock(), (key, kind, windows.limit, windows.seconds)
        with self._lock:
            self._start()
            self._drop_ended(window, now)
            self._unwritten_since.setdefault(window, now)
            self._unwritten[window] += events
            if not self._is_connected(now):
                return own_window
            count, ends = self._counted.get(window, (0, 0.0))
            if ends <= now:
                count, ends = 0, now + windows.seconds
            count += self._in_writing[window] + self._unwritten[window]
        return Window(max(windows.limit - count, 0), max(math.ceil(ends - now), 1), over=count - events >= windows.limit)

    def begin(self, key: str, max_running: int) -> bool:
        """Count a request of a key that begins to run, unless so many run already; return whether it may."""
        with self._lock:
            self._start()
            elsewhere = self._elsewhere.get(key, 0) if self._is_connected(self._clock()) else 0
            is_admitted = self._running[key] + elsewhere < max_running
            self._running[key] += is_admitted
        return is_admitted

    def end(self, key: str) -> None:
        """Count a request no longer, which has ended."""
        with self._lock:
            self._running[key] -= 1

    def refresh(self) -> None:
        """Do nothing: the thread tells the others that this gateway lives."""

    def close(self) -> None:
        """Write what is left, and leave the database."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)

    def flush(self) -> None:
        """Add to the database what this gateway has counted, and read what all have; if that fails, log it and keep them."""
        now = self._clock()
        with self._lock:
            for window in [*self._unwritten]:
                self._drop_ended(window, now)
            windows = {window for window, (_, ends) in self._counted.items() if ends > now} | set(self._unwritten)
            self._in_writing, self._unwritten = self._unwritten, Counter()
            since, self._unwritten_since = self._unwritten_since, {}
            events, running = self._in_writing, dict(self._running)
        try:
            if self._database is None:
                self._database = PostgresLimits(self._address)
                self._database.delete_old(self._database.now())
            with self._database.transaction():
                time_there = self._database.now()
                counted = {
                    window: self._database.count(window, time_there + window[3], time_there, events[window])
                    for window in sorted(windows)
                }
                for key, count in sorted(running.items()):
                    self._database.set_running(key, self._gateway, count, time_there)
                elsewhere = self._database.running_elsewhere(self._gateway, time_there)
        except AdapterhubError as error:
            self._discard_database()
            with self._lock:
                self._unwritten += self._in_writing
                self._unwritten_since |= since
                self._in_writing, self._read_at = Counter(), -math.inf
            if time.monotonic() - self._logged_at >= _LOG_SECONDS:
                self._logged_at = time.monotonic()
                log.error("limits of keys are counted for this gateway alone: %s", error)
        else:
            with self._lock:
                self._counted = {
                    window: (row[0], row[1] - time_there + now) for window, row in counted.items() if row is not None
                }
                self._elsewhere, self._in_writing, self._read_at = elsewhere, Counter(), now

    def _start(self) -> None:
        """Start the thread, for the first key with a limit."""
        if not self._thread.is_alive() and not self._end.is_set():
            self._thread.start()

    def _drop_ended(self, window: _WindowKey, now: float) -> None:
        """Forget what could not be written in time: the window that began with the first of it has ended."""
        if self._unwritten_since.get(window, now) + window[3] <= now:
            del self._unwritten_since[window], self._unwritten[window]

    def _is_connected(self, now: float) -> bool:
        """Return whether the database was read lately; a server may also hang."""
        return abs(now - self._read_at) < DEAD_SECONDS

    def _discard_database(self) -> None:
        """Close the database, so that the next try opens it again."""
        if self._database is not None:
            with suppress(Exception):
                self._database.close()
            self._database = None

    def _run(self) -> None:
        while not self._end.is_set():
            self._flush_or_log()
            self._end.wait(FLUSH_SECONDS)
        self._flush_or_log()
        if self._database is not None:
            with suppress(AdapterhubError):
                self._database.leave(self._gateway)
        self._discard_database()

    def _flush_or_log(self) -> None:
        try:
            self.flush()
        except Exception:  # the thread must not end
            log.exception("limits of keys cannot be shared")
