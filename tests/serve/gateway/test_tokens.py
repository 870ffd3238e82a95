"""The tokens of requests to a running gateway: in its metrics and in its log, as the engine has counted them."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.gateway.metrics import Metrics
from adapterhub.serve.usage import usage_report
from adapterhub.serve.usage.record_place import FILE
from adapterhub.serve.usage.token_counts import TokenCounts
from tests.support import llama_server, serving
from tests.support.serving import COUNT, Gateway, Models

P = "the quick brown fox "
KEY = {"authorization": "Bearer ah-key-of-ada"}
ROUTES = f"""
    [routes.legal]
    to = {{ "team/a1:prod" = 1 }}
    [keys.ada]
    sha256 = "{hashlib.sha256(b"ah-key-of-ada").hexdigest()}"
"""


@pytest.fixture(scope="module")
def gateway(models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "routes.toml").write_text(ROUTES)
    options = ("--program", llama_server.program(), "--route", folder / "routes.toml")
    with serving.gateway(models.gguf, registry, folder, *options) as running:
        yield running


def line_of(gateway: Gateway, request: str) -> dict[str, Any]:
    """Return the fields of a request's line in the log, which is written after the answer has been sent."""
    while True:
        for line in gateway.log.read_text().splitlines():
            if request in line and line.endswith("}") and "status" in (fields := json.loads(line)):
                return dict(fields)
        time.sleep(0.02)


def tokens_of_kind(gateway: Gateway, kind: str) -> int:
    """Return the tokens of a kind in the metrics, of all labels."""
    page = gateway.get("/metrics", **KEY).body.decode()
    return sum(int(float(number)) for number in re.findall(rf'adapterhub_tokens_total{{.*kind="{kind}".*}} (.*)', page))


@pytest.mark.peer
@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_a_request_are_those_that_the_engine_reports(gateway: Gateway, stream: bool) -> None:
    before = {kind: tokens_of_kind(gateway, kind) for kind in ("prompt", "cached", "answer")}
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    reply = gateway.complete("legal", P, headers=KEY, **options)
    [reported] = re.findall(r'"usage":({.*?}})', reply.body.decode())
    usage = json.loads(reported)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    fields = line_of(gateway, reply.headers["x-request-id"])
    assert (fields["prompt_tokens"], fields["cached_tokens"], fields["answer_tokens"], fields["estimated"]) == (
        usage["prompt_tokens"],
        cached,
        COUNT,
        False,
    )
    assert (fields["route"], fields["arm"], fields["engine"], fields["key"]) == ("legal", "team/a1:prod", "llama.cpp", "ada")
    assert f"{usage['prompt_tokens']}+{COUNT} tokens" in fields["message"]
    assert tokens_of_kind(gateway, "prompt") - before["prompt"] == usage["prompt_tokens"]
    assert tokens_of_kind(gateway, "cached") - before["cached"] == cached
    assert tokens_of_kind(gateway, "answer") - before["answer"] == COUNT


@pytest.mark.peer
def test_the_usage_of_a_chat_is_known_although_its_client_did_not_ask_for_it(gateway: Gateway) -> None:
    body = {"model": "team/a2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "logit_bias": serving.BIAS}
    reply = gateway.post("/v1/chat/completions", {**body, "stream": True}, **KEY)
    assert b"usage" not in reply.body
    fields = line_of(gateway, reply.headers["x-request-id"])
    assert (fields["answer_tokens"], fields["estimated"], fields["route"], fields["arm"]) == (8, False, "", "")
    assert fields["prompt_tokens"] > 2


@pytest.mark.peer
def test_a_request_that_no_engine_was_asked_has_no_tokens(gateway: Gateway) -> None:
    reply = gateway.complete("team/none", P, headers=KEY)
    fields = line_of(gateway, reply.headers["x-request-id"])
    assert (fields["status"], fields["engine"], fields["prompt_tokens"], fields["estimated"]) == (404, "", 0, False)


@pytest.mark.peer
def test_what_was_served_is_recorded_beside_the_registry_while_the_gateway_runs(gateway: Gateway, registry: Path) -> None:
    assert gateway.complete("legal", P, headers=KEY).status == 200
    expected = ("ada", "legal", "team/a1:prod", "llama.cpp")
    while expected not in {
        row.group for row in usage_report.report(registry / FILE, ["key", "route", "arm", "engine"], 0).rows
    }:
        time.sleep(0.05)


@pytest.mark.peer
def test_the_last_requests_are_recorded_when_the_gateway_ends(models: Models, registry: Path, tmp_path: Path) -> None:
    options = ("--program", llama_server.program(), "--usage-file", tmp_path / "here" / "mine.db")
    with serving.gateway(models.gguf, registry, tmp_path, *options) as running:
        replies = [running.complete(name, P) for name in ("team/a0", "team/a0", "team/none")]
    assert [reply.status for reply in replies] == [200, 200, 404]
    usages = [reply.document["usage"] for reply in replies[:2]]
    total = usage_report.report(tmp_path / "here" / "mine.db", ["key"], 0).total.usage
    assert (total.requests, total.estimated, total.answer_tokens) == (2, 0, 2 * COUNT)
    assert total.prompt_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert total.cached_tokens == sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)


def test_the_labels_of_tokens_are_bounded() -> None:
    metrics = Metrics(1, is_up=lambda: True)
    for number in range(1100):
        metrics.count_tokens(f"team/a{number}", "ada", "", "", TokenCounts(1, 0, 1))
    lines = [line for line in metrics.page().decode().splitlines() if line.startswith("adapterhub_tokens_total")]
    assert len(lines) == 3 * 1001
    assert 'adapterhub_tokens_total{arm="other",key="other",kind="answer",route="other",version="other"} 100.0' in lines
