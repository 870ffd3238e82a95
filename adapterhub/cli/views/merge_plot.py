"""A picture of disagreements between the adapters of a merge, and of truncation losses, by layer.

Each kind of module has a color.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import picture
from adapterhub.cli import output

if TYPE_CHECKING:
    from adapterhub.merging import MergeReport, ModuleMerge

_KINDS, _POINTS = 16, 1000  # the most kinds of modules in a picture (the frequent ones win), and points of each
_NAMED = 4  # kinds that a note names


def _least_cosine(module: ModuleMerge) -> float:
    return min((row[j] for i, row in enumerate(module.cosines) for j in range(i)), default=math.nan)


# Title, value and start of the scale of each panel; all scales end at 1, so that small differences look small.
_Panels = Sequence[tuple[str, Callable[["ModuleMerge"], float], float]]
_PANELS: _Panels = (
    ("cosine of the two deltas least alike: 1 same direction, 0 unrelated, −1 opposite", _least_cosine, -1.0),
    (
        "signs apart: share of elements that some adapters raise and others lower",
        lambda module: module.signs if len(module.ranks) > 1 else math.nan,
        0.0,
    ),
    ("energy lost: share of the sum of squares that truncation left out", lambda module: module.lost, 0.0),
)


def draw(report: MergeReport, path: Path, *, title: str) -> None:
    """Draw the least cosine, the signs apart and the energy lost of each module into a PNG."""
    panels = _PANELS if any(len(module.ranks) > 1 for module in report.modules.values()) else _PANELS[-1:]
    kinds: dict[str, list[tuple[int, ModuleMerge]]] = {}
    for name, module in report.modules.items():
        numbers = [part for part in name.split(".") if part.isdecimal() and len(part) < 10]
        last = name.rpartition(".")[2]
        kinds.setdefault("" if last in numbers[:1] else last, []).append((int(numbers[0]) if numbers else 0, module))
    with picture.figure(path, 8, 1.2 + 2 * len(panels)) as figure:
        figure.suptitle(
            picture.fit_label(f"{title}: {report.method}", 7.6, size=13, bold=True),
            x=0.02, ha="left", fontsize=13, fontweight="bold",
        )  # fmt: skip
        _draw(figure, panels, kinds)


def _draw(figure: Any, panels: _Panels, kinds: Mapping[str, list[tuple[int, ModuleMerge]]]) -> None:
    from matplotlib import colormaps

    kinds_shown = sorted(sorted(kinds, key=lambda kind: -len(kinds[kind]))[:_KINDS])
    colors = list(map(tuple, colormaps["tab10" if len(kinds_shown) <= 10 else "tab20"](range(len(kinds_shown)))))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, value, least) in zip(rows, panels, strict=True):
        for kind, color in zip(kinds_shown, colors, strict=True):
            modules = sorted(kinds[kind], key=lambda item: item[0])
            # Every n-th module, so that at most _POINTS remain.
            points = [(layer, value(module)) for layer, module in modules[:: -(-len(modules) // _POINTS)]]
            label = picture.fit_label(kind, 1.4, size=8)
            axes.plot(*zip(*points, strict=True), "o", markersize=3.5, alpha=0.8, color=color, label=label)
        axes.set_ylim(least - 0.04, 1.04)
        axes.set_title(title, loc="left", color=picture.GRAY, fontsize=9)
        axes.grid(color=picture.LIGHT)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=picture.GRAY, length=0)
    rows[-1].set_xlabel("layer", color=picture.GRAY)
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("\n".join(_notes(kinds, compared=len(panels) > 1)), color=picture.GRAY, fontsize=9, x=0.02, ha="left")
    legend = {"loc": "outside right center", "fontsize": 8, "frameon": False, "borderaxespad": 1.5}
    figure.legend(*rows[0].get_legend_handles_labels(), **legend)


def _notes(kinds: Mapping[str, list[tuple[int, ModuleMerge]]], *, compared: bool) -> list[str]:
    """Return notes on what the picture leaves out."""
    notes = [f"{len(kinds) - _KINDS:,} more kinds of modules are not shown"] if len(kinds) > _KINDS else []
    alone = {kind: sum(len(module.ranks) < 2 for _, module in modules) for kind, modules in kinds.items()}
    names = sorted(kind for kind, count in alone.items() if count)
    if compared and names:
        listed = ", ".join([*names[:_NAMED], "…"] if len(names) > _NAMED else names)
        count = output.plural(sum(alone.values()), "module")
        note = f"no cosine and no signs for {count} that one adapter alone changes: {listed}"
        notes.append(picture.fit_label(note, 7.6, size=9))
    return notes
