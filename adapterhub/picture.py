"""Pictures by matplotlib, written whole or not at all: without a display, of limited size, with texts shown literally.

A dollar sign starts no formula, a missing glyph raises no warning, and texts from others go through `label`.
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

_MAX_TEXT = 120  # characters of a text
_DPI = 150
_MAX_SIDE = 60.0  # inches, the longest side; 9,000 pixels
BLUE, ORANGE, GRAY, LIGHT = "#3b6fb6", "#d9622b", "#6b7280", "#e5e7eb"
"""Colors: what is shown, what stands out, words, and the grid and missing values."""


def check() -> None:
    """Raise ImportError if matplotlib is missing, before any work is done."""
    import matplotlib  # noqa: F401


def label(text: str) -> str:
    """Return `text` in printable characters, with limited length."""
    printable_text = printable(text[: _MAX_TEXT + 1])
    return printable_text if len(printable_text) <= _MAX_TEXT else printable_text[: _MAX_TEXT - 1] + "…"


def extent(text: str, *, size: float, bold: bool = False) -> tuple[float, float]:
    """Return the width in inches of a text's longest line, and the height of all its lines, at `size` points."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, _DPI), FontProperties(size=size, weight="bold" if bold else "normal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [renderer.get_text_width_height_descent(line, font, ismath=False) for line in text.split("\n")]
    return max(line[0] for line in lines) / _DPI, sum(line[1] for line in lines) / _DPI


def fit_label(text: str, inches: float, *, size: float, bold: bool = False) -> str:
    """Return the `label` of a text, cut with an ellipsis to the available width."""
    full = label(text)
    if len(full) < 2 or extent(full, size=size, bold=bold)[0] <= inches:
        return full
    # A text is wider than its prefixes, so a binary search measures only a few of them.
    length = bisect_right(range(len(full) - 1), inches, key=lambda count: extent(f"{full[:count]}…", size=size, bold=bold)[0])
    return f"{full[: max(0, length - 1)]}…"


def heading(axes: Any, title: str, *subtitle: str) -> None:
    """Write a title and gray lines beneath it above axes that fill the whole picture, cut to its width."""
    available = axes.figure.get_figwidth() - 1.2
    lines = [fit_label(line, available, size=9) for line in subtitle if line]
    axes.set_title(
        fit_label(title, available, size=13, bold=True), loc="left", fontsize=13, fontweight="bold", pad=10 + 13 * len(lines)
    )
    for number, line in enumerate(reversed(lines)):
        position = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "baseline"}
        axes.annotate(line, (0, 1), (0, 8 + 13 * number), color=GRAY, fontsize=9, **position)


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a matplotlib figure of that size in inches, at most 60, and write it as the PNG `path` at the end."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size, margins = (min(width, _MAX_SIDE), min(height, _MAX_SIDE)), ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
        drawing = Figure(figsize=size, dpi=_DPI, layout=margins)
        # Agg draws without a display; `pyplot` would look for one.
        FigureCanvasAgg(drawing)
        yield drawing
        with atomic.pending_output(path, folder=False) as temporary:
            # Matplotlib writes its own version into the file unless told not to.
            drawing.savefig(temporary, format="png", metadata={"Software": None})
