"""Shadows of routes: copies that change and delay nothing, are dropped first, and leave numbers but no text."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from adapterhub.digest import Digest
from adapterhub.serve.gateway import shadows
from adapterhub.serve.gateway.shadows import agreement, text_of
from adapterhub.serve.gateway.workers.host import HostGateway

from .test_rollouts import Arms, Running, run, versions  # noqa: F401

SHADOW = '[routes.sql]\nto = "team/sql:prod"\nshadow = "team/sql:v2"\n'


@pytest.fixture(autouse=True)
def shadow(versions: list[Digest], tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "routes.toml").write_text(SHADOW)


async def sums(gateway: Running, copies: int, name: str = "copies") -> dict[str, Any]:
    """Return what is known of the shadow, once it has so many copies."""
    while True:
        [*documents] = (await gateway.client.get("/v1/rollouts")).json()["shadows"]
        if documents and documents[0][name] >= copies:
            return dict(documents[0])
        await asyncio.sleep(0.005)


def test_the_client_gets_the_stable_answer_and_the_shadow_a_copy_after_it(versions: list[Digest], tmp_path: Path) -> None:  # noqa: F811
    async def test(gateway: Running) -> None:
        assert await gateway.ask(1) == {f"team/sql@{versions[0]}": 1}
        known_sums = await sums(gateway, 1)
        assert (known_sums["same"], known_sums["failed"], known_sums["agreement"]) == (1, 0, 1.0)
        assert f"team/sql@{versions[1]}" in gateway.engine.held

    run(tmp_path, test)


def test_a_shadow_that_fails_or_is_slow_changes_and_delays_no_answer(versions: list[Digest], tmp_path: Path) -> None:  # noqa: F811
    async def test(gateway: Running) -> None:
        gateway.engine.bad = {f"team/sql@{versions[1]}"}
        assert await gateway.ask(1) == {f"team/sql@{versions[0]}": 1}
        assert (await sums(gateway, 1))["failed"] == 1
        gateway.engine.slow = {f"team/sql@{versions[1]}"}
        assert await gateway.ask(5) == {f"team/sql@{versions[0]}": 5}  # its copy never ends, and four more are dropped
        assert (await sums(gateway, 4, "dropped"))["copies"] == 1

    run(tmp_path, test)


def test_copies_are_dropped_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: list[Digest]) -> None:  # noqa: F811
    async def test(gateway: Running) -> None:
        gateway.engine.slow = {f"team/sql@{versions[1]}"}
        await gateway.ask(1)
        while not gateway.gateway.shadows._tasks:
            await asyncio.sleep(0)
        monkeypatch.setattr(shadows, "_MAX_RUNNING", 0)
        await gateway.ask(1)  # ends the copy that runs, and gets none
        assert (await sums(gateway, 2, "dropped"))["copies"] == 0
        assert not gateway.gateway.shadows._tasks

    run(tmp_path, test)


def test_a_shadow_takes_no_room_of_another_version(tmp_path: Path) -> None:
    async def test(gateway: Running) -> None:
        gateway.gateway.versions.max_adapters = 1
        await gateway.ask(1)
        assert (await sums(gateway, 1, "dropped"))["copies"] == 0
        assert len(gateway.engine.held) == 1

    run(tmp_path, test)


@pytest.mark.parametrize(("allowed", "copies"), [(False, 0), (True, 1)])
def test_requests_with_tools_are_copied_only_if_the_route_says_so(tmp_path: Path, allowed: bool, copies: int) -> None:
    if allowed:
        (tmp_path / "routes.toml").write_text(SHADOW.replace('"team/sql:v2"', '{ to = "team/sql:v2", tools = true }'))

    async def test(gateway: Running) -> None:
        await gateway.ask(1, tools=[{"type": "function"}])
        if allowed:
            await sums(gateway, 1)
        assert sum(route_sums.copies + route_sums.dropped for route_sums in gateway.gateway.shadows.sums.values()) == copies

    run(tmp_path, test)


def test_a_gateway_of_several_workers_says_that_it_sends_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(gateway: Running) -> None:
        HostGateway(gateway.gateway.settings, Arms(), 2, lambda: None)._leases.close()
        assert "sends nothing to shadows" in caplog.text

    run(tmp_path, test)


def test_texts_are_compared_to_their_first_difference() -> None:
    stream = (
        b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"delta":{"content":"b"}}]}\n\ndata: [DONE]\n\n'
    )
    assert text_of(stream) == text_of(b'{"choices":[{"message":{"content":"ab"}}]}') == text_of(b'{"choices":[{"text":"ab"}]}')
    assert [text_of(body) for body in (b"", b"{", b"[]", b'{"choices":7}', b"data: {\n", b"\xff")] == [""] * 6
    assert [agreement(*pair) for pair in (("", ""), ("abcd", "abxd"), ("ab", "abcd"), ("x", ""))] == [1.0, 0.5, 0.5, 0.0]
