"""The loss curve as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GRAY = "#3b6fb6", "#d9622b", "#6b7280"


def loss_curve(log: Sequence[Mapping[str, Any]], path: Path, *, kept: int, title: str, subtitle: str) -> None:
    """Draw training loss and held-out loss over steps, the first held-out one and that of step `kept`, which is the result,
    with their perplexity. No display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in log if "loss" in line]
    losses = [line["loss"] for line in log if "loss" in line]
    asked = [(line["step"], line["heldout_loss"]) for line in log if "heldout_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, smoothed(losses), color=_BLUE, linewidth=2, label="training (smoothed)")
    if asked:
        axes.plot(*zip(*asked, strict=True), color=_ORANGE, marker="o", markersize=6, linewidth=1.5, label="held out")
        last = max(step for step, _ in asked)
        for step, loss in asked:
            if step not in (asked[0][0], kept):
                continue
            align = "left" if step == 0 else "right"
            text = f"perplexity {math.exp(loss):.2f}{', kept' if kept == step < last else ''}"
            axes.annotate(text, (step, loss), (0, 9), textcoords="offset points", ha=align, color=_ORANGE, fontsize=9)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=22)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=_GRAY, fontsize=10)
    axes.set_xlabel("step", color=_GRAY)
    axes.set_ylabel("loss, nats a token", color=_GRAY)
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GRAY)
    axes.margins(x=0.02, y=0.12)
    axes.legend(frameon=False)
    # Matplotlib writes its own version into the file unless told not to.
    figure.savefig(path, metadata={"Software": None})


def smoothed(losses: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    means, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


# ---- A curve in one line of text


_BARS = "▁▂▃▄▅▆▇█"


def line(values: Sequence[float], width: int = 24) -> str:
    """The values from first to last in at most `width` characters, each the mean of its share, from the lowest to the
    highest."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * number // count for number in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] for mean in means)
