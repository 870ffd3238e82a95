"""Values that follow from a digest, or from the state of a log: made once, and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """The values used last, shared by all threads.

    Args:
        most: What they may take together.
        size: What one takes; by default 1, so that `most` is their number.
    """

    def __init__(self, most: int, size: Callable[[T], int] = lambda _: 1) -> None:
        self._most, self._size, self._taken = most, size, 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, which `make` makes unless it is there; an error is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            if key not in self._values:  # another thread may have made it meanwhile
                self._values[key] = made
                self._taken += self._size(made)
            while self._taken > self._most:
                self._taken -= self._size(self._values.popitem(last=False)[1])
        return made
