"""Bodies of requests: asked first, then taken, and counted while they arrive.

A route settles from the headers alone who asks, what it may do and whether there is room. Only then does it take the body, by
`body_of`: its bytes count in one sum for the process, one for the client's address and one for its account until the request
has ended, and the whole body has a deadline. `BodyGuard` gives routes no other way to read one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import lru_cache
from typing import Any, cast

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_converters.lazy_dataclass import dataclass

BODY_SECONDS = 60.0
"""Seconds a client may let the server wait for a body, besides those that its bytes take at `MIN_RATE`."""
MIN_RATE = 4 << 10
"""Bytes a second of the slowest client that may send more than a minute: one of several uploads on a slow line."""
WINDOW = 4 << 20
"""Bytes of a streamed body that are in memory at a time, at most: two chunks that are written and two that arrive."""
TOO_LARGE, TOO_SLOW, TOO_MANY = "too_large", "timeout", "too_many"
_KEY = "adapterhub.body"  # of a scope
_SHARED_BITS = {4: 24, 6: 48}  # of an address of each version of IP
_PARSED_IN_THREAD = 64 << 10  # bytes; larger bodies are parsed in a thread, so that other requests go on


class BodyError(Exception):
    """A body that is not taken.

    Attributes:
        status: 413, 408 or 429.
        code: `TOO_LARGE`, `TOO_SLOW` or `TOO_MANY`.
        seconds: The value of Retry-After; 0 for none.
    """

    def __init__(self, status: int, message: str, code: str, *, seconds: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.seconds = status, code, seconds

    def headers(self) -> dict[str, str]:
        """Return the additional headers of the response."""
        return {"retry-after": str(self.seconds)} if self.seconds else {}


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on the bytes of bodies that are in memory at a time.

    Attributes:
        process: Of all clients.
        address: Of one address, or of one network with IPv6.
        account: Of one account; of all clients without an account together.
        stranger: Of one address, for clients without an account.
    """

    process: int
    address: int
    account: int
    stranger: int


