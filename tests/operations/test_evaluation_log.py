"""Evaluations of a version at a hub: recorded there for writers of its name, and measured all the same for readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.project import settings_file
from adapterhub.ref import Ref
from tests.conftest import Run
from tests.hub.conftest import Running, serving
from tests.support.adapters import Make
from tests.support.chat_server import chat_server, completion

RULES = '[promote.prod.require]\neval = { letters = "acc>0.7" }\n'


def write_results(folder: Path) -> Path:
    """The result file of lm-evaluation-harness for 40 samples of one task, for a model that it only names."""
    path = folder / "results_2026.json"
    results = {"results": {"letters": {"acc,none": 0.9}}, "n-samples": {"letters": {"original": 40, "effective": 40}}}
    path.write_text(
        json.dumps({**results, "config": {"model": "local-completions"}, "model_name": "sql", "lm_eval_version": "0.4.13"})
    )
    return path


@pytest.mark.parametrize("protocol", ["hub+http", "oci+http"])
def test_what_a_writer_measures_meets_the_requirement_at_the_hub_and_what_a_reader_measures_is_only_shown(
    protocol: str, make: Make, run: Run, tmp_path: Path
) -> None:
    policy = settings_file.parse(RULES, tmp_path / "rules.toml").policy
    with serving(tmp_path / "hub", policy=policy) as hub:
        with hub.registry() as registry:
            registry.author = "alice"
            registry.push(make("a1", 1), Ref.parse("team/sql:staging"))
        words = ["eval", address(hub, protocol), "--import", str(write_results(tmp_path)), "--trust-name", "--gate", "acc>0.8"]
        as_reader = run(*words, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.make_token("rita", "read")})
        assert "passed: acc>0.8 (0.9)" in as_reader.stdout
        assert "recorded for" not in as_reader.stdout
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
        promotion = ("promote", f"{hub.url.replace('http', 'hub+http', 1)}/team/sql@staging", "prod")
        assert "was not measured" in run(*promotion, env=env, code=6).stdout
        as_writer = run(*words, env=env)
        if protocol != "hub+http":  # which has no log
            assert "recorded for" not in as_writer.stdout
            return
        assert "not recorded: " in as_reader.stderr
        assert f"recorded for {address(hub, protocol)}" in as_writer.stdout
        assert "team/sql:prod is team/sql:v1" in run(*promotion, env=env).stdout
        log = run("log", promotion[1].partition("@")[0], env=env).stdout
        assert "letters: acc 0.9" in log
        assert "alice" in log


def test_an_endpoint_is_asked_for_the_version_at_an_address_and_junit_names_it(make: Make, run: Run, tmp_path: Path) -> None:
    (tmp_path / "golden.jsonl").write_text('{"id": "greets", "prompt": "hi", "contains": "hello"}\n')

    def answered(document: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return 200, {"x-adapterhub-version": document["model"]}, completion("hello")

    with serving(tmp_path / "hub") as hub, chat_server(answered) as (url, requests):
        with hub.registry() as registry:
            digest = registry.push(make("a1", 1), Ref.parse("team/sql:staging")).digest
        words = ("eval", address(hub, "hub+http"), "--tests", "golden.jsonl", "--url", url, "--junit", "golden.xml")
        result = run(*words, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token})
        with hub.registry() as registry:
            [evaluation] = registry.show(Ref("team/sql"))["evaluations"]
    assert f"recorded for {address(hub, 'hub+http')}" in result.stdout
    assert evaluation["cases"] == {"greets": 1.0}
    assert requests[0][1]["model"] == f"team/sql@{digest}"
    assert f'value="team/sql@{digest}"' in (tmp_path / "golden.xml").read_text()


def address(hub: Running, protocol: str) -> str:
    return f"{hub.url.replace('http', protocol, 1)}/team/sql{'@' if protocol == 'hub+http' else ':'}staging"
