"""The loss report of a conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.manifest.package_files import shorten_names

from . import groups

if TYPE_CHECKING:
    from adapterhub_converters.adapter import LossReport, TensorLoss

# Words for losses whose names are not clear in a sentence.
_WORDS = {"rewritten": "exact in another form"}


def document(report: LossReport) -> dict[str, Any]:
    """Return a loss report as JSON; the keys are stable."""
    return {
        "worst": report.worst.name.lower(),
        "summary": report.summary,
        "tensors": [
            {"name": line.name, "loss": line.loss.name.lower(), "note": line.note, "error": line.error}
            for line in report.losses
        ],
        "notes": grouped_notes(report),
    }


def summary(report: LossReport) -> str:
    """Return a summary such as `420 tensors: 418 exact, 2 rounded`."""
    counts = ", ".join(f"{count} {_WORDS.get(name, name)}" for name, count in report.summary.items() if count)
    return f"{output.plural(len(report.losses), 'tensor')}: {counts}"


def write(report: LossReport, write: Callable[[str], None], *, verbose: bool = False) -> None:
    """Write a line for each loss and its reason, or for each tensor if `verbose`, and the notes."""
    if verbose:
        for line in report.losses:
            note = f": {line.note}" if line.note else ""
            write(output.one_line(f"  {_loss(line)}: {line.name}{note}{_error(line)}"))
    else:
        lossy = [line for line in report.losses if line.loss > 0]
        for text in groups.lines((groups.Item(f"{_loss(line)}:", line.name, _detail(line)) for line in lossy), None, indent=2):
            write(text)
    for note in grouped_notes(report):
        write(output.one_line(f"  note: {note}"))


def grouped_notes(report: LossReport) -> list[str]:
    """Return the notes, those that say the same of several modules as one."""
    modules: dict[str, list[str]] = {}
    for note in report.notes:
        module, colon, message = note.partition(": ")
        is_named = bool(colon) and " " not in module
        modules.setdefault(message if is_named else note, []).extend([module] if is_named else [])
    return [f"{shorten_names(names, 3)}: {message}" if names else message for message, names in modules.items()]


def _loss(line: TensorLoss) -> str:
    name = line.loss.name.lower()
    return _WORDS.get(name, name)


def _detail(line: TensorLoss) -> str:
    return line.note + _error(line) if _loss(line) == "approximated" else line.note


def _error(line: TensorLoss) -> str:
    return "" if line.error is None else f" (relative error {line.error:.3g})"
