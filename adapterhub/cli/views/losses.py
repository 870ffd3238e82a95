"""What became of every tensor in a conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adapterhub.cli import output

if TYPE_CHECKING:
    from adapterhub_converters.adapter import Kept, LossReport


_SHOWN = 5  # tensors of one loss that the text names


def loss_document(report: LossReport) -> dict[str, object]:
    """A loss report with stable keys."""
    return {
        "worst": report.worst.name.lower(),
        "summary": report.summary,
        "tensors": [
            {"name": line.name, "loss": line.loss.name.lower(), "note": line.note, "error": line.error} for line in report.kept
        ],
        "notes": list(report.notes),
    }


# The losses in the words of a sentence.
_WORDS = {"rewritten": "exact in another form"}


def loss_line(report: LossReport) -> str:
    """`420 tensors: 418 exact, 2 rounded`."""
    parts = ", ".join(f"{count} {_WORDS.get(name, name)}" for name, count in report.summary.items() if count)
    return f"{output.plural(len(report.kept), 'tensor')}: {parts}"


def write_losses(report: LossReport, write: Callable[[str], None], *, verbose: bool = False) -> None:
    """A line for each way in which tensors are not exact, with some of their names (all, each on its own line, if
    `verbose`), and the notes."""
    if verbose:
        for line in report.kept:
            loss = _WORDS.get(line.loss.name.lower(), line.loss.name.lower())
            error = "" if line.error is None else f" (error {line.error:.3g})"
            write(output.one_line(f"  {loss}: {line.name}" + (f": {line.note}{error}" if line.note else error)))
    else:
        _write_groups(report, write)
    for note in report.notes:
        write(output.one_line(f"  note: {note}"))


def _write_groups(report: LossReport, write: Callable[[str], None]) -> None:
    groups: dict[tuple[str, str], list[Kept]] = {}
    for line in report.kept:
        if line.loss > 0:
            groups.setdefault((line.loss.name.lower(), line.note), []).append(line)
    for (loss, note), lines in groups.items():
        names = [line.name for line in lines]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        text = f"  {_WORDS.get(loss, loss)}: {', '.join(names[:_SHOWN])}{more}" + (f": {note}" if note else "")
        errors = [line.error for line in lines if line.error is not None]
        if loss == "approximated" and errors:
            text += f"; relative error {min(errors):.3g} to {max(errors):.3g}"
        write(output.one_line(text))
