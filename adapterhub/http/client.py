"""Requests to one server and to where it redirects: tries, redirects, credentials, and bodies of checked length.

Redirects are followed here, hop by hop, because credentials go to the server's own origin and never to the storage that it
redirects to, and nothing goes from https to http (RFC 9110, section 15.4). A body is read as far as it was expected to reach
and no further.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, Protocol, TypeVar

from urllib3 import HTTPResponse

from adapterhub_converters.errors import FormatError, NotFoundError, RemoteError

from .boundary import Boundary
from .connections import FAILURES, Connections, StaleError, chain, failure
from .errors import AgainError, CutError, DeniedError, GivenUpError
from .urls import ProxyOf, next_page, no_proxy, origin, proxy_to, resolved

MAX_REDIRECTS = 10
PAUSES = (0.5, 1.0, 2.0)  # seconds before another try
TIMEOUT = 60.0  # seconds; a registry hashes what it has received before it answers
SMALL = 1 << 16  # bytes of an answer that only reports success or failure
_SLOWEST = 50_000  # bytes a second of a small body, once the timeout is over
_TOO_SLOW = f"the server sends less than {_SLOWEST // 1000} kB a second"
_LONGEST_PAUSE = 120.0  # seconds that a server may ask us to wait; the user is told of longer ones
_PIECE = 1 << 16
MAX_PAGES = 1000  # of one list
_LONGEST_LIST = 300.0  # seconds for all pages of a list
_MAX_LIST = 64_000_000  # bytes of them
_SHORTEST_SECRET = 8  # characters of one that is looked for in names of hosts, which contain any short word
_REPEATED = {"docker-content-digest", "x-repo-commit"}  # headers that errors repeat
_REDIRECTS = {301, 302, 303, 307, 308}
_AGAIN = {408, 429, 500, 502, 503, 504}

T = TypeVar("T")
Authorize = Callable[[Sequence[str], str], str]
"""Returns the `Authorization` for the challenges of a 401 (`WWW-Authenticate`, several) and a scope."""


class Outgoing(Protocol):
    """A body that is read while it is sent, from its start whenever it is iterated; `len` is its length in bytes.

    It must not have a `read`, which urllib3 would call instead.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[memoryview]: ...


@dataclass(frozen=True)
class Answer:
    """A status, headers by lower-case names, the body, and the URL that it came from after redirects."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    def number(self, header: str) -> int | None:
        """A header that is a plain number; None if it is absent or not one."""
        text = self.headers.get(header, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


class Body:
    """An answer whose body is still to be read, at once with `read` or piece by piece with `readinto`.

    Attributes:
        length: In bytes, None where the server does not tell.
        taken: Bytes read so far.
    """

    def __init__(self, response: HTTPResponse, url: str, where: str) -> None:
        self.status, self.url, self.length, self.taken = response.status, url, response.length_remaining, 0
        self.headers = {key.lower(): response.headers[key] for key in response.headers}  # several of a name are one list
        self.challenges: list[str] = response.headers.getlist("WWW-Authenticate")
        self._response, self._where = response, where
        # http.client fills our buffer; urllib3's own `readinto` makes bytes of each piece first, which takes a quarter longer.
        self._raw: Any = response._original_response

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill as much of `buffer` as comes; 0 at the end, CutError where that is too early."""
        try:
            n: int = self._raw.readinto(buffer) or 0
        except FAILURES as error:
            found = failure(error, self._where)
            raise CutError(self._where, found.reason) if isinstance(found, AgainError) else found from error
        if not n and len(buffer) and self.length is not None and self.taken < self.length:
            raise CutError(self._where, f"the connection ended {self.length - self.taken} bytes too early", "Try again")
        self.taken += n
        return n

    def read(self, limit: int, timeout: float = TIMEOUT) -> bytes:
        """The body, or its first `limit` bytes.

        Raises:
            AgainError: It ended too early.
            RemoteError: It comes so slowly that it might as well not come.
        """
        data, began = bytearray(), time.monotonic()
        try:
            while len(data) < limit:
                self._raw.wire.hurry(began + timeout + len(data) / _SLOWEST, _TOO_SLOW)
                # One read more than needed finds the end, after which the connection can be kept.
                if not (piece := self._response.read1(min(_PIECE, limit - len(data)))):
                    break
                data += piece
                self.taken += len(piece)
        except FAILURES as error:
            raise failure(error, self._where) from error
        return bytes(data)

    def check_identity(self) -> None:
        """RemoteError for a body that the server has compressed."""
        if self.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise RemoteError(self._where, "the server sends it compressed though it was asked not to")

    def close(self) -> None:
        """Keep the connection if the body was read to its end, else close it."""
        if self._raw.isclosed():
            self._response.release_conn()
        else:
            self._response.close()


