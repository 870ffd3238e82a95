"""A gateway in this process, on an engine that only remembers: what it holds of the disk, and by which rules it goes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from starlette.applications import Starlette

from adapterhub.operations.local_registry import Registry
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref
from adapterhub.serve import resolving
from adapterhub.serve.engines import Blend, EngineAnswer
from adapterhub.serve.gateway import engine_versions
from adapterhub.serve.gateway.app import create_app
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.gateway.openai_errors import ProblemError
from adapterhub.serve.model_names import AllowedNames
from adapterhub_converters.errors import RefusedError
from tests.support import folders

from .test_versions import Holder

Test = Callable[[Gateway, Holder], Coroutine[Any, Any, None]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GatewaySettings:
    """A registry with `team/sql`, and the working folder as a project; the gateway looks at all files at each moment."""
    monkeypatch.chdir(tmp_path)
    folders.adapter(tmp_path / "sql", folders.pairs(2))
    with Registry(tmp_path / "registry") as registry:
        registry.push(tmp_path / "sql", "team/sql")
    workspace = Workspace(registry=tmp_path / "registry", cache=tmp_path / "cache")
    return GatewaySettings(folders.base(tmp_path / "base"), "base", workspace, routes=tmp_path / "routes.toml", poll=0.01)


def in_loop(settings: GatewaySettings, test: Test) -> None:
    async def main() -> None:
        engine = Holder()
        gateway = Gateway(settings, engine)
        await gateway.start()
        try:
            await asyncio.wait_for(test(gateway, engine), 60)
        finally:
            await gateway.close()

    asyncio.run(main())


async def use(gateway: Gateway) -> None:
    version = await gateway._moving_refs.find(Ref.parse("team/sql"))
    async with gateway.versions.use([(version, 1.0)]):
        pass


async def until(happened: Callable[[], object]) -> None:
    while not happened():
        await asyncio.sleep(0.01)


def aged(settings: GatewaySettings) -> None:
    for folder in Path(str(settings.workspace.cache)).glob("served/sha256-*/*"):
        os.utime(folder, (1, 1))


def test_a_gc_removes_what_nobody_asked_for_in_a_while(settings: GatewaySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings.routes or Path()).touch()
    served = resolving.served_folder(settings.workspace)

    async def test(gateway: Gateway, engine: Holder) -> None:
        await use(gateway)
        aged(settings)
        assert served.sweep().in_use == 1
        monkeypatch.setattr(engine_versions, "IDLE", 0.0)
        await until(lambda: not engine.held)
        await until(lambda: (served.sweep().folders, aged(settings))[0])
        await use(gateway)  # made anew

    in_loop(settings, test)


@pytest.mark.parametrize("flag", ["warm", "pin"])
def test_a_warm_route_has_its_version_before_the_first_request_and_after_a_move(settings: GatewaySettings, flag: str) -> None:
    routes = settings.routes or Path()
    routes.write_text(f'[routes.legal]\nto = "team/sql:prod"\n{flag} = true\n')
    with Registry(settings.workspace.folder()) as registry:
        first = registry.tag("team/sql", "prod")

        async def test(gateway: Gateway, engine: Holder) -> None:
            assert engine.held == {f"team/sql@{first.digest}"}
            assert gateway.versions.pinned == (engine.held if flag == "pin" else frozenset())
            folders.adapter(Path("other"), folders.pairs(2), lora_alpha=8)
            second = registry.push("other", "team/sql:prod").digest
            await until(lambda: f"team/sql@{second}" in engine.held)
            if flag == "pin":
                await until(lambda: gateway.versions.pinned == {f"team/sql@{second}"})

        in_loop(settings, test)


def test_pins_leave_room_for_the_requests_of_others(settings: GatewaySettings, caplog: pytest.LogCaptureFixture) -> None:
    """And a version that is not there is waited for: it holds up no other."""
    routes = settings.routes or Path()
    targets = '{ "team/sql:v1" = 1, "team/sql:v2" = 1, "team/none" = 0 }'
    routes.write_text(f"[routes.legal]\nto = {targets}\npin = true\n")
    folders.adapter(Path("other"), folders.pairs(2), lora_alpha=8)
    with Registry(settings.workspace.folder()) as registry:
        registry.push("other", "team/sql")

    async def main() -> None:
        gateway = Gateway(settings, Holder(max_adapters=2))
        await gateway.start()
        assert len(gateway.versions.pinned) == 1
        await gateway.close()

    asyncio.run(main())
    assert "2 versions are pinned, and the engine has room for 1 of them; the others may be displaced" in caplog.text
    assert "a warm route waits for its version: team/none" in caplog.text


def test_the_policy_is_read_again_when_its_file_changes(settings: GatewaySettings, caplog: pytest.LogCaptureFixture) -> None:
    (settings.routes or Path()).touch()
    caplog.set_level("INFO", "adapterhub.serve")
    policy = Path("adapterhub.toml")

    async def test(gateway: Gateway, engine: Holder) -> None:
        await use(gateway)
        policy.write_text("[policy]\nmax_rank = 1\n")
        await until(lambda: "the policy has changed" in caplog.text)
        for _ in range(2):
            with pytest.raises(RefusedError, match="rank 2 is over 1"):
                await use(gateway)
        policy.write_text("[policy\n")
        await until(lambda: "the policy stays as it was" in caplog.text)
        with pytest.raises(RefusedError, match="rank 2 is over 1"):
            await use(gateway)
        policy.unlink()
        await until(lambda: caplog.text.count("the policy has changed") == 2)
        await use(gateway)
        assert len(engine.held) == 1

    in_loop(settings, test)


@pytest.mark.parametrize("name", ["team/sql", "hub/team/sql", "sql"])
def test_a_base_under_a_name_of_an_adapter_is_refused(settings: GatewaySettings, name: str) -> None:
    named = replace(settings, base_name=name, remote_name="hub", allowed=AllowedNames(("team/*",)), routes=None)

    async def test(_gateway: Gateway, _engine: Holder) -> None:
        raise AssertionError

    with pytest.raises(RefusedError, match="is the name of the base and of an adapter") as caught:
        in_loop(named, test)
    assert (caught.value.code, caught.value.hint) == ("name-of-base-and-adapter", "Give the base another one")


def test_so_is_that_of_the_registry(settings: GatewaySettings) -> None:
    (settings.routes or Path()).touch()

    async def is_refused(gateway: Gateway) -> bool:
        try:
            await use(gateway)
        except RefusedError as error:
            return "rank 2 is over 1" in str(error)
        return False

    async def test(gateway: Gateway, _engine: Holder) -> None:
        await use(gateway)
        (Path(str(settings.workspace.registry)) / "adapterhub.toml").write_text("[policy]\nmax_rank = 1\n")
        while not await is_refused(gateway):
            await asyncio.sleep(0.01)

    in_loop(settings, test)


def test_what_runs_goes_on_under_another_policy_and_then_leaves_the_engine(
    settings: GatewaySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settings.routes or Path()).touch()

    async def test(gateway: Gateway, engine: Holder) -> None:
        version = await gateway._moving_refs.find(Ref.parse("team/sql"))
        async with gateway.versions.use([(version, 1.0)]):
            Path("adapterhub.toml").write_text('[policy]\nallow = ["other/*"]\n')
            gateway.reload()
            with pytest.raises(RefusedError, match="not a name that"):
                await use(gateway)
            assert engine.held
        monkeypatch.setattr(engine_versions, "IDLE", 0.0)
        await until(lambda: not engine.held)

    in_loop(settings, test)


def test_a_blend_is_named_with_the_weights_that_were_asked_for(settings: GatewaySettings) -> None:
    async def test(gateway: Gateway, _engine: Holder) -> None:
        version = await gateway._moving_refs.find(Ref.parse("team/sql"))
        for weight in ("0.1234567", "-1000", "0.7", "1e-09"):
            assert gateway.version_of(((version, float(weight)),)) == f"{version.model}*{weight}"
        assert gateway.version_of(((version, 0.1 + 0.2),)) == f"{version.model}*0.3"

    in_loop(replace(settings, routes=None), test)


def test_who_has_no_key_and_who_asks_too_much_at_once_is_told_so(settings: GatewaySettings) -> None:
    (settings.routes or Path()).write_text(f'[keys.one]\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\nrunning = 1\n')

    async def test(gateway: Gateway, _engine: Holder) -> None:
        missing = "Send an API key as Authorization: Bearer KEY, or as x-api-key"
        for headers, words in (
            ({}, missing),
            ({"authorization": "Bearer x"}, "Incorrect API key"),
            ({"x-api-key": "x"}, "Incorrect API key"),
        ):
            with pytest.raises(ProblemError, match=words) as is_refused:
                gateway.access.key_of(headers)
            assert (is_refused.value.status, is_refused.value.code) == (401, "invalid_api_key")
        key = gateway.access.key_of({"authorization": "Bearer secret"})
        assert gateway.access.key_of({"x-api-key": "secret"}) is key
        for second, words in ((key, "This key has reached its limit of requests at once: 1"),
                              (None, "The gateway has reached its limit of requests at once: 1")):  # fmt: skip
            with gateway.admit(key), pytest.raises(ProblemError, match=words) as is_refused, gateway.admit(second):
                pass
            assert (is_refused.value.status, is_refused.value.code, is_refused.value.seconds) == (429, "rate_limit_exceeded", 1)
        with gateway.admit(key):
            pass

    in_loop(replace(settings, requests=1), test)


def test_routes_are_read_again_when_their_file_changes(settings: GatewaySettings) -> None:
    file = settings.routes or Path()
    file.write_text('[routes.legal]\nto = "team/sql"\n')

    async def test(gateway: Gateway, _engine: Holder) -> None:
        assert [*gateway.routes.routes] == ["legal"]
        file.write_text('[routes.sql]\nto = "team/sql"\n')
        await until(lambda: [*gateway.routes.routes] == ["sql"])

    in_loop(settings, test)


class Pausing(Holder):
    """An engine that streams two events, and never goes on."""

    async def request(self, path: str, body: Any, blend: Any) -> EngineAnswer:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(2):
                yield b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'
            await asyncio.Event().wait()

        return EngineAnswer(200, "text/event-stream", pieces())


def test_the_tokens_of_a_stream_that_its_client_leaves_are_estimated(
    settings: GatewaySettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "adapterhub.serve.requests")
    app = cast(Starlette, create_app(gateway := Gateway(replace(settings, routes=None), Pausing())))
    body = json.dumps({"model": "team/sql", "prompt": "x" * 40, "stream": True}).encode()
    headers = [(b"host", b"localhost"), (b"x-request-id", b"left")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}

    async def main() -> None:
        messages = [{"type": "http.request", "body": body}]
        sent: list[bytes] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await until(lambda: b"".join(sent).count(b"data:") == 2)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        async with app.router.lifespan_context(app):
            await until(lambda: gateway.ready)
            await app(scope, receive, send)

    asyncio.run(asyncio.wait_for(main(), 60))
    [fields] = [getattr(record, "fields") for record in caplog.records if record.name == "adapterhub.serve.requests"]  # noqa: B009
    assert (fields["id"], fields["answer_tokens"], fields["estimated"]) == ("left", 2, True)
    assert fields["prompt_tokens"] > 10
    assert "~" in caplog.text


class Loading(Holder):
    """An engine that is started once a test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def start(self) -> None:
        await self.go.wait()


