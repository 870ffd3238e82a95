"""Versions, as tables and documents show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output

if TYPE_CHECKING:
    from adapterhub.index.queries import Row
    from adapterhub.registry.registry import Version


def version_document(version: Version) -> dict[str, Any]:
    """A version as a push gives it; others leave out what only a push can say."""
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


def row_cells(row: Row) -> list[str]:
    """What tables of versions show of each: ref, tags, base, method, rank, size."""
    return [
        str(row.ref),
        ", ".join(row.tags) or "-",
        (row.base or "-").rpartition("/")[2],
        row.method or "-",
        str(row.r) if row.r is not None else "-",
        output.size(row.size) if row.size is not None else "-",
    ]


def row_document(row: Row, deprecated: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    """A version as lists give it to programs; `deprecated` as `Registry.deprecations` says it."""
    return {
        "ref": str(row.ref),
        "name": row.name,
        "number": row.number,
        "tags": list(row.tags),
        "deprecated": deprecated.get((row.name, row.number), deprecated.get((row.name, 0))),
        "digest": row.digest,
        "size": row.size,
        "time": row.time,
        "base": row.base,
        "revision": row.revision,
        "method": row.method,
        "r": row.r,
        "alpha": row.alpha,
        "format": row.format,
        "dtype": row.dtype,
        "parameters": row.parameters,
        "license": row.license,
        "description": row.description,
        "parents": list(row.parents),
    }
