"""The loss curve, as a PNG and as one line of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from adapterhub import picture


def loss_curve(log: Sequence[Mapping[str, Any]], path: Path, *, kept_step: int, title: str, subtitle: str) -> None:
    """Draw the training loss and the held-out loss by step, without a display.

    The first held-out loss and that of `kept_step`, whose parameters are the result, are labeled with their perplexity, or for
    pairs with their accuracy.
    """
    steps = [line["step"] for line in log if "loss" in line]
    losses = [line["loss"] for line in log if "loss" in line]
    heldout = [line for line in log if "heldout_loss" in line]
    with picture.figure(path, 8, 4.5) as figure:
        axes = figure.add_subplot()
        _draw(axes, steps, losses, heldout, kept_step)
        picture.heading(axes, title, subtitle)


def _draw(axes: Any, steps: list[int], losses: list[float], heldout: list[Mapping[str, Any]], kept_step: int) -> None:
    axes.plot(steps, losses, color=picture.BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, exponential_means(losses), color=picture.BLUE, linewidth=2, label="training (smoothed)")
    if heldout:
        points = [(line["step"], line["heldout_loss"]) for line in heldout]
        axes.plot(*zip(*points, strict=True), color=picture.ORANGE, marker="o", markersize=6, linewidth=1.5, label="held out")
        last = max(step for step, _ in points)
        for step, line in {line["step"]: line for line in heldout if line["step"] in (points[0][0], kept_step)}.items():
            # The label of the kept step is below its point and that of the first above: the curve falls from left to right.
            offset, alignment = (9, "bottom") if step == points[0][0] else (-9, "top")
            loss, accuracy = line["heldout_loss"], line.get("heldout_accuracy")
            text = f"perplexity {_three_digits(math.exp(loss))}" if accuracy is None else f"accuracy {accuracy:.0%}"
            text += ", kept" if kept_step == step < last else ""
            placement = {"textcoords": "offset points", "ha": "left" if step < last / 5 else "right", "va": alignment}
            axes.annotate(text, (step, loss), (0, offset), color=picture.ORANGE, fontsize=9, **placement)
    axes.set_xlabel("step", color=picture.GRAY)
    axes.xaxis.get_major_locator().set_params(integer=True)
    has_pairs = any("heldout_accuracy" in line for line in heldout)
    axes.set_ylabel("loss of a pair" if has_pairs else "loss, nats a token", color=picture.GRAY)
    axes.grid(axis="y", color=picture.LIGHT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=picture.GRAY)
    axes.margins(x=0.02, y=0.15)
    # Above the axes, where it covers no curve.
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9, borderaxespad=0)


def _three_digits(number: float) -> str:
    """Return a number with three significant digits."""
    return f"{number:.2e}" if number >= 1e6 else f"{number:#.3g}" if number < 100 else f"{float(f'{number:.3g}'):,.0f}"


_DECAY = 0.9  # the weight of the mean before, at each further loss


def exponential_means(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving means, corrected for their start."""
    means, weighted_sum, weight = [], 0.0, 0.0
    for loss in losses:
        weighted_sum = _DECAY * weighted_sum + (1 - _DECAY) * loss
        weight = _DECAY * weight + (1 - _DECAY)
        means.append(weighted_sum / weight)
    return means


_BARS = "▁▂▃▄▅▆▇█"


def line(values: Sequence[float], width: int = 24) -> str:
    """Return a curve of the values in at most `width` characters, each of which shows the mean of its share of them."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * number // count for number in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] for mean in means)
