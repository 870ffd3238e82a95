"""The report of `pack` and `pack --undo`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from adapterhub.cli import output
from adapterhub.cli.options import Settings
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.maintenance.compress import PackingOutcome

_CHANGES = (Column("REF"), Column("FILE"), Column("SIZE", right=True), Column("STORED", right=True), Column("AS", drop=1))

_SHORT = 12 + len("sha256:")


def show(settings: Settings, changes: Sequence[PackingOutcome], summary: Callable[[], str], **extra: object) -> None:
    """Print the changed files and a summary, or a document of them that also has the keys of `extra`."""
    document = {
        "files": [dataclasses.asdict(change) for change in changes],
        "size": sum(change.size for change in changes),
        "stored": sum(change.stored for change in changes),
        **extra,
    }

    def text() -> None:
        changed = [change for change in changes if change.outcome in ("packed", "unpacked")]
        if changed:
            cells = [
                [change.ref, change.path, output.size(change.size), _stored_size(change), _storage_kind(change)]
                for change in changed
            ]
            output.write_table(_CHANGES, cells)
        output.write(summary())

    output.emit(document, as_json=settings.as_json, text=text)


def _stored_size(change: PackingOutcome) -> str:
    return f"{output.size(change.stored)} ({change.stored / change.size:.0%})" if change.size else output.size(change.stored)


def _storage_kind(change: PackingOutcome) -> str:
    if change.outcome == "unpacked":
        return "plain"
    return f"difference to {change.parent[:_SHORT]}" if change.parent else "alone"
