"""A picture of how far the adapters of a merge disagree, and of truncation losses: by layer, one color per kind of module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import picture
from adapterhub_converters.errors import MissingExtraError

if TYPE_CHECKING:
    from adapterhub.merging import Merged, MergeReport

_GRAY = "#6b7280"
_KINDS, _POINTS = 16, 1000  # kinds of modules in a picture, the most frequent; points of each


def _least_cosine(module: Merged) -> float:
    return min((row[j] for i, row in enumerate(module.cosines) for j in range(i)), default=math.nan)


# Title, value and start of the scale of each panel; all scales end at 1, so that small differences look small.
_Panels = Sequence[tuple[str, Callable[["Merged"], float], float]]
_PANELS: _Panels = (
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
    panels = _PANELS if any(len(module.ranks) > 1 for module in report.modules.values()) else _PANELS[-1:]
    kinds: dict[str, list[tuple[int, Merged]]] = {}
    for name, module in report.modules.items():
        numbers = [part for part in name.split(".") if part.isdecimal() and len(part) < 10]
        last = name.rpartition(".")[2]
        kinds.setdefault("" if last in numbers[:1] else last, []).append((int(numbers[0]) if numbers else 0, module))
    with picture.figure(path, 8, 1 + 2 * len(panels)) as figure:
        figure.suptitle(picture.label(f"{title}: {report.method}"), x=0.02, ha="left", fontsize=13, fontweight="bold")
        _draw(figure, panels, kinds)


def _draw(figure: Any, panels: _Panels, kinds: Mapping[str, list[tuple[int, Merged]]]) -> None:
    shown = sorted(sorted(kinds, key=lambda kind: -len(kinds[kind]))[:_KINDS])
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, value, least) in zip(rows, panels, strict=True):
        for kind in shown:
            modules = sorted(kinds[kind], key=lambda item: item[0])
            points = [(layer, value(module)) for layer, module in modules[:: -(-len(modules) // _POINTS)]]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=picture.label(kind))
        axes.set_ylim(least - 0.04, 1.04)
        axes.set_ylabel(label, color=_GRAY)
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_GRAY, length=0)
    more = f"; {len(kinds) - _KINDS:,} more kinds of modules" if len(kinds) > _KINDS else ""
    rows[-1].set_xlabel(f"layer{more}", color=_GRAY)
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
