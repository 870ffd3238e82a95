"""Whoever has had threads work for their share of a minute waits, on every route; a request that has had its share ends."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from adapterhub.http_server import work_time
from adapterhub.http_server.request_bodies import BodyError
from adapterhub.http_server.work_time import ClientWork, WorkMeter
from adapterhub.hub.converted_versions import ConvertedVersions
from adapterhub.hub.middleware import AuditMiddleware
from adapterhub_converters.errors import RefusedError
from tests.attacks.test_hub_refused_rates import ALWAYS, ROUTES, ask
from tests.hub.conftest import Running, serving
from tests.support.adapters import write_adapter
from tests.support.hub_tenants import Tenant

CLIENTS = 60


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A hub where what a few requests take is the share of a minute."""
    monkeypatch.setattr(work_time, "MAX_OF_STRANGER", 0.001)
    monkeypatch.setattr(work_time, "MAX_OF_ACCOUNT", 0.001)
    with serving(tmp_path / "hub", behind_proxy=True) as running:
        yield running


def spend(hub: Running, address: str, token: str = "") -> None:
    for _ in range(200):
        if ask(hub, "GET", "/api/models", address, token).status_code == 429:
            return
    raise AssertionError("no limit")


def test_every_route_tells_a_network_that_has_had_its_share_to_wait(hub: Running) -> None:
    spend(hub, "2001:db8:0:1::1")
    for route in ROUTES:
        path = re.sub(r"{\w+(:path)?}", "red", route.path)
        for method in (route.methods or set()) if path not in ALWAYS else ():
            answer = ask(hub, method, path, "2001:db8:0:1::ffff", token="wrong" if len(path) % 2 else "")
            assert answer.status_code == 429, (method, path)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert ask(hub, "GET", "/health", "2001:db8:0:1::1").status_code == 200
    assert ask(hub, "GET", "/api/models", "2001:db8:0:1::1", hub.token).status_code == 200


def test_an_account_that_has_had_its_share_waits_wherever_it_is_and_others_go_on(hub: Running) -> None:
    spend(hub, "203.0.113.1", hub.token)
    assert ask(hub, "GET", "/api/models", "203.0.113.2", hub.token).status_code == 429
    assert ask(hub, "GET", "/api/models", "203.0.113.2", hub.make_token("ada", "read")).status_code == 200


def test_requests_that_were_sent_at_once_wait_too(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a client had sent before the first one ended was worked on: each was asked for its share when it arrived."""
    together, answer = asyncio.Barrier(CLIENTS), AuditMiddleware.__call__

    async def answer_together(middleware: AuditMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await together.wait()
        await answer(middleware, scope, receive, send)

    monkeypatch.setattr(AuditMiddleware, "__call__", answer_together)
    with ThreadPoolExecutor(CLIENTS) as pool:
        statuses = [*pool.map(lambda _: ask(hub, "GET", "/api/models", "203.0.113.1").status_code, range(CLIENTS))]
    assert {*statuses} == {200, 429}
    assert statuses.count(200) < CLIENTS // 2, "more than the threads had begun"


def test_the_work_of_a_conversion_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account could have versions converted without end: only those of strangers were counted, by their number."""
    counted: dict[str, float] = {}
    spent: list[float] = []

    def make(*_: object) -> None:
        started = time.thread_time()
        sum(range(1_000_000))
        spent.append(time.thread_time() - started)
        raise RefusedError("red/open", "is not converted")

    def count(_work: ClientWork, _network: str, account: str, seconds: float) -> None:
        counted[account] = counted.get(account, 0.0) + seconds

    with serving(tmp_path / "hub") as hub:
        red = Tenant(hub, "red")
        red.create("open")
        assert red.upload("open", write_adapter(tmp_path / "adapter", 1)).ok
        monkeypatch.setattr(ConvertedVersions, "_make", make)
        monkeypatch.setattr(ClientWork, "count", count)
        assert red.get("/api/models/red/open.v1.mlx").status_code == 400
    assert counted["red"] > sum(spent) > 0


def test_what_goes_on_without_its_client_counts() -> None:
    work, meter = work_time.ClientWork(), WorkMeter()
    meter.on_work = lambda seconds: work.count("203.0.113.0/24", "", seconds + work_time.MAX_OF_STRANGER)
    meter.exceeded = lambda: work.exceeded("203.0.113.0/24", str)
    meter.with_timer(lambda: None)()
    assert meter.exceeded()
    meter.with_timer(lambda: None)()  # of the same request, which has begun: what it has changed is not left half done
    with pytest.raises(BodyError, match="try again in"):
        WorkMeter(exceeded=meter.exceeded).with_timer(lambda: None)()


def test_work_of_less_than_a_millisecond_counts_as_often_as_it_comes() -> None:
    work = work_time.ClientWork()
    for _ in range(100_000):
        work.count("203.0.113.0/24", "", 0.0004)
    assert work.exceeded("203.0.113.0/24", str)


def test_no_work_begins_for_a_request_that_has_had_its_share(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_time, "MAX_OF_REQUEST", -1.0)
    answer = ask(hub, "GET", "/api/models", "203.0.113.1", hub.token)
    assert (answer.status_code, "has taken over" in answer.text) == (429, True)
