"""The log of answers finds what a client gave an id, however often it gave that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.usage import answer_log
from adapterhub.serve.usage.answer_log import AnswerRecord
from adapterhub.serve.usage.usage_database import UsageDatabase
from adapterhub.sqlite_file import SqliteReader


def answer(request: str, ident: str, key: str = "ci") -> AnswerRecord:
    return AnswerRecord(
        request, ident, 1.0, key, "v", "", "", engine="e", path="/", status=200, seconds=1.0, prompt_tokens=1, answer_tokens=1
    )


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A record in which a client has given all its requests one id."""
    path = tmp_path / "usage.db"
    with closing(UsageDatabase(path)) as database:
        with database.transaction():
            database.add_answers([answer("same", f"a{number}") for number in range(200)], [])
            database.add_answers([answer("b", "same", "other"), answer("c", "same")], [])
        yield path


def test_the_newest_of_an_id_are_found_whether_it_is_of_the_request_or_of_the_answer(place: Path) -> None:
    matches = [(record.request, record.answer) for record, _ in answer_log.find_answers(place, "same", "ci")]
    assert matches[:2] == [("c", "same"), ("same", "a199")]
    assert len(matches) == answer_log._MAX_MATCHES
    assert [record.key for record, _ in answer_log.find_answers(place, "same")][:2] == ["ci", "other"]
    assert [record.answer for record, _ in answer_log.find_answers(place, "a7", "ci")] == ["a7"]


def test_all_answers_of_an_id_are_not_sorted_to_find_the_newest(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a million, each feedback took 0.7 s, while that of all others waited."""
    statements: list[tuple[str, tuple[object, ...]]] = []
    select = SqliteReader.select

    def listening(reader: SqliteReader, sql: str, *values: object) -> list[tuple[Any, ...]]:
        statements.append((sql, values))
        return select(reader, sql, *values)

    monkeypatch.setattr(SqliteReader, "select", listening)
    for key in ("ci", None):
        answer_log.find_answers(place, "same", key)
    with closing(UsageDatabase(place)) as database:
        plans = [database.select(f"EXPLAIN QUERY PLAN {sql}", *values) for sql, values in statements]
    assert len(plans) > 4
    steps = [step for plan in plans for *_, step in plan if "sqlite_master" not in step]
    assert not [step for step in steps if "TEMP B-TREE" in step or "SCAN" in step.split()]
