"""The result of a scan: problems, shown as those of a check are, and numbers without a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adapterhub.checks import SEVERITIES
from adapterhub.cli import output
from adapterhub.cli.output import Column

from . import reports

if TYPE_CHECKING:
    from adapterhub.analysis.spectra import RankedSummary
    from adapterhub.operations.scan import Scan, Weights

_ROWS = 24  # kinds of modules; a language model has 4 to 16
_SHARE = 100  # the table shows shares in percent


def document(scan: Scan) -> dict[str, Any]:
    """Return the scan as JSON, with stable keys; there is no key for a verdict."""
    report, weights = scan.report, scan.weights
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
            "kinds": [asdict(ranked) for ranked in weights.kinds],
            "modules": [asdict(ranked) for ranked in weights.modules],
            "left_out": dict(weights.left_out),
        },
    }


def lines(scan: Scan, screen: int | None) -> Iterator[str]:
    """Yield the scan for people."""
    report = scan.report
    counted = f"{output.plural(report.facts['files'], 'file')}, {output.size(report.facts['bytes'])}"  # type: ignore[arg-type]  # both are int
    yield output.one_line(f"{report.where}: {counted}")
    if report.problems:
        yield from ("", *reports.problem_lines(report, screen))
    yield from ("", *_weight_lines(scan.weights, screen), "")
    counts = [output.plural(count, severity) for severity in SEVERITIES if (count := report.count(severity))]
    if counts:
        yield f"found {', '.join(counts)}"
    else:
        yield from output.wrap("found nothing of what scan looks for, which proves nothing about the rest", screen)


def _weight_lines(weights: Weights, screen: int | None) -> Iterator[str]:
    if weights.missing:
        yield from output.wrap(f"no numbers of weights: {weights.missing}", screen, indent=2)
        return
    columns = (
        Column("MODULES"), Column("COUNT", right=True),
        Column("NORM", right=True), Column("PCT", right=True),
        Column("TOP", right=True), Column("PCT", right=True),
        Column("SHARE", right=True), Column("PCT", right=True),
        Column("N", right=True),
    )  # fmt: skip
    yield from output.table(columns, [_row(ranked) for ranked in weights.kinds[:_ROWS]], screen=screen)
    if len(weights.kinds) > _ROWS:
        yield output.remainder_line(len(weights.kinds) - _ROWS)
    # Three are enough to see the reason; --json has all.
    for name, reason in list(weights.left_out.items())[:3]:
        yield from output.wrap(f"without numbers: {name}: {reason}", screen, indent=2)
    among = f"{output.plural(weights.population, 'other adapter')} of {weights.base or 'an unknown base'} in the registry"
    explained = (
        "NORM of the delta, TOP singular value, SHARE of the energy in that one; PCT: percentile among N adapters, of the "
        f"{among}. No verdict follows from them."
    )
    yield from output.wrap(explained, screen)


def _row(ranked: RankedSummary) -> list[str]:
    percentiles = ranked.percentiles
    ranks = (
        ["-"] * 3
        if percentiles is None
        else [f"{value:.0f}" for value in (percentiles.norm, percentiles.top, percentiles.share)]
    )
    numbers = [f"{ranked.spectrum.norm:.3g}", f"{ranked.spectrum.top:.3g}", f"{ranked.spectrum.share * _SHARE:.0f} %"]
    pairs = [cell for pair in zip(numbers, ranks, strict=True) for cell in pair]
    return [output.cut(ranked.name, 30), str(ranked.modules), *pairs, str(ranked.n)]
