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
_INTERVAL = 0.1  # seconds between two updates, and before the first
_WINDOW = 5.0  # seconds that a rate is averaged over

Show = Callable[[int, int], None]


def has_screen() -> bool:
    """Return whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def bar(*columns: str | ProgressColumn) -> Progress:
    """Return a bar on stderr that disappears when it is stopped. rich takes 30 ms to import, so it is imported only here."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    cells = [TextColumn(column, markup=False) if isinstance(column, str) else column for column in columns]
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    return Progress(
        # No markup: brackets in a name are no styles.
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        *cells,
        console=console,
        transient=True,
    )


@contextmanager
def bytes_bar(title: str) -> Iterator[Show | None]:
    """Report bytes done, of bytes in all, with rate and time left; yield None if no progress is wanted."""
    with _progress(title, counted=False) as callback:
        yield callback


@contextmanager
def count_bar(title: str) -> Iterator[Show | None]:
    """Report as `bytes_bar` does for things that are counted."""
    with _progress(title, counted=True) as callback:
        yield callback


@contextmanager
def _progress(title: str, *, counted: bool) -> Iterator[Show | None]:
    context = click.get_current_context(silent=True)
    meta = context.meta if context else {}
    if meta.get(EVENTS):
        with _write_events(title) as callback:
            yield callback
    elif meta.get(QUIET) or not has_screen():
        yield None
    else:
        with _draw_bar(title, counted=counted) as callback:
            yield callback


@contextmanager
def _draw_bar(title: str, *, counted: bool) -> Iterator[Show]:
    last = time.monotonic()
    drawn: Progress | None = None

    def show(completed: int, total: int) -> None:
        nonlocal drawn, last
        now = time.monotonic()
        if now - last < _INTERVAL:  # short work needs no bar
            return
        last = now
        if drawn is None:
            from rich.progress import DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn

            amount = (MofNCompleteColumn(),) if counted else (DownloadColumn(), TransferSpeedColumn())
            drawn = bar("{task.percentage:>3.0f}%", *amount, TimeRemainingColumn(compact=True), "left")
            drawn.add_task(printable(title), total=total or None)
            drawn.start()
        drawn.update(drawn.task_ids[0], completed=completed, total=total or None)

    try:
        yield show
    finally:
        if drawn:
            drawn.stop()


@contextmanager
def _write_events(title: str) -> Iterator[Show]:
    speed, last = _Speed(), (0, 0)

    def write(event: str, **fields: Any) -> None:
        print(output.json_text({"event": event, "title": title, **fields}), file=sys.stderr, flush=True)

    def show(completed: int, total: int) -> None:
        nonlocal last
        last = completed, total
        if speed.due(completed):
            rate = speed.rate()
            seconds_left = round((total - completed) / rate, 1) if rate else None
            write("progress", done=completed, total=total, rate=round(rate), seconds_left=seconds_left)

    write("start")
    try:
        yield show
    except BaseException:
        # A program that reads the events must not wait for more.
        write("failed", done=last[0], total=last[1])
        raise
    write("done", done=last[0], total=last[1])


class _Speed:
    """The rate of work, in units per second, over the last few seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def due(self, completed: int) -> bool:
        """Count `done` and return True, at most once in `_INTERVAL` seconds."""
        now = time.monotonic()
        if self._samples and now - self._samples[-1][0] < _INTERVAL:
            return False
        self._samples.append((now, completed))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW:
            self._samples.popleft()
        return True

    def rate(self) -> float:
        """Return units per second; 0.0 until they are known."""
        (began, first), (now, last) = self._samples[0], self._samples[-1]
        return max(last - first, 0) / (now - began) if now > began else 0.0
