"""Positions for a drawing of a directed graph in layers (Sugiyama's method): parents above, edges around the boxes.

An edge over several layers gets a place of its own in each layer between, so that it never runs behind a box.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

from adapterhub_converters.lazy_dataclass import dataclass

Point = tuple[float, float]
Edge = tuple[str, str]
_SWEEPS = 8
_LANE = 0.1  # width of the place of an edge in a layer, in the unit of the boxes


@dataclass(frozen=True)
class Layout:
    """A drawing, with x to the right and y downward from a corner at (0, 0), in the unit of the boxes' sizes.

    Attributes:
        centers: The center of each box.
        paths: The points of each edge: vertical within a layer, from the first to the second, the third to the fourth …, and a
            curve between two layers, from the second to the third ….
    """

    centers: Mapping[str, Point]
    paths: Mapping[Edge, Sequence[Point]]
    width: float
    height: float


def layout(sizes: Mapping[str, Point], edges: Sequence[Edge], *, gap: Point = (0.35, 0.55)) -> Layout:
    """Place boxes of these sizes (width, height), with `gap` between them in each direction; an edge is (parent, child)."""
    layer = _layers(sizes, edges)
    rows: list[list[Hashable]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    chains: dict[Edge, list[Hashable]] = {}
    for name in sizes:
        rows[layer[name]].append(name)
    for edge in dict.fromkeys(edges):
        if layer[edge[0]] < layer[edge[1]]:
            lanes = [(edge, between) for between in range(layer[edge[0]] + 1, layer[edge[1]])]
            for lane in lanes:
                rows[lane[1]].append(lane)
            chains[edge] = [edge[0], *lanes, edge[1]]
    steps = [step for chain in chains.values() for step in pairwise(chain)]
    above, below = _neighbors(rows, [(b, a) for a, b in steps]), _neighbors(rows, steps)
    for sweep in range(_SWEEPS):
        _order(rows, below if sweep % 2 else above, upward=bool(sweep % 2))
    widths: dict[Hashable, float] = {item: sizes[item][0] if isinstance(item, str) else _LANE for row in rows for item in row}
    x = _columns(rows, widths, above, below, gap[0])
    heights = [max((sizes[item][1] for item in row if isinstance(item, str)), default=0.0) for row in rows]
    tops = [sum(heights[:number]) + gap[1] * number for number in range(len(rows))]
    bottoms = [top + height for top, height in zip(tops, heights, strict=True)]
    centers = {name: (x[name], tops[layer[name]] + heights[layer[name]] / 2) for name in sizes}
    paths = {}
    for (parent, child), chain in chains.items():
        starts, ends = centers[parent][1] + sizes[parent][1] / 2, centers[child][1] - sizes[child][1] / 2
        points = [(x[parent], starts), (x[parent], bottoms[layer[parent]])]
        for number, place in enumerate(chain[1:-1], layer[parent] + 1):
            points += [(x[place], tops[number]), (x[place], bottoms[number])]
        paths[parent, child] = [*points, (x[child], tops[layer[child]]), (x[child], ends)]
    width = max((x[item] + widths[item] / 2 for row in rows for item in row), default=0.0)
    return Layout(centers, paths, width, bottoms[-1] if rows else 0.0)


def _layers(names: Mapping[str, object], edges: Sequence[Edge]) -> dict[str, int]:
    """Return the layer of each box: below all its parents; a box without parents goes right above its nearest child."""
    parents: dict[str, set[str]] = {name: set() for name in names}
    children: dict[str, set[str]] = {name: set() for name in names}
    for parent, child in edges:
        parents[child].add(parent)
        children[parent].add(child)
    missing = {name: len(parents[name]) for name in names}
    ready = [name for name in names if not missing[name]]
    layer: dict[str, int] = {}
    while len(layer) < len(names):
        # A circle has no first box; any will do.
        name = ready.pop() if ready else next(name for name in names if name not in layer)
        if name in layer:
            continue
        layer[name] = max((layer[parent] + 1 for parent in parents[name] if parent in layer), default=0)
        for child in children[name]:
            missing[child] -= 1
            if not missing[child]:
                ready.append(child)
    for name in names:
        if not parents[name] and children[name]:
            layer[name] = max(0, min(layer[child] for child in children[name]) - 1)
    return layer


def _neighbors(
    rows: Sequence[Sequence[Hashable]], steps: Sequence[tuple[Hashable, Hashable]]
) -> dict[Hashable, list[Hashable]]:
    neighbors: dict[Hashable, list[Hashable]] = {item: [] for row in rows for item in row}
    for item, neighbor in steps:
        neighbors[item].append(neighbor)
    return neighbors


def _order(rows: list[list[Hashable]], neighbors: Mapping[Hashable, Sequence[Hashable]], *, upward: bool) -> None:
    """Sort each row by the mean position of its items' neighbors in the row before, which leaves few crossings."""
    place: dict[Hashable, int] = {}
    for row in reversed(rows) if upward else rows:
        mean = {item: _mean([place[neighbor] for neighbor in neighbors[item]], number) for number, item in enumerate(row)}
        row.sort(key=mean.__getitem__)
        place = {item: number for number, item in enumerate(row)}


def _columns(
    rows: Sequence[Sequence[Hashable]],
    widths: Mapping[Hashable, float],
    above: Mapping[Hashable, Sequence[Hashable]],
    below: Mapping[Hashable, Sequence[Hashable]],
    gap: float,
) -> dict[Hashable, float]:
    """Return the x of every item: near the mean of its neighbors, in the order of its row, and never overlapping."""
    x: dict[Hashable, float] = {item: 0.0 for row in rows for item in row}
    for sweep in range(_SWEEPS):
        neighbors = below if sweep % 2 else above
        for row in reversed(rows) if sweep % 2 else rows:
            ideal = [_mean([x[neighbor] for neighbor in neighbors[item]], x[item]) for item in row]
            x |= zip(row, _spread(ideal, [widths[item] for item in row], gap), strict=True)
    left_edge = min((x[item] - widths[item] / 2 for item in x), default=0.0)
    return {item: place - left_edge for item, place in x.items()}


def _spread(ideal: Sequence[float], widths: Sequence[float], gap: float) -> list[float]:
    """Return the places nearest to `ideal`, by least squares, that keep the order and the distances (isotonic regression)."""
    offsets = [0.0]
    for width, next_width in pairwise(widths):
        offsets.append(offsets[-1] + (width + next_width) / 2 + gap)
    blocks: list[tuple[float, int]] = []  # mean, count
    for place, offset in zip(ideal, offsets, strict=False):
        mean, count = place - offset, 1
        while blocks and blocks[-1][0] > mean:
            earlier_mean, earlier_count = blocks.pop()
            mean, count = (earlier_mean * earlier_count + mean * count) / (earlier_count + count), earlier_count + count
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