def test_while_the_engine_is_being_started_clients_are_told_to_come_again(settings: GatewaySettings) -> None:
    engine = Loading()
    app = cast(Starlette, create_app(Gateway(replace(settings, routes=None), engine)))

    async def main() -> None:
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            body = {"model": "team/sql", "prompt": "x"}
            for reply in (await client.post("/v1/completions", json=body), await client.get("/v1/models")):
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
                error = reply.json()["error"]
                assert (error["code"], error["message"]) == ("service_unavailable", "The engine is starting")
            assert (await client.get("/health")).json()["status"] == "ok"
            assert await reason(client) == "the engine is starting"
            engine.go.set()
            await leaves(client, "the engine is starting")
            assert not await reason(client)

    asyncio.run(main())


async def leaves(client: httpx2.AsyncClient, state: str) -> None:
    """Wait until a gateway's reason not to be ready is another one; fail if it stays."""
    async with asyncio.timeout(60):
        while await reason(client) == state:
            await asyncio.sleep(0.01)


async def reason(client: httpx2.AsyncClient) -> str:
    """Why a gateway is not ready; empty if it is."""
    reply = await client.get("/ready")
    document = reply.json()
    ready = (200, "ready", None)
    assert (reply.status_code, document["status"], reply.headers.get("retry-after")) in (ready, (503, "not ready", "2"))
    return str(document.get("reason", ""))


