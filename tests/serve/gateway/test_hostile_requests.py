"""Requests that try to get past the name of a version: one clean error each, and no engine is asked."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest

from adapterhub.http_server import binding, client_connections, request_bodies
from adapterhub.operations.local_registry import Registry
from adapterhub.operations.workspace import Workspace
from adapterhub.serve.engines import Blend, EngineAnswer
from adapterhub.serve.gateway import app
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.model_names import AllowedNames
from tests.support import folders

from .test_versions import Holder


class Remembering(Holder):
    """An engine that answers at once, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Mapping[str, Any], list[str]]] = []

    async def request(self, path: str, body: Any, blend: Blend) -> EngineAnswer:
        async def pieces() -> AsyncIterator[bytes]:
            yield b'{"model":"x","choices":[]}'

        self.calls.append((body, [served.name for served, _ in blend]))
        return EngineAnswer(200, "application/json", pieces())


class Sender:
    """Sends bytes to a running gateway with the adapter `team/sql`."""

    def __init__(self, address: tuple[str, int], engine: Remembering) -> None:
        self.address, self.engine = address, engine

    def __call__(self, raw: bytes) -> tuple[list[int], Any]:
        """The statuses of all answers, and the document of the last one, or its text; the server closes the connection."""
        self.engine.calls.clear()
        with socket.create_connection(self.address, timeout=60) as client:
            client.sendall(raw)
            reply = client.makefile("rb").read()
        statuses = [int(answer[:3]) for answer in reply.split(b"HTTP/1.1 ")[1:]]
        body = reply.rpartition(b"\r\n\r\n")[2].decode()
        return statuses, json.loads(body) if body.startswith("{") else body


@pytest.fixture(scope="module")
def send(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sender]:
    folder = tmp_path_factory.mktemp("gateway")
    folders.adapter(folder / "sql", folders.pairs(2))
    with Registry(folder / "registry") as registry:
        registry.push(folder / "sql", "team/sql")
    workspace = Workspace(registry=folder / "registry", cache=folder / "cache")
    settings = GatewaySettings(folders.base(folder / "base"), "base", workspace, allowed=AllowedNames(("team/*",)))
    gateway = Gateway(settings, engine := Remembering())
    sock = binding.open_listener("127.0.0.1", 0)
    server = client_connections.make_server(app.create_app(gateway), certificate=None, key=None, drain=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not gateway.ready:
        time.sleep(0.01)
    yield Sender(sock.getsockname(), engine)
    server.should_exit = True
    thread.join()


def asking(model: object) -> bytes:
    return json.dumps({"model": model, "prompt": "x"}).encode()


def request(
    body: bytes = asking("team/sql"), *headers: str, path: str = "/v1/completions", length: bool = True, last: bool = True
) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers]
    lines += [f"Content-Length: {len(body)}"] if length else []
    lines += ["Connection: close"] if last else []
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body


# ---- names

NAMES = [
    "TEAM/SQL", "team/\uff53ql", "team/s\u200dql", "team/sq\u0142", "base\u200b", "BASE", "base ",
    "team/sql\0", "team/sql\n", " team/sql", "team/../team/sql", "team\\sql", "team%2Fsql", "team/sql,team/sql",
    "team/sql:latest:latest", "team/sql@@sha256:0", "/etc/passwd",
    "layout:///tmp", "oci://evil.example/x", "hf://evil/x", "team/sql*inf",
    "team/sql*nan", "team/sql*1_0", "team/sql*\u0663", "team/sql*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_only_looks_like_a_name_is_not_there(send: Sender, name: str) -> None:
    statuses, document = send(request(asking(name)))
    assert (statuses, document["error"]["code"], send.engine.calls) == ([404], "model_not_found", [])


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"base","mod\\u0065l":"team/sql","prompt":"x"}',
        b'{"model":"base","prompt":"x","stream_options":{"a":1,"a":2}}',
        *map(asking, (["team/sql"], {"name": "team/sql"}, True, None, "")),
        asking("team/sql") + asking("base"),
        b"\xef\xbb\xbf" + asking("base"),
        asking("base").decode().encode("utf-16"),
        b'{"model":"team/\\ud800","prompt":"x"}',
        b'{"model":"base","temperature":NaN}',
        b'{"model":"base","temperature":1e999}',
        b'{"model":"base","max_tokens":1' + b"0" * 5000 + b"}",
    ],
)
def test_a_body_with_two_readings_has_none(send: Sender, body: bytes) -> None:
    statuses, document = send(request(body))
    assert (statuses, document["error"]["type"], send.engine.calls) == ([400], "invalid_request_error", [])


