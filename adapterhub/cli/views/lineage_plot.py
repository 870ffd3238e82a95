"""The lineage of an adapter as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import picture
from adapterhub_converters.errors import MissingExtraError, RefusedError

from .lineage import name_of

if TYPE_CHECKING:
    from adapterhub.registry.lineage import Lineage

_BLUE, _ORANGE, _GRAY = "#3b6fb6", "#d9622b", "#6b7280"
_MOST = 300  # nodes


def draw(found: Lineage, path: Path) -> None:
    """Draw the graph, ancestors above, into a PNG; MissingExtraError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("--plot", "matplotlib is not installed", "Run `pip install 'adapterhub[train]'`") from error
    if len(found.nodes) > _MOST:
        what = f"{len(found.nodes):,} versions and bases are too many for a picture (at most {_MOST})"
        raise RefusedError("--plot", what, "Leave it out, or draw the output of --dot")
    places = _places(found)
    wide, deep = max(x for x, _ in places.values()) + 1, len({y for _, y in places.values()})
    with picture.figure(path, max(6.0, 2.9 * wide), max(2.5, 1.5 * deep)) as figure:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.margins(x=0.25 / wide + 0.12, y=0.5 / deep)
        _draw(axes, found, places)


def _draw(axes: Any, found: Lineage, places: Mapping[str, tuple[float, float]]) -> None:
    for edge in found.edges:
        start, end = places[edge.parent], places[edge.child]
        arrow = {"arrowstyle": "->", "color": _GRAY, "shrinkA": 24, "shrinkB": 24}
        axes.annotate("", end, start, arrowprops=arrow)
        if edge.weight is not None:
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
            axes.annotate(f"{edge.weight:g}", middle, color=_GRAY, fontsize=8, ha="center", backgroundcolor="white")
    for digest, (x, y) in places.items():
        node = found.nodes[digest]
        color = _ORANGE if digest == found.root else _BLUE if node.manifest else _GRAY
        text = "\n".join(
            part for part in (picture.label(name_of(node)), picture.label(node.how), picture.label(node.base)) if part
        )
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color, "linewidth": 1.5}
        axes.annotate(text, (x, y), ha="center", va="center", fontsize=8, bbox=box)
        axes.plot(x, y, alpha=0)


def _places(found: Lineage) -> dict[str, tuple[float, float]]:
    """Positions: one row for each distance from the oldest ancestors, centered."""
    depth: dict[str, int] = {}

    def measure(digest: str, above: frozenset[str]) -> int:
        if digest not in depth:
            parents = [edge.parent for edge in found.parents(digest) if edge.parent not in above]
            depth[digest] = max((measure(parent, above | {digest}) + 1 for parent in parents), default=0)
        return depth[digest]

    for digest in found.nodes:
        measure(digest, frozenset())
    rows: dict[int, list[str]] = {}
    for digest, row in depth.items():
        rows.setdefault(row, []).append(digest)
    widest = max(map(len, rows.values()))
    return {
        digest: (number + (widest - len(members)) / 2, float(-row))
        for row, members in rows.items()
        for number, digest in enumerate(members)
    }
