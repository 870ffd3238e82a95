"""HTTP as a registry's client needs it: bodies in both directions, kept connections, tries, and who asks.

`http.client`, so that redirects are followed here, hop by hop: what says who asks goes to the registry's own origin and never
to the storage that it redirects to, and nothing goes from https to http (RFC 9110, section 15.4). An answer is read as far as
it was expected to reach and no further.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import unquote, urljoin, urlsplit

from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, NotFoundError, RemoteError

from .protocol import CutError

MAX_REDIRECTS = 5
PAUSES = (0.5, 1.0, 2.0)  # seconds before another try
TIMEOUT = 60.0  # seconds without a byte; a registry hashes what it has received before it answers
SMALL = 1 << 16  # bytes of an answer that only says how it went
_LONGEST = 120.0  # seconds that an answer of a few kilobytes, or a manifest, may take
_LONGEST_PAUSE = 120.0  # seconds that a server may ask us to wait; of more, whoever waits is told
_REDIRECTS = {301, 302, 303, 307, 308}
_AGAIN = {408, 429, 500, 502, 503, 504}

Origin = tuple[str, str, int]
Authorize = Callable[[Sequence[str], str], str]
"""What to answer the challenges of a 401 (`WWW-Authenticate`, several) with, for a scope."""


class Outgoing(Protocol):
    """A body that is read while it is sent, from its start whenever it is iterated; `len` says how long it is."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[memoryview]: ...


