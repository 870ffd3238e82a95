"""The lineage of an adapter as a picture: base models and data, adapters, and the models that contain them, each row below."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import picture
from adapterhub.cli import output
from adapterhub_converters.errors import MissingExtraError, RefusedError

from .layered_layout import Edge, Layout, Point, layout
from .lineage import name_of

if TYPE_CHECKING:
    from adapterhub.registry.lineage import Lineage, Node

_BLUE, _ORANGE, _GRAY, _LIGHT = "#3b6fb6", "#d9622b", "#6b7280", "#f3f4f6"
_MOST = 200  # boxes in one picture
_MOST_DATA = 4  # data sets of one adapter
_NAME = 44  # characters of a line
_PAD = 0.12  # inches between a box and its text
_MARGIN = 0.25  # inches around the graph
_DPI = 150


@dataclass(frozen=True)
class _Box:
    text: str
    color: str
    fill: str = "white"
    dashed: bool = False


def draw(found: Lineage, path: Path) -> None:
    """Draw the graph into a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
        RefusedError: The graph has too many nodes for a picture.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("--plot", "matplotlib is not installed", "Run `pip install 'adapterhub[train]'`") from error
    boxes, edges = _graph(found)
    if len(boxes) > _MOST:
        raise _too_large(f"{len(boxes):,} nodes")
    sizes = {name: _size(box.text) for name, box in boxes.items()}
    placed = layout(sizes, list(edges))
    width, height = placed.width + 2 * _MARGIN, placed.height + 2 * _MARGIN
    if max(width, height) > picture.LARGEST:
        raise _too_large(f"{len(boxes)} nodes with names of this length")
    with picture.figure(path, width, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-_MARGIN, placed.width + _MARGIN)
        axes.set_ylim(placed.height + _MARGIN, -_MARGIN)
        _draw_edges(axes, placed, edges)
        for name, box in boxes.items():
            _draw_box(axes, placed.centers[name], sizes[name], box)


def _too_large(what: str) -> RefusedError:
    return RefusedError("--plot", f"{what} are too many for a picture", "Draw the output of --dot, or use --json")


def _graph(found: Lineage) -> tuple[dict[str, _Box], dict[Edge, str]]:
    """Return the boxes by name, and the edges with their labels."""
    boxes: dict[str, _Box] = {}
    edges: dict[Edge, str] = {}
    for digest, node in found.nodes.items():
        color = _ORANGE if digest == found.root else _BLUE if node.manifest else _GRAY
        boxes[digest] = _Box(_lines(name_of(node), _about(node)), color, dashed=node.manifest is None)
        if node.base and not node.parents:
            base = f"base {node.base}"
            boxes[base] = _Box(_lines(node.base, "base model"), _GRAY, _LIGHT)
            edges[base, digest] = ""
        for data in node.data[:_MOST_DATA]:
            name = f"data {data.digest or data.name or data.path}"
            kind = f"data, {len(node.data) - _MOST_DATA} more" if len(node.data) > _MOST_DATA else "data"
            boxes[name] = _Box(_lines(data.name or data.path or "data", kind), _GRAY, _LIGHT)
            edges[name, digest] = ""
    for digest in found.nodes:
        parents = found.parents(digest)
        plain = all(edge.weight in (None, 1) for edge in parents)
        for edge in parents:
            edges[edge.parent, digest] = "" if plain or edge.weight is None else f"{edge.weight:g}"
    for model in found.models:
        boxes[f"model {model.name}"] = _Box(_lines(model.name, f"model on {model.base}"), _BLUE, _LIGHT)
        edges[model.parent, f"model {model.name}"] = "" if model.weight == 1 else f"{model.weight:g}"
    return boxes, edges


def _about(node: Node) -> str:
    rank = node.manifest.r if node.manifest else None
    return node.how + (f", r {rank}" if rank else "")


def _lines(*texts: str) -> str:
    return "\n".join(output.cut(picture.label(text), _NAME) for text in texts if text)


def _size(text: str) -> Point:
    """Width and height of a box around a text, in inches."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer = RendererAgg(1, 1, _DPI)
    lines = [renderer.get_text_width_height_descent(line, FontProperties(size=8), ismath=False) for line in text.split("\n")]
    return max(line[0] for line in lines) / _DPI + 2 * _PAD, sum(line[1] * 1.45 for line in lines) / _DPI + 2 * _PAD


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

    for edge, points in placed.paths.items():
        route, codes = [points[0]], [Curve.MOVETO]
        for number, ((x, y), (to_x, to_y)) in enumerate(pairwise(points)):
            if number % 2:
                route += [(x, (y + to_y) / 2), (to_x, (y + to_y) / 2), (to_x, to_y)]
                codes += [Curve.CURVE4] * 3
            elif y != to_y or number == len(points) - 2:
                route.append((to_x, to_y))
                codes.append(Curve.LINETO)
        arrow = FancyArrowPatch(path=Curve(route, codes), arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0)
        arrow.set(color=_GRAY, linewidth=1, zorder=1)
        axes.add_patch(arrow)
        if edges[edge]:
            (x, y), (to_x, to_y) = points[-3], points[-2]
            middle = {"ha": "center", "va": "center", "color": _GRAY, "fontsize": 8, "zorder": 2}
            axes.text((x + to_x) / 2, (y + to_y) / 2, edges[edge], backgroundcolor="white", **middle)
