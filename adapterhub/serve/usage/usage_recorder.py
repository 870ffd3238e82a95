"""Recording usage while a gateway runs: requests are summed in memory, and a thread writes the sums every half second.

A full or broken disk is logged, and the sums stay in memory until they can be written. It holds up answers to a key with a
budget alone, and only until the record has been read once: what the key had spent is unknown. A process that is killed loses
the sums of the last half second. What a key may spend in a day or a month is compared with what all processes have written,
so that several of them can exceed it by what they answer in half a second.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar, cast

from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

from . import answer_log
from .answer_log import AnswerRecord, Feedback
from .postgres_record import PostgresUsage
from .record_place import Place, PostgresAddress
from .token_counts import TokenCounts
from .usage_database import DAY, HOUR, UsageDatabase, UsageKey, UsageSum

T = TypeVar("T")
log = logging.getLogger("adapterhub.serve.usage")
FLUSH_SECONDS = 0.5
_MAX_ROWS = 10_000  # of an hour, and in memory; what would be a further row is counted as `other`
_OTHER = "other"
_LOCK = ".lock"  # what the name of the file that all gateways of a record lock adds to that of the record
_LOG_SECONDS = 300.0  # between two lines about the same failure
_END_SECONDS = 10.0  # that the end of a gateway waits for the last sums to be written


@dataclass(frozen=True, slots=True)
class _FileDays:
    """The tokens of each key in the file, on the day when it was read and in that month."""

    today: int = 0
    month: int = 0
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def spent_by(self, key: str, today: int, month: int) -> tuple[int, int]:
        """Return the tokens of a key on a day and in a month; 0 for any that began after the file was read."""
        day_tokens, month_tokens = self.tokens.get(key, (0, 0))
        return day_tokens if today == self.today else 0, month_tokens if month == self.month else 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """What is written in one transaction.

    Attributes:
        number: Larger than those of this recorder's earlier batches.
        days: The tokens of each key by day, which are in `sums` too.
    """

    number: int
    sums: Mapping[UsageKey, UsageSum]
    answers: Sequence[AnswerRecord]
    feedback: Sequence[Feedback]
    days: Counter[tuple[int, str]]

    @property
    def has_rows(self) -> bool:
        """Return whether there is anything to write."""
        return bool(self.sums or self.answers or self.feedback)


def _days(now: float) -> tuple[int, int]:
    """Return the day, and the first one of its month (UTC), in days of Unix time."""
    date = datetime.datetime.fromtimestamp(now, datetime.UTC)
    today = int(now) // DAY
    return today, today - date.day + 1


def _drop_first(queue: deque[T], written: Sequence[T]) -> None:
    """Drop from a queue what was written; a full queue has dropped some itself."""
    written_ids = set(map(id, written))
    while queue and id(queue[0]) in written_ids:
        queue.popleft()


class _SharedLock:
    """A lock that all gateways of a record share, which tells whether this is the only one.

    POSIX locks belong to a process, and are kept while one is changed, unlike those of flock(2). Where there are none, no
    gateway knows that it is the only one.
    """

    def __init__(self, path: Path) -> None:
        self._file = ConfinedFiles(path.parent).resume(path, 0o600)
        self._lock("LOCK_SH")

    def is_sole(self) -> bool:
        """Return whether no other process has the lock."""
        if not self._lock("LOCK_EX", "LOCK_NB"):
            return False
        self._lock("LOCK_SH")
        return True

    def close(self) -> None:
        """Give it back."""
        self._file.close()

    def _lock(self, *names: str) -> bool:
        try:
            import fcntl

            fcntl.lockf(self._file, sum(getattr(fcntl, name) for name in names))
        except (ImportError, OSError):
            return False
        return True


def open_database(place: Place) -> UsageDatabase:
    """Open a record, created if missing."""
    return PostgresUsage(place) if isinstance(place, PostgresAddress) else UsageDatabase(place)


class UsageRecorder:
    """The usage of one gateway, on its way to its record.

    Args:
        place: Where to record; None to count in memory only, what keys spend.
        has_budgets: Returns whether `spent_by` is needed, for which the record is read.
    """

    def __init__(
        self, place: Place | None, *, has_budgets: Callable[[], bool] = lambda: False, clock: Callable[[], float] = time.time
    ) -> None:
        self.place, self._has_budgets, self._clock = place, has_budgets, clock
        self._lock = threading.Lock()  # held for moments only, never while the file is written
        self._write_lock = threading.Lock()  # batches are written in their order
        self._sums: dict[UsageKey, UsageSum] = {}
        self._hour, self._hour_rows = 0, set[UsageKey]()
        # Not written yet; while the file cannot be written, the oldest are dropped.
        self._answers: deque[AnswerRecord] = deque(maxlen=_MAX_ROWS)
        self._feedback: deque[Feedback] = deque(maxlen=_MAX_ROWS)
        # What keys have spent: in the file as it was read last, on its way there, and since then.
        self._file_days = _FileDays()
        self._batch: _Batch | None = None
        self._batch_number, self._id = 1, uuid.uuid4().hex
        self._new_days: Counter[tuple[int, str]] = Counter()
        self._database: UsageDatabase | None = None
        self._shared_lock: _SharedLock | None = None
        self._failed_at: float | None = None  # when a failure was logged last
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        """Open the record, and begin to write; one that cannot be opened is logged, and tried again."""
        if self.place is None:
            return
        self.flush()
        if isinstance(self.place, Path):
            with suppress(OSError, AdapterhubError):
                self._shared_lock = _SharedLock(self.place.with_name(self.place.name.removesuffix(".db") + _LOCK))
        self._thread.start()

    def close(self) -> None:
        """Write what is left, for at most ten seconds."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)
        if self._shared_lock is not None:
            self._shared_lock.close()
            self._shared_lock = None

    def add(self, *, key: str, version: str, route: str, arm: str, engine: str, path: str, tokens: TokenCounts) -> None:
        """Count a request that has ended."""
        hour = int(self._clock()) // HOUR * HOUR
        row = UsageKey(hour, key, version, route, arm, engine, path)
        with self._lock:
            self._new_days[hour // DAY, key] += tokens.total
            if self.place is None:
                return
            if hour != self._hour:
                self._hour, self._hour_rows = hour, set()
            is_new = row not in self._sums and row not in self._hour_rows
            if is_new and max(len(self._hour_rows), len(self._sums)) >= _MAX_ROWS:
                row = replace(row, version=_OTHER, route=_OTHER, arm=_OTHER, engine=_OTHER, path=_OTHER)
            self._hour_rows.add(row)
            self._sums.setdefault(row, UsageSum()).add(tokens)

    def add_answer(self, answer: AnswerRecord) -> None:
        """Add an answer that has ended to the log."""
        if self.place is not None:
            with self._lock:
                self._answers.append(answer)

    def add_feedback(self, feedback: Feedback) -> None:
        """Add what somebody thinks of an answer."""
        if self.place is not None:
            with self._lock:
                self._feedback.append(feedback)

    def has_company(self) -> bool:
        """Return whether another gateway may have answers that are not in the file yet."""
        return self.place is not None and (self._shared_lock is None or not self._shared_lock.is_sole())

    def find_answer(self, ident: str, key: str) -> tuple[AnswerRecord, Feedback | None] | None:
        """Return the newest answer to a key with an id, of its own or of its request, and its feedback; None without one."""
        with self._lock:
            answers, pending_feedback = [*self._answers], [*self._feedback]
        logged = [] if self.place is None else answer_log.find_answers(self.place, ident, key)
        recent = (answer for answer in reversed(answers) if answer.key == key and ident in (answer.request, answer.answer))
        newest = next(chain(((answer, None) for answer in recent), logged), None)
        if newest is None:
            return None
        answer, feedback = newest
        unwritten = [later for later in pending_feedback if (later.request, later.key) == (answer.request, key)]
        return answer, unwritten[-1] if unwritten else feedback

    def spent_by(self, key: str) -> tuple[int, int] | None:
        """Return the tokens of a key on this day and in this month (UTC), those of other processes as last written.

        None while the record has not been read since the start: what the key had spent by then is unknown.
        """
        today, month = _days(self._clock())
        with self._lock:
            if self.place is not None and not self._file_days.today:
                return None
            day_tokens, month_tokens = self._file_days.spent_by(key, today, month)
            for days in (self._batch.days if self._batch else Counter(), self._new_days):
                day_tokens += days[today, key]
                month_tokens += sum(days[day, key] for day in range(month, today + 1))
        return day_tokens, month_tokens

    def flush(self) -> None:
        """Write what was counted; if that fails, log it and keep it.

        A batch that failed is written first, and again as it was: its commit may have succeeded without an answer.
        """
        try:
            with self._write_lock:
                self._write_batches()
        except Exception as error:
            self._discard_database()
            if not isinstance(error, AdapterhubError):
                raise
            now = time.monotonic()
            if self._failed_at is None or now - self._failed_at >= _LOG_SECONDS:
                self._failed_at = now
                log.error("usage is kept in memory, and is lost if this process ends: %s", error)
        else:
            if self._failed_at is not None:
                log.info("usage is written to %s again", self.place)
            self._failed_at = None

    def _write_batches(self) -> None:
        """Write the batch that failed, and then one of all that was counted since."""
        if self._batch is not None:
            self._write(self._batch)
        with self._lock:
            self._batch = batch = _Batch(self._batch_number, self._sums, [*self._answers], [*self._feedback], self._new_days)
            self._batch_number, self._sums, self._new_days = self._batch_number + 1, {}, Counter()
        self._write(batch)

    def _write(self, batch: _Batch) -> None:
        """Write a batch once, and read what all processes have written, if there are budgets."""
        now = self._clock()
        if self._database is None:
            self._database = open_database(cast(Place, self.place))
            self._database.delete_old(now)
        today, month = _days(now)
        with self._database.transaction() if batch.has_rows else nullcontext():
            if batch.has_rows and self._database.begin_batch(self._id, batch.number, now):
                self._database.add(batch.sums)
                self._database.add_answers(batch.answers, batch.feedback)
            tokens = self._database.tokens_by_key(today, month) if self._has_budgets() else {}
        with self._lock:
            self._file_days, self._batch = _FileDays(today, month, tokens), None
            _drop_first(self._answers, batch.answers)
            _drop_first(self._feedback, batch.feedback)

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
        if self._database is not None and self._batch is None:
            with suppress(AdapterhubError):
                self._database.forget_batches(self._id)
        self._discard_database()

    def _flush_or_log(self) -> None:
        try:
            self.flush()
        except Exception:  # the thread must not end
            log.exception("usage cannot be written")
