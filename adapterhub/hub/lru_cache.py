"""An LRU cache for values that follow from a digest or from the state of a log, measured in bytes of keys and values."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_ENTRY_BYTES = 200  # of an entry itself, besides its key and its value


def memory_of(value: Any) -> int:
    """Return about how many bytes of memory a value takes, with all that it refers to, each counted once."""
    total, seen, pending = 0, set[int](), [value]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        total += sys.getsizeof(current, 64)
        if isinstance(current, Mapping):
            pending += [*current.keys(), *current.values()]
        elif is_dataclass(current):
            pending += [getattr(current, part.name) for part in fields(current)]
        elif isinstance(current, Collection) and not isinstance(current, str | bytes | bytearray | range):
            pending += current
        elif isinstance(current, BaseException):
            pending += [*current.args, *vars(current).values()]
    return total


class LRUCache(Generic[T]):
    """The values used last, shared by all threads.

    Args:
        max_size: Limit in bytes of all keys and values together.
        size_of: Returns the bytes of a value.
    """

    def __init__(self, max_size: int, size_of: Callable[[T], int] = memory_of) -> None:
        self.max_size, self._size_of, self._total = max_size, size_of, 0
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """The bytes of all keys and values."""
        return self._total

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, calling `make` if it is not cached. An error is not cached."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        # Outside of the lock: making one value must not block readers of the others.
        value = make()
        # The key, too: a client may choose it, and it may be larger than the value.
        size = _ENTRY_BYTES + memory_of(key) + self._size_of(value)
        with self._lock:
            if key not in self._values:  # another thread may have been faster
                self._values[key] = value, size
                self._total += size
            while self._total > self.max_size:
                self._total -= self._values.popitem(last=False)[1][1]
        return value
