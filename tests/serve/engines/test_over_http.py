"""A client of an engine's server, and the process that it is."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.engines import EngineDownError, engine_client
from adapterhub.serve.engines.engine_client import Client
from adapterhub.serve.engines.engine_stream import EngineNetwork, EngineStream
from adapterhub.serve.engines.over_http import Process
from adapterhub_converters.errors import LocalIOError, RefusedError

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


async def never() -> bool:
    return False


def python(text: str, patience: float = 30.0) -> Process:
    return Process([sys.executable, "-c", text], {}, never, patience=patience)


def test_why_a_process_cannot_be_started_is_told() -> None:
    with pytest.raises(RefusedError, match="ended with 3 before it was ready: error: no such model"):
        asyncio.run(python("print('hello\\nerror: no such model\\nbye'); raise SystemExit(3)").start())
    with pytest.raises(RefusedError, match="is not ready after 0 seconds"):
        asyncio.run(python("import time; time.sleep(60)", patience=0.2).start())
    with pytest.raises(RefusedError, match="ended with 1 before it was ready: it said nothing"):
        asyncio.run(python("raise SystemExit(1)").start())
    with pytest.raises(RefusedError, match="was ended by SIGILL before it was ready: bye. It was built for another processor"):
        asyncio.run(python("import os; print('bye', flush=True); os.kill(os.getpid(), 4)").start())
    with pytest.raises(LocalIOError, match="No such file"):
        asyncio.run(Process(["/no/such/program"], {}, never).start())


def test_a_process_that_hangs_is_ended_and_started_again() -> None:
    async def main() -> None:
        answers = True

        async def ready() -> bool:
            return answers

        process = Process([sys.executable, "-c", "import time; time.sleep(60)"], {}, ready, silence=0.2)
        await process.start()
        first = process._process
        assert first is not None
        answers = False
        await asyncio.wait_for(first.wait(), 60)
        answers = True
        while process._process is first or not process.up:
            await asyncio.sleep(0.01)
        assert first.returncode == -signal.SIGTERM
        await process.close()

    asyncio.run(main())


FAILS_BELOW = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "raise ValueError('1 error in it\\\\n  the KV cache is too small')"])
for line in range(60):
    print("  frame", line, flush=True)
raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
"""


def test_the_reason_is_the_exception_of_the_process_that_failed_not_that_of_its_parent() -> None:
    with pytest.raises(RefusedError, match="before it was ready: ValueError: 1 error in it the KV cache is too small"):
        asyncio.run(python(FAILS_BELOW).start())


def test_a_process_that_ends_is_started_again(tmp_path: Path) -> None:
    async def main() -> None:
        count = tmp_path / "count"
        text = f"open({str(count)!r}, 'a').write('x')\nimport time; time.sleep(60)"

        async def ready() -> bool:
            return count.exists()

        process = Process([sys.executable, "-c", text], {}, ready)
        await process.start()
        process.check()
        assert process._process is not None
        process._process.kill()
        while process.up:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDownError, match="the engine has ended, and is being started again"):
            process.check()
        while not process.up:
            await asyncio.sleep(0.01)
        await process.close()
        assert not process.up

    asyncio.run(main())
