"""A client of one engine's server: it passes answers through, and knows which process answers on a connection.

A server that is restarted answers on new connections only. So a connection is never opened a second time, and each can be
greeted before its first request: what the server said then holds for all that is asked on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpcore2

from adapterhub_converters.containers import json_file
from adapterhub_converters.display import printable
from adapterhub_converters.errors import FormatError, RefusedError

from . import REQUEST_HEADERS, EngineAnswer, EngineDownError, EngineTimeoutError
from .engine_stream import EngineNetwork

_CONNECT = 5.0  # seconds
_IDLE = 2.0  # seconds after which a connection is not reused, because servers close idle ones after five
_MAX_IDLE = 64  # connections
_CALL_SECONDS = 120.0  # seconds for a request that loads or lists something
_GREETING_SECONDS = 30.0  # seconds in which a look at the health greets a new connection, for which a base may compute a token
_HEALTH_SECONDS = 2.0  # seconds for an answer that costs an engine nothing
_MAX_DOCUMENT = 4 << 20  # bytes of an answer to one of our own requests


class BrokenConnectionError(EngineDownError):
    """The server closed the connection before it answered: an idle one just as it was reused, or it has ended."""


class UnsentRequestError(BrokenConnectionError):
    """The server closed the connection before the whole request was sent, so that it has not begun to answer it."""


class _Response:
    """An answer that has begun; the connection can be used again once it is closed."""

    def __init__(self, connection: Connection, response: httpcore2.Response) -> None:
        self._connection, self._response = connection, response
        self._is_closed = False
        self.status = response.status
        kinds = (value.decode("latin-1") for name, value in response.headers if name.lower() == b"content-type")
        self.media_type = next(kinds, "application/json")

    async def pieces(self) -> AsyncGenerator[bytes]:
        """Yield the body as it arrives, and close."""
        try:
            with _engine_errors():
                async for piece in self._response.aiter_stream():
                    yield piece
        finally:
            await self.close()

    async def close(self) -> None:
        """End the answer, which closes the connection unless all of it has arrived."""
        if not self._is_closed:
            self._is_closed = True
            await self._response.aclose()
            await self._connection.release()

    async def document(self, path: str) -> Any:
        """Return the whole body as a JSON document, or as text if it is none."""
        raw = b""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                raw += piece
                if len(raw) > _MAX_DOCUMENT:
                    raise EngineDownError(f"{path}: an answer of more than {_MAX_DOCUMENT} bytes")
        try:
            return json_file.parse(raw, path)
        except FormatError:
            return raw.decode(errors="replace")


class Connection:
    """One connection to one process of a server.

    Attributes:
        facts: What `Client.greet` returned for it.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._http = httpcore2.AsyncHTTPConnection(
            client.origin, client.ssl_context, keepalive_expiry=_IDLE, network_backend=EngineNetwork()
        )
        self.facts: Any = None

    def is_usable(self) -> bool:
        """Return whether it is idle, and neither closed nor about to be."""
        return self._http.is_idle() and not self._http.has_expired()

    async def close(self) -> None:
        """Close it."""
        await self._http.aclose()

    async def release(self) -> None:
        """Give it back to the client after an answer."""
        await self._client.take_back(self)

    async def send(self, method: str, path: str, body: Mapping[str, Any] | None, patience: float | None) -> _Response:
        """Send a request, and return the answer as soon as it begins.

        Args:
            patience: Seconds until it begins, and between two pieces of it; None for no limit.
        """
        headers, content = [*self._client.headers], None
        headers += [(name.encode(), value.encode()) for name, value in REQUEST_HEADERS.get().items()]
        if body is not None:
            content = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        timeout = {"connect": _CONNECT, "read": patience, "write": patience}
        url = self._client.url_of(path)
        request = httpcore2.Request(method, url, headers=headers, content=content, extensions={"timeout": timeout})
        if self._http.is_closed():
            raise EngineDownError("it closes its connections after an answer, and the next one may be of another process")
        with _engine_errors():
            return _Response(self, await self._http.handle_async_request(request))

    async def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = _CALL_SECONDS
    ) -> tuple[int, Any]:
        """Send a request of our own on this connection, like `Client.call`."""
        response = await self.send(method, path, body, seconds)
        return response.status, await response.document(path)


