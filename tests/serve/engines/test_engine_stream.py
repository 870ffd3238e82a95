"""Connections to engines: whole requests, answers in pieces, silence, ends, and encryption."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpcore2
import pytest
import uvloop

from adapterhub.serve.engines.engine_stream import EngineNetwork
from tests.support.certificates import write_certificate

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Use = Callable[[httpcore2.AsyncNetworkStream], Awaitable[None]]


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS, autouse=True)
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test on both event loops that a gateway may have."""
    monkeypatch.setattr(asyncio, "run", lambda main: asyncio.Runner(loop_factory=LOOPS[request.param]).run(main))


def connect(handler: Handler, use: Use, context: ssl.SSLContext | None = None) -> None:
    """Use a connection to a server that answers with `handler`."""

    async def main() -> None:
        server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=context)
        async with server:
            stream = await EngineNetwork().connect_tcp("127.0.0.1", server.sockets[0].getsockname()[1], timeout=5)
            try:
                async with asyncio.timeout(30):
                    await use(stream)
            finally:
                await stream.aclose()

    asyncio.run(main())


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what arrives, piece by piece, until the end."""
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    writer.close()


async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read until the end."""
    while await reader.read(1 << 16):
        pass
    writer.close()


def test_a_request_leaves_as_a_whole_when_the_answer_is_read() -> None:
    async def use(stream: httpcore2.AsyncNetworkStream) -> None:
        await stream.write(b"head ")
        await stream.write(b"body")
        await asyncio.sleep(0)
        assert not stream.get_extra_info("is_readable")
        assert await stream.read(100, timeout=5) == b"head body"

    connect(echo, use)


def test_a_body_of_megabytes_arrives_and_no_read_returns_more_than_it_may() -> None:
    body = bytes(range(256)) * (1 << 14)

    async def use(stream: httpcore2.AsyncNetworkStream) -> None:
        async def send() -> None:
            for start in range(0, len(body), 1 << 18):
                await stream.write(body[start : start + (1 << 18)], timeout=20)

        sending, received = asyncio.create_task(send()), bytearray()
        while len(received) < len(body):
            piece = await stream.read(1000, timeout=20)
            assert 0 < len(piece) <= 1000
            received += piece
        await sending
        assert received == body

    connect(echo, use)


def test_a_server_that_sends_more_than_is_read_is_held_up() -> None:
    sent = [0]

    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for _ in range(1000):
                writer.write(bytes(1 << 16))
                sent[0] += 1 << 16
                await writer.drain()
        finally:
            writer.close()

    async def use(stream: httpcore2.AsyncNetworkStream) -> None:
        before = -1
        while before != sent[0]:  # until the server waits
            before = sent[0]
            await asyncio.sleep(0.3)
        assert sent[0] < 1000 << 16
        total = 0
        while piece := await stream.read(1 << 20, timeout=20):
            total += len(piece)
        assert total == 1000 << 16

    connect(flood, use)


def test_silence_is_a_timeout_and_what_comes_later_is_still_read() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2)
        writer.write(b"late")
        await reader.read()
        writer.close()

    async def use(stream: httpcore2.AsyncNetworkStream) -> None:
        await stream.write(b"a")
        with pytest.raises(httpcore2.ReadTimeout):
            await stream.read(10, timeout=0.05)
        await stream.write(b"b")
        assert await stream.read(10, timeout=5) == b"late"

    connect(slow, use)


def test_a_loop_that_was_held_up_takes_what_is_in_time_for_no_timeout() -> None:
    def answer(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            while piece := connection.recv(100):
                connection.sendall(piece)

    async def main(address: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        # As by other programs on a busy machine: longer than the timeout, which begins before and ends during it.
        loop.call_soon(time.sleep, 0.3)
        stream = await EngineNetwork().connect_tcp(*address, timeout=0.2)
        try:
            await stream.write(b"question")
            loop.call_soon(time.sleep, 0.3)
            assert await stream.read(100, timeout=0.2) == b"question"
        finally:
            await stream.aclose()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, args=[listening])
        thread.start()
        asyncio.run(main(listening.getsockname()))
        thread.join()


def test_a_server_that_reads_nothing_ends_the_writing_in_time() -> None:
    ended = asyncio.Event()

    async def stall(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _reader._transport.pause_reading()  # type: ignore[attr-defined]
        await ended.wait()
        writer.transport.abort()

    async def use(stream: httpcore2.AsyncNetworkStream) -> None:
        try:
            with pytest.raises(httpcore2.WriteTimeout):
                await stream.write(bytes(64 << 20), timeout=0.1)
        finally:
            ended.set()

    connect(stall, use)


def test_an_idle_connection_that_the_server_has_closed_is_seen_before_it_is_used() -> None:
    async def close(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def use(stream: httpcore2.AsyncNetworkStream) -> None:
        while not stream.get_extra_info("is_readable"):
            await asyncio.sleep(0.01)
        assert await stream.read(10, timeout=5) == b""
        await stream.write(b"x")

        async def write_until_refused() -> None:
            while True:  # the first may leave before the loop has seen the end
                await stream.read(10, timeout=5)
                await stream.write(b"x")
                await asyncio.sleep(0.01)

        with pytest.raises(httpcore2.WriteError):
            await write_until_refused()

    connect(close, use)


def test_nobody_to_connect_to_is_a_connection_error() -> None:
    async def main() -> None:
        await EngineNetwork().connect_tcp("127.0.0.1", 1, timeout=5)

    with pytest.raises(httpcore2.ConnectError):
        asyncio.run(main())


def test_it_is_encrypted_and_a_certificate_of_another_name_is_refused(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path / "cert.pem", days=10, secret=tmp_path / "key.pem")
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context(cafile=str(certificate))
    server.load_cert_chain(certificate, tmp_path / "key.pem")
    client.hostname_checks_common_name = True

    async def use(stream: httpcore2.AsyncNetworkStream) -> None:
        encrypted = await stream.start_tls(client, "hub.example", timeout=5)
        await encrypted.write(b"secret")
        assert await encrypted.read(100, timeout=5) == b"secret"
        assert not encrypted.get_extra_info("is_readable")

    async def use_wrong_name(stream: httpcore2.AsyncNetworkStream) -> None:
        with pytest.raises(httpcore2.ConnectError, match="certificate"):
            await stream.start_tls(client, "another.example", timeout=5)

    connect(echo, use, server)
    connect(echo, use_wrong_name, server)


def test_a_server_that_never_answers_the_handshake_is_a_timeout() -> None:
    async def use(stream: httpcore2.AsyncNetworkStream) -> None:
        with pytest.raises(httpcore2.ConnectTimeout):
            await stream.start_tls(ssl.create_default_context(), "hub.example", timeout=0.1)

    connect(be_silent, use)
