"""A value that takes long to compute, computed anew by one thread once it is too old, while the others get the earlier one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_PAUSE = 20  # times what computing took: at most a twentieth of a processor


class TimedValue(Generic[T]):
    """A value that is at least `ttl` seconds old when it is computed anew."""

    def __init__(self, ttl: float = 0.0) -> None:
        self._ttl, self._until = ttl, 0.0
        self._lock = threading.Lock()
        self._values: list[T] = []  # the last one

    def get(self, compute: Callable[[], T]) -> T:
        """Return the value, computed if it is too old and no other thread is at it; the first time, wait for that thread."""
        if self._until < time.monotonic() and self._lock.acquire(blocking=not self._values):
            try:
                start = time.monotonic()
                if self._until < start:
                    self._values = [compute()]
                    self._until = time.monotonic() + max(self._ttl, _PAUSE * (time.monotonic() - start))
            finally:
                self._lock.release()
        return self._values[0]