@dataclass
class Client:
    """Requests to one server; several threads may use it at once.

    Attributes:
        base: Its URL; only this origin gets credentials, and with TLS there nothing is sent without it anywhere.
        authorize: Answers a 401 of that origin; None for a client without credentials.
        login_hint: How to log in, for errors.
        login_host: The host that this program can log in at (`DeniedError`); empty for a server of another kind.
        secrets: Texts that no error may repeat, whatever a server sends.
        pauses: Seconds before each further try.
        timeout: Seconds without a byte, and for all headers of an answer and of the redirects to it.
        proxy: The proxy for a scheme and a host.
        boundary: What it may lead to; that of `base` if there is none.
        longest: Seconds for all pages of a list.
    """

    base: str = ""
    authorize: Authorize | None = None
    login_hint: str = ""
    secrets: Callable[[], Sequence[str]] = tuple
    pauses: Sequence[float] = PAUSES
    timeout: float = TIMEOUT
    proxy: ProxyOf = no_proxy
    login_host: str = ""
    boundary: Boundary | None = None
    longest: float = _LONGEST_LIST
    known: dict[str, str] = field(default_factory=dict, repr=False)
    """`Authorization` by scope; the empty scope is that of a request that names none."""

    plain_hint: ClassVar[str] = ""
    """For a server that is asked for TLS and speaks plain HTTP."""

    def __post_init__(self) -> None:
        self.boundary = self.boundary or Boundary(origin(self.base, self.base)[1] if self.base else "")
        self._connections = Connections(self.timeout, self.boundary)
        self._authorizing = threading.Lock()
        self._stopped = threading.Event()

    def ask(
        self,
        method: str,
        url: str,
        where: str,
        *,
        good: Sequence[int],
        scope: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | Outgoing | None = None,
        limit: int = SMALL,
        retry: bool = True,
        redirects: bool = True,
    ) -> Answer:
        """The answer to one request, its status one of `good`, its body at most `limit` bytes.

        Raises:
            NotFoundError: 404.
            DeniedError: 401 or 403.
            RemoteError: The server failed, did not answer, or refused for a reason of its own.
            FormatError: The body is larger than `limit`.
            AgainError: Without `retry`, for what the next try may do better.
        """

        def once() -> Answer:
            with self._response(method, url, where, scope=scope, headers=headers, body=body, redirects=redirects) as found:
                if found.status not in good:
                    raise self._refused(found, where)
                found.check_identity()
                data = found.read(limit + 1, self.timeout)
                if len(data) > limit:
                    raise FormatError(where, f"the answer is larger than the limit of {limit} bytes")
                return Answer(found.status, found.headers, data, found.url)

        return self.tried(once, where) if retry else once()

    def pages(self, url: str, where: str, *, limit: int, good: Sequence[int] = (200,), scope: str = "") -> Iterator[Answer]:
        """The pages of a list, each named by the one before (`Link`); errors as those of `ask`, RemoteError for no end."""
        began, size, page = time.monotonic(), 0, url
        for _ in range(MAX_PAGES):
            answer = self.ask("GET", page, where, good=good, scope=scope, limit=limit)
            size += len(answer.body)
            yield answer
            following = next_page(answer.headers.get("link", ""), answer.url, where)
            if following is None:
                return
            if size > _MAX_LIST:
                raise RemoteError(where, f"its list has more than {_MAX_LIST // 1_000_000} MB")
            if time.monotonic() - began > self.longest:
                raise RemoteError(where, f"its list takes longer than {self.longest:g} seconds")
            page = following
        raise RemoteError(where, f"its list has more than {MAX_PAGES} pages")

    @contextmanager
    def stream(
        self,
        url: str,
        where: str,
        *,
        scope: str = "",
        headers: Mapping[str, str] | None = None,
        good: Sequence[int] = (200, 206),
        retry: bool = True,
    ) -> Iterator[Body]:
        """The answer to a GET, its status one of `good`, its body of any length and unread; errors as those of `ask`."""
        with ExitStack() as stack:

            def opened() -> Body:
                found = stack.enter_context(self._response("GET", url, where, scope=scope, headers=headers))
                if found.status in good:
                    return found
                refused = self._refused(found, where)
                stack.close()
                raise refused

            found = self.tried(opened, where) if retry else opened()
            found.check_identity()
            yield found

    def tried(self, once: Callable[[], T], where: str) -> T:
        """The result of `once`, called again after a pause as often as it raises AgainError and there are pauses."""
        for number in range(len(self.pauses) + 1):
            try:
                return once()
            except AgainError as error:
                if number == len(self.pauses):
                    raise self.given_up(error, where, number + 1) from error
                self.pause(error, number, where)
        raise AssertionError

    def pause(self, error: AgainError, number: int, where: str) -> None:
        """Wait before try `number` + 1, as long as the server asked to; RemoteError if that is too long."""
        if error.pause is not None and error.pause > _LONGEST_PAUSE:
            raise RemoteError(where, f"{error.reason}; it asks to wait {error.pause:.0f} seconds", "Try again then") from error
        if self._stopped.wait(self.pauses[number] if error.pause is None else error.pause):
            raise RemoteError(where, "stopped") from error

    def given_up(self, error: AgainError, where: str, tries: int) -> RemoteError:
        """The error for an AgainError after the last try."""
        hint = (
            "Check the address, and that the server is running" if "connection refused" in error.reason else "Try again later"
        )
        return GivenUpError(where, error.reason + (f" ({tries} tries)" if tries > 1 else ""), hint)

    def close(self) -> None:
        """Close the kept connections."""
        self._connections.close()

    def stop(self, *, on: bool = True) -> None:
        """Have what other threads wait for end at once, as if the network had failed, until called with `on` False."""
        (self._stopped.set if on else self._stopped.clear)()
        if on:
            self._connections.stop()

    # ---- one request

    @contextmanager
    def _response(
        self,
        method: str,
        url: str,
        where: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None,
        body: bytes | Outgoing | None = None,
        redirects: bool = True,
    ) -> Iterator[Body]:
        """The answer after redirects and, once, after a login."""
        logged_in, left = False, self.timeout
        for _ in range(MAX_REDIRECTS + 2):
            began = time.monotonic()
            at_home = self._at_home(url, where)
            known = self.known.get(scope) if at_home else None
            who = {"Authorization": known} if known else {}
            found = self._send(method, url, where, headers={**(headers or {}), **who}, body=body, within=left)
            try:
                if found.status in _REDIRECTS and redirects and method in ("GET", "HEAD"):
                    _finish(found, left)
                    url = resolved(url, found.headers.get("location"), where)
                    left -= time.monotonic() - began
                    if left <= 0:
                        raise RemoteError(where, f"no answer in time: its redirects take longer than {self.timeout:g} seconds")
                    continue
                if found.status == 401 and at_home and self.authorize and not logged_in:
                    _finish(found, left)
                    self._log_in(scope, known, found.challenges)
                    logged_in, left = True, self.timeout
                    continue
                yield found
                return
            finally:
                found.close()
        raise RemoteError(where, f"redirected more than {MAX_REDIRECTS} times")

    def _at_home(self, url: str, where: str) -> bool:
        here = origin(url, where)
        return bool(self.base) and here == origin(self.base, where)

    def _log_in(self, scope: str, refused: str | None, challenges: Sequence[str]) -> None:
        """Get the `Authorization` for a scope, unless another thread has got it since `refused` was sent."""
        with self._authorizing:
            if self.authorize and self.known.get(scope) in (None, refused):
                self.known.pop(scope, None)
                self.known[scope] = self.authorize(challenges, scope)

    def _send(
        self, method: str, url: str, where: str, *, headers: Mapping[str, str], body: bytes | Outgoing | None, within: float
    ) -> Body:
        sent = {"User-Agent": "adapterhub", "Accept-Encoding": "identity", **headers}
        if body is not None or method in ("POST", "PUT", "PATCH"):
            sent["Content-Length"] = str(len(body or b""))
        scheme, host, _ = origin(url, where)
        if self._names_secret(host, where):
            raise RemoteError(where, "the server leads to a host whose name contains a password or token")
        if scheme != "https" and self.base and origin(self.base, where)[0] == "https":
            raise RemoteError(where, "the server leads from https to http", code="no-tls")
        proxy = proxy_to(scheme, host, self.proxy, where)
        while True:
            try:
                found = self._connections.send(method, url, headers=sent, body=body, proxy=proxy, within=within)
                answer = Body(found, url, where)
                answer.headers |= {key: self.unless_secret(answer.headers[key]) for key in _REPEATED & answer.headers.keys()}
                return answer
            except FAILURES as error:
                # A server may close an idle connection at any time, which is no failure; of a PATCH some may have arrived.
                stale = any(isinstance(one, StaleError) for one in chain(error))
                if not stale or method == "PATCH" or self._stopped.is_set():
                    raise failure(error, where, proxy, plain=self.plain_hint, host=host) from error

    def _refused(self, found: Body, where: str) -> Exception:
        """The error for an answer whose status is not a good one."""
        data = found.read(SMALL, self.timeout)
        return self._refusal(Answer(found.status, found.headers, data, found.url), where)

    def _refusal(self, answer: Answer, where: str) -> Exception:
        """The error for a status; servers with errors of their own have a subclass."""
        details = self._details(answer)
        if answer.status in _AGAIN:
            return AgainError(f"HTTP {answer.status}{details}", seconds(answer.headers.get("retry-after")))
        if answer.status in (401, 403):
            what = "login required" if answer.status == 401 else "forbidden"
            if not self._at_home(answer.url, where):
                return DeniedError(where, f"HTTP {answer.status}: {what}")
            return DeniedError(where, f"HTTP {answer.status}: {what}", self.login_hint, host=self.login_host)
        if answer.status in (404, 410):
            return NotFoundError(where, f"not found{details or f' (HTTP {answer.status})'}")
        return RemoteError(where, f"HTTP {answer.status}{details}")

    def _details(self, _answer: Answer) -> str:
        """The server's own words about its refusal, as `: words`; empty if it has none."""
        return ""

    def unless_secret(self, text: str) -> str:
        """A text of the server's; empty if it repeats a secret."""
        return "" if any(secret in text for secret in self._all_secrets()) else text

    def _all_secrets(self) -> list[str]:
        return [secret for secret in (*self.secrets(), *(value.partition(" ")[2] for value in self.known.values())) if secret]

    def _names_secret(self, host: str, where: str) -> bool:
        """True for a host that a server made of a secret: names of hosts are looked up, and are in errors."""
        if self.base and host == origin(self.base, where)[1]:
            return False
        secrets = (secret.lower() for secret in self._all_secrets() if len(secret) >= _SHORTEST_SECRET)
        return any(secret in host for secret in secrets)


def _finish(found: Body, timeout: float) -> None:
    """Read the rest of an answer that only points elsewhere, so that its connection can be kept."""
    with contextlib.suppress(AgainError, RemoteError):
        found.read(SMALL, timeout)


def seconds(text: str | None) -> float | None:
    """The pause that `Retry-After` asks for, in seconds or as a date (RFC 9110, section 10.2.3); None without a valid one."""
    if not text:
        return None
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None
