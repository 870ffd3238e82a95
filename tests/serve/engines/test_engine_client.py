"""A client of an engine's server: its connections, and answers that break off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from adapterhub.serve.engines import EngineDownError, engine_client
from adapterhub.serve.engines.engine_client import Client
from adapterhub.serve.engines.engine_stream import EngineNetwork, EngineStream

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Asking = Callable[[Client], Awaitable[bytes]]
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


async def ask(client: Client) -> bytes:
    answer = await client.request("/v1/completions", {"prompt": "x"})
    return b"".join([piece async for piece in answer.body])


async def manage(client: Client) -> bytes:
    return json.dumps((await client.call("POST", "/models/load", {"model": "x"}))[1]).encode()


def answers_of(answering: Answering, times: int, asking: Asking = ask) -> list[bytes]:
    """What a client gets from a server that answers like this, one request after the other."""

    async def main() -> list[bytes]:
        server = await asyncio.start_server(answering, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return [await asking(client) for _ in range(times)]
        finally:
            await client.close()
            server.close()

    return asyncio.run(main())


async def request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    [length] = [int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")]
    await reader.readexactly(length)


@pytest.mark.parametrize("asking", [ask, manage])
def test_a_connection_that_the_server_has_closed_is_opened_again(asking: Asking) -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(OK)
        await request(reader)  # the second one on this connection comes too late
        writer.close()

    assert answers_of(answering, 3, asking) == [b"{}"] * 3


@pytest.mark.parametrize(("closed_connections", "answers"), [(1, True), (2, False)])
def test_a_new_connection_that_the_server_closed_before_its_request_is_opened_once_more(
    monkeypatch: pytest.MonkeyPatch, closed_connections: int, answers: bool
) -> None:
    connections: list[bool] = []

    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(len(connections) < closed_connections)
        if not connections[-1]:
            await request(reader)
            writer.write(OK)
        writer.close()

    class HeldUpNetwork(EngineNetwork):
        """A network whose new connections are used once the server has closed those that it closes."""

        async def connect_tcp(self, *words: Any, **options: Any) -> EngineStream:
            stream = await super().connect_tcp(*words, **options)
            while not connections or (connections[-1] and not stream._transport.is_closing()):
                await asyncio.sleep(0)
            return stream

    monkeypatch.setattr(engine_client, "EngineNetwork", HeldUpNetwork)
    if answers:
        assert answers_of(answering, 1) == [b"{}"]
    else:
        with pytest.raises(EngineDownError, match="closed the connection"):
            answers_of(answering, 1)
    assert len(connections) == 2


def test_an_answer_that_breaks_off_is_an_error() -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(OK.replace(b"length: 2", b"length: 9"))
        await writer.drain()
        writer.close()

    with pytest.raises(EngineDownError):
        answers_of(answering, 1)


def test_nobody_answers() -> None:
    async def main() -> None:
        client = Client("http://127.0.0.1:1")
        with pytest.raises(EngineDownError):
            await client.request("/v1/completions", {})
        assert not await client.answers("/health")
        await client.close()

    asyncio.run(main())
