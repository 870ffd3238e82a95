"""How far long work has come: on stderr, and only where a person sees it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import output

_EVERY = 0.1  # seconds between two redraws


@contextmanager
def count_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """`bytes_bar` for things that are counted."""
    with bytes_bar(title, str) as show:
        yield show


@contextmanager
def bytes_bar(title: str, write: Callable[[int], str] = output.size) -> Iterator[Callable[[int, int], None] | None]:
    """A line that says bytes done of bytes in all; None where stderr is no terminal. Gone when the work is done."""
    if not sys.stderr.isatty():
        yield None
        return
    last, drawn = time.monotonic(), False  # what is done at once needs no line

    def show(done: int, total: int) -> None:
        nonlocal last, drawn
        now = time.monotonic()
        if now - last >= _EVERY:
            last, drawn = now, True
            share = f"{done / total:4.0%}" if total else ""
            print(f"\r\x1b[K{title} {share} {write(done)} of {write(total)}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
