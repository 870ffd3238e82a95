"""One GET at a time over HTTP: a range or a small file, every length checked, tried again when the network hiccups.

`urllib` under rules of its own: redirects are followed here, hop by hop, because the token of a hub goes to that hub's
origin alone and never to the storage it redirects to; an answer is read as far as was asked for and no further, whatever
the server would like to send (RFC 9110, sections 14 and 15.4).
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RemoteError, UsageError

MAX_REDIRECTS = 10
PAUSES = (0.5, 1.0, 2.0)  # seconds before another try
_TIMEOUT = 15.0  # seconds without a byte
_SLOWEST = 50_000  # bytes a second; with this and _TIMEOUT a server cannot keep us for ever
_PIECE = 1 << 16
MAX_SKIPPED = 1 << 27  # bytes read to get at what lies behind them, of a server that knows no ranges
_LONGEST_PAUSE = 30.0  # seconds that a server may ask us to wait
_REDIRECTS = {301, 302, 303, 307, 308}
_AGAIN = {408, 429, 500, 502, 503, 504}


class ForbiddenError(RemoteError):
    """The server knows who asks and says no; object stores say it of files that are not there, too."""


class TooLargeError(FormatError):
    """A file that should be small is not."""


class _TryAgainError(Exception):
    """What may go better next time: the reason, and how long the server asked to wait."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


@dataclass(frozen=True)
class Answer:
    """A status of 200, 206 or 416, headers by lower-case names, and as much of the body as was asked for."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def length(self) -> int | None:
        """What `Content-Length` says; None when it is not said or nonsense."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


@dataclass
class Client:
    """Fetches for one command.

    Attributes:
        token: Sent to `origin` (scheme, host, port) and to nobody else.
        fetched: Bytes of all bodies so far.
    """

    token: str | None = None
    origin: tuple[str, str, int] | None = None
    pauses: Sequence[float] = PAUSES
    timeout: float = _TIMEOUT
    fetched: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._opener = urllib.request.build_opener(_AsItIs(), _Http(), _Https())

    def get(self, url: str, where: str, *, n: int, start: int | None = None) -> Answer:
        """The `n` bytes from `start` on, or, without a `start`, the whole file if it has no more than `n` bytes.

        A server that knows no ranges answers 200: then the body has everything up to `start + n`.

        Raises:
            NotFoundError: The server has no such file.
            TooLargeError: The whole file has more than `n` bytes.
            RemoteError: It refused, failed, did not answer, or answered what makes no sense. `where` is in the message, and
                never the address of a redirect, which may be signed.
        """
        for number in range(len(self.pauses) + 1):
            try:
                return self._once(url, where, n, start)
            except _TryAgainError as error:
                if number == len(self.pauses):
                    tries = f" ({number + 1} tries)" if number else ""
                    raise RemoteError(where, f"{error.reason}{tries}", "Try again later") from error
                time.sleep(min(error.pause or self.pauses[number], _LONGEST_PAUSE))
        raise AssertionError

    def _once(self, url: str, where: str, n: int, start: int | None) -> Answer:
        for _ in range(MAX_REDIRECTS + 1):
            response = self._open(url, where, start, n)
            try:
                headers = {key.lower(): value for key, value in response.headers.items()}
                if response.status in _REDIRECTS:
                    url = _next(url, headers.get("location"), where)
                    continue
                self._refuse(response.status, headers, where, at_hub=origin(url, where) == self.origin)
                if start is None and response.status != 200:
                    raise RemoteError(where, f"HTTP {response.status}, where the whole file was asked for")
                answer = Answer(response.status, headers, b"")
                body = self._body(response, answer, where, _wanted(answer, n, start, where))
                if start is None and len(body) > n:
                    raise TooLargeError(where, f"more than the {n} bytes of a small file")
                return dataclasses.replace(answer, body=body)
            finally:
                response.close()
        raise RemoteError(where, f"redirected more than {MAX_REDIRECTS} times")

    def _open(self, url: str, where: str, start: int | None, n: int) -> Any:
        headers = {"User-Agent": "adapterhub", "Accept-Encoding": "identity"}
        if start is not None:
            headers["Range"] = f"bytes={start}-{start + n - 1}"
        if self.token and self.origin == origin(url, where):
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            return self._opener.open(urllib.request.Request(url, headers=headers), timeout=self.timeout)  # noqa: S310
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _network(error, where) from error

    def _body(self, response: Any, answer: Answer, where: str, wanted: int) -> bytes:
        if answer.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise RemoteError(where, "the server sends it compressed though it was asked not to")
        said = answer.length()
        wanted = wanted if said is None else min(wanted, said)
        body, deadline = bytearray(), time.monotonic() + self.timeout + wanted / _SLOWEST
        try:
            while len(body) < wanted and (piece := response.read1(min(_PIECE, wanted - len(body)))):
                body += piece
                if time.monotonic() > deadline:
                    raise _TryAgainError(f"the server sends less than {_SLOWEST // 1000} kB a second")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _network(error, where) from error
        finally:
            with self._lock:
                self.fetched += len(body)
        if said is not None and len(body) < wanted:
            raise _TryAgainError(f"the connection ended after {len(body)} of {wanted} bytes")
        return bytes(body)

    def _refuse(self, status: int, headers: Mapping[str, str], where: str, *, at_hub: bool) -> None:
        """Raise what a status that brings no bytes means."""
        if status in (200, 206, 416):
            return
        if status in _AGAIN:
            pause = headers.get("retry-after", "")
            raise _TryAgainError(f"HTTP {status}", float(pause) if pause.isascii() and pause.isdigit() else None)
        raise self._error(status, headers.get("x-error-code", ""), where, at_hub=at_hub)

    def _error(self, status: int, code: str, where: str, *, at_hub: bool) -> AdapterhubError:
        anonymous = at_hub and not self.token
        takes = "Set HF_TOKEN to a token that may read it" if at_hub else ""
        if code == "GatedRepo":
            return RemoteError(
                where, f"HTTP {status}: a gated model", f"Ask for access on its page{' and set HF_TOKEN' if anonymous else ''}"
            )
        if status in (404, 410):
            kind = {"RepoNotFound": "model", "RevisionNotFound": "revision"}.get(code, "file")
            return NotFoundError(where, f"no such {kind} (HTTP {status})", "A private one needs HF_TOKEN" if anonymous else "")
        if status == 401:
            what = "the token was refused" if at_hub and self.token else "it takes a login"
            missing = ", or there is no such model" if at_hub else ""
            return RemoteError(where, f"HTTP 401: {what}{missing}", takes)
        if status == 403:
            return ForbiddenError(where, "HTTP 403: forbidden", takes)
        return RemoteError(where, f"HTTP {status}")


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Hands over every status: urllib's own redirects would take the token along."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class _Connection(http.client.HTTPConnection):
    """One whose whole answer but the body must have come within the timeout, which is otherwise for every byte."""

    def getresponse(self) -> http.client.HTTPResponse:
        late, sock = threading.Event(), self.sock

        def stop() -> None:
            late.set()
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not that of TLS, which is not for another thread

        timer = threading.Timer(self.timeout or _TIMEOUT, stop)
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()
        finally:
            timer.cancel()
            if late.is_set():  # headers that ended early pass for whole ones
                raise TimeoutError
        return response


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req)


