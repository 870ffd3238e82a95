"""usage.limits.db: what keys have used of their limits, counted once for all gateways of a machine.

One statement counts a request and says whether it was one too many, so two gateways never both answer the last one. All of it
is about the next minutes, so it is never flushed to the disk. While the file cannot be used, a gateway counts for itself, as it
does anyway, logs why, and adds to the file what it counted once it can.
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
from adapterhub_converters.errors import AdapterhubError

from .limits_database import LimitsDatabase

T = TypeVar("T")
log = logging.getLogger("adapterhub.serve.usage")
REFRESH_SECONDS = 2.0
"""Seconds between two calls of `SharedLimits.refresh`."""
_RETRY_SECONDS = 5.0  # between a failure and the next try
_LOG_SECONDS = 300.0  # between two lines about the same failure


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
        self._unwritten: dict[tuple[str, str, int, int], tuple[int, float]] = {}  # by window, events and when they end
        self._database: LimitsDatabase | None = None
        self._retry_at = -math.inf
        self._logged_at = -math.inf

    def count(self, key: str, kind: str, windows: Windows, events: int = 1) -> Window:
        """Count events of a key, or 0 to see what is left; a negative number gives events of the same window back.

        Args:
            kind: What is counted: `requests` or `tokens`.
            windows: The limit, and what this gateway has counted by itself.
        """
        own_window = windows.count(key, events)
        now = self._clock()
        window, new_end = (key, kind, windows.limit, windows.seconds), now + windows.seconds
        unwritten, unwritten_end = self._unwritten.pop(window, (0, new_end))
        if not now < unwritten_end <= new_end:  # the window has ended, or the clock was set back
            unwritten, unwritten_end = 0, new_end
        counted = self._ask(lambda database: database.count(window, new_end, now, unwritten + events) or (0, new_end))
        if counted is None:
            self._unwritten[window] = unwritten + events, unwritten_end
            return own_window
        count, ends = counted
        seconds = max(math.ceil(ends - now), 1)
        return Window(max(windows.limit - count, 0), seconds, over=count - events >= windows.limit)

    def begin(self, key: str, max_running: int) -> bool:
        """Count a request of a key that begins to run, unless so many run already; return whether it may."""
        running = self._running[key]
        values = (key, self._gateway, running + 1, self._clock(), max_running)
        admitted = self._ask(lambda database: database.begin(*values))
        if admitted is None:
            admitted = running < max_running
        self._running[key] += admitted
        return admitted

    def end(self, key: str) -> None:
        """Count a request no longer, which has ended."""
        self._running[key] -= 1
        self._ask(lambda database: database.set_running(key, self._gateway, self._running[key], self._clock()))

    def refresh(self) -> None:
        """Tell the others that this gateway lives, so that its running requests count."""
        if self._database is not None:
            self._ask(lambda database: database.refresh(self._gateway, self._clock()))

    def close(self) -> None:
        """Leave the file."""
        if self._database is not None:
            self._ask(lambda database: database.leave(self._gateway))
        if self._database is not None:
            self._database.close()

    def _ask(self, ask: Callable[[LimitsDatabase], T]) -> T | None:
        """Return what the database says; None while it cannot be used."""
        now = time.monotonic()
        if self._path is None or now < self._retry_at:
            return None
        try:
            if self._database is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._database = LimitsDatabase(self._path)
                self._database.delete_old(self._clock())
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
