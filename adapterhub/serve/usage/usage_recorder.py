"""Recording usage while a gateway runs: requests are summed in memory, and a thread writes the sums every two seconds.

A full or broken disk is logged, and never holds up an answer: the sums stay in memory until they can be written. A process that
is killed loses those of the last two seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from adapterhub_converters.errors import AdapterhubError

from .token_counts import TokenCounts
from .usage_database import HOUR, UsageDatabase, UsageKey, UsageSum

log = logging.getLogger("adapterhub.serve.usage")
FLUSH_SECONDS = 2.0
_MOST_ROWS = 10_000  # of an hour, and in memory; what would be a further row is counted as `other`
_OTHER = "other"
_LOG_SECONDS = 300.0  # between two lines about the same failure
_END_SECONDS = 10.0  # that the end of a gateway waits for the last sums to be written


class UsageRecorder:
    """The usage of one gateway, on its way to a file."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self._lock = threading.Lock()  # held for moments only, never while the file is written
        self._sums: dict[UsageKey, UsageSum] = {}
        self._hour, self._hour_rows = 0, set[UsageKey]()
        self._database: UsageDatabase | None = None
        self._failed_at: float | None = None  # when a failure was logged last
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        """Open the file, and begin to write; a file that cannot be opened is logged, and tried again."""
        self.flush()
        self._thread.start()

    def close(self) -> None:
        """Write what is left, for at most ten seconds."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)

    def add(self, *, key: str, version: str, route: str, arm: str, engine: str, path: str, tokens: TokenCounts) -> None:
        """Count a request that has ended."""
        hour = int(self._clock()) // HOUR * HOUR
        row = UsageKey(hour, key, version, route, arm, engine, path)
        with self._lock:
            if hour != self._hour:
                self._hour, self._hour_rows = hour, set()
            is_new = row not in self._sums and row not in self._hour_rows
            if is_new and max(len(self._hour_rows), len(self._sums)) >= _MOST_ROWS:
                row = replace(row, version=_OTHER, route=_OTHER, arm=_OTHER, engine=_OTHER, path=_OTHER)
            self._hour_rows.add(row)
            self._sums.setdefault(row, UsageSum()).add(tokens)

    def flush(self) -> None:
        """Write the sums now; if that fails, log it and keep them."""
        with self._lock:
            sums, self._sums = self._sums, {}
        try:
            self._write(sums)
        except AdapterhubError as error:
            self._discard_database()
            with self._lock:
                for row, usage in sums.items():
                    self._sums.setdefault(row, UsageSum()).merge(usage)
            now = time.monotonic()
            if self._failed_at is None or now - self._failed_at >= _LOG_SECONDS:
                self._failed_at = now
                log.error("usage is kept in memory, and is lost if this process ends: %s", error)
        else:
            if self._failed_at is not None:
                log.info("usage is written to %s again", self.path)
            self._failed_at = None

    def _write(self, sums: dict[UsageKey, UsageSum]) -> None:
        if self._database is None:
            self._database = UsageDatabase(self.path)
            self._database.delete_old(self._clock())
        if sums:
            self._database.add(sums)

    def _discard_database(self) -> None:
        """Close the file, so that a transaction that could not be committed ends, and the next try opens it again."""
        if self._database is not None:
            with suppress(Exception):
                self._database.close()
            self._database = None

    def _run(self) -> None:
        while not self._end.wait(FLUSH_SECONDS):
            self._flush_or_log()
        self._flush_or_log()
        self._discard_database()

    def _flush_or_log(self) -> None:
        try:
            self.flush()
        except Exception:  # the thread must not end
            log.exception("usage cannot be written")
