"""Connections of clients that nobody knows yet: what arrives without a use is bounded, and a silent one is closed.

uvicorn keeps headers of any length, as many as come, and waits for their end as long as it takes. A proxy in front has limits
of its own; a server without one needs these.

Large bodies cost less here than uvicorn's own connection takes for them. What arrives is read in pieces of up to 1 MiB, not 256
KiB, and is copied once, not four times; and an application can have the system send a file (`ZERO_COPY`, of the ASGI
specification), whose bytes then never come into this process.
"""

from __future__ import annotations

import asyncio
import os
import select
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from adapterhub_converters.errors import LocalIOError, UsageError

MAX_HEAD = 64 << 10
"""Bytes of a request line with its headers, or of what follows a body, beyond the piece in which they end."""
HEAD_SECONDS = 30.0
"""Until the headers are complete."""
SILENT_SECONDS = 120.0
"""Without a byte of a body that is arriving, or without one read of an answer."""
CHECK_SECONDS = 10.0
ZERO_COPY = "http.response.zerocopysend"
"""The extension and the message by which an application sends a part of a file: `file`, a descriptor, `offset` and `count`."""
_READ, _READ_OF_HEAD = 1 << 20, 1 << 16  # bytes that are read at a time
_SENT = 16 << 20  # bytes of a file that are sent before another one has its turn
_PATIENCE = 5  # milliseconds that a thread waits for a client before it does something else
_FLUSH_SECONDS = 0.01  # between two looks whether the headers of a file are sent
_FILES = 65536  # that a server may have open, if the system lets it
_KEPT = 256  # of them, for other things than connections
_OFFERS = (b"upgrade:", b"http2-settings:")


def most_connections() -> int:
    """How many connections leave files for the work itself; the process may have as many as the system allows from then on."""
    if sys.platform == "win32":
        return _FILES
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return max(most if soft == resource.RLIM_INFINITY else soft - _KEPT, _KEPT)


Send = Callable[[Any], Awaitable[None]]


