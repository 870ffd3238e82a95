"""A pause of Python's garbage collector, for code that makes many values and no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_gc() -> Iterator[None]:
    """Pause the collector: traversing the values of 300,000 tensors again and again takes up to a third of a check's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Nested pauses end with the outermost one.
        if enabled:
            gc.enable()
