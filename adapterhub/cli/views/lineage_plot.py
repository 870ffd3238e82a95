"""A picture of the lineage of an adapter: base models and data, adapters, and the models that contain them, in rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import picture
from adapterhub.analysis.layered_layout import Edge, Layout, Point, layout
from adapterhub.cli import output
from adapterhub_converters.errors import RefusedError

from .lineage_tree import name_of

if TYPE_CHECKING:
    from adapterhub.registry.lineage_graph import Lineage, Node

_LIGHT = "#f3f4f6"  # fill of boxes that are not adapters
_MOST = 200  # boxes in one picture
_MOST_DATA = 4  # data sets of one adapter
_NAME = 44  # characters of a line
_PAD = 0.12  # inches between a box and its text
_MARGIN = 0.25  # inches around the graph
_HEAD = 0.15  # inches of the straight line behind the head of an arrow


@dataclass(frozen=True)
class _Box:
    text: str
    color: str
    fill: str = "white"
    dashed: bool = False


def draw(graph: Lineage, path: Path) -> None:
    """Draw the graph into a PNG.

    Raises:
        ImportError: matplotlib is not installed.
        RefusedError: The graph has too many nodes for a picture.
    """
    picture.check()
    boxes, edges = _graph(graph)
    if len(boxes) > _MOST:
        raise _too_large(f"{len(boxes):,} nodes")
    sizes = {name: _size(box.text) for name, box in boxes.items()}
    layout_ = layout(sizes, list(edges))
    width, height = layout_.width + 2 * _MARGIN, layout_.height + 2 * _MARGIN
    if max(width, height) > picture.LARGEST:
        raise _too_large(f"{len(boxes)} nodes with names of this length")
    with picture.figure(path, width, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-_MARGIN, layout_.width + _MARGIN)
        axes.set_ylim(layout_.height + _MARGIN, -_MARGIN)
        _draw_edges(axes, layout_, edges)
        for name, box in boxes.items():
            _draw_box(axes, layout_.centers[name], sizes[name], box)


def _too_large(subject: str) -> RefusedError:
    return RefusedError("--plot", f"{subject} are too many for a picture", "Draw the output of --dot, or use --json")


def _graph(graph: Lineage) -> tuple[dict[str, _Box], dict[Edge, str]]:
    """Return the boxes by name, and the edges with their labels."""
    boxes: dict[str, _Box] = {}
    edges: dict[Edge, str] = {}
    for digest, node in graph.nodes.items():
        color = picture.ORANGE if digest == graph.root else picture.BLUE if node.manifest else picture.GRAY
        boxes[digest] = _Box(_lines(name_of(node), _about(node)), color, dashed=node.manifest is None)
        if node.base and not node.parents:
            base = f"base {node.base}"
            boxes[base] = _Box(_lines(node.base, "base model"), picture.GRAY, _LIGHT)
            edges[base, digest] = ""
        for data in node.data[:_MOST_DATA]:
            name = f"data {data.digest or data.name or data.path}"
            kind = f"data, {len(node.data) - _MOST_DATA} more" if len(node.data) > _MOST_DATA else "data"
            boxes[name] = _Box(_lines(data.name or data.path or "data", kind), picture.GRAY, _LIGHT)
            edges[name, digest] = ""
    for digest in graph.nodes:
        parents = graph.parents(digest)
        all_equal = all(edge.weight in (None, 1) for edge in parents)
        for edge in parents:
            edges[edge.parent, digest] = "" if all_equal or edge.weight is None else f"{edge.weight:g}"
    for model in graph.models:
        boxes[f"model {model.name}"] = _Box(_lines(model.name, f"model on {model.base}"), picture.BLUE, _LIGHT)
        edges[model.parent, f"model {model.name}"] = "" if model.weight == 1 else f"{model.weight:g}"
    return boxes, edges


def _about(node: Node) -> str:
    rank = node.manifest.r if node.manifest else None
    return node.origin + (f", r {rank}" if rank else "")


def _lines(*texts: str) -> str:
    return "\n".join(output.cut(picture.label(text), _NAME) for text in texts if text)


def _size(text: str) -> Point:
    """Return the width and height of a box around a text, in inches."""
    width, height = picture.extent(text, size=8)
    return width + 2 * _PAD, 1.45 * height + 2 * _PAD


def _draw_box(axes: Any, center: Point, size: Point, box: _Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (center[0] - size[0] / 2, center[1] - size[1] / 2)
    patch = FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.08", linestyle="--" if box.dashed else "-")
    patch.set(facecolor=box.fill, edgecolor=box.color, linewidth=1.4, zorder=3)
    axes.add_patch(patch)
    axes.text(*center, box.text, ha="center", va="center", fontsize=8, zorder=4)


def _draw_edges(axes: Any, placed: Layout, edges: dict[Edge, str]) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    for edge, (*before, (x, tip), end) in placed.paths.items():
        points = [*before, (x, min(tip, end[1] - _HEAD)), end]
        route, codes = [points[0]], [Curve.MOVETO]
        for number, (start, to) in enumerate(pairwise(points)):
            if number % 2:
                middle = (start[1] + to[1]) / 2
                route += [(start[0], middle), (to[0], middle), to]
                codes += [Curve.CURVE4] * 3
            elif start != to:
                route.append(to)
                codes.append(Curve.LINETO)
        arrow = FancyArrowPatch(path=Curve(route, codes), arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0)
        arrow.set(color=picture.GRAY, linewidth=1, zorder=1)
        axes.add_patch(arrow)
        if edges[edge]:
            start, to = points[-3], points[-2]
            style = {"ha": "center", "va": "center", "color": picture.GRAY, "fontsize": 8, "zorder": 2}
            axes.text((start[0] + to[0]) / 2, (start[1] + to[1]) / 2, edges[edge], backgroundcolor="white", **style)
