"""`adapterhub formats`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.options import Settings, command

if TYPE_CHECKING:
    from adapterhub_converters.formats.probe import Row

_MARKS = {"bytes": "=", "function": "~", "no": "-"}


@command(
    "formats",
    example="""
    adapterhub formats
    adapterhub formats --json""",
)
@click.pass_obj
def formats(settings: Settings) -> None:
    """List the formats that can be read and written, which of them need a base, and which round trips are exact.

    The tables are measured: a tiny adapter is converted in a temporary folder. In the second table a file of the row's format
    is converted to that of the column and back: = gives the same file byte for byte, ~ the same function in other numbers, -
    is not possible.
    """
    from adapterhub_converters.formats import probe

    rows = probe.tried()
    output.emit({"formats": [asdict(row) for row in rows]}, as_json=settings.as_json, text=lambda: _text(rows))


def _text(rows: list[Row]) -> None:
    columns = [output.Column(title) for title in ("FORMAT", "READ", "WRITTEN", "BASE")] + [output.Column("FILES", wrap=True)]
    cells = [
        [row.name, _word(yes=row.reads), _word(yes=row.writes), "to write it" if row.base else "", ", ".join(row.files)]
        for row in rows
    ]
    output.write_table(columns, cells)
    output.write()
    titles = ["FROM \\ AND BACK", *(row.name for row in rows)]
    marks = [[row.name, *(_MARKS[row.back[other.name]] if other is not row else "" for other in rows)] for row in rows]
    for line in output.table([output.Column(title) for title in titles], marks):
        output.write(line)


def _word(*, yes: bool) -> str:
    return "yes" if yes else "no"
