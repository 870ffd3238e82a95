"""Requests to one server and wherever it redirects: retries, redirects, credentials, and bodies of checked length.

Redirects are followed here, hop by hop, because credentials go only to the server's own origin, never to the storage it
redirects to, and nothing goes from https to http (RFC 9110, section 15.4). A body is read as far as expected and no further.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field
from typing import ClassVar, Protocol, TypeVar

from adapterhub_converters.errors import FormatError, NotFoundError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from .boundary import Boundary
from .connection_pools import FAILURES, Connections, StaleError, causes_of, error_for
from .http_errors import DeniedError, RetriesExhaustedError, RetryableError
from .responses import SMALL_BODY, TIMEOUT, Body, Response, discard_body, retry_after_seconds
from .urls import ProxyOf, next_page, no_proxy, origin, proxy_to, resolve_link

MAX_REDIRECTS = 10
PAUSES = (0.5, 1.0, 2.0)  # seconds before each retry
_MAX_PAUSE = 120.0  # the longest pause in seconds that a server may ask for; longer ones are reported to the user
MAX_PAGES = 1000  # in one list
_MAX_LIST_SECONDS = 300.0  # seconds for all pages of a list
_MAX_LIST_BYTES = 64_000_000  # bytes of all pages
_MIN_SECRET = 8  # characters of secrets looked for in host names; shorter ones match by chance
_QUOTED_HEADERS = {"docker-content-digest", "x-repo-commit"}  # headers quoted in errors
_REDIRECTS = {301, 302, 303, 307, 308}
_RETRY_STATUSES = {408, 429, 500, 502, 503, 504}

T = TypeVar("T")
Authorize = Callable[[Sequence[str], str], str]
"""Returns the `Authorization` for the challenges of a 401 (`WWW-Authenticate`, may be several) and a scope."""


class RequestBody(Protocol):
    """A request body that is read while it is sent, from its start whenever it is iterated; `len` is its length in bytes.

    It must not have a `read` method, which urllib3 would call instead.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[memoryview]: ...


