"""Layered drawings: no box on another, and no edge behind a box."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.hub.web.layered_layout import Layout, Point, layout

Graph = tuple[dict[str, Point], list[tuple[str, str]]]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(1, 14))
    side = st.floats(0.2, 4.0)
    sizes = {f"n{number}": (draw(side), draw(side)) for number in range(count)}
    pairs = list(combinations(sizes, 2))
    edges = draw(st.lists(st.sampled_from(pairs), max_size=30)) if pairs else []
    return sizes, edges


def crossed(sizes: dict[str, Point], placed: Layout) -> list[tuple[tuple[str, str], str]]:
    """Return the edges with the boxes that they run behind."""
    crossings = []
    for edge, points in placed.paths.items():
        for point in sampled(points):
            for name, (x, y) in placed.centers.items():
                inside = abs(point[0] - x) < sizes[name][0] / 2 - 1e-6 and abs(point[1] - y) < sizes[name][1] / 2 - 1e-6
                if inside:
                    crossings.append((edge, name))
    return crossings


def sampled(points: Sequence[Point]) -> list[Point]:
    """Return points along an edge."""
    samples: list[Point] = []
    for number, (start, end) in enumerate(pairwise(points)):
        for step in range(21):
            t = step / 20
            if number % 2 == 0:  # straight, through a layer
                samples.append((start[0], start[1] + t * (end[1] - start[1])))
            else:  # a cubic curve with vertical tangents
                bend = 3 * t * t - 2 * t**3
                height = (1 - t) ** 3 * start[1] + 1.5 * t * (1 - t) * (start[1] + end[1]) + t**3 * end[1]
                samples.append((start[0] + bend * (end[0] - start[0]), height))
    return samples


@given(graph=graphs())
@settings(max_examples=100)
def test_boxes_do_not_overlap_and_edges_run_around_them(graph: Graph) -> None:
    sizes, edges = graph
    placed = layout(sizes, edges)
    assert crossed(sizes, placed) == []
    for first, second in combinations(sizes, 2):
        (x, y), (to_x, to_y) = placed.centers[first], placed.centers[second]
        wide, high = (sizes[first][0] + sizes[second][0]) / 2, (sizes[first][1] + sizes[second][1]) / 2
        assert abs(x - to_x) >= wide - 1e-6 or abs(y - to_y) >= high - 1e-6
    for name, (x, y) in placed.centers.items():
        assert sizes[name][0] / 2 - 1e-6 <= x <= placed.width - sizes[name][0] / 2 + 1e-6
        assert sizes[name][1] / 2 - 1e-6 <= y <= placed.height - sizes[name][1] / 2 + 1e-6


@given(graph=graphs())
@settings(max_examples=50)
def test_parents_are_above_their_children(graph: Graph) -> None:
    sizes, edges = graph
    placed = layout(sizes, edges)
    for parent, child in edges:
        assert placed.centers[parent][1] + sizes[parent][1] / 2 < placed.centers[child][1] - sizes[child][1] / 2


def test_a_circle_and_a_long_chain_are_drawn_too() -> None:
    names = {f"n{number}": (1.0, 0.5) for number in range(5000)}
    chain = [(f"n{number}", f"n{number + 1}") for number in range(4999)]
    assert len(layout(names, chain).paths) == 4999
    assert set(layout({"a": (1, 1), "b": (1, 1)}, [("a", "b"), ("b", "a")]).centers) == {"a", "b"}


def test_a_child_of_two_is_between_them() -> None:
    placed = layout({"a": (1, 1), "b": (1, 1), "c": (1, 1)}, [("a", "c"), ("b", "c")])
    assert placed.centers["c"][0] == (placed.centers["a"][0] + placed.centers["b"][0]) / 2
