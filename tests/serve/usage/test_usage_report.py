"""Sums of usage, and what they cost."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.serve.usage import price_list, usage_report
from adapterhub.serve.usage.record_place import FILE
from adapterhub.serve.usage.usage_database import DAY, HOUR, UsageDatabase, UsageKey, UsageSum
from adapterhub_converters.errors import NotFoundError, UsageError

PRICES = """
currency = "EUR"
[prices."team/sql"]
prompt = 1.0
cached = 0.25
answer = 4
[prices."team/*"]
prompt = 0.5
answer = 0
"""
SQL = "team/sql@sha256:5fcb"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with closing(UsageDatabase(tmp_path / FILE)) as database:
        for day, key, version, count in (
            (1, "ada", SQL, 2),
            (1, "bob", SQL, 1),
            (2, "ada", "team/tone", 4),
            (2, "", "base", 1),
        ):
            usage = UsageSum(count, 0, count * 1_000_000, count * 400_000, count * 100_000)
            database.add({UsageKey(day * DAY + 3 * HOUR, key, version, "", "", "vllm", "/v1/completions"): usage})
    return tmp_path / FILE


def test_usage_is_summed_by_what_was_asked_for(file: Path) -> None:
    report = usage_report.report(file, ["key"], 0)
    assert [(row.group, row.usage.requests) for row in report.rows] == [(("ada",), 6), (("",), 1), (("bob",), 1)]
    assert report.total.usage == UsageSum(8, 0, 8_000_000, 3_200_000, 800_000)
    by_day = usage_report.report(file, ["version", "day"], 0)
    assert [row.group for row in by_day.rows] == [(SQL, "1970-01-02"), ("team/tone", "1970-01-03"), ("base", "1970-01-03")]
    assert [row.group for row in usage_report.report(file, ["version"], 2 * DAY).rows] == [("team/tone",), ("base",)]


def test_costs_are_of_the_first_pattern_that_matches(file: Path, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    report = usage_report.report(file, ["key"], 0, price_list.read(tmp_path / "prices.toml"))
    costs = {row.group[0]: row.cost for row in report.rows}
    # A million tokens of a prompt, 400,000 of them cached, and 100,000 of an answer.
    assert costs["bob"] == pytest.approx(0.6 * 1.0 + 0.4 * 0.25 + 0.1 * 4)
    assert costs["ada"] == pytest.approx(2 * 1.1 + 4 * 0.5)
    assert costs[""] is None
    assert report.total.cost == pytest.approx(3 * 1.1 + 2.0)
    assert report.unpriced == ("base",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no tables of prices"),
        ("prices = 7", "no tables of prices"),
        ("[prices]\nx = 7", "no tables of prices"),
        ("[prices.x]\nprompt = 1", "prices.x.answer: is missing"),
        ("[prices.x]\nprompt = -1\nanswer = 1", "prices.x.prompt: not a price"),
        ("[prices.x]\nprompt = true\nanswer = 1", "prices.x.prompt: not a price"),
        ("[prices.x]\nprompt = 1\nanswer = 1\noutput = 1", "output: unknown"),
        ("currency = 7\n[prices.x]\nprompt = 1\nanswer = 1", "currency: not a short text"),
        ("price = 1", "price: unknown"),
    ],
)
def test_a_malformed_price_list_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        price_list.read(tmp_path / "prices.toml")
    assert caught.value.code == "invalid-config"


def test_a_file_that_a_gateway_is_creating_has_no_usage_yet(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    assert usage_report.report(tmp_path / FILE, ["key"], 0).rows == []
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE usage (hour INTEGER)")
        assert usage_report.report(tmp_path / FILE, ["key"], 0).rows == []


def test_without_a_record_there_is_nothing_to_sum(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no usage was recorded there") as caught:
        usage_report.report(tmp_path / FILE, ["key"], 0)
    assert caught.value.code == "no-usage"
