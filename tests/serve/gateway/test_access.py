"""What a key may do at several gateways of one machine: as much as at one of them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapterhub.http_server.rate_windows import Windows
from adapterhub.operations.workspace import Workspace
from adapterhub.serve.gateway.access import limits_of
from adapterhub.serve.gateway.front import GatewayRequest
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.gateway.openai_errors import ProblemError
from adapterhub.serve.gateway.rewriting import Usage
from adapterhub.serve.gateway.route_file import Key
from tests.support import folders, llama_server, serving
from tests.support.serving import COUNT, Models

from .test_versions import Holder

HEADERS = {"authorization": "Bearer ah-key-of-ada"}
SHA256 = hashlib.sha256(b"ah-key-of-ada").hexdigest()
Test = Callable[[Gateway, Gateway, Key], Coroutine[Any, Any, None]]


def on_two_gateways(tmp_path: Path, limits: str, test: Test) -> None:
    """Run a test on two gateways with one record of usage and a key with limits."""
    (tmp_path / "routes.toml").write_text(f"[keys.ada]\nsha256 = '{SHA256}'\n{limits}\n")
    workspace = Workspace(registry=tmp_path / "registry", cache=tmp_path / "cache")
    base, routes, usage = folders.base(tmp_path / "base"), tmp_path / "routes.toml", tmp_path / "usage.db"
    settings = GatewaySettings(base, "base", workspace, routes=routes, usage=usage)

    async def main() -> None:
        gateways = [Gateway(settings, Holder()) for _ in range(2)]
        try:
            for gateway in gateways:
                await gateway.start()
            left, right = gateways
            key = left.access.key_of(HEADERS)
            assert key
            await test(left, right, key)
        finally:
            for gateway in gateways:
                await gateway.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_its_requests_are_counted_once(tmp_path: Path) -> None:
    async def test(left: Gateway, right: Gateway, key: Key) -> None:
        for gateway in (left, right, left):
            with gateway.admit(key):
                pass
        for gateway in (left, right):
            with pytest.raises(ProblemError, match="More than 3 requests in 60 seconds"), gateway.admit(key):
                pass

    on_two_gateways(tmp_path, "requests = '3/60'", test)


def test_so_are_those_that_run(tmp_path: Path) -> None:
    async def test(left: Gateway, right: Gateway, key: Key) -> None:
        with left.admit(key), pytest.raises(ProblemError, match="its limit of requests at once: 1"), right.admit(key):
            pass
        with right.admit(key):
            pass

    on_two_gateways(tmp_path, "running = 1", test)


def test_its_tokens_count_at_the_other_before_the_client_has_the_end_of_its_answer(tmp_path: Path) -> None:
    async def test(left: Gateway, right: Gateway, key: Key) -> None:
        request = GatewayRequest("/v1/completions", HEADERS, key)
        request.usage = usage = Usage({})
        usage.count({"usage": {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}})
        await left.settle(request)
        with pytest.raises(ProblemError, match="More than 100 tokens in 60 seconds"), right.admit(key):
            pass
        left.record_end(request, 200, 0.1, 0.2)
        assert right.access._limits.count("ada", "tokens", key.tokens, 0).remaining == 0  # type: ignore[arg-type]
        assert left.access._limits.count("ada", "tokens", key.tokens, 1).over  # type: ignore[arg-type]

    on_two_gateways(tmp_path, "tokens = '100/60'", test)


def test_the_file_is_beside_the_record_of_usage(tmp_path: Path) -> None:
    for usage, limits in (("usage.db", "usage.limits.db"), ("mine", "mine.limits.db")):
        opened = limits_of(tmp_path / usage)
        opened.count("ada", "requests", Windows(2, 60))
        opened.close()
        assert (tmp_path / limits).exists()


@pytest.mark.peer
def test_two_programs_that_were_started_by_themselves_share_what_a_key_may_do(
    models: Models, registry: Path, tmp_path: Path
) -> None:
    routes = tmp_path / "routes.toml"
    routes.write_text(f"[keys.ada]\nsha256 = '{SHA256}'\nrequests = '3/3600'\ntokens = '{2 * COUNT}/3600'\n")
    options = ("--program", llama_server.program(), "--route", routes)
    with (
        serving.gateway(models.gguf, registry, tmp_path / "left", *options) as left,
        serving.gateway(models.gguf, registry, tmp_path / "right", *options) as right,
    ):
        replies = [gateway.complete("base", "x", headers=HEADERS) for gateway in (left, right, left, right)]
    assert [reply.status for reply in replies] == [200, 200, 429, 429]
    messages = [reply.document["error"]["message"] for reply in replies[2:]]
    assert messages == [f"More than {2 * COUNT} tokens in 3,600 seconds", "More than 3 requests in 3,600 seconds"]


def test_a_key_with_a_budget_waits_until_the_record_can_be_read(tmp_path: Path) -> None:
    """What it had spent is unknown; taken for nothing, each restart beside a broken disk would renew its budget."""
    record = tmp_path / "usage.db"
    record.mkdir()

    async def test(left: Gateway, _: Gateway, key: Key) -> None:
        with pytest.raises(ProblemError, match="cannot be read for now") as refusal, left.admit(key):
            pass
        assert refusal.value.status == 503
        record.rmdir()
        while left.access._recorder.spent_by(key.name) is None:
            await asyncio.sleep(0.01)
        with left.admit(key):
            pass

    on_two_gateways(tmp_path, "tokens_per_day = 100", test)
