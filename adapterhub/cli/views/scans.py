"""The result of a scan: problems, shown as those of a check are, and numbers without a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adapterhub.checks import SEVERITIES
from adapterhub.cli import output
from adapterhub.cli.output import Column

from . import report_documents, reports

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
        "problems": report_documents.problems(report),
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
    contents = f"{output.plural(report.facts['files'], 'file')}, {output.size(report.facts['bytes'])}"  # type: ignore[arg-type]  # both are int
    yield output.one_line(f"{report.where}: {contents}")
    if report.problems:
        yield from ("", *reports.problem_lines(report, screen))
    yield from ("", *_weight_lines(scan.weights, screen), "")
    counts = [output.plural(count, severity) for severity in SEVERITIES if (count := report.count(severity))]
    if counts:
        yield f"found {', '.join(counts)}"
    else:
        nothing = "nothing found: no code, no hidden bytes, no misleading text"
        yield from output.wrap(f"{nothing}. What the model writes is not checked", screen)


def _weight_lines(weights: Weights, screen: int | None) -> Iterator[str]:
    if weights.missing:
        yield from output.wrap(f"no numbers of weights: {weights.missing}", screen, indent=2)
        return
    names = ("NORM", "PCT", "TOP", "PCT", "SHARE", "PCT", "N") if weights.population else ("NORM", "TOP", "SHARE")
    columns = (Column("MODULES"), Column("COUNT", right=True), *(Column(name, right=True) for name in names))
    rows = [_row(ranked, is_compared=bool(weights.population)) for ranked in weights.kinds[:_ROWS]]
    yield from output.table(columns, rows, screen=screen)
    if len(weights.kinds) > _ROWS:
        yield output.remainder_line(len(weights.kinds) - _ROWS)
    # Three are enough to see the reason; --json has all.
    for name, reason in list(weights.left_out.items())[:3]:
        yield from output.wrap(f"without numbers: {name}: {reason}", screen, indent=2)
    base = weights.base or "an unknown base"
    comparison = f"No other adapter of {base} is in the registry to compare with."
    if weights.population:
        among = f"{output.plural(weights.population, 'other adapter')} of {base} in the registry"
        comparison = f"PCT: percentile among N adapters, of the {among}."
    legend = "NORM of the delta, TOP singular value, SHARE of the energy in that one."
    yield from output.wrap(f"{legend} {comparison} No verdict follows from them.", screen)


def _row(ranked: RankedSummary, *, is_compared: bool) -> list[str]:
    percentiles = ranked.percentiles
    ranks = (
        ["-"] * 3
        if percentiles is None
        else [f"{value:.0f}" for value in (percentiles.norm, percentiles.top, percentiles.share)]
    )
    numbers = [f"{ranked.spectrum.norm:.3g}", f"{ranked.spectrum.top:.3g}", f"{ranked.spectrum.share * _SHARE:.0f} %"]
    cells = [*(cell for pair in zip(numbers, ranks, strict=True) for cell in pair), str(ranked.n)] if is_compared else numbers
    return [output.cut(ranked.name, 30), str(ranked.modules), *cells]