def test_it_is_ready_while_its_engine_answers_and_names_can_be_looked_up(settings: GatewaySettings) -> None:
    engine = Holder()
    app = cast(Starlette, create_app(Gateway(replace(settings, routes=None), engine)))
    registry = Path(str(settings.workspace.registry))

    async def main() -> None:
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            await leaves(client, "the engine is starting")
            assert not await reason(client)
            engine.down = True
            assert await reason(client) == "the engine does not answer"
            engine.down = False
            registry.rename(registry.with_name("elsewhere"))
            assert await reason(client) == "names cannot be looked up"
            assert (await client.get("/health")).status_code == 200
            registry.with_name("elsewhere").rename(registry)
            assert not await reason(client)

    asyncio.run(main())


def test_without_a_registry_it_lists_and_serves_the_base_until_there_is_one(settings: GatewaySettings) -> None:
    app = cast(Starlette, create_app(Gateway(replace(settings, routes=None), Answering())))
    registry = Path(str(settings.workspace.registry))
    elsewhere = registry.rename(registry.with_name("elsewhere"))
    registry.mkdir()

    async def main() -> None:
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            await leaves(client, "the engine is starting")
            assert await reason(client) == "names cannot be looked up"
            assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["base"]
            assert (await client.post("/v1/completions", json={"model": "base", "prompt": "a"})).status_code == 200
            assert (await client.post("/v1/completions", json={"model": "team/a0:prod", "prompt": "a"})).status_code == 503
            registry.rmdir()
            elsewhere.rename(registry)
            assert not await reason(client)
            assert len((await client.get("/v1/models")).json()["data"]) > 1

    asyncio.run(main())


