"""Limits of tokens in a day and a month: of one key, over restarts and several gateways."""

from __future__ import annotations

import datetime
import hashlib
import time
from pathlib import Path

import pytest

from adapterhub.serve.gateway.calendar_budgets import CalendarBudget
from adapterhub.serve.gateway.openai_errors import ProblemError
from tests.support import llama_server, serving
from tests.support.serving import COUNT, Models

KEY = {"authorization": "Bearer ah-key-of-ada"}


@pytest.mark.parametrize(
    ("spent", "message", "seconds"),
    [
        ((100, 100), "More than 100 tokens today (UTC)", 3600),
        ((1, 1000), "More than 1000 tokens this month (UTC)", 3600 + 3 * 86400),
        ((100, 1000), "More than 1000 tokens this month (UTC)", 3600 + 3 * 86400),
    ],
)
def test_a_budget_that_is_used_up_says_when_the_next_begins(spent: tuple[int, int], message: str, seconds: int) -> None:
    budget = CalendarBudget(100, 1000)
    with pytest.raises(ProblemError) as caught:
        budget.check(*spent, now=lambda: datetime.datetime(2026, 11, 27, 23, tzinfo=datetime.UTC))
    assert (caught.value.status, str(caught.value)) == (429, message)
    assert int(caught.value.headers()["retry-after"]) == seconds + 1


def test_a_month_ends_with_its_year() -> None:
    with pytest.raises(ProblemError) as caught:
        CalendarBudget(0, 1).check(1, 1, now=lambda: datetime.datetime(2026, 12, 31, 23, 59, 30, tzinfo=datetime.UTC))
    assert caught.value.headers()["retry-after"] == "31"


def test_less_than_a_budget_is_answered() -> None:
    CalendarBudget(100, 1000).check(99, 999)
    CalendarBudget(0, 1000).check(10**9, 999)
    CalendarBudget(100, 0).check(99, 10**9)


@pytest.mark.peer
@pytest.mark.parametrize("limit", ["tokens_per_day", "tokens_per_month"])
def test_a_budget_survives_a_restart(models: Models, registry: Path, tmp_path: Path, limit: str) -> None:
    sha256 = hashlib.sha256(b"ah-key-of-ada").hexdigest()
    (tmp_path / "routes.toml").write_text(f"[keys.ada]\nsha256 = '{sha256}'\n{limit} = {COUNT + 1}\n")
    options = ("--program", llama_server.program(), "--route", tmp_path / "routes.toml", "--usage-file", tmp_path / "usage.db")
    with serving.gateway(models.gguf, registry, tmp_path, *options) as gateway:
        reply = gateway.complete("base", "x", headers=KEY)
        assert reply.status == 200
        while reply.headers["x-request-id"] not in gateway.log.read_text():
            time.sleep(0.02)
        assert gateway.complete("base", "x", headers=KEY).status == 429
    with serving.gateway(models.gguf, registry, tmp_path, *options) as gateway:
        refused = gateway.complete("base", "x", headers=KEY)
    assert refused.status == 429
    assert refused.document["error"]["message"].startswith(f"More than {COUNT + 1} tokens t")
    assert int(refused.headers["retry-after"]) > 0