def origin(url: str, where: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address; UsageError when it is none that is fetched here."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(where, f"not an address ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(where, "not an http or https address")
    if parts.username is not None or parts.password is not None:
        raise UsageError(where.rpartition("@")[2], "credentials in an address end up in logs", "Leave them out; use HF_TOKEN")
    return parts.scheme, parts.hostname.lower(), port or (443 if parts.scheme == "https" else 80)


def _next(url: str, location: str | None, where: str) -> str:
    if not location:
        raise RemoteError(where, "a redirect that does not say where to")
    try:
        target = urljoin(url, location)
        scheme, _, _ = origin(target, where)
    except (UsageError, ValueError) as error:
        raise RemoteError(where, "a redirect to what is not fetched here") from error
    if urlsplit(url).scheme == "https" and scheme != "https":
        raise RemoteError(where, "a redirect from https to http")
    return target


def _wanted(answer: Answer, n: int, start: int | None, where: str) -> int:
    """How many bytes of a body are read."""
    said = answer.length()
    if answer.status == 416:
        return 0
    if start is None:
        if said is None and answer.headers.get("transfer-encoding", "").lower() != "chunked":
            raise RemoteError(where, "the server does not say how long the file is")
        if said is not None and said > n:
            raise TooLargeError(where, f"{said} bytes, more than the {n} of a small file")
        return n + 1  # the one shows that there are too many
    if answer.status == 206:
        return n
    if start + n > MAX_SKIPPED and start:
        what = f"the server knows no ranges, and {start + n} bytes would have to be read for {n} at their end"
        raise RemoteError(where, what, "Download it, and name the file")
    return start + n


def _network(error: Exception, where: str) -> Exception:
    reason = getattr(error, "reason", None)
    cause = reason if isinstance(reason, Exception) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return RemoteError(where, f"its certificate is not trusted ({cause.verify_message})")
    if isinstance(cause, socket.gaierror):
        if cause.errno != socket.EAI_AGAIN:
            return RemoteError(where, "no such host")
        return _TryAgainError("its host's name could not be looked up")
    if isinstance(cause, UnicodeError):  # of a name that the name system cannot say
        return RemoteError(where, "no such host")
    if isinstance(cause, TimeoutError):
        return _TryAgainError("no answer in time")
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return _TryAgainError(text.splitlines()[0][:200].lower())
