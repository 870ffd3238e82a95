"""Connections of unauthenticated clients: useless bytes are limited, and silent clients are disconnected.

uvicorn accepts headers of any length and number, and waits for their end forever. A proxy in front has limits of its own; a
server without one needs these. How long a body may take, and how much of all bodies is in memory, is up to `request_bodies`:
until the application asks for a body, no more than 128 KiB of it is read.

Large bodies also cost less here than with uvicorn's own connection: they are read in pieces of up to 1 MiB, not 256 KiB, and
copied once, not four times; and an application can let the operating system send a file (`ZERO_COPY`, of the ASGI
specification), whose bytes then never enter this process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from adapterhub_converters.errors import LocalIOError, UsageError

from . import binding
from .certificate import Certificate
from .counted_connections import ConnectionCounts, TlsConnection, network_of

_log = logging.getLogger("adapterhub.http_server")
MAX_HEAD = 64 << 10
"""Bytes of a request line with its headers, or after a body, beyond the piece in which they end."""
HEAD_SECONDS = 30.0
"""Seconds until the headers must be complete."""
REST_SECONDS = 30.0
"""Seconds for the rest of a body whose request was answered before it had arrived."""
SILENT_SECONDS = 120.0
"""Seconds without a byte of an arriving body, or without the client reading from a response."""
CHECK_SECONDS = 10.0
ZERO_COPY = "http.response.zerocopysend"
"""The extension and message with which an application sends part of a file: `file` (a descriptor), `offset` and `count`."""
_READ, _READ_OF_HEAD = 1 << 20, 1 << 16  # bytes read at a time
_FILE_TURN = 16 << 20  # bytes of a file sent before another file gets its turn
_PATIENCE = 5  # milliseconds a thread waits for a client before it turns to other work
_FLUSH_SECONDS = 0.01  # seconds between checks whether a file's headers have been sent
_MAX_FILES = 65536  # files a server may have open, if the system allows it
_RESERVED_FILES = 256  # files reserved for anything but connections
_UPGRADE_HEADERS = (b"upgrade:", b"http2-settings:")


def max_connections() -> int:
    """Return how many connections leave enough files for other work; raise the process's own limit as far as possible."""
    if sys.platform == "win32":
        return _MAX_FILES
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            soft = limit
    return max(limit if soft == resource.RLIM_INFINITY else soft - _RESERVED_FILES, _RESERVED_FILES)


Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]


