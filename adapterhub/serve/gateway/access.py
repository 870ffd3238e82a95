"""Who may ask, and how much: the keys of clients, and what their limits allow now."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from adapterhub.http_server import binding
from adapterhub.serve.usage import shared_limits
from adapterhub.serve.usage.delayed_limits import DelayedLimits
from adapterhub.serve.usage.record_place import Place, PostgresAddress
from adapterhub.serve.usage.shared_limits import SharedLimits
from adapterhub.serve.usage.usage_recorder import UsageRecorder
from adapterhub_converters.display import printable
from adapterhub_converters.lazy_dataclass import dataclass

from .gateway_settings import GatewaySettings
from .openai_errors import BUSY, DOWN, ProblemError
from .reloading import Rules
from .route_file import Key

_LIMITS = ".limits.db"  # what the name of the file of shared limits adds to that of the record of usage


@dataclass(slots=True)
class ReservedTokens:
    """The tokens of a request that were counted against the limits of its key.

    Attributes:
        count: Their number: what the request may take, and once it was answered what it took.
        window_end: When the window ends in which they were counted, by a monotonic clock.
    """

    count: int = 0
    window_end: float = 0.0


class Access:
    """The keys of clients, with the requests that run and what was counted for each."""

    def __init__(self, settings: GatewaySettings, rules: Rules, recorder: UsageRecorder) -> None:
        self._settings, self._rules, self._recorder = settings, rules, recorder
        self._limits = limits_of(settings.usage)
        self._running = 0  # requests
        self._unrecorded: Counter[str] = Counter()  # tokens of requests that run, by key with a budget

    async def keep_counted(self) -> None:
        """Let other gateways count the running requests of this one, until this is canceled."""
        while True:
            await asyncio.sleep(shared_limits.REFRESH_SECONDS)
            self._limits.refresh()

    def close(self) -> None:
        """Leave the limits that are shared."""
        self._limits.close()

    def running(self) -> int:
        """Return how many requests run."""
        return self._running

    def key_of(self, headers: Mapping[str, str]) -> Key | None:
        """Return the key of the client; None if no key is needed.

        Raises:
            ProblemError: A key is needed and is missing or unknown, or a page of another site sent the request.
        """
        routes = self._rules.routes
        if not routes.keys:
            if not self._settings.behind_proxy:
                _check_site(headers, self._settings.cors)
            return None
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if not secret or kind.lower() != "bearer":
            secret = headers.get("x-api-key", "")  # Anthropic's clients send it so
        if not secret:
            raise ProblemError(401, "Send an API key as Authorization: Bearer KEY, or as x-api-key", code="invalid_api_key")
        key = routes.key_of(secret.strip())
        if key is None:
            raise ProblemError(401, "Incorrect API key", code="invalid_api_key")
        return key

    @contextmanager
    def admit(self, key: Key | None) -> Iterator[None]:
        """Count a request until it ends; ProblemError if there are too many."""
        if key is not None:
            self._check_windows(key)
            self._check_budget(key)
        name = key.name if key is not None else ""
        max_running = key.max_running if key is not None else 0
        if max_running and not self._limits.begin(name, max_running):
            raise _busy(f"This key has reached its limit of requests at once: {max_running}", 1)
        try:
            if self._running >= self._settings.requests:
                raise _busy(f"The gateway has reached its limit of requests at once: {self._settings.requests}", 1)
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1
        finally:
            if max_running:
                self._limits.end(name)

    def _check_windows(self, key: Key) -> None:
        """Count a request of a key; ProblemError if it has used up its requests, or its tokens."""
        for kind, windows, events in (("requests", key.windows, 1), ("tokens", key.tokens, 0)):
            if windows is not None and (window := self._limits.count(key.name, kind, windows, events)).over:
                raise _busy(f"More than {windows.limit} {kind} in {windows.seconds:,} seconds", window.seconds)

    def _check_budget(self, key: Key) -> None:
        """Raise ProblemError if a key has used up its tokens of a day or a month, or if the requests that run may."""
        if key.budget is None:
            return
        spent = self._recorder.spent_by(key.name)
        if spent is None:
            message = "The record of usage cannot be read for now, so that what is left of this key's budget is unknown"
            raise ProblemError(503, message, code=DOWN, seconds=5)
        day_tokens, month_tokens = spent
        key.budget.check(day_tokens, month_tokens)
        unrecorded = self._unrecorded[key.name]
        try:
            key.budget.check(day_tokens + unrecorded, month_tokens + unrecorded)
        except ProblemError as error:
            raise _busy(f"{error}, if those that run take as many as they may", 1) from error

    def reserve(self, key: Key, tokens: int) -> ReservedTokens:
        """Count the tokens that a request may take before it takes them; ProblemError if none are left beside the others."""
        self._check_budget(key)
        window_end = math.inf
        if key.tokens is not None:
            window = self._limits.count(key.name, "tokens", key.tokens, tokens)
            if window.over:
                self._limits.count(key.name, "tokens", key.tokens, -tokens)
                raise _busy(f"More than {key.tokens.limit} tokens in {key.tokens.seconds:,} seconds", window.seconds)
            window_end = time.monotonic() + window.seconds - 1  # which are rounded up
        self._unrecorded[key.name] += tokens
        return ReservedTokens(tokens, window_end)

    def count_tokens(self, key: Key, reserved: ReservedTokens, tokens: int) -> None:
        """Count the tokens that a request took in place of those that it reserved."""
        self._unrecorded[key.name] += tokens - reserved.count
        in_window = reserved.count if time.monotonic() < reserved.window_end else 0
        if key.tokens is not None and tokens != in_window:
            self._limits.count(key.name, "tokens", key.tokens, tokens - in_window)
        reserved.count, reserved.window_end = tokens, math.inf

    def end_tokens(self, key: Key, reserved: ReservedTokens) -> None:
        """Leave the tokens of a request that has ended to the record, which has them now."""
        self._unrecorded[key.name] -= reserved.count


def limits_of(usage: Place | None) -> SharedLimits | DelayedLimits:
    """Return the limits that gateways with a record of usage share: those in a file beside a file, or in the same database."""
    if isinstance(usage, PostgresAddress):
        return DelayedLimits(usage)
    return SharedLimits(usage.with_name(usage.name.removesuffix(".db") + _LIMITS) if usage else None)


def _busy(message: str, seconds: int) -> ProblemError:
    return ProblemError(429, message, code=BUSY, seconds=seconds)


def _check_site(headers: Mapping[str, str], origins: frozenset[str]) -> None:
    """Refuse requests that a browser sends for another site's page: without keys, they look like the user's own.

    Any site but one whose name resolves to this machine sends its name as the origin, which may be one of those that are
    allowed.
    """
    host = headers.get("host", "")
    if not binding.is_local_site(host):
        message = f"Without keys, only requests to localhost are answered, not to {printable(host[:80])!r}"
        raise ProblemError(403, message, code="foreign_site")
    origin = headers.get("origin", "")
    if origin and origin not in origins and origin.partition("://")[2] != host:
        raise ProblemError(403, f"Without keys, no page of {printable(origin[:80])} is answered", code="foreign_site")
