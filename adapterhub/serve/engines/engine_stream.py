"""The connections of the client of engines, over asyncio alone: head and body of a request leave in one system call.

httpcore's own goes through anyio, which stops and resumes reading around each piece; a token of a stream is one.

Time limits have two halves. On a busy machine an event loop can be held up for longer than a limit, and then ends it before it
has looked at its connections: after the first half it looks again, so that what is in time is no timeout.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import httpcore2

_JOINED = 1 << 16  # bytes of a request that are sent at once
_MAX_RECEIVED = 1 << 20  # bytes received and not yet read, after which no more is received


@asynccontextmanager
async def _time_limit(seconds: float | None) -> AsyncIterator[None]:
    """Raise TimeoutError if the block takes longer, as `asyncio.timeout` does, in two halves; None for no limit."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        half = None if seconds is None else seconds / 2
        timer = None if half is None else loop.call_later(half, lambda: limit.reschedule(loop.time() + half))
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()


class EngineStream(asyncio.Protocol, httpcore2.AsyncNetworkStream):
    """A connection to a server, as httpcore uses it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._pieces: deque[bytes | memoryview] = deque()
        self._received = 0  # bytes in `_pieces`
        self._unsent: list[bytes] = []
        self._has_ended, self._error = False, ""
        self._arrival: asyncio.Future[None] | None = None
        self._room = asyncio.Event()

    # ---- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to write."""
        self._transport = cast(asyncio.Transport, transport)
        self._room.set()

    def data_received(self, data: bytes) -> None:
        """Keep what arrives until it is read."""
        self._pieces.append(data)
        self._received += len(data)
        if self._received > _MAX_RECEIVED:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """Close, since the server sends no more."""
        self._has_ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all waiting."""
        self._has_ended, self._error = True, str(exc or "")
        self._room.set()
        self._wake()

    def pause_writing(self) -> None:
        """Wait with further writes."""
        self._room.clear()

    def resume_writing(self) -> None:
        """Go on writing."""
        self._room.set()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # ---- what httpcore calls

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Send what was written, and return the next bytes that arrive; empty at the end."""
        await self._send(timeout)
        halves = 2  # not by `_time_limit`, which would take as long as the rest of a read
        while not self._pieces and not self._has_ended:
            if not halves:
                raise httpcore2.ReadTimeout
            halves -= 1
            self._arrival = asyncio.get_running_loop().create_future()
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if timeout is None else timeout / 2):
                        await self._arrival
            finally:
                self._arrival = None
        if not self._pieces:
            if self._error:
                raise httpcore2.ReadError(self._error)
            return b""
        piece = self._pieces.popleft()
        if len(piece) > max_bytes:
            self._pieces.appendleft(memoryview(piece)[max_bytes:])
            piece = memoryview(piece)[:max_bytes]
        self._received -= len(piece)
        if not self._received and not self._has_ended:
            self._transport.resume_reading()
        return bytes(piece)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Keep a part of a request until it is complete: until the answer is read, or there is much of it."""
        self._unsent.append(buffer)
        if sum(map(len, self._unsent)) > _JOINED:
            await self._send(timeout)

    async def _send(self, timeout: float | None) -> None:
        if not self._unsent:
            return
        if self._transport.is_closing():
            raise httpcore2.WriteError(self._error or "the server has closed the connection")
        self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
        if not self._room.is_set():
            try:
                async with _time_limit(timeout):
                    await self._room.wait()
            except TimeoutError as error:
                raise httpcore2.WriteTimeout from error

    async def aclose(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """Encrypt the connection."""
        try:
            async with _time_limit(timeout):
                transport = await asyncio.get_running_loop().start_tls(
                    self._transport, self, ssl_context, server_hostname=server_hostname
                )
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout from error
        except OSError as error:  # an SSLError too
            raise httpcore2.ConnectError(str(error)) from error
        self._transport = cast(asyncio.Transport, transport)
        return self

    def get_extra_info(self, info: str) -> Any:
        """Return a fact about the connection; `is_readable` is whether an idle one has been closed, or has unexpected bytes."""
        if info == "is_readable":
            if self._has_ended or self._pieces or self._transport.is_closing():
                return True
            poll = select.poll()
            poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
            return bool(poll.poll(0))
        return self._transport.get_extra_info(info)


class EngineNetwork(httpcore2.AsyncNetworkBackend):
    """Connects httpcore with `EngineStream`."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> EngineStream:
        """Connect to a server."""
        try:
            async with _time_limit(timeout):
                _, stream = await asyncio.get_running_loop().create_connection(EngineStream, host, port)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        return stream
