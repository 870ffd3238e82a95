"""The report of a merge into a base, or of a conversion of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output

from . import groups

if TYPE_CHECKING:
    from adapterhub.merging import ChangeEstimate, ModelMergeReport

_SHOWN = 5  # rows of the table

_INDENT = "  "

_DOUBT = 0.01  # a smaller uncertainty of the kept share is not shown


def document(report: ModelMergeReport) -> dict[str, Any]:
    """Return a merge report as JSON; the keys are stable."""
    return {
        "output": str(report.out) if report.out else None,
        "tensors": report.tensors,
        "size": report.size,
        "touched_size": report.touched_size,
        "touched": {
            name: {
                "relative": change.relative,
                "kept": change.retained,
                "doubt": change.uncertainty,
                "error_original": change.original,
                "error_as_trained": change.as_trained,
            }
            for name, change in report.touched.items()
        },
        "copied": list(report.copied),
        "skipped": dict(report.skipped),
        "notes": list(report.notes),
        "warnings": list(report.warnings),
    }


def text(report: ModelMergeReport) -> None:
    """Print a merge report."""
    label = str(report.out) if report.out else "nothing written"
    output.write(
        f"{label}: {output.plural(report.tensors, 'tensor')}, {output.size(report.size)}"
        + (f"; {len(report.touched)} changed, {output.size(report.touched_size)}" if report.touched else "")
    )
    changes = {name: change for name, change in report.touched.items() if change.relative is not None}
    if changes:
        largest = max(change.relative or 0.0 for change in changes.values())
        least_kept = min(change.retained for change in changes.values() if change.retained is not None)
        advice = (
            "; all of it with --dtype f32"
            if any(change.is_lost and not change.quantized for change in changes.values())
            else ""
        )
        _write(f"  largest change {largest:.2%} of a weight's norm; at least {least_kept:.1%} of it survived rounding{advice}")
    errors = [(change.original, change.as_trained) for change in changes.values() if change.original is not None]
    if errors:
        original, trained = (max(error[column] or 0.0 for error in errors) for column in (0, 1))
        _write(
            f"  trained on a base in 4 bits: on the original weights its effect is off by up to {original:.2%}, with "
            f"--onto as-trained by up to {trained:.2%}"
        )
    # The table helps to decide, before a merge and where there is a choice of --onto.
    if report.out is None or any(change.original is not None for change in changes.values()):
        for line in _worst(changes):
            output.write(_INDENT + line)
    for line in groups.lines((groups.Item("left out:", *item) for item in report.skipped.items()), output.width(), indent=2):
        output.write(line)
    for note in report.notes:
        _write(f"  note: {note}")


def _write(line: str) -> None:
    for part in output.wrap(output.one_line(line), output.width(), indent=4):
        output.write(part)


def _worst(changes: Mapping[str, ChangeEstimate]) -> list[str]:
    """Return the table of the modules that lost most to rounding."""
    worst = sorted(changes.items(), key=lambda item: item[1].retained or 0.0)[:_SHOWN]
    has_errors = any(change.original is not None for _, change in worst)
    columns = [output.Column("LEAST KEPT"), output.Column("CHANGE", right=True, drop=1), output.Column("KEPT", right=True)]
    if has_errors:
        columns += [output.Column("ERROR ORIGINAL", right=True, drop=2), output.Column("AS TRAINED", right=True, drop=3)]
    rows = []
    for name, change in worst:
        doubt = f" ± {change.uncertainty:.0%}" if change.uncertainty > _DOUBT else ""
        row = [name, f"{change.relative:.2%}", f"{change.retained:.1%}{doubt}"]
        if has_errors:
            row += [f"{change.original:.2%}", f"{change.as_trained:.2%}"]
        rows.append(row)
    screen = output.width()
    return output.table(columns, rows, screen=screen and screen - len(_INDENT))
