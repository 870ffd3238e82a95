"""The connections of one client, on urllib3's pools, with limits for each response and a way to stop them all.

urllib3 opens, keeps and reuses connections, checks certificates and speaks to proxies. It never reads the environment, and its
own redirects and retries are off: redirects must not carry credentials along, and only the client knows what may be repeated.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast
from urllib.parse import urlsplit
from weakref import WeakSet

from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool, PoolManager, ProxyManager, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util.connection import allowed_gai_family, create_connection

from adapterhub_converters.errors import RemoteError

from .boundary import Boundary, LedAstrayError
from .bounded_responses import BoundedResponse, NonsenseError, SlowError
from .http_errors import RetryableError
from .urls import Proxy

FAILURES = (HTTPError, http.client.HTTPException, OSError, ValueError)
"""What urllib3 and http.client raise when a connection or a response fails."""
PERMANENT = (NonsenseError, SlowError, LedAstrayError)
"""Failures that a retry would meet as well; their text is for people."""
_MAX_IDLE = 16  # idle connections to one origin
_MAX_ADDRESSES = 8  # of a name that are tried, in the time of one


class StaleError(ConnectionError):
    """The server closed a kept connection before it got the request."""


class _BoundedConnection(HTTPConnection):
    """A connection with bounded responses, and only to addresses that `boundary` admits."""

    response_class = BoundedResponse
    boundary: Boundary
    _opened: socket.socket | None = None
    _answered = False

    def _new_conn(self) -> socket.socket:
        if self.proxy is not None:
            return super()._new_conn()
        # Not urllib3's way, which connects before anybody has judged the address, and waits for the whole timeout at each of
        # the hundreds of addresses that a name may have.
        addresses = _addresses(self._dns_host, self.port)[:_MAX_ADDRESSES]
        deadline, failure = time.monotonic() + (self.timeout or 0.0), OSError("no address")
        for number, address in enumerate(addresses):
            try:
                return self._connected(address, (deadline - time.monotonic()) / (len(addresses) - number))
            except OSError as error:
                failure = error
        raise failure

    def _connected(self, address: str, patience: float) -> socket.socket:
        self.boundary.check_peer(self.host, address, is_connected=False)
        connected = create_connection((address, self.port), max(patience, 0.001), socket_options=self.socket_options)
        try:
            self.boundary.check_peer(self.host, connected.getpeername()[0])
        except BaseException:
            connected.close()
            raise
        connected.settimeout(self.timeout)
        return connected

    def connect(self) -> None:
        super().connect()
        # Keep the socket: after `Connection: close`, http.client drops `sock`, and only the body still holds it.
        self._opened, self._answered = self.sock, False

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3's own
        try:
            response = super().getresponse()
        except (OSError, http.client.HTTPException) as error:
            if self._answered and not isinstance(error, (TimeoutError, *PERMANENT)):
                raise StaleError from error
            raise
        self._answered = True
        return response

    def shut_down(self) -> None:
        """Make the thread that waits for this connection fail at once."""
        if self._opened is not None:
            with contextlib.suppress(OSError):
                # Bypass TLS's shutdown, whose state belongs to the other thread.
                socket.socket.shutdown(self._opened, socket.SHUT_RDWR)


class Connections:
    """The connections of one client; several threads may use them at once, each request on its own connection."""

    def __init__(self, timeout: float, home: Boundary) -> None:
        self._timeout, self._boundary = timeout, home
        self._open: WeakSet[_BoundedConnection] = WeakSet()
        self._managers: dict[tuple[str, Proxy | None], PoolManager] = {}
        self._lock = threading.Lock()

        class Plain(_BoundedConnection):
            boundary = home

            def connect(connection) -> None:  # noqa: N805
                super().connect()
                with self._lock:
                    self._open.add(connection)

        class Secure(Plain, HTTPSConnection):
            pass

        class Pool(HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = Secure

        self._pools = {"http": Pool, "https": SecurePool}

    def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | Iterable[Any] | None,
        proxy: Proxy | None,
        within: float,
    ) -> HTTPResponse:
        """Return the response to one request, with its body unread and its head read `within` so many seconds.

        Raises one of FAILURES if there is none.
        """
        parts = urlsplit(url)
        self._boundary.check_name(parts.hostname or "")
        scheme = parts.scheme
        with self._lock:
            if (scheme, proxy) not in self._managers:
                self._managers[scheme, proxy] = self._new(scheme, proxy)
            manager = self._managers[scheme, proxy]
        # Pass the path as it is: in a whole URL, urllib3 would resolve `..`, and a hostile file name would reach another
        # repository.
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        response = manager.connection_from_url(url).urlopen(
            method,
            url if proxy and scheme == "http" else path,
            headers=headers,
            body=body,
            timeout=Timeout(connect=self._timeout, read=within),
            redirect=False,
            retries=False,
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
        )
        http_response = cast(HTTPResponse, response)
        cast(BoundedResponse, http_response._original_response).wire.head_is_read(self._timeout)
        return http_response

    def _new(self, scheme: str, proxy: Proxy | None) -> PoolManager:
        options: dict[str, Any] = {"maxsize": _MAX_IDLE}
        if scheme == "https":
            options["ssl_context"] = ssl.create_default_context()
        manager = ProxyManager(proxy.url, proxy_headers=proxy.headers, **options) if proxy else PoolManager(**options)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def stop(self) -> None:
        """Make requests in other threads fail at once."""
        with self._lock:
            for connection in self._open:
                connection.shut_down()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            managers = list(self._managers.values())
            self._managers.clear()
        for manager in managers:
            manager.clear()


def _addresses(host: str, port: int) -> list[str]:
    """Return the addresses that a host has now, each once."""
    answers = socket.getaddrinfo(host.strip("[]"), port, allowed_gai_family(), socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in answers))


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, the original cause last."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or next(
            (argument for argument in reversed(current.args) if isinstance(argument, BaseException)), None
        )


def error_for(
    error: Exception, location: str, proxy: Proxy | None = None, *, plain: str = "", host: str = ""
) -> RetryableError | RemoteError:
    """Return the meaning of one of FAILURES.

    Args:
        error: One of FAILURES.
        location: The address the user knows.
        proxy: The proxy in use.
        plain: The hint for a server that does not speak TLS.
        host: The requested host, which the error names unless `location` contains it.
    """
    prefix = f"{host}: " if host not in location else ""
    causes = list(causes_of(error))
    if any(isinstance(cause, LocationParseError | UnicodeError) for cause in causes):  # not a valid DNS name
        return RemoteError(location, f"{prefix}no such host", code="no-such-host")
    lasting = _permanent_error(causes[-1], location, proxy, plain)
    if lasting is None:
        return RetryableError(prefix + _transient_reason(causes[-1]))
    lasting.what = prefix + lasting.what
    return lasting


def _permanent_error(cause: BaseException, location: str, proxy: Proxy | None, plain: str) -> RemoteError | None:
    """Return the error for a cause that a retry would meet as well; None for any other cause."""
    if (
        isinstance(cause, (*PERMANENT, http.client.LineTooLong)) or type(cause) is http.client.HTTPException
    ):  # http.client's error for too many headers
        return RemoteError(location, str(cause)[:200])
    if isinstance(cause, ssl.SSLCertVerificationError):
        hint = "If your own authority issued it, set SSL_CERT_FILE to a file with that authority's certificate"
        return RemoteError(location, f"its certificate is not trusted ({cause.verify_message})", hint, code="certificate")
    if proxy and str(cause).startswith("Tunnel connection failed"):
        reply = str(cause).partition(": ")[2][:80]
        hint = "Write its user and password into the variable that names it, like http://USER:PASSWORD@HOST:PORT"
        return RemoteError(location, f"the proxy {proxy.host}:{proxy.port} refused ({reply})", hint if "407" in reply else "")
    if isinstance(cause, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(cause):
        return RemoteError(location, "it does not speak TLS", plain, code="no-tls")
    if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
        return RemoteError(location, "no such host", code="no-such-host")
    return None


def _transient_reason(cause: BaseException) -> str:
    """Return the reason of a failure that a retry may not have."""
    if isinstance(cause, socket.gaierror):
        return "its host's name could not be looked up"
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, http.client.IncompleteRead):
        return f"the connection ended {f'{cause.expected} bytes ' if cause.expected else ''}too early"
    text = getattr(cause, "strerror", None) or str(cause)
    return next(filter(None, str(text).splitlines()), type(cause).__name__)[:200].lower()
