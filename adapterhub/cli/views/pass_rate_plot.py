"""The pass rates of tests over the versions of a name, from its log: the panel below the norms in the picture of `show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub import picture
from adapterhub.manifest import measurement
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.manifest.measurement import Evaluation
    from adapterhub.store.store import Entry

_LINES = 8  # the most lines in a picture; those of the newest versions win


@dataclass(frozen=True)
class PassRates:
    """The pass rates of versions that answered the same tests.

    Attributes:
        name: The name of the evaluation.
        by_version: Pass rate, 0 to 1, by version number, ascending.
    """

    name: str
    by_version: Mapping[int, float]


def pass_rates(log: Sequence[Entry]) -> list[PassRates]:
    """Return the pass rates in the log of a name, newest entry first; a change of the tests of a name begins another item."""
    evaluations: dict[tuple[int, str], Evaluation] = {}
    for entry in log:
        evaluation = measurement.parse(entry.message) if entry.op == "evaluate" else None
        if evaluation is not None:
            evaluations.setdefault((entry.number, evaluation.name), evaluation)  # the latest of a name counts
    rates: dict[tuple[object, ...], dict[int, float]] = {}
    for (number, name), evaluation in sorted(evaluations.items(), key=lambda item: item[0]):
        rate = evaluation.metrics.get("pass_rate")
        if rate is not None and 0 <= rate <= 1:
            tests = (*(str(file.get("digest")) for file in evaluation.data), *sorted(evaluation.cases))
            rates.setdefault((name, tests), {})[number] = rate
    return [PassRates(str(name), by_version) for (name, _), by_version in rates.items()]


def draw(axes: Any, lines: Sequence[PassRates], number: int) -> None:
    """Draw pass rates over versions, with a vertical line at the version `number`."""
    from matplotlib import colormaps

    shown_lines = sorted(sorted(lines, key=lambda line: -max(line.by_version))[:_LINES], key=lambda line: line.name)
    names = list(dict.fromkeys(line.name for line in shown_lines))
    colors = dict(zip(names, map(tuple, colormaps["tab10"](range(len(names)))), strict=True))
    axes.axvline(number, color=picture.LIGHT, linewidth=6, zorder=0)
    labeled: set[str] = set()
    for line in shown_lines:
        label = None if line.name in labeled else line.name
        labeled.add(line.name)
        axes.plot(*zip(*line.by_version.items(), strict=True), "o-", color=colors[line.name], markersize=5, label=label)
    title = "pass rate by version; each line is one set of tests"
    title += f"; {len(lines) - _LINES:,} more lines" if len(lines) > _LINES else ""
    available = axes.figure.get_figwidth() - 1.2
    axes.set_title(picture.fit_label(title, available, size=9), loc="left", color=picture.GRAY, fontsize=9)
    versions = sorted({number, *(version for line in shown_lines for version in line.by_version)})
    ticks = versions[:: -(-len(versions) // 10)]
    axes.set_xticks(ticks, [f"v{version}" for version in ticks])
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.grid(axis="y", color=picture.LIGHT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=picture.GRAY, length=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
