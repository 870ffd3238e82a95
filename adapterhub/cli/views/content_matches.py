"""The versions that contain a file or its tensors, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.registry.content_search import ContentMatches


def write_matches(results: Sequence[ContentMatches]) -> None:
    """Print a row for each version that contains a file or some of its tensors."""
    columns = [Column("REF"), Column("TAGS", drop=2), Column("FILE", drop=1)]
    if any(result.shares for result in results):
        columns.append(Column("TENSORS"))
    several = len(results) > 1
    if several:
        columns.insert(0, Column("SOURCE"))
    cells = []
    for result in results:
        for row, place, share in _holder_rows(result):
            cells.append([*([result.source] if several else []), str(row.ref), ", ".join(row.tags) or "-", place, share])
    output.write_table(columns, [row[: len(columns)] for row in cells])
    for result in results:
        if not result.holders:
            suffix = " as a whole" if result.shares else ""
            output.say(output.one_line(f"{result.source}: no version contains it{suffix}"))


def _holder_rows(result: ContentMatches) -> list[tuple[Any, str, str]]:
    """Return the row, the place and the share of each version that has the file."""
    whole_rows = [
        (holder.row, ": ".join(filter(None, (holder.path, holder.tensor))) or "(the whole adapter)", "all")
        for holder in result.holders
    ]
    return whole_rows + [(share.row, share.path, f"{share.count} of {result.tensors}") for share in result.shares]
