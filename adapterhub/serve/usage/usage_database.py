"""usage.db: sums of requests and tokens, a row for each hour and all that differs between requests; and the log of answers.

Several gateways may add to one file. Rows older than 400 days are deleted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from adapterhub.sqlite_file import UNTRUSTED, SqliteFile
from adapterhub_converters.errors import LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

from . import answer_log
from .answer_log import AnswerRecord, Feedback
from .token_counts import TokenCounts

HOUR, DAY = 3600, 86400
"""Seconds."""
_MAX_DAYS = 400
_LOCK_SECONDS = 5.0
# The statements that take the database from each version to the next; `user_version` counts them. Never edit one: append.
MIGRATIONS = (
    """
    CREATE TABLE usage (
        hour INTEGER NOT NULL, key TEXT NOT NULL, version TEXT NOT NULL, route TEXT NOT NULL, arm TEXT NOT NULL,
        engine TEXT NOT NULL, path TEXT NOT NULL, requests INTEGER NOT NULL, estimated INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL,
        PRIMARY KEY (hour, key, version, route, arm, engine, path)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE key_days (day INTEGER NOT NULL, key TEXT NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (day, key))
        STRICT, WITHOUT ROWID
    """,
    answer_log.TABLES,
    answer_log.FEEDBACK_INDEX,
    "CREATE TABLE batches (recorder TEXT PRIMARY KEY, number INTEGER NOT NULL, time REAL NOT NULL) STRICT, WITHOUT ROWID",
)
_BEGIN_BATCH = """
    INSERT INTO batches (recorder, number, time) VALUES (?, ?, ?)
    ON CONFLICT (recorder) DO UPDATE SET number = excluded.number, time = excluded.time WHERE batches.number < excluded.number
"""
_ADD = """
    INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (hour, key, version, route, arm, engine, path) DO UPDATE SET
        requests = usage.requests + excluded.requests, estimated = usage.estimated + excluded.estimated,
        prompt_tokens = usage.prompt_tokens + excluded.prompt_tokens,
        cached_tokens = usage.cached_tokens + excluded.cached_tokens,
        answer_tokens = usage.answer_tokens + excluded.answer_tokens
"""
_ADD_DAY = (
    "INSERT INTO key_days VALUES (?, ?, ?) ON CONFLICT (day, key) DO UPDATE SET tokens = key_days.tokens + excluded.tokens"
)

_TOKENS_BY_KEY = """
    SELECT key, sum(CASE WHEN day = ? THEN tokens ELSE 0 END), sum(tokens) FROM key_days WHERE day >= ? GROUP BY key
"""


@dataclass(frozen=True, slots=True)
class UsageKey:
    """All that differs between the requests of different rows.

    Attributes:
        hour: The hour's begin, in seconds of Unix time.
        key: The name of the client's key; empty without one.
        version: The version that answered, the base's name, or `blend`.
        route: The name of the route that chose it; empty without one.
        arm: The target that the route chose.
        path: The path of the API.
    """

    hour: int
    key: str
    version: str
    route: str
    arm: str
    engine: str
    path: str


@dataclass(slots=True)
class UsageSum:
    """The requests and tokens of a row; `estimated` counts the requests whose tokens are estimates."""

    requests: int = 0
    estimated: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0

    def add(self, tokens: TokenCounts) -> None:
        """Add a request."""
        self.merge(UsageSum(1, int(tokens.is_estimate), tokens.prompt, tokens.cached, tokens.answer))

    def merge(self, usage: UsageSum) -> None:
        """Add the requests of another sum."""
        self.requests += usage.requests
        self.estimated += usage.estimated
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.answer_tokens += usage.answer_tokens


class UsageDatabase(SqliteFile):
    """An open usage.db, created if missing, with its folder."""

    # A killed process loses nothing that was committed; a machine without power may lose the last seconds.
    _pragmas = ("journal_mode = WAL", "synchronous = NORMAL", UNTRUSTED)

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalIOError(str(path.parent), error.strerror or str(error)) from error
        super().__init__(path, MIGRATIONS, lock_seconds=_LOCK_SECONDS)

    def begin_batch(self, recorder: str, number: int, now: float) -> bool:
        """Return whether a batch is yet to be added, in the transaction that adds it; its recorder counts them upwards.

        A recorder that never learned whether its last commit succeeded writes the same batch again.
        """
        return self.execute(_BEGIN_BATCH, recorder, number, now) == 1

    def forget_batches(self, recorder: str) -> None:
        """Delete the number of the last batch of a recorder that writes no more."""
        self.execute("DELETE FROM batches WHERE recorder = ?", recorder)

    def add(self, usage: Mapping[UsageKey, UsageSum]) -> None:
        """Add sums to the rows, in a transaction of the caller's."""
        days: Counter[tuple[int, str]] = Counter()
        for key, total in usage.items():
            days[key.hour // DAY, key.key] += total.prompt_tokens + total.answer_tokens
        self.execute_many(_ADD, [(*astuple(key), *astuple(total)) for key, total in usage.items()])
        self.execute_many(_ADD_DAY, [(*day, tokens) for day, tokens in days.items()])

    def add_answers(self, answers: Sequence[AnswerRecord], feedback: Sequence[Feedback]) -> None:
        """Add answers and feedback, of which the last for an answer counts, in a transaction of the caller's."""
        self.execute_many(answer_log.ADD_ANSWER, [*map(answer_log.answer_row, answers)])
        self.execute_many(answer_log.ADD_FEEDBACK, [*map(answer_log.feedback_row, feedback)])
        if self.execute(answer_log.DELETE_OLDEST, answer_log.MAX_ANSWERS) > 0:
            self.execute(answer_log.DELETE_OLDEST_FEEDBACK)

    def delete_old(self, now: float) -> None:
        """Delete the rows that are kept no longer."""
        first_day = int(now) // DAY - _MAX_DAYS
        with self.transaction():
            self.execute("DELETE FROM usage WHERE hour < ?", first_day * DAY)
            self.execute("DELETE FROM key_days WHERE day < ?", first_day)
            self.execute("DELETE FROM answers WHERE time < ?", float(first_day * DAY))
            self.execute("DELETE FROM feedback WHERE time < ?", float(first_day * DAY))
            self.execute("DELETE FROM batches WHERE time < ?", float(first_day * DAY))

    def tokens_by_key(self, today: int, month: int) -> dict[str, tuple[int, int]]:
        """Return the tokens of each key on a day, and since the first day of a month; both in days of Unix time."""
        rows = self.select(_TOKENS_BY_KEY, today, month)
        return {key: (int(day_tokens), int(month_tokens)) for key, day_tokens, month_tokens in rows}