class Answering(Holder):
    """An engine that answers every request, and remembers the bodies."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.bodies: list[Mapping[str, Any]] = []

    async def request(self, path: str, body: Any, blend: Blend) -> EngineAnswer:
        async def whole() -> AsyncIterator[bytes]:
            yield b'{"choices": []}'

        self.bodies.append(body)
        return EngineAnswer(200, "application/json", whole())


def replies(settings: GatewaySettings, engine: Answering, *requests: tuple[str, dict[str, Any]]) -> list[httpx2.Response]:
    """The answers to completions, each asked for with a key and fields of its body."""
    app = cast(Starlette, create_app(Gateway(settings, engine)))

    async def main() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            await leaves(client, "the engine is starting")
            assert not await reason(client)
            posts = []
            for key, fields in requests:
                body = {"model": "base", "prompt": "x", **fields}
                posts.append(await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}))
            posts.append(await client.get("/v1/models/team/sql", headers={"authorization": f"Bearer {requests[0][0]}"}))
            return posts

    return asyncio.run(main())


@pytest.mark.parametrize("priorities", [True, False])
def test_priorities_are_those_of_keys_and_never_of_a_request(
    settings: GatewaySettings, priorities: bool, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"urgent": "\npriority = -5", "usual": ""}
    tables = (f"[keys.{name}]\nsha256 = '{hashlib.sha256(name.encode()).hexdigest()}'{line}" for name, line in keys.items())
    (settings.routes or Path()).write_text("\n".join(tables))
    engine = Answering(has_priorities=priorities)
    answers = replies(settings, engine, ("urgent", {}), ("usual", {}), ("usual", {"priority": -9}), ("urgent", {"priority": 0}))
    assert [body.get("priority") for body in engine.bodies] == [-5 if priorities else None, None]
    assert [reply.status_code for reply in answers[:4]] == [200, 200, 400, 400]
    assert answers[2].json()["error"]["param"] == "priority"
    assert ("holder has no priorities, so that those of urgent have no effect" in caplog.text) != priorities


def test_without_keys_a_priority_is_the_user_s_own(settings: GatewaySettings) -> None:
    engine = Answering()
    replies(replace(settings, routes=None), engine, ("", {"priority": 3}))
    assert engine.bodies[0]["priority"] == 3


def test_an_answer_from_a_deprecated_version_says_why_in_a_header(settings: GatewaySettings) -> None:
    unmarked = replace(settings, routes=None)
    sql = ("", {"model": "team/sql"})
    assert "x-adapterhub-deprecated" not in replies(unmarked, Answering(), sql)[0].headers
    for reason, header in (
        ("use v3", "use v3"),
        ("", "deprecated"),
        ("gr\u00fc\u00df\u202e\u6f22" + "x" * 300, "gr\u00fc\u00df ?" + "x" * 194),
    ):
        with Registry(settings.workspace.folder()) as registry:
            registry.deprecate("team/sql", reason)
        base, version, model = replies(unmarked, Answering(), ("", {}), sql)
        assert "x-adapterhub-deprecated" not in base.headers
        headers = [dict(reply.headers.raw)[b"x-adapterhub-deprecated"].decode("latin-1") for reply in (version, model)]
        assert headers == [header, header]


# ---- engines that answer with something else