class Client:
    """A client of one server, with its key if it has one.

    Attributes:
        greet: Called with each new connection before it is used; returns its `facts`, or raises.
        patience: Seconds until an answer begins, and between two pieces of it; None for no limit.
    """

    def __init__(self, url: str, key: str = "", *, patience: float | None = None) -> None:
        self.url, self._parsed = url, httpcore2.URL(url)
        self.origin = self._parsed.origin
        host = urlsplit(url).netloc.rpartition("@")[2]
        self.headers = [(b"host", host.encode("ascii"))]
        if key:
            self.headers.append((b"authorization", f"Bearer {key}".encode()))
        # Each connection would read the certificates of the machine again. No proxy of the environment is used for an engine.
        self.ssl_context = ssl.create_default_context() if url.startswith("https:") else None
        self.greet: Callable[[Connection], Awaitable[Any]] | None = None
        self.patience = patience
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    def url_of(self, path: str) -> httpcore2.URL:
        """Return the URL of a path of the server, with its query if it has one."""
        parsed = self._parsed
        target = parsed.target.rstrip(b"/") + path.encode("ascii")
        return httpcore2.URL(scheme=parsed.scheme, host=parsed.host, port=parsed.port, target=target)

    async def close(self) -> None:
        """Close all connections."""
        while self._open:
            await self._drop(next(iter(self._open)))

    @property
    def is_connected(self) -> bool:
        """Whether a greeted connection is open, so that the process at its end has not ended."""
        return any(connection.is_usable() or connection not in self._idle for connection in self._open)

    async def take_back(self, connection: Connection) -> None:
        """Keep a connection whose answer has ended for later requests, unless it has been closed."""
        if connection not in self._open:  # it is being greeted
            return
        if connection.is_usable() and len(self._idle) < _MAX_IDLE:
            self._idle.append(connection)
        else:
            await self._drop(connection)

    async def _drop(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        await connection.close()

    async def _take(self) -> tuple[Connection, bool]:
        """Return the idle connection that was used last, or else a new one that was greeted; and whether it is new."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                return connection, False
            await self._drop(connection)
        connection = Connection(self)
        if self.greet is not None:
            try:
                connection.facts = await self.greet(connection)
            except BaseException as error:
                await connection.close()
                if isinstance(error, EngineTimeoutError):  # the request itself has not been sent
                    raise EngineDownError(str(error)) from error
                raise
        self._open.add(connection)
        return connection, True

    async def _send(
        self, method: str, path: str, body_for: Callable[[Any], Mapping[str, Any] | None], patience: float | None
    ) -> _Response:
        """Send a request; once more on another connection if the server has just closed an idle one, or one still unused.

        On a busy machine, seconds can pass between a new connection and its first request, and servers close those that wait.
        """
        new_connections = 0
        while True:
            connection, is_new = await self._take()
            new_connections += is_new
            try:
                return await connection.send(method, path, body_for(connection.facts), patience)
            except BaseException as error:
                await self._drop(connection)
                is_last = new_connections >= (2 if isinstance(error, UnsentRequestError) else 1)
                if is_last or not isinstance(error, BrokenConnectionError):
                    raise

    async def request(self, path: str, body: Mapping[str, Any], model: str = "") -> EngineAnswer:
        """Send a document, and return the answer as soon as it begins.

        Args:
            model: The name by which the server is asked, and which it repeats; empty for a server that does not.
        """
        document = {**body, "model": model} if model else body
        return await self.request_with(lambda _facts: document, path, model)

    async def request_with(self, body_for: Callable[[Any], Mapping[str, Any]], path: str, model: str = "") -> EngineAnswer:
        """Like `request`, with a document that depends on the facts of the connection that it is sent on."""
        response = await self._send("POST", path, body_for, self.patience)
        return EngineAnswer(response.status, response.media_type, response.pieces(), response.close, model)

    async def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = _CALL_SECONDS
    ) -> tuple[int, Any]:
        """Send a request of our own; return the status, and the document of the answer, or its text if it is not JSON.

        Raises:
            EngineDownError: There is no answer.
        """
        response = await self._send(method, path, lambda _facts: body, seconds)
        return response.status, await response.document(path)

    async def answers(self, path: str) -> bool:
        """Return whether a path answers with success now, within two seconds once a connection has been greeted."""
        with contextlib.suppress(EngineDownError, RefusedError, TimeoutError):
            async with asyncio.timeout(_GREETING_SECONDS):
                return (await self.call("GET", path, seconds=_HEALTH_SECONDS))[0] == 200
        return False


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Raise httpcore's errors as those of an engine."""
    try:
        yield
    except httpcore2.ReadTimeout as error:
        raise EngineTimeoutError("it does not answer in time") from error
    except httpcore2.WriteError as error:
        raise UnsentRequestError(_reason(error)) from error
    except (httpcore2.ReadError, httpcore2.RemoteProtocolError, httpcore2.ConnectionNotAvailable) as error:
        raise BrokenConnectionError(_reason(error)) from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
        raise EngineDownError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return an error as one short line."""
    return printable(str(error) or type(error).__name__)[:200]
