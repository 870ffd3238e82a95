"""`adapterhub usage`: what was served, as a table, as CSV and as JSON."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.serve.usage.record_place import FILE
from adapterhub.serve.usage.usage_database import UsageDatabase, UsageKey, UsageSum
from tests.conftest import Run

PRICES = 'currency = "EUR"\n[prices."team/*"]\nprompt = 1\nanswer = 2\n'


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    hour = int(time.time()) // 3600 * 3600
    with closing(UsageDatabase(tmp_path / FILE)) as database:
        for key, version, count in (("ada", "team/sql@sha256:5f", 3), ("=cmd()", "base", 1)):
            row = UsageKey(hour, key, version, "", "", "vllm", "/v1/completions")
            database.add({row: UsageSum(count, 1, 1000 * count, 200 * count, 10 * count)})
    return tmp_path


def test_the_table_has_a_total(run: Run, recorded: Path) -> None:
    rows = [line.split() for line in run("usage", "--registry", recorded).stdout.splitlines()]
    assert rows == [
        ["VERSION", "REQUESTS", "ESTIMATED", "PROMPT", "CACHED", "ANSWER"],
        ["team/sql@sha256:5f", "3", "1", "3,000", "600", "30"],
        ["base", "1", "1", "1,000", "200", "10"],
        ["total", "4", "2", "4,000", "800", "40"],
    ]


def test_programs_get_numbers_and_costs(run: Run, recorded: Path) -> None:
    (recorded / "prices.toml").write_text(PRICES)
    words = ("usage", "--usage-file", recorded / FILE, "--by", "key,version", "--since", "1d", "--prices", "prices.toml")
    ended = run(*words, "--json")
    document = json.loads(ended.stdout)
    assert (document["by"], document["currency"], document["unpriced"]) == (["key", "version"], "EUR", ["base"])
    assert document["rows"][0] == {
        "key": "ada", "version": "team/sql@sha256:5f", "requests": 3, "estimated": 1, "prompt_tokens": 3000,
        "cached_tokens": 600, "answer_tokens": 30, "cost": 0.00306,
    }  # fmt: skip
    assert document["rows"][1]["cost"] is None
    assert document["total"]["requests"] == 4
    assert "no price: base" in ended.stderr
    assert run(*words, "--csv").stdout.splitlines() == [
        "key,version,requests,estimated,prompt_tokens,cached_tokens,answer_tokens,cost",
        "ada,team/sql@sha256:5f,3,1,3000,600,30,0.00306",
        "=cmd(),base,1,1,1000,200,10,",
    ]
    assert "COST EUR" in run(*words).stdout


def test_nothing_since_then_is_said(run: Run, recorded: Path) -> None:
    assert run("usage", "--registry", recorded, "--since", "2999-01-01").stdout == "no requests since 2999-01-01T00:00:00Z\n"


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("--by", "model"), 2, "'model' is unknown. There are key, version, route, arm, engine, day"),
        (("--csv", "--json"), 2, "--csv and --json exclude each other"),
        (("--since", "soon"), 2, "soon: is neither an age nor a date"),
        (("--usage-file", "nowhere"), 3, "no usage was recorded there"),
    ],
)
def test_what_cannot_be_summed_is_refused(run: Run, recorded: Path, words: tuple[str, ...], code: int, line: str) -> None:
    assert line in run("usage", "--registry", recorded, *words, code=code).stderr