class _Pieces:
    """The pieces of a body that wait for the application, in place of a bytearray, to and from which they would be copied."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def __iadd__(self, piece: bytes) -> _Pieces:
        self._pieces.append(piece)
        self._size += len(piece)
        return self

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)


class Connection(HttpToolsProtocol):
    """A connection that is cut when its client sends endless headers, or lets the server wait, or when there are too many.

    Attributes:
        most: Connections of this process at once.
    """

    most = _FILES

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch the connection."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        self._unused = 0  # bytes since the last that were of any use
        self._begun = self._heard = self._moved = self.loop.time()
        self._in_head = True
        self._in_request = False  # the end of one that has begun is still to come
        self._unread = 0  # bytes of an answer that the client had not read at the last check
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes | memoryview) -> None:
        """Take what arrives, up to the limit for what is not of a body."""
        self._heard = self.loop.time()
        self._unused += len(data)
        if not self._in_request:
            data = _without_offers(bytes(data))
        super().data_received(data)  # type: ignore[arg-type]
        if self._unused > MAX_HEAD + len(data) and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    @property
    def is_receiving(self) -> bool:
        """Whether a body is arriving."""
        return not self._in_head and self.cycle is not None and self.cycle.more_body

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._begun, self._in_head, self._in_request = self.loop.time(), True, True
        super().on_message_begin()
        if self.scheme == "http" and hasattr(os, "sendfile"):  # a file cannot be sent through TLS
            self.scope["extensions"] = {ZERO_COPY: {}}

    def on_headers_complete(self) -> None:
        """Begin its body."""
        self._unused, self._in_head = 0, False
        super().on_headers_complete()
        self.cycle.send = partial(self._send, self.cycle, self.cycle.send)  # type: ignore[method-assign]

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unused = 0
        if not self.cycle.body:
            self.cycle.body = _Pieces()  # type: ignore[assignment]
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        self._unused, self._in_request = 0, False
        super().on_message_complete()

    def _check(self) -> None:
        """Cut the connection if its client is the one that everything waits for."""
        now, cycle = self.loop.time(), self.cycle
        answering = cycle is not None and not cycle.response_complete
        unread = self.transport.get_write_buffer_size()
        late = self._in_head and now - self._begun > HEAD_SECONDS
        silent = now - self._heard > SILENT_SECONDS and answering and cycle.more_body and not self.flow.read_paused
        stuck = self.flow.write_paused and unread == self._unread and now - self._moved > SILENT_SECONDS
        if unread != self._unread or not self.flow.write_paused:
            self._unread, self._moved = unread, now
        if late or silent or stuck:
            if answering:
                cycle.disconnected = True  # what is still sent goes nowhere, and is no error
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(CHECK_SECONDS, self._check)

    # ---- files

    async def _send(self, cycle: RequestResponseCycle, send: Send, message: Mapping[str, Any]) -> None:
        """Send a message of the application: of a file here, any other one as uvicorn does."""
        if message["type"] != ZERO_COPY:
            await send(message)
            return
        sent = await self._send_file(cycle, message["file"], message["offset"], message["count"])
        if sent < message["count"]:
            cycle.disconnected = True  # the client is gone, or the file is shorter than the headers said: the client sees that
            self.transport.abort()
        cycle.expected_content_length -= sent
        await send({"type": "http.response.body", "body": b"", "more_body": message.get("more_body", False)})

    async def _send_file(self, cycle: RequestResponseCycle, file: int, offset: int, count: int) -> int:
        """Have the system send a part of a file after what was written before; return the bytes that were sent."""
        while self.transport.get_write_buffer_size() and not cycle.disconnected:
            await asyncio.sleep(_FLUSH_SECONDS)
        if cycle.disconnected or self.transport.is_closing():
            return 0
        # Of another number than the transport's: the loop tells when it can be written to, and a closed one is not used again.
        to, sent = os.dup(self.transport.get_extra_info("socket").fileno()), 0
        try:
            while sent < count and not cycle.disconnected:
                most = min(count - sent, _SENT)
                done, ended = await self.loop.run_in_executor(None, _sent_now, to, file, offset + sent, most)
                sent += done
                if ended:
                    break
                if done < most:
                    await self._until_writable(to)
        except OSError:  # the client is gone, or was silent for too long
            pass
        finally:
            os.close(to)
        return sent

    async def _until_writable(self, to: int) -> None:
        """Wait until a socket takes more; TimeoutError, which is an OSError, if its client reads nothing for too long."""
        writable = asyncio.Event()
        self.loop.add_writer(to, writable.set)
        try:
            await asyncio.wait_for(writable.wait(), SILENT_SECONDS)
        finally:
            self.loop.remove_writer(to)


def _sent_now(to: int, file: int, offset: int, count: int) -> tuple[int, bool]:
    """Send a part of a file as long as its client reads fast: the bytes that were sent, and whether the file ended there.

    For a client that reads as it is sent to, the thread waits itself: to go back to the event loop each time would take longer.
    """
    sent, writable = 0, select.poll()
    writable.register(to, select.POLLOUT)
    while sent < count:
        try:
            done = os.sendfile(to, file, offset + sent, count - sent)
        except BlockingIOError:
            if not writable.poll(_PATIENCE):
                break
            continue
        if not done:
            return sent, True
        sent += done
    return sent, False


def _without_offers(data: bytes) -> bytes:
    """Headers without the offer to go on with another protocol, as Java's client makes with each request.

    The parser would take a body for the first bytes of that protocol. Headers that come in pieces keep it.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end or b"upgrade" not in head.lower():
        return data
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(_OFFERS)) + end + rest


_BUFFER = memoryview(bytearray(_READ))


class _Reader(asyncio.BufferedProtocol):
    """Reads what arrives on a connection into the one buffer of all, from which the parser takes it at once."""

    def __init__(self, **more: Any) -> None:
        self._connection = Connection(**more)
        for name in ("connection_made", "connection_lost", "pause_writing", "resume_writing", "eof_received"):
            setattr(self, name, getattr(self._connection, name))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: of a body more than of headers, which the parser keeps."""
        return _BUFFER if self._connection.is_receiving else _BUFFER[:_READ_OF_HEAD]

    def buffer_updated(self, nbytes: int) -> None:
        """Take them from there."""
        self._connection.data_received(_BUFFER[:nbytes])


def make_server(app: Any, *, certificate: Path | None, key: Path | None, drain: int) -> uvicorn.Server:
    """A server of an ASGI application with these connections, not started.

    Args:
        certificate: Its PEM file, to serve HTTPS.
        key: The PEM file of its private key.
        drain: Seconds for the requests that are running when it ends.

    Raises:
        UsageError: There is a certificate without its key, or a key without its certificate.
        LocalIOError: They cannot be read, or do not belong together.
    """
    if (certificate is None) != (key is None):
        raise UsageError(str(certificate or key), "a certificate and its private key belong together", "Give both, or none")
    Connection.most = most_connections()
    config = uvicorn.Config(
        app,
        http=_Reader,  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=drain,
        ssl_certfile=str(certificate) if certificate else None,
        ssl_keyfile=str(key) if key else None,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        what = error.strerror or str(error)
        raise LocalIOError(str(certificate), what, "Give a certificate and its private key, each in PEM") from error
    return uvicorn.Server(config)
