"""Pictures by matplotlib, written whole or not at all: without a display, of a limited size, with texts that mean themselves.

A dollar sign begins no mathematics, an empty glyph is no warning, and a text of a stranger goes through `label`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import atomic
from adapterhub_converters.display import printable

_LONGEST = 120  # characters of a text
LARGEST = 60.0
"""Inches of a side, 9,000 pixels."""


def label(text: str) -> str:
    """`text` as a printable one of limited length."""
    shown = printable(text[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of that size in inches, or of the largest, that becomes the PNG `path` at the end of the block."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Figure(figsize=(min(width, LARGEST), min(height, LARGEST)), dpi=150, layout="constrained")
        FigureCanvasAgg(made)
        yield made
        with atomic.whole(path, folder=False) as temporary:
            # Matplotlib writes its own version into the file unless told not to.
            made.savefig(temporary, format="png", metadata={"Software": None})
