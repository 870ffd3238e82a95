"""Versions as rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from adapterhub.cli import output
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.index.queries import VersionRow


_COLUMNS = (
    Column("REF"),
    Column("TAGS", drop=2),
    Column("BASE", drop=4),
    Column("METHOD", drop=7),
    Column("R", right=True, drop=6),
    Column("SIZE", right=True, drop=5),
)
_Deprecations = Mapping[tuple[str, int], str]
"""The type of the result of `Registry.deprecations`."""


def write_rows(rows: Sequence[VersionRow], last: Column, cell: Callable[[VersionRow], str], deprecated: _Deprecations) -> None:
    """Print a table of versions: ref, tags, base, method, rank, size, and one more column."""
    from adapterhub.remotes.version_documents import reason_of

    output.write_table((*_COLUMNS, last), [[*_cells(row, reason_of(row, deprecated)), cell(row)] for row in rows])


def _cells(row: VersionRow, reason: str | None) -> list[str]:
    states = {"(withdrawn)": row.withdrawn, "(deprecated)": reason}
    marks = [*row.tags, *(state for state, why in states.items() if why is not None)]
    return [
        str(row.ref),
        ", ".join(marks) or "-",
        (row.base or "-").rpartition("/")[2],
        row.method or "-",
        row.rank or "-",
        output.size(row.size) if row.size is not None else "-",
    ]
