"""Limits on the CPU seconds that threads work: for one request in all, and for one client in a minute.

Each step of a request has a limit of its own; these bound the sum, however many steps a request or a client asks for.
"""

from __future__ import annotations

import threading
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
    """The seconds of CPU that threads have worked for one request.

    Attributes:
        seconds: How many.
        exceeded: Returns the window in which the client has used up its time; None if it has time left.
        on_work: Called in the thread with the seconds of each work as it ends.
    """

    seconds: float = 0.0
    exceeded: Callable[[], Window | None] = lambda: None
    on_work: Callable[[float], object] = lambda _seconds: None
    _has_begun: bool = False

    def with_timer(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return `work` with its time counted, to be called in a thread.

        Raises:
            BodyError: The request has used up its time; or, when the thread begins its first work, its client has by then.
        """
        if self.seconds > MAX_OF_REQUEST:
            raise BodyError(429, f"this request has taken over {MAX_OF_REQUEST:.0f} seconds", TOO_MANY, seconds=60)

        def work_with_timer() -> T:
            # Asked again when its turn comes: a client may have sent a thousand others before the first of them was counted.
            if not self._has_begun and (window := self.exceeded()):
                raise BodyError(429, wait_message(window), TOO_MANY, seconds=window.seconds)
            self._has_begun, started = True, time.thread_time()
            try:
                return work()
            finally:
                spent = time.thread_time() - started
                self.seconds += spent
                self.on_work(spent)

        return work_with_timer


def wait_message(window: Window) -> str:
    """Return what a client is told that has used up its time."""
    return f"the hub has worked for you for as long as it may in a minute; try again in {window.seconds} seconds"


class ClientWork:
    """The work of the last minute by client: an account, or a network of clients without one."""

    def __init__(self) -> None:
        self._strangers = Windows(_microseconds(MAX_OF_STRANGER), 60)
        self._accounts = Windows(_microseconds(MAX_OF_ACCOUNT), 60)
        self._accounts_over_until = 0.0
        self._lock = threading.Lock()

    def count(self, network: str, account: str, seconds: float) -> None:
        """Count seconds of CPU; threads call this."""
        windows, key = (self._accounts, account) if account else (self._strangers, network)
        with self._lock:
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
