"""An engine whose answer is none is one error, whatever it sent before."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from starlette.applications import Starlette

from adapterhub.operations.local_registry import Registry
from adapterhub.operations.workspace import Workspace
from adapterhub.serve.engines import EngineAnswer, EngineDownError
from adapterhub.serve.engines.engine_client import Client
from adapterhub.serve.gateway import rewriting
from adapterhub.serve.gateway.app import create_app
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from tests.support import folders

from .test_versions import Holder


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GatewaySettings:
    """A registry with `team/sql`, and the working folder as a project; the gateway looks at all files at each moment."""
    monkeypatch.chdir(tmp_path)
    folders.adapter(tmp_path / "sql", folders.pairs(2))
    with Registry(tmp_path / "registry") as registry:
        registry.push(tmp_path / "sql", "team/sql")
    workspace = Workspace(registry=tmp_path / "registry", cache=tmp_path / "cache")
    return GatewaySettings(folders.base(tmp_path / "base"), "base", workspace, routes=tmp_path / "routes.toml", poll=0.01)


async def until(happened: Callable[[], object]) -> None:
    while not happened():
        await asyncio.sleep(0.01)


class Streaming(Holder):
    """An engine that streams these events, and then fails."""

    def __init__(self, *events: bytes) -> None:
        super().__init__()
        self.events = events

    async def request(self, path: str, body: Any, blend: Any) -> EngineAnswer:
        async def pieces() -> AsyncIterator[bytes]:
            for event in self.events:
                yield event
            raise EngineDownError("it has ended")

        return EngineAnswer(200, "text/event-stream", pieces())


def responses(settings: GatewaySettings, engine: Holder, times: int = 1, **fields: object) -> list[httpx2.Response]:
    """What a client gets from a gateway on an engine."""
    app = cast(Starlette, create_app(gateway := Gateway(replace(settings, routes=None), engine)))

    async def main() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            await until(lambda: gateway.ready)
            body = {"model": "team/sql", "prompt": "x", **fields}
            return [await client.post("/v1/completions", json=body) for _ in range(times)]

    return asyncio.run(main())


@pytest.mark.parametrize(("events", "status"), [((), 503), ((b'data: {"choices": []}\n\n',), 200)])
def test_an_engine_that_fails_before_its_first_event_is_an_error_with_its_status(
    settings: GatewaySettings, events: tuple[bytes, ...], status: int
) -> None:
    [reply] = responses(settings, Streaming(*events), stream=True)
    assert reply.status_code == status
    *before, last = reply.text.strip().split("\n\n")
    assert len(before) == len(events)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"
    assert reply.headers["x-adapterhub-version"].startswith("team/sql@sha256:")


class Elsewhere(Holder):
    """An engine that is a server: two answers are these bytes, and then more of them forever; later ones are right."""

    def __init__(self, first: bytes, forever: bytes = b"") -> None:
        super().__init__()
        self.answers = [(first, forever)] * 2  # a request on a connection that ended is sent again

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.client = Client(f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}")

    async def close(self) -> None:
        await self.client.close()
        self.server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")]
        body = json.loads(await reader.readexactly(length))
        right = json.dumps({"model": body["model"], "choices": []}).encode()
        first, forever = self.answers.pop() if self.answers else (b"HTTP/1.1 200 OK\r\n\r\n" + right, b"")
        with suppress(OSError):
            writer.write(first)
            while forever:
                writer.write(forever)
                await writer.drain()
            writer.close()

    async def request(self, path: str, body: Any, blend: Any) -> EngineAnswer:
        return await self.client.request(path, body, blend[0][0].model)


OK, JSON, EVENTS = b"HTTP/1.1 200 OK\r\n", b"content-type: application/json\r\n\r\n", b"content-type: text/event-stream\r\n\r\n"
WHOLE = {
    "a redirect": (b"HTTP/1.1 307 X\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n", b"", "failed: 307"),
    "another protocol": (b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", b"", "does not answer"),
    "a compressed answer": (OK + b"content-encoding: gzip\r\n" + JSON + gzip.compress(b'{"choices":[]}'), b"", "not UTF-8"),
    "a page": (OK + b"content-type: text/html\r\n\r\n<html>", b"", "not valid JSON"),
    "a list": (OK + JSON + b"[]", b"", "not a JSON object"),
    "half an object": (OK + JSON + b'{"choices":[', b"", "not valid JSON"),
    "no number": (OK + JSON + b'{"logprob":NaN}', b"", "not valid JSON"),
    "another model": (OK + JSON + b'{"model":"base","choices":[]}', b"", "by 'base', but another model was asked"),
    "no model": (OK + JSON + b'{"model":null,"choices":[]}', b"", "by 'None'"),
    "no end": (OK + JSON, b" " * 65536, "more than 1,048,576 bytes"),
    "no end of a header": (OK + b"x: ", b"y" * 65536, "does not answer"),
    "no end of headers": (OK, b"x: y\r\n" * 1000, "does not answer"),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n", b"", "does not answer"),
    "nothing": (b"", b"", "does not answer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_no_answer_is_one_error(settings: GatewaySettings, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(rewriting, "_MAX_ANSWER", 1 << 20)
    first, forever, words = WHOLE[kind]
    failed, _, right = responses(settings, Elsewhere(first, forever), 3)
    assert failed.status_code in (502, 503)
    assert failed.headers["content-type"] == "application/json"
    assert words in failed.json()["error"]["message"]
    assert right.json()["model"] == right.headers["x-adapterhub-version"]


STREAMS = {
    "no event": (b"\n", b"", "cut off"),
    "no end of the stream": (b'data: {"choices":[]}\n\n', b"", "cut off"),
    "no end of the last event": (b'data: {"choices":[]}\n\ndata: [DONE]', b"", "cut off"),
    "no JSON": (b"data: {\n\n", b"", "not valid JSON"),
    "a text": (b'data: "x"\n\n', b"", "not a JSON object"),
    "another model": (b'data:{"model":"team/other","choices":[]}\r\n\r\n', b"", "by 'team/other'"),
    "a line in another": (b': x\rdata: {"model":"team/other"}\n\n', b"", "a carriage return inside a line"),
    "an endless event": (b"data: ", b"x" * 65536, "more than"),
    "endless events": (b"", b'data: {"choices":[]}\n\n' * 1000, "more than"),
    "endless comments": (b"", b":\n\n" * 10_000, "more than"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_is_none_ends_with_an_error(
    settings: GatewaySettings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(rewriting, "_MAX_STREAM", 1 << 18)
    first, forever, words = STREAMS[kind]
    failed, _, right = responses(settings, Elsewhere(OK + EVENTS + first, forever), 3, stream=True)
    assert failed.status_code in (200, 502)
    last = failed.text.strip().rpartition("\n\n")[2].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "engine_failed"
    assert words in json.loads(last)["error"]["message"]
    assert "team/other" not in failed.text.replace(last, "")
    assert right.json()["model"] == right.headers["x-adapterhub-version"]