class _Pieces:
    """The pieces of a body that wait for the application, in place of a bytearray, which would copy them in and out."""

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
    """A connection that is cut if its client sends endless headers, makes the server wait, or if there are too many.

    Attributes:
        counts: The connections of this process.
    """

    counts: ClassVar = ConnectionCounts(_MAX_FILES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start watching the connection."""
        super().connection_made(transport)
        # With TLS, it counts from before the handshake.
        self._is_counted_here = transport.get_extra_info("sslcontext") is None
        self._network = network_of(transport)
        if self._is_counted_here and not self.counts.admit(self._network):
            transport.abort()
        self._overhead = 0  # bytes since the last useful one
        self._began_at = self._received_at = self._drained_at = self.loop.time()
        self._in_head = True
        self._is_wanted = False  # whether the application has asked for the body
        self._answered_at: float | None = None  # when a request was answered whose body was still arriving
        self._in_request = False  # whether a request has begun and not ended
        self._unread = 0  # bytes of a response the client had not read at the last check
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._timer.cancel()
        if self._is_counted_here:
            self.counts.release(self._network)
        super().connection_lost(exc)

    def data_received(self, data: bytes | memoryview) -> None:
        """Pass on what arrives, within the limit for bytes outside of bodies."""
        self._received_at = self.loop.time()
        self._overhead += len(data)
        if not self._in_request:
            data = _without_upgrade_headers(bytes(data))
        super().data_received(data)  # type: ignore[arg-type]
        if self._overhead > MAX_HEAD + len(data) and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    @property
    def is_receiving(self) -> bool:
        """Whether a body is arriving that the application has asked for."""
        return not self._in_head and self._is_wanted and self.cycle is not None and self.cycle.more_body

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._began_at, self._in_head, self._in_request = self.loop.time(), True, True
        super().on_message_begin()
        if self.scheme == "http" and hasattr(os, "sendfile"):  # sendfile cannot encrypt
            self.scope["extensions"] = {ZERO_COPY: {}}

    def on_headers_complete(self) -> None:
        """Begin the request's body."""
        self._overhead, self._in_head, self._is_wanted, self._answered_at = 0, False, False, None
        super().on_headers_complete()
        self.cycle.receive = partial(self._receive, self.cycle.receive)  # type: ignore[method-assign]
        self.cycle.send = partial(self._send, self.cycle, self.cycle.send)  # type: ignore[method-assign]

    def on_body(self, body: bytes) -> None:
        """Pass on a piece of the body."""
        self._overhead = 0
        if not self.cycle.body:
            self.cycle.body = _Pieces()  # type: ignore[assignment]
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        self._overhead, self._in_request = 0, False
        super().on_message_complete()

    def _check(self) -> None:
        """Cut the connection if the server is only waiting for its client."""
        now, cycle = self.loop.time(), self.cycle
        answering = cycle is not None and not cycle.response_complete
        unread = self.transport.get_write_buffer_size()
        late = self._in_head and now - self._began_at > HEAD_SECONDS
        is_over = cycle is not None and cycle.response_complete and cycle.more_body
        self._answered_at = (self._answered_at or now) if is_over else None
        resting = self._answered_at is not None and now - self._answered_at > REST_SECONDS
        silent = now - self._received_at > SILENT_SECONDS and answering and cycle.more_body and not self.flow.read_paused
        stuck = self.flow.write_paused and unread == self._unread and now - self._drained_at > SILENT_SECONDS
        if unread != self._unread or not self.flow.write_paused:
            self._unread, self._drained_at = unread, now
        if late or silent or stuck or resting:
            if answering:
                cycle.disconnected = True  # ignore what the application still sends
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(CHECK_SECONDS, self._check)

    async def _receive(self, receive: Receive) -> Any:
        """Give the application the next message; from now on, its body is read in large pieces."""
        self._is_wanted = True
        return await receive()

    # ---- files

    async def _send(self, cycle: RequestResponseCycle, send: Send, message: Mapping[str, Any]) -> None:
        """Send a message of the application: part of a file here, anything else through uvicorn."""
        if message["type"] != ZERO_COPY:
            await send(message)
            return
        sent = await self._send_file(cycle, message["file"], message["offset"], message["count"])
        if sent < message["count"]:
            cycle.disconnected = (
                True  # the client is gone, or the file is shorter than announced: cutting the connection tells the client
            )
            self.transport.abort()
        cycle.expected_content_length -= sent
        await send({"type": "http.response.body", "body": b"", "more_body": message.get("more_body", False)})

    async def _send_file(self, cycle: RequestResponseCycle, file: int, offset: int, count: int) -> int:
        """Let the system send part of a file, after everything written before; return the bytes sent."""
        while self.transport.get_write_buffer_size() and not cycle.disconnected:
            await asyncio.sleep(_FLUSH_SECONDS)
        if cycle.disconnected or self.transport.is_closing():
            return 0
        # Duplicate the descriptor: the loop refuses a second writer for the transport's own, and a closed one could be reused.
        target, sent = os.dup(self.transport.get_extra_info("socket").fileno()), 0
        try:
            while sent < count and not cycle.disconnected:
                limit = min(count - sent, _FILE_TURN)
                piece_sent, ended = await self.loop.run_in_executor(
                    None, _send_while_writable, target, file, offset + sent, limit
                )
                sent += piece_sent
                if ended:
                    break
                if piece_sent < limit:
                    await self._wait_until_writable(target)
        except OSError:  # the client is gone, or was silent for too long
            pass
        finally:
            os.close(target)
        return sent

    async def _wait_until_writable(self, target: int) -> None:
        """Wait until a socket accepts more. TimeoutError, which is an OSError, if its client reads nothing for too long."""
        writable = asyncio.Event()
        self.loop.add_writer(target, writable.set)
        try:
            await asyncio.wait_for(writable.wait(), SILENT_SECONDS)
        finally:
            self.loop.remove_writer(target)


def _send_while_writable(target: int, file: int, offset: int, count: int) -> tuple[int, bool]:
    """Send part of a file while its client keeps reading; return the bytes sent, and whether the file ended there.

    For a client that keeps up, the thread itself waits: going back to the event loop each time would take longer.
    """
    sent, writable = 0, select.poll()
    writable.register(target, select.POLLOUT)
    while sent < count:
        try:
            piece_sent = os.sendfile(target, file, offset + sent, count - sent)
        except BlockingIOError:
            if not writable.poll(_PATIENCE):
                break
            continue
        if not piece_sent:
            return sent, True
        sent += piece_sent
    return sent, False


def _without_upgrade_headers(data: bytes) -> bytes:
    """Return headers without offers to switch protocols, as Java's client sends with each request.

    The parser would take a body for the first bytes of the new protocol. Headers that arrive in several pieces keep the offers.
    """
    head, end, tail = data.partition(b"\r\n\r\n")
    if not end or b"upgrade" not in head.lower():
        return data
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(_UPGRADE_HEADERS)) + end + tail


