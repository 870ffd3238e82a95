"""Pictures as numbers: within their frame, whatever is drawn."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from adapterhub.analysis.norms import NormHeatMap
from adapterhub.hub.web import drawings
from adapterhub.hub.web.drawings import STEPS, Box
from adapterhub.manifest.document import LossPoint


def heat(rows: int, columns: int) -> NormHeatMap:
    values = tuple(tuple(float(row + column) for column in range(columns)) for row in range(rows))
    return NormHeatMap(tuple(map(str, range(rows))), tuple(f"m{n}" for n in range(columns)), values, {}, {})


def test_the_least_norm_is_the_lightest_and_the_greatest_the_darkest() -> None:
    picture = drawings.heat_map(heat(3, 2))
    assert (picture.rows[0][2][0][1], picture.rows[2][2][1][1]) == (1, STEPS)
    assert (picture.least, picture.greatest) == (0.0, 3.0)


@given(st.integers(0, 300), st.integers(1, 60))
def test_a_heat_map_of_any_size_fits(rows: int, columns: int) -> None:
    picture = drawings.heat_map(heat(rows, columns))
    assert (280 if picture.folded <= 1 else 480) <= picture.width <= 720  # the legend fits
    assert picture.height <= 720
    assert len(picture.columns) + picture.more_columns == columns
    assert all(1 <= shade <= STEPS for _, _, cells in picture.rows for _, shade in cells)


numbers = st.none() | st.floats() | st.just(0.5)


@given(st.lists(st.builds(LossPoint, st.integers(-(2**70), 2**70), numbers, numbers), max_size=20))
def test_any_losses_are_a_curve_within_its_frame_or_none(points: list[LossPoint]) -> None:
    picture = drawings.curve(points)
    for _, _, line in picture.lines if picture else ():
        for pair in line.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 640
            assert 0 <= y <= 216


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    picture = drawings.curve([LossPoint(step, 1 / (step + 1)) for step in range(100_000)])
    assert picture is not None
    line = picture.lines[0][2].split()
    assert len(line) < 400
    assert math.isclose(float(line[-1].partition(",")[0]), picture.right)


def test_boxes_of_a_graph_are_in_the_picture_and_names_are_cut() -> None:
    boxes = {"a": Box(("x" * 200, "base model"), "base"), "b": Box(("b",), "root")}
    picture = drawings.graph(boxes, {("a", "b"): "0.5"})
    for box in picture.boxes:
        assert box.x >= 0
        assert box.y >= 0
        assert box.x + box.width <= picture.width
        assert box.y + box.height <= picture.height
        assert all(len(line) <= 36 for line in box.box.lines)
    assert [label for _, _, label in picture.labels] == ["0.5"]
