"""Progress on stderr: a bar for a person, JSON lines for a program that asked for them with `--events`."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output
from adapterhub_converters.display import printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

QUIET, EVENTS = f"{__name__}.quiet", f"{__name__}.events"  # set by the options of a command in its context's `meta`
_EVERY = 0.1  # seconds between two updates, and before the first
_WINDOW = 5.0  # seconds that a rate is averaged over

Show = Callable[[int, int], None]


def has_screen() -> bool:
    """True if stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def bar(*columns: str | ProgressColumn) -> Progress:
    """A bar on stderr that disappears when it is stopped. rich takes 30 ms to import, so only here."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    more = [TextColumn(column, markup=False) if isinstance(column, str) else column for column in columns]
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), *more, console=console, transient=True
    )


@contextmanager
def bytes_bar(title: str) -> Iterator[Show | None]:
    """Report bytes done, of bytes in all, with rate and time left; None where no progress is wanted."""
    with _progress(title, counted=False) as show:
        yield show


@contextmanager
def count_bar(title: str) -> Iterator[Show | None]:
    """`bytes_bar` for things that are counted."""
    with _progress(title, counted=True) as show:
        yield show


@contextmanager
def _progress(title: str, *, counted: bool) -> Iterator[Show | None]:
    context = click.get_current_context(silent=True)
    wanted = context.meta if context else {}
    if wanted.get(EVENTS):
        with _events(title) as show:
            yield show
    elif wanted.get(QUIET) or not has_screen():
        yield None
    else:
        with _drawn(title, counted=counted) as show:
            yield show


@contextmanager
def _drawn(title: str, *, counted: bool) -> Iterator[Show]:
    last = time.monotonic()
    drawn: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal drawn, last
        now = time.monotonic()
        if now - last < _EVERY:  # work that is done at once needs no bar
            return
        last = now
        if drawn is None:
            from rich.progress import DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn

            amount = (MofNCompleteColumn(),) if counted else (DownloadColumn(), TransferSpeedColumn())
            drawn = bar("{task.percentage:>3.0f}%", *amount, TimeRemainingColumn(compact=True), "left")
            drawn.add_task(printable(title), total=total or None)
            drawn.start()
        drawn.update(drawn.task_ids[0], completed=done, total=total or None)

    try:
        yield show
    finally:
        if drawn:
            drawn.stop()


@contextmanager
def _events(title: str) -> Iterator[Show]:
    speed, last = _Speed(), (0, 0)

    def write(event: str, **more: Any) -> None:
        print(output.json_text({"event": event, "title": title, **more}), file=sys.stderr, flush=True)

    def show(done: int, total: int) -> None:
        nonlocal last
        last = done, total
        if speed.due(done):
            rate = speed.rate()
            left = round((total - done) / rate, 1) if rate else None
            write("progress", done=done, total=total, rate=round(rate), seconds_left=left)

    write("start")
    try:
        yield show
    except BaseException:
        write("failed", done=last[0], total=last[1])
        raise
    write("done", done=last[0], total=last[1])


class _Speed:
    """Units per second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def due(self, done: int) -> bool:
        """Count `done` and return True, at most every `_EVERY` seconds."""
        now = time.monotonic()
        if self._seen and now - self._seen[-1][0] < _EVERY:
            return False
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        return True

    def rate(self) -> float:
        """Units per second; 0.0 until that is known."""
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return max(last - first, 0) / (now - began) if now > began else 0.0
