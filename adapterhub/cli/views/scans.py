"""What a scan found: problems as those of a check are shown, and numbers without a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adapterhub.checks import SEVERITIES
from adapterhub.cli import output
from adapterhub.cli.output import Column

from . import reports

if TYPE_CHECKING:
    from adapterhub.analysis.spectra import Ranked
    from adapterhub.scanning import Scan, Weights

_ROWS = 24  # kinds of modules; a model of text has 4 to 16
_SHARE = 100  # of a whole, in the table


def document(found: Scan) -> dict[str, Any]:
    """The scan with stable keys; there is no key for a verdict."""
    report, weights = found.report, found.weights
    return {
        "source": report.where,
        **report.facts,
        "strict": report.strict,
        "problems": reports.problems(report),
        "counts": dict(report.counted()),
        "weights": {
            "missing": weights.missing or None,
            "base": weights.base,
            "population": weights.population,
            "kinds": [asdict(one) for one in weights.kinds],
            "modules": [asdict(one) for one in weights.modules],
            "left_out": dict(weights.left_out),
        },
    }


def lines(found: Scan, screen: int | None) -> Iterator[str]:
    """The scan for people."""
    report = found.report
    counted = f"{output.plural(report.facts['files'], 'file')}, {output.size(report.facts['bytes'])}"  # type: ignore[arg-type]  # both are int
    yield output.one_line(f"{report.where}: {counted}")
    if report.problems:
        yield from ("", *reports.problem_lines(report, screen))
    yield from ("", *_weight_lines(found.weights, screen), "")
    counts = [output.plural(count, severity) for severity in SEVERITIES if (count := report.count(severity))]
    if counts:
        yield f"found {', '.join(counts)}"
    else:
        yield from output.wrapped("found nothing of what scan looks for, which proves nothing about the rest", screen)


def _weight_lines(weights: Weights, screen: int | None) -> Iterator[str]:
    if weights.missing:
        yield from output.wrapped(f"no numbers of weights: {weights.missing}", screen, indent=2)
        return
    columns = (
        Column("MODULES"), Column("COUNT", right=True),
        Column("NORM", right=True), Column("PCT", right=True),
        Column("TOP", right=True), Column("PCT", right=True),
        Column("SHARE", right=True), Column("PCT", right=True),
        Column("N", right=True),
    )  # fmt: skip
    yield from output.table(columns, [_row(one) for one in weights.kinds[:_ROWS]], screen=screen)
    if len(weights.kinds) > _ROWS:
        yield output.more(len(weights.kinds) - _ROWS)
    for name, reason in list(weights.left_out.items())[:3]:
        yield from output.wrapped(f"without numbers: {name}: {reason}", screen, indent=2)
    among = f"{output.plural(weights.population, 'other adapter')} of {weights.base or 'an unknown base'} in the registry"
    explained = (
        "NORM of the delta, TOP singular value, SHARE of the energy in that one; PCT: percentile among N adapters, of the "
        f"{among}. No verdict follows from them."
    )
    yield from output.wrapped(explained, screen)


def _row(one: Ranked) -> list[str]:
    places = one.percentiles
    ranks = ["-"] * 3 if places is None else [f"{value:.0f}" for value in (places.norm, places.top, places.share)]
    numbers = [f"{one.spectrum.norm:.3g}", f"{one.spectrum.top:.3g}", f"{one.spectrum.share * _SHARE:.0f} %"]
    pairs = [cell for pair in zip(numbers, ranks, strict=True) for cell in pair]
    return [output.cut(one.name, 30), str(one.modules), *pairs, str(one.n)]