class BodyBudget:
    """The bytes of all bodies that are being read or answered, by address and by account."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self._sums: dict[tuple[str, str], int] = {}

    @property
    def total(self) -> int:
        """The bytes of all bodies."""
        return self._sums.get(("process", ""), 0)

    def take(self, address: str, account: str, count: int) -> None:
        """Count bytes of a client; BodyError if they would be over a limit."""
        of_address = self.limits.address if account else self.limits.stranger
        limits = {("process", ""): self.limits.process, ("account", account): self.limits.account}
        limits["address", address] = of_address
        if any(self._sums.get(key, 0) + count > limit for key, limit in limits.items()):
            raise BodyError(429, "Too many large requests at a time; try again in 2 seconds", TOO_MANY, seconds=2)
        for key in limits:
            self._sums[key] = self._sums.get(key, 0) + count

    def give_back(self, address: str, account: str, count: int) -> None:
        """Stop counting bytes that were taken."""
        for key in (("process", ""), ("account", account), ("address", address)):
            remaining = self._sums.get(key, 0) - count
            if remaining > 0:
                self._sums[key] = remaining
            else:  # not kept: addresses are without number
                self._sums.pop(key, None)


class RequestBody:
    """The body of one request, which is read once."""

    def __init__(self, scope: Scope, receive: Receive, budget: BodyBudget, address: str) -> None:
        self._length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        self._receive, self._budget, self._address = receive, budget, address
        self._account, self._counted = "", 0

    @property
    def announced_size(self) -> int:
        """The size in bytes that the client announces; 0 if it does not."""
        return int(self._length) if self._length.isdigit() and len(self._length) < 20 else 0

    async def read(self, limit: int, account: str) -> bytes:
        """Return the whole body of at most `limit` bytes; they count until the request has ended.

        Args:
            limit: The most bytes.
            account: The account that sends it; empty without one.

        Raises:
            BodyError: It is too large, too slow, or there are too many.
            ClientDisconnect: The client is gone.
        """
        return b"".join([piece async for piece in self.stream(limit, account, window=limit)])

    async def read_object(self, limit: int, account: str, parse: Callable[[bytes], dict[str, Any]]) -> dict[str, Any]:
        """Return the JSON object in the body, as `parse` returns it; an empty one without a body."""
        raw = await self.read(limit, account)
        if not raw.strip():
            return {}
        return parse(raw) if len(raw) < _PARSED_IN_THREAD else await asyncio.to_thread(parse, raw)

    async def stream(self, limit: int | None, account: str, *, window: int = WINDOW) -> AsyncIterator[bytes]:
        """Yield the pieces of the body, of which the caller has at most `window` bytes in memory; errors as for `read`.

        `limit`: The most bytes; None if the caller counts them.
        """
        self._account = account
        if limit is not None and self.announced_size > limit:
            raise _too_large(limit)
        waited, arrived, is_complete = 0.0, 0, False
        while not is_complete:
            asked_at = time.monotonic()
            try:
                # Only the time spent waiting counts: that of a slow disk of ours is not the client's.
                async with asyncio.timeout(BODY_SECONDS + arrived / MIN_RATE - waited):
                    message = await self._receive()
            except TimeoutError as error:
                raise BodyError(408, f"The body took more than {waited + BODY_SECONDS:.0f} seconds", TOO_SLOW) from error
            waited += time.monotonic() - asked_at
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece, is_complete = message.get("body", b""), not message.get("more_body", False)
            arrived += len(piece)
            if limit is not None and arrived > limit:
                raise _too_large(limit)
            # Counted as it arrives, because a client may announce another length, or none.
            self._take(min(len(piece), window - self._counted))
            if piece:
                yield piece

    def _take(self, count: int) -> None:
        if count > 0:
            self._budget.take(self._address, self._account, count)
            self._counted += count

    def close(self) -> None:
        """Stop counting its bytes."""
        self._budget.give_back(self._address, self._account, self._counted)
        self._counted = 0

    async def receive_disconnect(self) -> Message:
        """Return the message that the client is gone; bytes of a body that was not taken are dropped."""
        while (message := await self._receive())["type"] == "http.request":
            pass
        return message


def _too_large(limit: int) -> BodyError:
    return BodyError(413, f"A body has at most {limit:,} bytes here", TOO_LARGE)


class BodyGuard:
    """Middleware that hands the body of a request to `body_of` alone: what a route receives is only the client's end.

    Args:
        app: The application.
        budget: What the bodies of all requests count in.
        behind_proxy: Whether the last entry of X-Forwarded-For is the client's address.
    """

    def __init__(self, app: ASGIApp, budget: BodyBudget, *, behind_proxy: bool = False) -> None:
        self._app, self.budget, self._behind_proxy = app, budget, behind_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = client_network(client_address(scope, behind_proxy=self._behind_proxy))
        body = RequestBody(scope, receive, self.budget, address)
        try:
            scope[_KEY] = body
            await self._app(scope, body.receive_disconnect, send)
        finally:
            body.close()


def body_of(request: Request) -> RequestBody:
    """Return the body of a request."""
    body: RequestBody = request.scope[_KEY]
    return body


async def until_disconnect(receive: Receive, work: Awaitable[None]) -> None:
    """Do some work, but cancel it and raise ClientDisconnect if the client closes the connection before it is done."""
    task, is_gone = cast("asyncio.Task[Any]", asyncio.current_task()), False

    async def wait_for_disconnect() -> None:
        """Cancel the work once the client has disconnected."""
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    disconnect = asyncio.create_task(wait_for_disconnect())
    try:
        await work
    except asyncio.CancelledError:  # codespell:ignore
        if not is_gone:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        disconnect.cancel()


# ---- who sends it


def client_address(scope: Scope, *, behind_proxy: bool) -> str:
    """Return the client's address: behind a proxy, the last entry of X-Forwarded-For, which the proxy itself appended."""
    forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"] if behind_proxy else []
    if forwarded:
        return _without_port(forwarded[-1].decode("latin-1").rpartition(",")[2].strip()[:64])
    return str(scope["client"][0]) if scope.get("client") else ""


def _without_port(address: str) -> str:
    """Return an address without the port that some proxies append, which would make a client of each connection."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and (host.startswith("[") or "." in host):
        address = host
    return address.removeprefix("[").removesuffix("]")


@lru_cache(maxsize=1024)
def client_network(address: str) -> str:
    """Return the network that one client controls: its address, or its /64 with IPv6."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if ip.version == 4:
        return address
    return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip), 64), strict=False))


def shared_network(address: str) -> str:
    """Return the network of an address that many clients share, or one has to itself; a text that is no address as it is."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ipaddress.ip_network((int(ip), _SHARED_BITS[ip.version]), strict=False))