class _Buffer(threading.local):
    """The buffer of a thread, in which one event loop reads: those of two servers in a process must not share one."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(_READ))


_BUFFER = _Buffer()


class _BufferedReader(asyncio.BufferedProtocol):
    """Reads what arrives on any connection of a thread into one shared buffer, which the parser consumes at once."""

    def __init__(self, **options: Any) -> None:
        self._connection, self._memory = Connection(**options), _BUFFER.memory
        for name in ("connection_made", "connection_lost", "pause_writing", "resume_writing", "eof_received"):
            setattr(self, name, getattr(self._connection, name))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go: more for a body than for headers, which the parser keeps."""
        return self._memory if self._connection.is_receiving else self._memory[:_READ_OF_HEAD]

    def buffer_updated(self, nbytes: int) -> None:
        """Consume the bytes read."""
        self._connection.data_received(self._memory[:nbytes])


def _tls_connection(context: ssl.SSLContext, **options: Any) -> TlsConnection:
    return TlsConnection(Connection.counts, context, _BufferedReader(**options), seconds=HEAD_SECONDS)


class _Server(uvicorn.Server):
    """A server that follows the changes of its certificate, and may be one of several processes on one socket."""

    certificate: Certificate | None = None
    stop_end: int | None = None

    async def startup(self, sockets: list[binding.Socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        if self.stop_end is not None:
            # Accepting one at a time, as below, has shortened the queue.
            for sock in sockets or ():
                sock.listen(binding.BACKLOG)
            asyncio.get_running_loop().add_reader(self.stop_end, self._stop, self.stop_end)

    def _stop(self, stop_end: int) -> None:
        """Stop, because the pipe is closed."""
        asyncio.get_running_loop().remove_reader(stop_end)
        self.should_exit = True

    async def main_loop(self) -> None:
        """Serve until the end."""
        following = asyncio.create_task(self.certificate.follow()) if self.certificate else None
        await super().main_loop()
        if following is not None:
            following.cancel()


def make_server(
    app: Any,
    *,
    certificate: Path | None,
    key: Path | None,
    drain: int,
    log: logging.Logger = _log,
    stop_end: int | None = None,
    behind_proxy: bool = False,
    most_of_network: int = _MAX_FILES,
) -> uvicorn.Server:
    """Return a server of an ASGI application with these connections, not started.

    Args:
        certificate: The PEM file of its certificate, to serve HTTPS; both files are read again when they change.
        key: The PEM file of its private key.
        drain: Seconds for requests still running at shutdown.
        log: Where changes of the certificate are logged.
        stop_end: The end of a pipe, for one of several processes on one socket: it stops once the pipe is closed.
        behind_proxy: All clients come through a proxy, from one address.
        most_of_network: Connections of one client at a time; in any case at most a quarter of those of the process.

    Raises:
        UsageError: There is a certificate without its key, or a key without its certificate.
        LocalIOError: They cannot be read, or do not belong together.
    """
    if (certificate is None) != (key is None):
        raise UsageError(str(certificate or key), "a certificate and its private key belong together", "Give both, or none")
    counts = Connection.counts
    counts.most = max_connections()
    counts.most_of_network = counts.most if behind_proxy else min(most_of_network, counts.most // 4)
    config = uvicorn.Config(
        app,
        http=_BufferedReader,  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=drain,
        # How many connections asyncio accepts at once: the first process to wake would get all that have just arrived.
        backlog=binding.BACKLOG if stop_end is None else 1,
        ssl_certfile=str(certificate) if certificate else None,
        ssl_keyfile=str(key) if key else None,
    )
    try:
        config.load()
    except OSError as error:  # includes ssl.SSLError
        problem = error.strerror or str(error)
        raise LocalIOError(str(certificate), problem, "Give a certificate and its private key, each in PEM") from error
    server = _Server(config)
    server.stop_end = stop_end
    if certificate and key and config.ssl:
        server.certificate = Certificate(config.ssl, (certificate, key), log)
        config.http_protocol_class, config.ssl = partial(_tls_connection, config.ssl), None  # type: ignore[assignment]
    return server
