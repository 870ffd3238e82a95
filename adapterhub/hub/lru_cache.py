"""An LRU cache for values that follow from a digest or from the state of a log."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class LRUCache(Generic[T]):
    """The values used last, shared by all threads.

    Args:
        most: Limit on the total size of all values.
        size: Returns the size of a value; by default 1, so that `most` limits their number.
    """

    def __init__(self, max_size: int, size_of: Callable[[T], int] = lambda _: 1) -> None:
        self._max_size, self._size_of, self._total = max_size, size_of, 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, calling `make` if it is not cached. An error is not cached."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        # Outside of the lock: making one value must not block readers of the others.
        value = make()
        with self._lock:
            if key not in self._values:  # another thread may have been faster
                self._values[key] = value
                self._total += self._size_of(value)
            while self._total > self._max_size:
                self._total -= self._size_of(self._values.popitem(last=False)[1])
        return value