class AgainError(Exception):
    """What may go better next time: the reason, and how long the server asked to wait."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


class GivenUpError(RemoteError):
    """What may go better next time has failed as often as it is tried."""


class DeniedError(RemoteError):
    """The server wants to know who asks, or knows and says no."""


@dataclass(frozen=True)
class Answer:
    """A status, headers by lower-case names, the body, and the URL that it came from in the end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    def number(self, header: str) -> int | None:
        """A header that is a plain number of bytes; None when it isn't there or nonsense."""
        text = self.headers.get(header, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


@dataclass
class Wire:
    """Requests to one server, and to where it redirects; several threads may ask at once, each on a connection of its own.

    Attributes:
        base: Its URL; only its origin is told who asks.
        authorize: Says who asks; None where nobody does.
        login_hint: How to log in, for the errors.
        secrets: What no error may repeat, whatever a server says.
    """

    base: str
    authorize: Authorize | None = None
    login_hint: str = ""
    secrets: Callable[[], Sequence[str]] = tuple
    pauses: Sequence[float] = PAUSES
    timeout: float = TIMEOUT
    _idle: dict[Origin, list[http.client.HTTPConnection]] = field(default_factory=dict, repr=False)
    _busy: set[http.client.HTTPConnection] = field(default_factory=set, repr=False)
    _known: dict[str, str] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _asking: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False)
    _context: ssl.SSLContext | None = field(default=None, repr=False)

    def ask(
        self,
        method: str,
        url: str,
        where: str,
        *,
        good: Sequence[int],
        scope: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview | Outgoing | None = None,
        limit: int = SMALL,
        retry: bool = True,
        redirects: bool = True,
    ) -> Answer:
        """The answer to one request, its status one of `good`, its body at most `limit` bytes.

        Raises:
            NotFoundError: 404.
            DeniedError: 401 or 403.
            RemoteError: The server failed, did not answer, or refused for a reason of its own.
            FormatError: The body is larger than it may be.
            AgainError: Without `retry`: what the next try may do better.
        """

        def once() -> Answer:
            with self._response(method, url, where, scope=scope, headers=headers or {}, body=body, redirects=redirects) as (
                response,
                final,
            ):
                found = {key.lower(): value for key, value in response.headers.items()}
                expected = limit if response.status in good else SMALL
                answer = Answer(response.status, found, _body(response, where, expected), final)
            if answer.status not in good:
                raise self._refusal(answer, where)
            return answer

        return self.tried(once, where) if retry else once()

    def tried(self, once: Callable[[], Any], where: str) -> Any:
        """What `once` returns, tried again as long as it raises AgainError, with a pause in between."""
        for number in range(len(self.pauses) + 1):
            try:
                return once()
            except AgainError as error:
                if number == len(self.pauses):
                    raise self.given_up(error, where, number + 1) from error
                self.pause(error, number, where)
        raise AssertionError

    def pause(self, error: AgainError, number: int, where: str) -> None:
        """Wait before try `number` + 1, as long as the server asked to; RemoteError when that is longer than anybody waits."""
        if error.pause is not None and error.pause > _LONGEST_PAUSE:
            raise RemoteError(where, f"{error.reason}; it asks to wait {error.pause:.0f} seconds", "Try again then") from error
        if self._stopped.wait(self.pauses[number] if error.pause is None else error.pause):
            raise RemoteError(where, "stopped") from error

    def given_up(self, error: AgainError, where: str, tries: int) -> RemoteError:
        """What an AgainError is after the last try."""
        return GivenUpError(where, error.reason + (f" ({tries} tries)" if tries > 1 else ""), "Try again later")

    @contextmanager
    def stream(self, url: str, where: str, *, scope: str = "", headers: Mapping[str, str] | None = None) -> Iterator[Body]:
        """The body of a GET of any length, 200 or 206."""

        def opened() -> Any:
            context = self._response("GET", url, where, scope=scope, headers=headers or {})
            response, final = context.__enter__()
            if response.status in (200, 206):
                return context, response
            try:
                found = {key.lower(): value for key, value in response.headers.items()}
                raise self._refusal(Answer(response.status, found, _body(response, where, SMALL), final), where)
            finally:
                context.__exit__(None, None, None)

        context, response = self.tried(opened, where)
        try:
            if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
                raise RemoteError(where, "the server sends it compressed though it was asked not to")
            yield Body(response, where)
        finally:
            context.__exit__(None, None, None)

    # ---- one request

    @contextmanager
    def _response(
        self,
        method: str,
        url: str,
        where: str,
        *,
        scope: str,
        headers: Mapping[str, str],
        body: bytes | memoryview | Outgoing | None = None,
        redirects: bool = True,
    ) -> Iterator[tuple[http.client.HTTPResponse, str]]:
        """The response after redirects and, once, after saying who asks; its connection is kept if it was read to its end."""
        said = False
        for _ in range(MAX_REDIRECTS + 2):
            here, at_home = origin(url, where), origin(url, where) == origin(self.base, where)
            known = self._known.get(scope) if at_home else None
            connection, response = self._send(method, url, where, {**headers, **_authorization(known)}, body)
            try:
                target = response.headers.get("Location")
                if response.status in _REDIRECTS and redirects and method in ("GET", "HEAD"):
                    response.read(SMALL)
                    url = resolved(url, target, where)
                    continue
                if response.status == 401 and at_home and self.authorize and not said:
                    response.read(SMALL)
                    self._say_who(scope, known, response.headers.get_all("WWW-Authenticate", []))
                    said = True
                    continue
                yield response, url
                return
            finally:
                self._let_go(here, connection, keep=response.isclosed() and not response.will_close)
        raise RemoteError(where, f"redirected more than {MAX_REDIRECTS} times")

    def _say_who(self, scope: str, known: str | None, challenges: Sequence[str]) -> None:
        """Learn what to say for a scope, unless another thread has learned it since `known` was refused."""
        with self._asking:
            if self.authorize and self._known.get(scope) in (None, known):
                self._known.pop(scope, None)
                self._known[scope] = self.authorize(challenges, scope)

    def _kept(self, place: Origin) -> http.client.HTTPConnection | None:
        with self._lock:
            connection = self._idle[place].pop() if self._idle.get(place) else None
            if connection:
                self._busy.add(connection)
            return connection

    def _let_go(self, place: Origin, connection: http.client.HTTPConnection, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            if keep:
                self._idle.setdefault(place, []).append(connection)
                return
        connection.close()

    def _send(
        self, method: str, url: str, where: str, headers: Mapping[str, str], body: bytes | memoryview | Outgoing | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        place, parts = origin(url, where), urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        sent = {"User-Agent": "adapterhub", "Accept-Encoding": "identity", **headers}
        if body is not None or method in ("POST", "PUT", "PATCH"):
            sent["Content-Length"] = str(len(body or b""))
        proxy = _proxy(place[0], place[1], where)
        if proxy and place[0] == "http":
            path, sent = url, {**sent, **proxy.headers}
        for kept in (True, False):
            connection = self._kept(place) if kept else self._connection(place, proxy)
            if connection is None:
                continue
            try:
                return connection, _exchange(connection, method, path, body, sent)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._let_go(place, connection, keep=False)
                # A kept connection may have been closed meanwhile; that is no failure of the server's.
                if not kept or method == "PATCH" or isinstance(error, TimeoutError):
                    raise network(error, where, proxy) from error
            except BaseException:
                self._let_go(place, connection, keep=False)
                raise
        raise AssertionError

    def _connection(self, place: Origin, proxy: Proxy | None) -> http.client.HTTPConnection:
        scheme, host, port = place
        connection: http.client.HTTPConnection
        if scheme == "http":
            connection = http.client.HTTPConnection(
                *((proxy.host, proxy.port) if proxy else (host, port)), timeout=self.timeout
            )
        else:
            with self._lock:
                self._context = self._context or ssl.create_default_context()
            there = (proxy.host, proxy.port) if proxy else (host, port)
            connection = http.client.HTTPSConnection(*there, timeout=self.timeout, context=self._context)
            if proxy:
                connection.set_tunnel(host, port, headers=proxy.headers)
        with self._lock:
            self._busy.add(connection)
        return connection

    def _refusal(self, answer: Answer, where: str) -> Exception:
        """What a status means that is not the one expected."""
        said = self._said(answer)
        if answer.status in _AGAIN:
            return AgainError(f"HTTP {answer.status}{said}", _seconds(answer.headers.get("retry-after")))
        at_home = origin(answer.url, where) == origin(self.base, where)
        if answer.status in (401, 403):
            hint = self.login_hint if at_home else ""
            return DeniedError(
                where, f"HTTP {answer.status}: {'it takes a login' if answer.status == 401 else 'forbidden'}", hint
            )
        if said.startswith(": DIGEST_INVALID"):
            return IntegrityError(
                where, f"the registry received other bytes (HTTP {answer.status})", "Nothing was stored; try again"
            )
        if answer.status in (404, 410):
            return NotFoundError(where, f"no such thing there{said or f' (HTTP {answer.status})'}")
        return RemoteError(where, f"HTTP {answer.status}{said}")

    def _said(self, answer: Answer) -> str:
        """The registry's own words (distribution-spec v1.1, "Error codes"), without anything secret in them."""
        try:
            error = json.loads(answer.body)["errors"][0]
            code, message = str(error["code"])[:40], str(error.get("message") or "")[:200]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
            return ""
        text = f": {code}" + (f", {message}" if message else "")
        known = [value.partition(" ")[2] for value in self._known.values()]
        return "" if any(secret and secret in text for secret in (*self.secrets(), *known)) else text

    def close(self) -> None:
        """Close the connections that were kept."""
        with self._lock:
            found = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
        for connection in found:
            connection.close()

    def stop(self, *, on: bool = True) -> None:
        """Have what other threads are waiting for end at once, as if the network had failed; until it is `on` no more."""
        if not on:
            self._stopped.clear()
            return
        self._stopped.set()
        with self._lock:
            for connection in self._busy:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # not that of TLS: it is another thread's


class Body:
    """The body of an answer as an unbuffered file; CutError where it ends before its length."""

    def __init__(self, response: http.client.HTTPResponse, where: str) -> None:
        self.status = response.status
        self.headers = {key.lower(): value for key, value in response.headers.items()}
        self.length = response.length
        self._response, self._where, self._left = response, where, response.length

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill as much of `buffer` as comes; 0 at the end."""
        try:
            n = self._response.readinto(buffer) or 0
        except (OSError, http.client.HTTPException, ValueError) as error:
            found = network(error, self._where)
            raise CutError(self._where, found.reason if isinstance(found, AgainError) else str(found)) from error
        if self._left is not None:
            if not n and self._left and len(buffer):
                raise CutError(self._where, f"the connection ended {self._left} bytes too early", "Try again")
            self._left -= n
        return n


def _body(response: http.client.HTTPResponse, where: str, limit: int) -> bytes:
    said, body, deadline = response.length, bytearray(), time.monotonic() + _LONGEST
    try:
        while len(body) <= limit and (piece := response.read1(limit + 1 - len(body))):
            body += piece
            if time.monotonic() > deadline:
                raise AgainError("the server sends too slowly")
        if len(body) == said:
            response.read()  # nothing, but now the connection can be kept
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise network(error, where) from error
    if len(body) > limit:
        if response.status < 400:
            raise FormatError(where, f"the answer has more than the {limit} bytes it may have")
        return b""
    if said is not None and len(body) < said:
        raise AgainError(f"the connection ended after {len(body)} of {said} bytes")
    if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        raise RemoteError(where, "the server sends it compressed though it was asked not to")
    return bytes(body)


def _authorization(known: str | None) -> dict[str, str]:
    return {"Authorization": known} if known else {}


def origin(url: str, where: str) -> Origin:
    """Scheme, host and port; RemoteError for what is no address that is asked here."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RemoteError(where, "it names an address that is none") from error
    odd = not url.isascii() or not url.isprintable() or " " in url or parts.username is not None
    if parts.scheme not in ("http", "https") or not parts.hostname or odd:
        raise RemoteError(where, "it names an address that is not asked here")
    return parts.scheme, parts.hostname.lower(), port or (443 if parts.scheme == "https" else 80)


def resolved(url: str, location: str | None, where: str) -> str:
    """The address that a `Location` means; RemoteError when there is none or it leaves https."""
    if not location:
        raise RemoteError(where, "an answer that does not say where to go on")
    try:
        target = urljoin(url, location)
    except ValueError as error:
        raise RemoteError(where, "it names an address that is none") from error
    if origin(url, where)[0] == "https" and origin(target, where)[0] != "https":
        raise RemoteError(where, "it leads from https to http")
    return target


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@dataclass(frozen=True)
class Proxy:
    """Where requests go instead; `headers` are for it alone."""

    host: str
    port: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def _proxy(scheme: str, host: str, where: str) -> Proxy | None:
    """The proxy that the environment names for a host, as urllib reads it."""
    found = {} if _is_here(host) or urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    text = found.get(scheme) or found.get("all")
    if not text:
        return None
    hint = f"Set {scheme.upper()}_PROXY to one like http://proxy.example:3128"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port or 8080
    except ValueError as error:
        raise RemoteError(where, "the proxy that is set has no address that makes sense", hint) from error
    if parts.scheme != "http" or not parts.hostname:
        raise RemoteError(where, f"a proxy by {parts.scheme[:20]!r} is set, and only http is known here", hint)
    headers = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return Proxy(parts.hostname, port, headers)


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | memoryview | Outgoing | None,
    headers: Mapping[str, str],
) -> http.client.HTTPResponse:
    try:
        connection.request(method, path, body=body, headers=headers)
    except (BrokenPipeError, ConnectionResetError):
        # Refused before all of it was sent; the answer may say why.
        if connection.sock is None or not body:
            raise
        connection.sock.settimeout(1.0)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            response = http.client.HTTPResponse(connection.sock, method=method)
            response.begin()
            response.will_close = True
            if response.status >= 400:
                return response
        raise
    return connection.getresponse()


def _seconds(text: str | None) -> float | None:
    """How long `Retry-After` asks to wait: seconds or a date (RFC 9110, section 10.2.3); None for nothing and nonsense."""
    if not text:
        return None
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None


def network(error: Exception, where: str, proxy: Proxy | None = None) -> AgainError | AdapterhubError:
    """What an exception of sockets or of http.client means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "If it is your own authority's, set SSL_CERT_FILE to a file with that one's certificate"
        return RemoteError(where, f"its certificate is not trusted ({error.verify_message})", hint)
    if proxy and str(error).startswith("Tunnel connection failed"):
        return RemoteError(where, f"the proxy {proxy.host}:{proxy.port} refused ({str(error).partition(': ')[2][:80]})")
    if isinstance(error, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(error):
        return RemoteError(where, "it does not speak TLS", "Write oci+http:// if plain HTTP is meant")
    if isinstance(error, socket.gaierror):
        return (
            AgainError("its host's name could not be looked up")
            if error.errno == socket.EAI_AGAIN
            else RemoteError(where, "no such host")
        )
    if isinstance(error, TimeoutError):
        return AgainError("no answer in time")
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return AgainError(str(text).splitlines()[0][:200].lower())