@dataclass
class Client:
    """A client of one server; several threads may use it at once.

    Attributes:
        base: Its URL. Only this origin gets credentials; if it uses TLS, no request goes anywhere without TLS.
        authorize: Answers a 401 of that origin; None for a client without credentials.
        login_hint: How to log in, for errors.
        login_host: The host this program can log in at (`DeniedError`); empty for servers of another kind.
        secrets: Texts that no error may repeat, whatever a server sends.
        pauses: Seconds before each retry.
        timeout: Seconds without a byte, and for all headers of a response and of the redirects to it.
        proxy: The proxy for a scheme and a host.
        boundary: The addresses it may be led to; by default as derived from `base`.
        max_list_seconds: Seconds for all pages of a list.
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
    max_list_seconds: float = _MAX_LIST_SECONDS
    authorizations: dict[str, str] = field(default_factory=dict, repr=False)
    """`Authorization` by scope; the empty scope is for requests that name none."""

    plain_hint: ClassVar[str] = ""
    """The hint for a server that speaks plain HTTP where TLS is expected."""

    def __post_init__(self) -> None:
        self.boundary = self.boundary or Boundary(origin(self.base, self.base)[1] if self.base else "")
        self._connections = Connections(self.timeout, self.boundary)
        self._authorizing = threading.Lock()
        self._stopped = threading.Event()

    def request(
        self,
        method: str,
        url: str,
        location: str,
        *,
        good: Sequence[int],
        scope: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | RequestBody | None = None,
        limit: int = SMALL_BODY,
        retry: bool = True,
        redirects: bool = True,
    ) -> Response:
        """Return the response to one request, with a status in `good` and a body of at most `limit` bytes.

        Raises:
            NotFoundError: 404.
            DeniedError: 401 or 403.
            RemoteError: The server failed, did not respond, or refused for a reason of its own.
            FormatError: The body is larger than `limit`.
            RetryableError: Without `retry`, for failures that a retry may not have.
        """

        def once() -> Response:
            with self._response(
                method, url, location, scope=scope, headers=headers, body=body, redirects=redirects
            ) as response:
                if response.status not in good:
                    raise self._status_error(response, location)
                response.check_identity()
                data = response.read(limit + 1, self.timeout)
                if len(data) > limit:
                    raise FormatError(location, f"the answer is larger than the limit of {limit} bytes")
                return Response(response.status, response.headers, data, response.url)

        return self.with_retries(once, location) if retry else once()

    def pages(
        self, url: str, location: str, *, limit: int, good: Sequence[int] = (200,), scope: str = ""
    ) -> Iterator[Response]:
        """Yield the pages of a list, each linked by the previous one (`Link`).

        Raises:
            RemoteError: The list does not end; other errors as in `request`.
        """
        began, size, page = time.monotonic(), 0, url
        for _ in range(MAX_PAGES):
            response = self.request("GET", page, location, good=good, scope=scope, limit=limit)
            size += len(response.body)
            yield response
            following = next_page(response.headers.get("link", ""), response.url, location)
            if following is None:
                return
            if size > _MAX_LIST_BYTES:
                raise RemoteError(location, f"its list has more than {_MAX_LIST_BYTES // 1_000_000} MB")
            if time.monotonic() - began > self.max_list_seconds:
                raise RemoteError(location, f"its list takes longer than {self.max_list_seconds:g} seconds")
            page = following
        raise RemoteError(location, f"its list has more than {MAX_PAGES} pages")

    @contextmanager
    def stream(
        self,
        url: str,
        location: str,
        *,
        scope: str = "",
        headers: Mapping[str, str] | None = None,
        good: Sequence[int] = (200, 206),
        retry: bool = True,
    ) -> Iterator[Body]:
        """Yield the response to a GET, with a status in `good` and an unread body of any length; errors as in `request`."""
        with ExitStack() as stack:

            def open_once() -> Body:
                response = stack.enter_context(self._response("GET", url, location, scope=scope, headers=headers))
                if response.status in good:
                    return response
                refused = self._status_error(response, location)
                stack.close()
                raise refused

            body = self.with_retries(open_once, location) if retry else open_once()
            body.check_identity()
            yield body

    def with_retries(self, once: Callable[[], T], location: str) -> T:
        """Return the result of `once`, called again after each of the pauses while it raises RetryableError."""
        for number in range(len(self.pauses) + 1):
            try:
                return once()
            except RetryableError as error:
                if number == len(self.pauses):
                    raise self.final_error(error, location, number + 1) from error
                self.pause(error, number, location)
        raise AssertionError

    def pause(self, error: RetryableError, number: int, location: str) -> None:
        """Wait before retry `number` + 1, as long as the server asked for. RemoteError if that is too long."""
        if error.pause is not None and error.pause > _MAX_PAUSE:
            raise RemoteError(
                location, f"{error.reason}; it asks to wait {error.pause:.0f} seconds", "Try again then"
            ) from error
        if self._stopped.wait(self.pauses[number] if error.pause is None else error.pause):
            raise RemoteError(location, "stopped") from error

    def final_error(self, error: RetryableError, location: str, tries: int) -> RemoteError:
        """Return the error for a RetryableError after the last attempt."""
        hint = (
            "Check the address, and that the server is running" if "connection refused" in error.reason else "Try again later"
        )
        return RetriesExhaustedError(location, error.reason + (f" ({tries} tries)" if tries > 1 else ""), hint)

    def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

    def stop(self, *, on: bool = True) -> None:
        """Make all requests fail at once in whatever thread waits for them, until called with `on` False."""
        (self._stopped.set if on else self._stopped.clear)()
        if on:
            self._connections.stop()

    # ---- one request

    @contextmanager
    def _response(
        self,
        method: str,
        url: str,
        location: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None,
        body: bytes | RequestBody | None = None,
        redirects: bool = True,
    ) -> Iterator[Body]:
        """Yield the response after redirects and, at most once, a login."""
        logged_in, remaining = False, self.timeout
        for _ in range(MAX_REDIRECTS + 2):
            began = time.monotonic()
            is_own_origin = self._is_own_origin(url, location)
            authorization = self.authorizations.get(scope) if is_own_origin else None
            auth_header = {"Authorization": authorization} if authorization else {}
            response = self._send(
                method, url, location, headers={**(headers or {}), **auth_header}, body=body, within=remaining
            )
            try:
                if response.status in _REDIRECTS and redirects and method in ("GET", "HEAD"):
                    discard_body(response, remaining)
                    url = resolve_link(url, response.headers.get("location"), location)
                    remaining -= time.monotonic() - began
                    if remaining <= 0:
                        raise RemoteError(
                            location, f"no answer in time: its redirects take longer than {self.timeout:g} seconds"
                        )
                    continue
                if response.status == 401 and is_own_origin and self.authorize and not logged_in:
                    discard_body(response, remaining)
                    self._log_in(scope, authorization, response.challenges)
                    # Start the clock again: the login took time of its own.
                    logged_in, remaining = True, self.timeout
                    continue
                yield response
                return
            finally:
                response.close()
        raise RemoteError(location, f"redirected more than {MAX_REDIRECTS} times")

    def _is_own_origin(self, url: str, location: str) -> bool:
        request_origin = origin(url, location)
        return bool(self.base) and request_origin == origin(self.base, location)

    def _log_in(self, scope: str, refused: str | None, challenges: Sequence[str]) -> None:
        """Get the `Authorization` for a scope, unless another thread has renewed it since `refused` was sent."""
        with self._authorizing:
            if self.authorize and self.authorizations.get(scope) in (None, refused):
                self.authorizations.pop(scope, None)
                self.authorizations[scope] = self.authorize(challenges, scope)

    def _send(
        self,
        method: str,
        url: str,
        location: str,
        *,
        headers: Mapping[str, str],
        body: bytes | RequestBody | None,
        within: float,
    ) -> Body:
        all_headers = {"User-Agent": "adapterhub", "Accept-Encoding": "identity", **headers}
        if body is not None or method in ("POST", "PUT", "PATCH"):
            all_headers["Content-Length"] = str(len(body or b""))
        scheme, host, _ = origin(url, location)
        if self._names_secret(host, location):
            raise RemoteError(location, "the server leads to a host whose name contains a password or token")
        if scheme != "https" and self.base and origin(self.base, location)[0] == "https":
            raise RemoteError(location, "the server leads from https to http", code="no-tls")
        proxy = proxy_to(scheme, host, self.proxy, location)
        while True:
            try:
                raw = self._connections.send(method, url, headers=all_headers, body=body, proxy=proxy, within=within)
                response = Body(raw, url, location)
                response.headers |= {
                    key: self.unless_secret(response.headers[key]) for key in _QUOTED_HEADERS & response.headers.keys()
                }
                return response
            except FAILURES as error:
                # A server may close an idle connection at any time: send again. Not a PATCH, of which a part may have arrived.
                stale = any(isinstance(cause, StaleError) for cause in causes_of(error))
                if not stale or method == "PATCH" or self._stopped.is_set():
                    raise error_for(error, location, proxy, plain=self.plain_hint, host=host) from error

    def _status_error(self, response: Body, location: str) -> Exception:
        """Return the error for a response with an unexpected status."""
        data = response.read(SMALL_BODY, self.timeout)
        return self._refusal(Response(response.status, response.headers, data, response.url), location)

    def _refusal(self, response: Response, location: str) -> Exception:
        """Return the error for a status; subclasses add the errors of their servers."""
        details = self._details(response)
        if response.status in _RETRY_STATUSES:
            return RetryableError(f"HTTP {response.status}{details}", retry_after_seconds(response.headers.get("retry-after")))
        if response.status in (401, 403):
            reason = "login required" if response.status == 401 else f"forbidden{details}"
            if not self._is_own_origin(response.url, location):
                return DeniedError(location, f"HTTP {response.status}: {reason}")
            return DeniedError(location, f"HTTP {response.status}: {reason}", self.login_hint, host=self.login_host)
        if response.status in (404, 410):
            return NotFoundError(location, f"not found{details or f' (HTTP {response.status})'}")
        return RemoteError(location, f"HTTP {response.status}{details}")

    def _details(self, _response: Response) -> str:
        """Return the server's own message about a refusal, as `: message`; empty if it has none."""
        return ""

    def unless_secret(self, text: str) -> str:
        """Return a text from the server, or an empty one if it repeats a secret."""
        return "" if any(secret in text for secret in self._all_secrets()) else text

    def _all_secrets(self) -> list[str]:
        return [
            secret
            for secret in (*self.secrets(), *(value.partition(" ")[2] for value in self.authorizations.values()))
            if secret
        ]

    def _names_secret(self, host: str, location: str) -> bool:
        """Return whether a server made a host name from a secret: host names are sent to DNS servers and appear in errors."""
        if self.base and host == origin(self.base, location)[1]:
            return False
        secrets = (secret.lower() for secret in self._all_secrets() if len(secret) >= _MIN_SECRET)
        return any(secret in host for secret in secrets)
