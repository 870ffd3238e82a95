"""Connections of clients that nobody knows yet: what arrives without a use is bounded, and a silent one is closed.

uvicorn keeps headers of any length, as many as come, and waits for their end as long as it takes. A proxy in front has limits
of its own; a server without one needs these.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adapterhub_converters.errors import LocalIOError, UsageError

MAX_HEAD = 64 << 10
"""Bytes of a request line with its headers, or of what follows a body, beyond the piece in which they end."""
HEAD_SECONDS = 30.0
"""Until the headers are complete."""
SILENT_SECONDS = 120.0
"""Without a byte of a body that is arriving, or without one read of an answer."""
CHECK_SECONDS = 10.0
_FILES = 65536  # that a server may have open, if the system lets it
_KEPT = 256  # of them, for other things than connections


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
        self._unread = 0  # bytes of an answer that the client had not read at the last check
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what arrives, up to the limit for what is not of a body."""
        self._heard = self.loop.time()
        self._unused += len(data)
        super().data_received(data)
        if self._unused > MAX_HEAD + len(data) and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._begun, self._in_head = self.loop.time(), True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin its body."""
        self._unused, self._in_head = 0, False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unused = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        self._unused = 0
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
        http=Connection,
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
