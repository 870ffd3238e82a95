"""The loss curve, as a PNG and in one line of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from adapterhub import picture

_BLUE, _ORANGE, _GRAY = "#3b6fb6", "#d9622b", "#6b7280"


def loss_curve(log: Sequence[Mapping[str, Any]], path: Path, *, kept_step: int, title: str, subtitle: str) -> None:
    """Draw training loss and held-out loss by step, without a display.

    The first held-out loss and that of `kept_step`, whose parameters are the result, are labeled with their perplexity.
    """
    steps = [line["step"] for line in log if "loss" in line]
    losses = [line["loss"] for line in log if "loss" in line]
    heldout = [(line["step"], line["heldout_loss"]) for line in log if "heldout_loss" in line]
    with picture.figure(path, 8, 4.5) as figure:
        axes = figure.add_subplot()
        _draw(axes, steps, losses, heldout, kept_step)
        axes.set_title(picture.label(title), loc="left", fontsize=13, fontweight="bold", pad=22)
        axes.text(0, 1.025, picture.label(subtitle), transform=axes.transAxes, color=_GRAY, fontsize=10)


def _draw(axes: Any, steps: list[int], losses: list[float], heldout: list[tuple[int, float]], kept_step: int) -> None:
    axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, smoothed(losses), color=_BLUE, linewidth=2, label="training (smoothed)")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), color=_ORANGE, marker="o", markersize=6, linewidth=1.5, label="held out")
        last = max(step for step, _ in heldout)
        for step, loss in heldout:
            if step not in (heldout[0][0], kept_step):
                continue
            align = "left" if step == 0 else "right"
            text = f"perplexity {math.exp(loss):.2f}{', kept' if kept_step == step < last else ''}"
            axes.annotate(text, (step, loss), (0, 9), textcoords="offset points", ha=align, color=_ORANGE, fontsize=9)
    axes.set_xlabel("step", color=_GRAY)
    axes.set_ylabel("loss, nats a token", color=_GRAY)
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GRAY)
    axes.margins(x=0.02, y=0.12)
    axes.legend(frameon=False)


def smoothed(losses: Sequence[float], keep: float = 0.9) -> list[float]:
    """Return the exponential mean, corrected for its start."""
    means, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


_BARS = "▁▂▃▄▅▆▇█"


def line(values: Sequence[float], width: int = 24) -> str:
    """Return a curve of the values in at most `width` characters, each for the mean of its share of them."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * number // count for number in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] for mean in means)
