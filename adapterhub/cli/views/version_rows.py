"""Versions as rows of tables and as JSON documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.index.queries import VersionRow
    from adapterhub.registry.registry import Version


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
    output.write_table((*_COLUMNS, last), [[*_cells(row, _reason(row, deprecated)), cell(row)] for row in rows])


def _reason(row: VersionRow, deprecated: _Deprecations) -> str | None:
    """Return why a version is deprecated; None if it is not. A name may be deprecated as a whole, under the number 0."""
    return deprecated.get((row.name, row.number), deprecated.get((row.name, 0)))


def version_document(version: Version) -> dict[str, Any]:
    """Return the document of a pushed version; other commands remove `new` and `skipped`."""
    return {
        "ref": str(version.ref),
        "name": version.name,
        "number": version.number,
        "tags": list(version.tags),
        "deprecated": version.deprecated,
        "digest": version.digest,
        "size": version.size,
        "new": version.new,
        "skipped": list(version.skipped),
    }


def _cells(row: VersionRow, reason: str | None) -> list[str]:
    marks = [*row.tags, *(["(deprecated)"] if reason is not None else [])]
    return [
        str(row.ref),
        ", ".join(marks) or "-",
        (row.base or "-").rpartition("/")[2],
        row.method or "-",
        row.rank or "-",
        output.size(row.size) if row.size is not None else "-",
    ]


def row_document(row: VersionRow, deprecated: _Deprecations) -> dict[str, Any]:
    """Return the document of a version in a list."""
    return {
        "ref": str(row.ref),
        "name": row.name,
        "number": row.number,
        "tags": list(row.tags),
        "deprecated": _reason(row, deprecated),
        "digest": row.digest,
        "size": row.size,
        "time": row.time,
        "base": row.base,
        "revision": row.revision,
        "method": row.method,
        "r": row.r,
        "least_r": row.least_r,
        "alpha": row.alpha,
        "format": row.format,
        "dtype": row.dtype,
        "parameters": row.parameters,
        "license": row.license,
        "description": row.description,
        "parents": list(row.parents),
    }
