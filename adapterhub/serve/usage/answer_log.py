"""The answers of gateways, a row each in their record: which version answered, by which arm, for which key, and its feedback.

An answer is found by its `id`, or by the id of its request, which a client may choose and use again. No text of a request or an
answer is kept, and a comment only if the operator wants it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from operator import attrgetter
from typing import Any

from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import record_place
from .record_place import Place

MAX_ANSWERS = 1_000_000
"""Answers that a file keeps: the newest, in about 300 MB."""
_MAX_MATCHES = 100  # answers returned for one id, because clients choose the ids of their requests
_MAX_FEEDBACK = 100_000  # rows returned at once
GOOD = 0.5
"""The lowest score, from 0 to 1, that counts as good."""
TABLES = """
    CREATE TABLE answers (
        number INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL, answer TEXT NOT NULL, time REAL NOT NULL,
        key TEXT NOT NULL, version TEXT NOT NULL, route TEXT NOT NULL, arm TEXT NOT NULL, engine TEXT NOT NULL,
        path TEXT NOT NULL, status INTEGER NOT NULL, seconds REAL NOT NULL, prompt_tokens INTEGER NOT NULL,
        answer_tokens INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX answers_request ON answers (request);
    CREATE INDEX answers_answer ON answers (answer);
    CREATE TABLE feedback (
        request TEXT NOT NULL, key TEXT NOT NULL, version TEXT NOT NULL, route TEXT NOT NULL, arm TEXT NOT NULL,
        time REAL NOT NULL, score REAL NOT NULL, label TEXT NOT NULL, comment TEXT NOT NULL, PRIMARY KEY (request, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX feedback_version ON feedback (version)
"""


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """An answer.

    Attributes:
        request: The id of the request, in `x-request-id`.
        answer: The `id` of the answer; empty if it has none.
        time: When it ended, in seconds of Unix time.
        key: The name of the client's key; empty without one.
        seconds: From the request to the end.
    """

    request: str
    answer: str
    time: float
    key: str
    version: str
    route: str
    arm: str
    engine: str
    path: str
    status: int
    seconds: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Feedback:
    """A client's feedback on an answer, by the id of its request: a score from 0, bad, to 1, good."""

    request: str
    key: str
    version: str
    route: str
    arm: str
    time: float
    score: float
    label: str = ""
    comment: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the answer is found bad."""
        return self.score < GOOD


_ANSWER_FIELDS, _FEEDBACK_FIELDS = ([field.name for field in fields(row)] for row in (AnswerRecord, Feedback))
_ANSWER_COLUMNS, _FEEDBACK_COLUMNS = ", ".join(_ANSWER_FIELDS), ", ".join(_FEEDBACK_FIELDS)
answer_row, feedback_row = attrgetter(*_ANSWER_FIELDS), attrgetter(*_FEEDBACK_FIELDS)
"""Return the values of an answer, or of feedback, for the statements below; `astuple` would copy each by itself."""
ADD_ANSWER = f"INSERT INTO answers ({_ANSWER_COLUMNS}) VALUES ({', '.join('?' * len(fields(AnswerRecord)))})"  # noqa: S608
ADD_FEEDBACK = f"""
    INSERT INTO feedback ({_FEEDBACK_COLUMNS}) VALUES ({", ".join("?" * len(fields(Feedback)))})
    ON CONFLICT (request, key) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in _FEEDBACK_FIELDS)}
"""  # noqa: S608
DELETE_OLDEST = "DELETE FROM answers WHERE number <= (SELECT max(number) FROM answers) - ?"
"""Statements that add an answer, add or replace feedback, and keep only the newest answers, as many as their parameter says."""
FEEDBACK_INDEX = "CREATE INDEX feedback_time ON feedback (time)"
# Feedback comes after its answer: what came before the oldest answer is about one that is gone.
DELETE_OLDEST_FEEDBACK = "DELETE FROM feedback WHERE time < (SELECT time FROM answers ORDER BY number LIMIT 1)"
"""Deletes feedback on answers that are gone, so that there is at most twice as much of it as there are answers."""


def find_answers(place: Place, ident: str, key: str | None = None) -> list[tuple[AnswerRecord, Feedback | None]]:
    """Return the answers with an id, their own or that of their request, newest first, each with its feedback.

    With a key, only those of its client: others may have given their requests the same id any number of times.
    """
    of_client, values = ("", (ident,)) if key is None else ("AND key = ?", (ident, key))
    with suppress(NotFoundError), record_place.reader(place) as database:
        if not database.has_table("answers"):
            return []
        rows: dict[int, tuple[Any, ...]] = {}
        # Each in the order of its index: a client may have given a million requests the same id.
        for column in ("request", "answer"):
            sql = f"SELECT number, {_ANSWER_COLUMNS} FROM answers WHERE {column} = ? {of_client} ORDER BY number DESC LIMIT ?"  # noqa: S608
            rows |= {number: row for number, *row in database.select(sql, *values, _MAX_MATCHES)}
        answers = [AnswerRecord(*rows[number]) for number in sorted(rows, reverse=True)[:_MAX_MATCHES]]
        sql = f"SELECT {_FEEDBACK_COLUMNS} FROM feedback WHERE request = ? AND key = ?"  # noqa: S608
        feedback = [database.select(sql, answer.request, answer.key) for answer in answers]
        return [(answer, Feedback(*row[0]) if row else None) for answer, row in zip(answers, feedback, strict=True)]
    return []


def feedback_since(place: Place, time: float) -> list[Feedback]:
    """Return the feedback of all gateways since a time, in seconds of Unix time; the newest, if it is very much."""
    with suppress(NotFoundError), record_place.reader(place) as database:
        if database.has_table("feedback"):
            sql = f"SELECT {_FEEDBACK_COLUMNS} FROM feedback WHERE time >= ? ORDER BY time DESC LIMIT {_MAX_FEEDBACK}"  # noqa: S608
            return [Feedback(*row) for row in database.select(sql, time)]
    return []


def feedback_counts(place: Place, version: str) -> tuple[int, int]:
    """Return how many answers of a version, `name@digest`, were found good and bad."""
    with suppress(NotFoundError), record_place.reader(place) as database:
        if database.has_table("feedback"):
            sql = "SELECT count(*), count(CASE WHEN score < ? THEN 1 END) FROM feedback WHERE version = ?"
            [(count, bad)] = database.select(sql, GOOD, version)
            return count - bad, bad
    return 0, 0
