"""The pictures: every text can be read, the scale says what it leaves out, and no line suggests a curve that is not there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import picture
from adapterhub.analysis import norms
from adapterhub.cli import output
from adapterhub.cli.views import merge_plot
from adapterhub.merging import MergeReport, ModuleMerge
from adapterhub.training.artifacts.loss_curve import loss_curve

pytest.importorskip("matplotlib")

LONG = "a-rather-long-namespace-of-a-team/and-an-even-longer-name-of-an-adapter-for-sql:v1"
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, which nothing returns."""
    figures: list[Any] = []
    original = picture.figure

    @contextmanager
    def remembered(*args: Any) -> Iterator[Any]:
        with original(*args) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(picture, "figure", remembered)
    return figures


def texts(figure: Any) -> list[Any]:
    """The texts that are drawn, which labels of ticks beyond the ends of an axis are not."""
    from matplotlib.text import Text

    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        hidden |= {label for tick in beyond for label in (tick.label1, tick.label2)}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in hidden]


def words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in texts(figure))


def assert_readable(figure: Any) -> None:
    """Assert that every text is within the picture and covers no other."""
    inside, boxes = figure.bbox, [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    for text, box in boxes:
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1, text
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1, text
    overlaps = [
        (first[0], second[0])
        for first, second in combinations(boxes, 2)
        if first[1].x0 < second[1].x1
        and second[1].x0 < first[1].x1
        and first[1].y0 < second[1].y1
        and second[1].y0 < first[1].y1
    ]
    assert not overlaps


# ---- norms


def heat(layers: int, kinds: tuple[str, ...] = KINDS, *, outlier: float = 0.0, prefix: str = "", relative: bool = False) -> Any:
    rng = np.random.default_rng(0)
    cells = {f"{prefix}model.layers.{n}.mlp.{kind}": 0.01 + 0.01 * rng.random() for n in range(layers) for kind in kinds}
    if outlier:
        cells[f"{prefix}model.layers.0.mlp.{kinds[-1]}"] = outlier
    return norms._arrange(cells, {}, relative=relative)


def test_an_outlier_ends_no_scale_and_the_picture_says_so(drawn: list[Any], tmp_path: Path) -> None:
    heat_map = heat(30, outlier=0.213)
    norms.plot(heat_map, tmp_path / "a.png", title="a")
    values = sorted(value for row in heat_map.values for value in row)
    image = drawn[0].axes[0].images[0]
    assert image.get_clim() == (values[0], values[int(0.99 * 209)])
    above = sum(value > image.get_clim()[1] for value in values)
    assert f"scale ends at the 99th percentile; {above} above, the largest 0.213: down in layer 0" in words(drawn[0])
    assert image.cmap(image.norm(0.213))[:3] != image.cmap(image.norm(image.get_clim()[1]))[:3]


@pytest.mark.parametrize("values", [[], [0.0], [1.0, 1.9], [0.0] * 9 + [1.0], [1.0] * 9 + [3.0]])
def test_a_scale_reaches_the_greatest_value_if_that_is_no_outlier(values: list[float]) -> None:
    heat_map = norms._arrange({f"m.layers.{n}.q": value for n, value in enumerate(values)}, {}, relative=False)
    assert heat_map.scale == ((min(values), max(values)) if values else (0.0, 0.0))
    assert heat_map.outlier_note == ""


@pytest.mark.parametrize("relative", [False, True])
def test_a_color_bar_has_a_label(drawn: list[Any], tmp_path: Path, relative: bool) -> None:
    norms.plot(heat(3, relative=relative), tmp_path / "a.png", title="a")
    assert drawn[0].axes[1].get_ylabel() == ("relative norm" if relative else "norm")


@pytest.mark.parametrize(
    "heat_map",
    [
        heat(1, ("q_proj",)),
        heat(30, outlier=1.0),
        heat(200, outlier=1.0),
        heat(4, ("a_rather_long_kind_of_module", "another_long_kind_of_module")),
        heat(4, tuple(f"kind_{n}" for n in range(100))),
        heat(3, prefix="a_long_name_of_a_stack."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("title", ["sql", LONG])
def test_norms_are_readable(drawn: list[Any], tmp_path: Path, heat_map: norms.NormHeatMap, title: str) -> None:
    norms.plot(heat_map, tmp_path / "a.png", title=title)
    assert_readable(drawn[0])


def luminance(color: int) -> float:
    """The relative luminance (WCAG 2) of a color of xterm's 6x6x6 cube."""
    levels = [(0, 95, 135, 175, 215, 255)[(color - 16) // step % 6] / 255 for step in (36, 6, 1)]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_color_of_a_heat_map_is_visible_on_black_and_lighter_than_the_one_before() -> None:
    shades = [luminance(color) for color in output._HEAT]
    assert shades == sorted(set(shades))
    assert (shades[0] + 0.05) / 0.05 > 3  # WCAG's least contrast of a graphic


# ---- merges


def report(shared: tuple[str, ...], alone: tuple[str, ...], layers: int = 30) -> MergeReport:
    rng = np.random.default_rng(0)

    def module_merge() -> ModuleMerge:
        cosine = float(rng.uniform(-1, 1))
        return ModuleMerge((4, 4), 4, 0.1, ((1.0, cosine), (cosine, 1.0)), 0.2, 0.5)

    modules = {f"model.layers.{n}.{kind}": module_merge() for n in range(layers) for kind in shared}
    modules |= {f"model.layers.{n}.{kind}": ModuleMerge((4,), 4, 0.1, ((1.0,),), 0.1) for n in range(layers) for kind in alone}
    return MergeReport("ties", (1.0, 1.0), modules=modules)


def test_a_merge_is_points_whose_words_explain_themselves(drawn: list[Any], tmp_path: Path) -> None:
    merge_plot.draw(report(KINDS[:4], KINDS[4:]), tmp_path / "a.png", title="both")
    lines = [line for axes in drawn[0].axes for line in axes.get_lines()]
    assert {line.get_linestyle() for line in lines} == {"None"}
    shown_words = words(drawn[0])
    assert "cosine of the two deltas least alike: 1 same direction, 0 unrelated, −1 opposite" in shown_words
    assert "signs apart: share of elements that some adapters raise and others lower" in shown_words
    assert "energy lost: share of the sum of squares that truncation left out" in shown_words


def test_modules_that_have_nothing_to_compare_are_named(drawn: list[Any], tmp_path: Path) -> None:
    merge_plot.draw(report(KINDS[:4], KINDS[4:]), tmp_path / "a.png", title="both")
    note = "no cosine and no signs for 90 modules that one adapter alone changes: down_proj, gate_proj, up_proj"
    assert note in words(drawn[0])
    merge_plot.draw(report(KINDS, ()), tmp_path / "b.png", title="both")
    merge_plot.draw(report((), KINDS), tmp_path / "c.png", title="both")
    assert not any("one adapter alone" in words(figure) for figure in drawn[1:])


def test_every_kind_of_a_merge_has_a_color_of_its_own(drawn: list[Any], tmp_path: Path) -> None:
    merge_plot.draw(report(tuple(f"kind_{n}" for n in range(20)), (), 3), tmp_path / "a.png", title="both")
    assert len({line.get_color() for line in drawn[0].axes[0].get_lines()}) == 16
    assert "4 more kinds of modules are not shown" in words(drawn[0])


@pytest.mark.parametrize(
    "merge_report",
    [
        report(KINDS[:4], KINDS[4:]),
        report((), KINDS[:1], 1),
        report((), tuple(f"{n}_of_these_kinds_of_modules_with_a_long_name" for n in range(20)), 3),
        report(tuple(f"kind_{n}" for n in range(20)), KINDS, 200),
    ],
)
@pytest.mark.parametrize("title", ["both", LONG])
def test_a_merge_is_readable(drawn: list[Any], tmp_path: Path, merge_report: MergeReport, title: str) -> None:
    merge_plot.draw(merge_report, tmp_path / "a.png", title=title)
    assert_readable(drawn[0])


# ---- training and lineage


def log(steps: int, first: float, last: float, *, interval: int) -> list[dict[str, Any]]:
    curve = [last + (first - last) * math.exp(-4 * step / steps) for step in range(steps + 1)]
    lines: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in enumerate(curve) if step]
    return [
        {"step": 0, "heldout_loss": first},
        *lines,
        *({"step": s, "heldout_loss": curve[s]} for s in range(interval, steps + 1, interval)),
    ]


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (0.0, "perplexity 1.00"), (2.3, "perplexity 9.97"), (4.0, "perplexity 54.6"), (5.3, "perplexity 200"),
        (10.843, "perplexity 51,200"), (700.0, "perplexity 1.01e+304"),
    ],
)  # fmt: skip
def test_a_perplexity_has_three_digits(drawn: list[Any], tmp_path: Path, loss: float, says: str) -> None:
    loss_curve(log(2, loss, loss, interval=2), tmp_path / "a.png", kept_step=0, title="a", subtitle="b")
    assert f"{says}, kept" in words(drawn[0]).splitlines()


@pytest.mark.parametrize(
    ("steps", "interval", "kept_step"), [(1, 1, 1), (200, 20, 200), (60, 10, 10), (1000, 5, 5), (60, 10, 0)]
)
@pytest.mark.parametrize("first", [10.9, 2.11])
def test_a_loss_curve_is_readable(
    drawn: list[Any], tmp_path: Path, steps: int, interval: int, kept_step: int, first: float
) -> None:
    loss_curve(
        log(steps, first, 2.1, interval=interval),
        tmp_path / "a.png",
        kept_step=kept_step,
        title=LONG,
        subtitle="QLoRA, NF4 base, r = 16",
    )
    assert_readable(drawn[0])
    assert all(float(step).is_integer() for step in drawn[0].axes[0].get_xticks())
