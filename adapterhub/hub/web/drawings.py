"""Geometry of the drawings: heat map, loss curve, lineage. Templates have the shapes, the style sheet the colors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from adapterhub.manifest.document import LossPoint
from adapterhub_converters.lazy_dataclass import dataclass

from .layered_layout import Edge, Point, layout

if TYPE_CHECKING:
    from adapterhub.analysis.norms import NormHeatMap

# ---- heat map: where an adapter acts

STEPS = 8
"""Shades of a heat map, numbered from 1."""
_ROWS, _COLUMNS = 48, 24
_CELL_HEIGHT, _LEFT, _TOP, _WIDTH = 12, 48, 24, 640
_LEGEND_WIDTH, _FOLDED_WIDTH = 240, 200  # of the shades and their two numbers; of the note that layers are folded


@dataclass(frozen=True)
class HeatMap:
    """A heat map; sizes in units of the picture.

    Attributes:
        columns: Left edge and name of each column.
        rows: For each row its top edge, its name or nothing, and the left edge and shade (1 to STEPS) of each cell.
    """

    width: float
    height: float
    cell: Point
    columns: tuple[tuple[float, str], ...]
    rows: tuple[tuple[float, str, tuple[tuple[float, int], ...]], ...]
    least: float
    greatest: float
    folded: int
    more_columns: int


def heat_map(heat: NormHeatMap) -> HeatMap:
    """Return the heat map of an adapter, with layers from top to bottom."""
    shown_heat = heat.fold(_ROWS)
    names = shown_heat.short_kinds[:_COLUMNS]
    column_width = min(96.0, (_WIDTH - _LEFT) / max(1, len(names)))
    least, greatest = shown_heat.scale
    label_step = max(1, math.ceil(len(shown_heat.layers) / 24))
    rows = []
    for number, (layer, values) in enumerate(zip(shown_heat.layers, shown_heat.values, strict=True)):
        cells = tuple(
            (_LEFT + column_width * column, _shade(value, least, greatest))
            for column, value in enumerate(values[:_COLUMNS])
            if value is not None
        )
        rows.append((_TOP + number * _CELL_HEIGHT, "" if number % label_step else layer, cells))
    folded = -(-len(heat.layers) // max(1, len(shown_heat.layers)))
    return HeatMap(
        _LEFT + max(column_width * len(names) + 8, _LEGEND_WIDTH + (_FOLDED_WIDTH if folded > 1 else 0)),
        _TOP + _CELL_HEIGHT * len(rows) + 4,
        (column_width - 1, _CELL_HEIGHT - 1),
        tuple((_LEFT + column_width * column, _truncate(name, int(column_width / 7))) for column, name in enumerate(names)),
        tuple(rows),
        least,
        greatest,
        folded,
        len(shown_heat.short_kinds) - len(names),
    )


def _shade(value: float, least: float, greatest: float) -> int:
    share = (value - least) / (greatest - least) if greatest > least else 1.0
    return 1 + min(STEPS - 1, int(share * STEPS))


# ---- loss curve

_POINTS = 300
_PLOT = (64.0, 12.0, 632.0, 188.0)  # left, top, right, bottom


@dataclass(frozen=True)
class Curve:
    """A loss curve.

    Attributes:
        lines: CSS class of each line, its name, and its points as SVG text.
        y_ticks, x_ticks: Position and label of each tick.
    """

    lines: tuple[tuple[str, str, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    left: float = _PLOT[0]
    right: float = _PLOT[2]
    bottom: float = _PLOT[3]


def curve(points: Sequence[LossPoint]) -> Curve | None:
    """Return the loss curve of a training; None for fewer than two points."""
    series = {
        "train": ("training", [(point.step, point.loss) for point in points]),
        "heldout": ("held-out", [(point.step, point.heldout_loss) for point in points]),
    }
    finite_series = {
        name: (label, [(step, loss) for step, loss in pairs if loss is not None and abs(loss) < 1e15 and abs(step) < 1e15])
        for name, (label, pairs) in series.items()
    }
    all_pairs = [pair for _, pairs in finite_series.values() for pair in pairs]
    if len(all_pairs) < 2:
        return None
    steps, losses = [step for step, _ in all_pairs], [loss for _, loss in all_pairs]
    x = _scale(min(steps), max(steps), _PLOT[0], _PLOT[2])
    y = _scale(min(losses), max(losses), _PLOT[3], _PLOT[1])
    lines = tuple(
        (name, label, " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in _sample(pairs)))
        for name, (label, pairs) in finite_series.items()
        if len(pairs) > 1
    )
    y_ticks = tuple((y(value), f"{value:.3g}") for value in _ticks(min(losses), max(losses)))
    x_ticks = tuple((x(value), f"{value:,.0f}") for value in _ticks(min(steps), max(steps)))
    return Curve(lines, y_ticks, x_ticks) if lines else None


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    return [low + (high - low) * step / 4 for step in range(5)] if high > low else [low]


def _sample(pairs: Sequence[tuple[int, float]]) -> Iterable[tuple[int, float]]:
    step = max(1, len(pairs) // _POINTS)
    return [*pairs[::step], pairs[-1]]


# ---- lineage

_LETTER, _LINE, _PAD = 7.0, 18.0, 12.0
_NAME = 36  # characters


@dataclass(frozen=True)
class Box:
    """A box of a graph: its lines, its kind as a CSS class, and the address after a click."""

    lines: tuple[str, ...]
    kind: str
    url: str = ""


@dataclass(frozen=True)
class PlacedBox:
    """A box with its top left corner and its size."""

    box: Box
    x: float
    y: float
    width: float
    height: float

    @property
    def texts(self) -> list[tuple[float, str]]:
        """The baseline and text of each line."""
        return [(self.y + _PAD + _LINE * (number + 0.7), line) for number, line in enumerate(self.box.lines)]


@dataclass(frozen=True)
class Graph:
    """A drawn graph: boxes, the paths of the edges as SVG text, and their labels."""

    width: float
    height: float
    boxes: tuple[PlacedBox, ...]
    paths: tuple[str, ...]
    labels: tuple[tuple[float, float, str], ...]


def graph(boxes: Mapping[str, Box], edges: Mapping[Edge, str]) -> Graph:
    """Draw a graph with parents above; the label of an edge may be empty."""
    cut = {name: Box(tuple(_truncate(line, _NAME) for line in box.lines), box.kind, box.url) for name, box in boxes.items()}
    sizes = {
        name: (max(map(len, box.lines), default=1) * _LETTER + 2 * _PAD, len(box.lines) * _LINE + 2 * _PAD)
        for name, box in cut.items()
    }
    placed = layout(sizes, list(edges), gap=(24.0, 40.0))
    placed_boxes = []
    for name, box in cut.items():
        (x, y), (width, height) = placed.centers[name], sizes[name]
        placed_boxes.append(PlacedBox(box, x - width / 2 + 1, y - height / 2 + 1, width, height))
    labels = []
    for edge, points in placed.paths.items():
        if edges[edge]:
            (x, y), (to_x, to_y) = points[-3], points[-2]
            labels.append(((x + to_x) / 2 + 1, (y + to_y) / 2 + 5, edges[edge]))
    paths = tuple(_path(points) for points in placed.paths.values())
    return Graph(placed.width + 2, placed.height + 2, tuple(placed_boxes), paths, tuple(labels))


def _path(points: Sequence[Point]) -> str:
    x, y = points[0]
    parts = [f"M{x + 1:.1f} {y + 1:.1f}"]
    for number, ((_, y), (to_x, to_y)) in enumerate(pairwise(points)):
        x = points[number][0]
        middle = (y + to_y) / 2 + 1
        if number % 2:
            parts.append(f"C{x + 1:.1f} {middle:.1f} {to_x + 1:.1f} {middle:.1f} {to_x + 1:.1f} {to_y + 1:.1f}")
        else:
            parts.append(f"L{to_x + 1:.1f} {to_y + 1:.1f}")
    return "".join(parts)


def _truncate(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(1, limit - 1)] + "…"
