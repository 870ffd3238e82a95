"""A picture of how far the adapters of a merge disagree, and of truncation losses: by layer, one color per kind of module."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.cli import output
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import MissingExtraError

if TYPE_CHECKING:
    from adapterhub.merging import Merged, MergeReport

_GRAY = "#6b7280"


def _least_cosine(module: Merged) -> float:
    return min((row[j] for i, row in enumerate(module.cosines) for j in range(i)), default=math.nan)


# Title, value and start of the scale of each panel; all scales end at 1, so that small differences look small.
_PANELS: tuple[tuple[str, Callable[[Merged], float], float], ...] = (
    ("least cosine", _least_cosine, -1.0),
    ("signs apart", lambda module: module.signs if len(module.ranks) > 1 else math.nan, 0.0),
    ("energy lost", lambda module: module.lost, 0.0),
)


def check() -> None:
    """Raise MissingExtraError without matplotlib, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("--plot", "matplotlib is not installed", "Run `pip install 'adapterhub[train]'`") from error


def draw(report: MergeReport, path: Path, *, title: str) -> None:
    """Draw the least cosine, the signs apart and the energy lost of each module into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _PANELS if any(len(module.ranks) > 1 for module in report.modules.values()) else _PANELS[-1:]
    kinds: dict[str, list[tuple[int, Merged]]] = {}
    for name, module in report.modules.items():
        numbers = [part for part in name.split(".") if part.isdecimal() and len(part) < 10]
        last = name.rpartition(".")[2]
        kinds.setdefault("" if last in numbers[:1] else last, []).append((int(numbers[0]) if numbers else 0, module))
    figure = Figure(figsize=(8, 1 + 2 * len(panels)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(output.printable(f"{title}: {report.method}"), x=0.02, ha="left", fontsize=13, fontweight="bold")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, value, least) in zip(rows, panels, strict=True):
        for kind, modules in sorted(kinds.items()):
            points = [(layer, value(module)) for layer, module in sorted(modules, key=lambda item: item[0])]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=output.printable(kind))
        axes.set_ylim(least - 0.04, 1.04)
        axes.set_ylabel(label, color=_GRAY)
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_GRAY, length=0)
    rows[-1].set_xlabel("layer", color=_GRAY)
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    with atomic.whole(path, folder=False) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