# ---- paths


@pytest.mark.parametrize(
    "path",
    ["/v1//completions", "/v1/completions/", "/x/../v1/completions", "/V1/completions", "/..%2f..%2fetc/passwd", "/page.js%00"],
)
def test_a_path_is_that_path_and_leads_nowhere_else(send: Sender, path: str) -> None:
    statuses, document = send(request(path=path))
    assert (statuses, send.engine.calls) == ([404], [])
    assert document["error"]["message"].endswith("is not answered here")


@pytest.mark.parametrize("path", ["/%761/completions", "/v1%2Fcompletions", "http://evil.example/v1/completions"])
def test_a_path_in_other_letters_is_the_same_path(send: Sender, path: str) -> None:
    statuses, document = send(request(path=path))
    assert statuses == [200]
    assert document["model"].startswith("team/sql@sha256:")
    assert [names for _, names in send.engine.calls] == [["team/sql"]]


# ---- heads

CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(asking("base")), asking("base"))
SECOND = request()
HEADS = {
    "a length and chunks": request(CHUNKED, "Transfer-Encoding: chunked"),
    "a request in the chunks": request(b"0\r\n\r\n" + SECOND, "Transfer-Encoding: chunked"),
    "two lengths": request(asking("base") + SECOND, f"Content-Length: {len(asking('base'))}"),
    "a length with a sign": request(b"hello", "Content-Length: +5", length=False),
    "a negative length": request(b"hello", "Content-Length: -5", length=False),
    "unknown chunks": request(CHUNKED, "Transfer-Encoding: xchunked", length=False),
    "a space before the colon": request(CHUNKED, "Transfer-Encoding : chunked"),
    "a line that goes on": request(asking("base"), "X-A: b\r\n c"),
    "lines without a return": request().replace(b"\r\n", b"\n"),
    "a zero": request(asking("base"), "X-A: a\0b"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a proxy": b"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_with_two_readings_ends_the_connection(send: Sender, kind: str) -> None:
    assert send(HEADS[kind]) == ([400], "Invalid HTTP request received.")
    assert send.engine.calls == []


@pytest.mark.parametrize("header", [f"X-A: {'a' * 200_000}", "\r\n".join(f"X-{number}: a" for number in range(20_000))])
def test_a_head_without_an_end_is_cut(send: Sender, header: str) -> None:
    with socket.create_connection(send.address, timeout=60) as client:
        client.sendall(request(asking("base"), header))
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    assert send.engine.calls == []


def test_headers_between_two_neighbors_change_nothing(send: Sender) -> None:
    headers = (
        "Connection: content-length, host, authorization",
        "Keep-Alive: 5",
        "TE: trailers",
        "X-Forwarded-Host: evil.example",
        "X-HTTP-Method-Override: DELETE",
        "Upgrade: websocket",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    statuses, document = send(request(asking("team/sql"), *headers))
    assert statuses == [200]
    assert document["model"].startswith("team/sql@sha256:")


def test_requests_on_one_connection_are_answered_one_by_one(send: Sender) -> None:
    statuses, _ = send(request(asking("base"), last=False) + request(asking("team/none"), last=False) + request())
    assert statuses == [200, 404, 200]
    assert [names for _, names in send.engine.calls] == [[], ["team/sql"]]


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_a_minute(send: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_bodies, "BODY_SECONDS", 0.05)
    with socket.create_connection(send.address, timeout=60) as client:
        client.sendall(request()[:-1])
        answer = client.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"message": "The body took more than 0 seconds"' in answer


def test_the_body_of_the_engine_is_that_of_the_client(send: Sender) -> None:
    odd = {"user": [1], "stream": "yes", "stream_options": "x", "no_such_field": {"a": [1.5, "\u00e9\U0001f600"]}}
    body = {"model": "team/sql", "prompt": "x", **odd}
    statuses, _ = send(request(json.dumps(body).encode()))
    assert statuses == [200]
    assert [request for request, _ in send.engine.calls] == [body]
