"""A record of usage, whatever keeps it: these tests run over files, and in `tests/peers` over PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.serve.usage import answer_log, record_place, usage_recorder, usage_report
from adapterhub.serve.usage.answer_log import AnswerRecord, Feedback
from adapterhub.serve.usage.record_place import FILE, Place, PostgresAddress
from adapterhub.serve.usage.token_counts import TokenCounts
from adapterhub.serve.usage.usage_database import DAY, UsageDatabase
from adapterhub.serve.usage.usage_recorder import UsageRecorder
from adapterhub_converters.errors import UsageError

ANSWER = AnswerRecord("r1", "chatcmpl-1", 9 * DAY, "ada", "team/a@1", "chat", "stable", "torch", "/v1/chat", 200, 0.5, 20, 3)
GOOD = Feedback("r1", "ada", "team/a@1", "chat", "stable", 9 * DAY, 1.0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place where nothing is recorded."""
    return tmp_path / "folder" / FILE


@pytest.fixture
def database(place: Place) -> Callable[[], UsageDatabase]:
    """Opens the tables at the place."""
    return lambda: usage_recorder.open_database(place)


@pytest.fixture
def recorder(place: Place) -> Callable[[], UsageRecorder]:
    """Returns the recorder of another gateway each time, on the tenth day."""
    return lambda: UsageRecorder(place, has_budgets=lambda: True, clock=lambda: 9.5 * DAY)


def add(recorder: UsageRecorder, key: str = "ada", version: str = "team/a", tokens: int = 23) -> None:
    counts = TokenCounts(tokens - 3, 16, 3)
    recorder.add(key=key, version=version, route="", arm="", engine="vllm", path="/v1/completions", tokens=counts)
    recorder.flush()


def test_gateways_add_to_the_same_sums(recorder: Callable[[], UsageRecorder], place: Place) -> None:
    left, right = recorder(), recorder()
    for _ in range(2):
        add(left)
        add(right)
    add(right, key="bob", version="team/b")
    report = usage_report.report(place, ["key", "day"], 0)
    assert [(row.group, row.usage.requests, row.usage.prompt_tokens, row.usage.answer_tokens) for row in report.rows] == [
        (("ada", "1970-01-10"), 4, 80, 12),
        (("bob", "1970-01-10"), 1, 20, 3),
    ]
    assert type(report.total.usage.cached_tokens) is int


def test_a_budget_counts_what_every_gateway_has_written(recorder: Callable[[], UsageRecorder]) -> None:
    left, right = recorder(), recorder()
    add(left)
    right.flush()
    assert right.spent_by("ada") == (23, 23)
    assert right.spent_by("bob") == (0, 0)


def test_an_answer_is_found_by_both_ids_and_for_its_key_only(recorder: Callable[[], UsageRecorder], place: Place) -> None:
    gateway = recorder()
    for key in ("ada", "bob"):
        gateway.add_answer(replace(ANSWER, key=key))
    gateway.flush()
    assert [answer.key for answer, _ in answer_log.find_answers(place, "r1")] == ["bob", "ada"]
    assert answer_log.find_answers(place, "chatcmpl-1", "ada") == [(ANSWER, None)]
    assert answer_log.find_answers(place, "chatcmpl-2") == []
    assert recorder().find_answer("r1", "ada") == (ANSWER, None)


def test_the_last_feedback_on_an_answer_counts(recorder: Callable[[], UsageRecorder], place: Place) -> None:
    gateway = recorder()
    gateway.add_answer(ANSWER)
    for score in (1.0, 0.2):
        gateway.add_feedback(replace(GOOD, score=score, comment="100 % 'so'\0 🦊"))
        gateway.flush()
    [(_, feedback)] = answer_log.find_answers(place, "r1")
    assert feedback is not None
    assert feedback.score == 0.2
    assert feedback.comment.startswith("100 % 'so'")
    assert answer_log.feedback_counts(place, "team/a@1") == (0, 1)
    assert [row.score for row in answer_log.feedback_since(place, 8 * DAY)] == [0.2]
    assert answer_log.feedback_since(place, 10 * DAY) == []


def test_only_the_newest_answers_and_their_feedback_are_kept(
    recorder: Callable[[], UsageRecorder], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_log, "MAX_ANSWERS", 2)
    gateway = recorder()
    for number in range(4):
        gateway.add_answer(replace(ANSWER, request=f"r{number}", time=float(number)))
        gateway.add_feedback(replace(GOOD, request=f"r{number}", time=float(number)))
    gateway.flush()
    assert [number for number in range(4) if answer_log.find_answers(place, f"r{number}")] == [2, 3]
    assert {row.request for row in answer_log.feedback_since(place, 0.0)} == {"r2", "r3"}


def test_old_rows_are_deleted(
    recorder: Callable[[], UsageRecorder], database: Callable[[], UsageDatabase], place: Place
) -> None:
    add(recorder())
    opened = database()
    opened.delete_old(1000.0 * DAY)
    assert usage_report.report(place, ["key"], 0).rows == []
    assert opened.tokens_by_key(9, 9) == {}
    opened.close()


def test_a_place_is_a_path_or_an_address_whose_password_is_not_shown() -> None:
    assert record_place.parse("folder/usage.db") == Path("folder/usage.db")
    place = record_place.parse("postgresql://ada:secret@db.example/usage")
    assert isinstance(place, PostgresAddress)
    assert str(place) == "postgresql://db.example/usage"
    assert "secret" not in repr(place)


@pytest.mark.parametrize("password", ["sec?ret", "sec#ret", "sec%2Fret", "sec:ret", "sec[ret"])
def test_a_password_of_any_characters_is_not_shown(password: str) -> None:
    for host in ("db.example:5432", "[::1]", "db1.example:1,db2.example:2", ""):
        place = record_place.parse(f"postgresql://ada:{password}@{host}/usage?user=bob@site&password={password}")
        assert str(place) == f"postgresql://{host}/usage"


@pytest.mark.parametrize(
    "address",
    [
        "mysql://db.example/usage",
        "POSTGRESQL://ada:secret@db.example/usage",
        "postgresql://ada:sec/ret@db.example/usage",
        "postgresql://ada:sec/r?et@db.example/usage",
        "postgresql://ada:sec@ret@db.example/usage",
        "postgresql://[::1/usage",
    ],
)
def test_an_address_that_is_not_clearly_that_of_postgresql_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(UsageError, match="not an address of PostgreSQL") as caught:
        record_place.parse(address)
    assert "sec" not in str(caught.value)
