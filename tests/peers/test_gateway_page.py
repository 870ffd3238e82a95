"""The gateway's page in a real browser: where a rollout stands, and which version gave an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub import Registry
from tests.support import serving
from tests.support.browser import Browser

pytestmark = pytest.mark.peer

ROUTE = """
[routes.sql]
to = "team/sql:prod"
candidate = "team/sql:v2"
steps = [{ share = 50, for = "10m" }, 100]
bounds = { errors = 30 }
"""
_SHOWN = """
page.wait_for_selector("#rollouts section")
page.fill("#served input", ID)
page.press("#served input", "Enter")
page.wait_for_selector("#answer:not(:empty)")
result = {"rollouts": page.inner_text("#rollouts"), "answer": page.inner_text("#answer")}
"""


def test_it_draws_rollouts_and_finds_the_version_of_an_answer(chromium: Browser, tmp_path: Path) -> None:
    models = serving.make_models(tmp_path / "models")
    with Registry(tmp_path / "registry") as registry:
        for number in (0, 1):
            registry.push(models.adapter(number), "team/sql")
        registry.tag("team/sql:v1", "prod")
    (tmp_path / "routes.toml").write_text(ROUTE)
    options = ("--engine", "torch", "--route", tmp_path / "routes.toml")
    with serving.gateway(models.base, tmp_path / "registry", tmp_path / "gateway", *options) as gateway:
        answer = gateway.complete("sql", "abc")
        shown_page = chromium.visit(gateway.url, f"ID = {answer.headers['x-request-id']!r}\n{_SHOWN}")
        assert chromium.violations(gateway.url) == []
    assert "sql: running" in shown_page["rollouts"]
    assert "[50 %] → 100 %" in shown_page["rollouts"]
    assert "errors" in shown_page["rollouts"]
    assert answer.version.partition("@")[0] in shown_page["answer"]
    assert answer.version.partition("@")[2] in shown_page["answer"]
