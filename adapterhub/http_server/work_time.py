"""Limits on the CPU seconds that threads work: for one request in all, and for one client in a minute.

Each step of a request has a limit of its own; these bound the sum, however many steps a request or a client asks for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from adapterhub_converters.lazy_dataclass import dataclass

from .rate_windows import Window, Windows
from .request_bodies import TOO_MANY, BodyError

T = TypeVar("T")
MAX_OF_REQUEST = 60.0
"""Seconds after which no further work begins for a request."""
MAX_OF_STRANGER, MAX_OF_ACCOUNT = 30.0, 45.0
"""Seconds a minute for a network of clients without an account, and for an account. A process has at most 60 a minute, because
threads of Python take turns."""


@dataclass
class WorkMeter:
    """The seconds of CPU that threads have worked for one request."""

    seconds: float = 0.0

    def with_timer(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return `work` with its time counted, to be called in a thread.

        Raises:
            BodyError: The request has used up its time.
        """
        if self.seconds > MAX_OF_REQUEST:
            raise BodyError(429, f"this request has taken over {MAX_OF_REQUEST:.0f} seconds", TOO_MANY, seconds=60)

        def work_with_timer() -> T:
            started = time.thread_time()
            try:
                return work()
            finally:
                self.seconds += time.thread_time() - started

        return work_with_timer


class ClientWork:
    """The work of the last minute by client: an account, or a network of clients without one."""

    def __init__(self) -> None:
        self._strangers = Windows(_microseconds(MAX_OF_STRANGER), 60)
        self._accounts = Windows(_microseconds(MAX_OF_ACCOUNT), 60)
        self._accounts_over_until = 0.0

    def count(self, network: str, account: str, seconds: float) -> None:
        """Count seconds of CPU."""
        windows, key = (self._accounts, account) if account else (self._strangers, network)
        if windows.count(key, _microseconds(seconds)).remaining == 0 and account:
            self._accounts_over_until = time.monotonic() + windows.seconds

    def exceeded(self, network: str, account_of: Callable[[], str]) -> Window | None:
        """Return the window in which a client has used up its time; None if it has time left.

        `account_of` looks the account up, and is only called if some client of the network, or some account, is over its limit.
        """
        window = self._strangers.count(network, 0)
        if not window.over and self._accounts_over_until < time.monotonic():
            return None
        if account := account_of():
            window = self._accounts.count(account, 0)
        return window if window.over else None


def _microseconds(seconds: float) -> int:
    # Milliseconds would count nothing for a request that takes less than one, however many of them come.
    return int(seconds * 1_000_000)
