"""Kept connections of one client on urllib3's pools, with bounds for each answer and a way to stop them all.

urllib3 opens, keeps and reuses connections, checks certificates and speaks to proxies. It never reads the environment, and its
own redirects and retries are off: redirects must not take credentials along, and only the client knows what may be repeated.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast
from urllib.parse import urlsplit
from weakref import WeakSet

from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool, PoolManager, ProxyManager, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError

from adapterhub_converters.errors import RemoteError

from .boundary import Boundary, LedAstrayError
from .bounded import BoundedResponse, NonsenseError, SlowError
from .errors import AgainError
from .urls import Proxy

FAILURES = (HTTPError, http.client.HTTPException, OSError, ValueError)
"""What urllib3 and http.client raise when a connection or an answer fails."""
LASTING = (NonsenseError, SlowError, LedAstrayError)
"""Those of them that another try would meet as well; their text is for people."""
_KEPT = 16  # idle connections to one origin


class StaleError(ConnectionError):
    """The server had closed a kept connection before it got the request."""


class _Watched(HTTPConnection):
    """One connection, with answers that are bounded, and only to an address that `boundary` admits."""

    response_class = BoundedResponse
    boundary: Boundary
    _opened: socket.socket | None = None
    _answered = False

    def _new_conn(self) -> socket.socket:
        connected = super()._new_conn()
        try:
            if self.proxy is None:
                self.boundary.check_peer(self.host, connected.getpeername()[0])
        except BaseException:
            connected.close()
            raise
        return connected

    def connect(self) -> None:
        super().connect()
        # After `Connection: close`, http.client drops `sock` and only the body still holds it.
        self._opened, self._answered = self.sock, False

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3's own
        try:
            response = super().getresponse()
        except (OSError, http.client.HTTPException) as error:
            if self._answered and not isinstance(error, (TimeoutError, *LASTING)):
                raise StaleError from error
            raise
        self._answered = True
        return response

    def shut_down(self) -> None:
        """Have the thread that waits for this connection fail at once."""
        if self._opened is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._opened, socket.SHUT_RDWR)  # not TLS's own, which belongs to the other thread


class Connections:
    """The connections of one client; several threads may use them at once, each request on one of its own."""

    def __init__(self, timeout: float, home: Boundary) -> None:
        self._timeout, self._boundary = timeout, home
        self._all: WeakSet[_Watched] = WeakSet()
        self._managers: dict[tuple[str, Proxy | None], PoolManager] = {}
        self._lock = threading.Lock()

        class Plain(_Watched):
            boundary = home

            def connect(connection) -> None:  # noqa: N805
                super().connect()
                with self._lock:
                    self._all.add(connection)

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
        """The answer to one request, its head read `within` these seconds, its body unread; one of FAILURES without one."""
        parts = urlsplit(url)
        self._boundary.check_name(parts.hostname or "")
        scheme = parts.scheme
        with self._lock:
            if (scheme, proxy) not in self._managers:
                self._managers[scheme, proxy] = self._new(scheme, proxy)
            manager = self._managers[scheme, proxy]
        # A path as it is: of a whole URL, urllib3 would resolve `..`, and a hostile file name reach another repository.
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
        found = cast(HTTPResponse, response)
        cast(BoundedResponse, found._original_response).wire.head_is_read(self._timeout)
        return found

    def _new(self, scheme: str, proxy: Proxy | None) -> PoolManager:
        options: dict[str, Any] = {"maxsize": _KEPT}
        if scheme == "https":
            options["ssl_context"] = ssl.create_default_context()
        manager = ProxyManager(proxy.url, proxy_headers=proxy.headers, **options) if proxy else PoolManager(**options)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def stop(self) -> None:
        """Have what other threads wait for fail at once."""
        with self._lock:
            for connection in self._all:
                connection.shut_down()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            managers = list(self._managers.values())
            self._managers.clear()
        for manager in managers:
            manager.clear()


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those it was made from, the first cause last."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or next((one for one in reversed(found.args) if isinstance(one, BaseException)), None)


def failure(
    error: Exception, where: str, proxy: Proxy | None = None, *, plain: str = "", host: str = ""
) -> AgainError | RemoteError:
    """The meaning of one of FAILURES.

    Args:
        error: One of FAILURES.
        where: The address that the user knows.
        proxy: The proxy that was asked.
        plain: The hint for a server that speaks no TLS.
        host: The host that was asked, which the error names where `where` does not.
    """
    at = f"{host}: " if host not in where else ""
    causes = list(chain(error))
    if any(isinstance(one, LocationParseError | UnicodeError) for one in causes):  # a name that DNS cannot have
        return RemoteError(where, f"{at}no such host", code="no-such-host")
    lasting = _lasting(causes[-1], where, proxy, plain)
    if lasting is None:
        return AgainError(at + _passing(causes[-1]))
    lasting.what = at + lasting.what
    return lasting


def _lasting(cause: BaseException, where: str, proxy: Proxy | None, plain: str) -> RemoteError | None:
    """The error for a cause that another try would meet as well."""
    if isinstance(cause, (*LASTING, http.client.LineTooLong)) or type(cause) is http.client.HTTPException:  # too many headers
        return RemoteError(where, str(cause)[:200])
    if isinstance(cause, ssl.SSLCertVerificationError):
        hint = "If your own authority issued it, set SSL_CERT_FILE to a file with that authority's certificate"
        return RemoteError(where, f"its certificate is not trusted ({cause.verify_message})", hint, code="certificate")
    if proxy and str(cause).startswith("Tunnel connection failed"):
        said = str(cause).partition(": ")[2][:80]
        hint = "Write its user and password into the variable that names it, like http://USER:PASSWORD@HOST:PORT"
        return RemoteError(where, f"the proxy {proxy.host}:{proxy.port} refused ({said})", hint if "407" in said else "")
    if isinstance(cause, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(cause):
        return RemoteError(where, "it does not speak TLS", plain, code="no-tls")
    if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
        return RemoteError(where, "no such host", code="no-such-host")
    return None


def _passing(cause: BaseException) -> str:
    """The reason of a failure that another try may not meet."""
    if isinstance(cause, socket.gaierror):
        return "its host's name could not be looked up"
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, http.client.IncompleteRead):
        return f"the connection ended {f'{cause.expected} bytes ' if cause.expected else ''}too early"
    text = getattr(cause, "strerror", None) or str(cause)
    return next(filter(None, str(text).splitlines()), type(cause).__name__)[:200].lower()
