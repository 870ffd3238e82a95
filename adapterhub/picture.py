"""Pictures by matplotlib, written whole or not at all: without a display, of a limited size, with texts that mean themselves.

A dollar sign begins no mathematics, an empty glyph is no warning, and a text of a stranger goes through `label`.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import atomic
from adapterhub_converters.display import printable

_LONGEST = 120  # characters of a text
_DPI = 150
LARGEST = 60.0
"""Inches of a side, 9,000 pixels."""
BLUE, ORANGE, GRAY, LIGHT = "#3b6fb6", "#d9622b", "#6b7280", "#e5e7eb"
"""What is shown; what stands out; words; the grid and what is missing."""


def check() -> None:
    """Raise ImportError without matplotlib, before any work is done."""
    import matplotlib  # noqa: F401


def label(text: str) -> str:
    """`text` as a printable one of limited length."""
    shown = printable(text[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def extent(text: str, *, size: float, bold: bool = False) -> tuple[float, float]:
    """Width in inches of a text's longest line, and the sum of the heights of its lines, at `size` points."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, _DPI), FontProperties(size=size, weight="bold" if bold else "normal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [renderer.get_text_width_height_descent(line, font, ismath=False) for line in text.split("\n")]
    return max(line[0] for line in lines) / _DPI, sum(line[1] for line in lines) / _DPI


def fitted(text: str, inches: float, *, size: float, bold: bool = False) -> str:
    """`label` of a text, cut with an ellipsis to the width that there is."""
    shown = label(text)
    if len(shown) < 2 or extent(shown, size=size, bold=bold)[0] <= inches:
        return shown
    # A text is wider than its beginnings, so that a few have to be measured.
    kept = bisect_right(range(len(shown) - 1), inches, key=lambda count: extent(f"{shown[:count]}…", size=size, bold=bold)[0])
    return f"{shown[: max(0, kept - 1)]}…"


def heading(axes: Any, title: str, *subtitle: str) -> None:
    """Write a title and gray lines beneath it above axes that are the whole picture, cut to its width."""
    room = axes.figure.get_figwidth() - 1.2
    lines = [fitted(line, room, size=9) for line in subtitle if line]
    axes.set_title(
        fitted(title, room, size=13, bold=True), loc="left", fontsize=13, fontweight="bold", pad=10 + 13 * len(lines)
    )
    for number, line in enumerate(reversed(lines)):
        at = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "baseline"}
        axes.annotate(line, (0, 1), (0, 8 + 13 * number), color=GRAY, fontsize=9, **at)


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of that size in inches, or of the largest, that becomes the PNG `path` at the end of the block."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size, margins = (min(width, LARGEST), min(height, LARGEST)), ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
        made = Figure(figsize=size, dpi=_DPI, layout=margins)
        FigureCanvasAgg(made)
        yield made
        with atomic.whole(path, folder=False) as temporary:
            # Matplotlib writes its own version into the file unless told not to.
            made.savefig(temporary, format="png", metadata={"Software": None})
