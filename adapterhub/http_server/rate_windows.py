"""Counts of events in fixed windows of time, in the memory of this process: each of several processes counts for itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import field

from adapterhub_converters.lazy_dataclass import dataclass

_MAX_WINDOWS = 50_000
"""Windows kept in memory."""


@dataclass(frozen=True, slots=True)
class Window:
    """What is left in a window, and the seconds until the next one begins; `over` if the event exceeded the limit."""

    remaining: int
    seconds: int
    over: bool


@dataclass
class Windows:
    """Windows by key, each of `seconds`, in which `limit` events may happen."""

    limit: int
    seconds: int
    clock: Callable[[], float] = time.monotonic
    _counts: dict[str, tuple[float, int]] = field(default_factory=dict, repr=False)

    def count(self, key: str, events: int = 1) -> Window:
        """Count events, or 0 to see what is left; a negative number gives events of the same window back."""
        now = self.clock()
        end, count = self._counts.get(key, (0.0, 0))
        if end <= now:
            end, count = now + self.seconds, 0
        if events:
            self._make_room(key, now)
            self._counts[key] = end, max(count + events, 0)
        return Window(max(self.limit - count - events, 0), max(int(end - now + 0.999), 1), count >= self.limit)

    def _make_room(self, key: str, now: float) -> None:
        """Forget ended windows, and of too many those with the fewest events: a flood of new keys resets nobody's count."""
        if key in self._counts or len(self._counts) < _MAX_WINDOWS:
            return
        open_windows = [(kept_key, window) for kept_key, window in self._counts.items() if window[0] > now]
        if len(open_windows) >= _MAX_WINDOWS:
            open_windows.sort(key=lambda entry: entry[1][1])
            del open_windows[: _MAX_WINDOWS // 2]
        self._counts = dict(open_windows)
