"""How far long work has come: on stderr, as a line that a person sees or as JSON lines for a program that asked for them."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from . import output

QUIET, EVENTS = f"{__name__}.quiet", f"{__name__}.events"  # what a command says of them in its context's `meta`
_EVERY = 0.1  # seconds between two redraws
_WINDOW = 5.0  # seconds whose rate is shown

Show = Callable[[int, int], None]


@contextmanager
def count_bar(title: str) -> Iterator[Show | None]:
    """`bytes_bar` for things that are counted."""
    with bytes_bar(title, str) as show:
        yield show


@contextmanager
def bytes_bar(title: str, write: Callable[[int], str] = output.size) -> Iterator[Show | None]:
    """Says bytes done of bytes in all, how fast and how long still: a line on a terminal, gone when the work is done.

    With `--events` as JSON lines, terminal or not; None where neither is wanted.
    """
    context = click.get_current_context(silent=True)
    said = context.meta if context else {}
    if said.get(EVENTS):
        with _events(title) as show:
            yield show
    elif said.get(QUIET) or not sys.stderr.isatty():
        yield None
    else:
        with _line(title, write) as show:
            yield show


@contextmanager
def _line(title: str, write: Callable[[int], str]) -> Iterator[Show]:
    speed, began, drawn = _Speed(), time.monotonic(), False

    def show(done: int, total: int) -> None:
        nonlocal drawn
        if not speed.due(done) or time.monotonic() - began < _EVERY:  # what is done at once needs no line
            return
        drawn = True
        share = f"{done / total:4.0%}" if total else ""
        rate, left = speed.rate(), speed.left(total)
        fast = f"  {output.size(round(rate))}/s" if rate and write is output.size else ""
        wait = f"  {_duration(left)} left" if left is not None else ""
        print(f"\r\x1b[K{title} {share} {write(done)} of {write(total)}{fast}{wait}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _events(title: str) -> Iterator[Show]:
    speed, last = _Speed(), (0, 0)

    def say(event: str, **more: Any) -> None:
        print(json.dumps({"event": event, "title": title, **more}), file=sys.stderr, flush=True)

    def show(done: int, total: int) -> None:
        nonlocal last
        last = done, total
        if speed.due(done):
            left = speed.left(total)
            rate = round(speed.rate())
            say("progress", done=done, total=total, rate=rate, seconds_left=None if left is None else round(left, 1))

    say("start")
    try:
        yield show
    except BaseException:
        say("failed", done=last[0], total=last[1])
        raise
    say("done", done=last[0], total=last[1])


class _Speed:
    """Units a second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def due(self, done: int) -> bool:
        """Whether it is time to say something; then `done` counts."""
        now = time.monotonic()
        if self._seen and now - self._seen[-1][0] < _EVERY:
            return False
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        return True

    def rate(self) -> float:
        """Units a second; 0.0 as long as that isn't known."""
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return max(last - first, 0) / (now - began) if now > began else 0.0

    def left(self, total: int) -> float | None:
        """Seconds until all is done at that rate."""
        rate = self.rate()
        return (total - self._seen[-1][1]) / rate if rate else None


def _duration(seconds: float) -> str:
    """Seconds for people: `5 s`, `2:05`, `1:02:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
