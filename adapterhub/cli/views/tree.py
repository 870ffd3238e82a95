"""A registry as a tree: namespaces, names, versions and their parents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.manifest.package_files import shortened

from .versions import row_document

if TYPE_CHECKING:
    from adapterhub.index.queries import Row

MOST = 10  # versions of a name, parents of a version, on a terminal; a pipe gets all


def document(rows: Sequence[Row], deprecated: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    """The tree as a document; `rows` by name, newest first."""
    return {
        "namespaces": [
            {
                "namespace": space,
                "names": [
                    {"name": name, "versions": [row_document(row, deprecated) for row in versions]} for name, versions in names
                ],
            }
            for space, names in _grouped(rows)
        ]
    }


def lines(rows: Sequence[Row], holding: Callable[[str], Sequence[Row]], *, screen: int | None) -> Iterator[str]:
    """Lines of the tree within `screen` columns; None for no limit, and all versions.

    `holding` returns the versions with a digest, for parents that are not among `rows`.
    """
    refs: dict[str, list[str]] = {}
    for row in rows:
        refs.setdefault(row.digest, []).append(str(row.ref))
    for parent in {parent for row in rows for parent in row.parents if parent.startswith("sha256:")} - refs.keys():
        refs[parent] = [str(row.ref) for row in holding(parent)]
    for space, names in _grouped(rows):
        yield output.cut(f"{space}/  {output.plural(len(names), 'name')}", screen)
        for name, versions in names:
            yield output.cut(f"  {name.partition('/')[2]}  {output.plural(len(versions), 'version')}", screen)
            yield from (output.cut(f"    {line}", screen) for line in _versions(versions, refs, screen))


def _grouped(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, list[Row]]]]]:
    by_name = [(name, list(versions)) for name, versions in groupby(rows, lambda row: row.name)]
    return [(space, list(names)) for space, names in groupby(by_name, lambda item: item[0].partition("/")[0])]


def _versions(rows: Sequence[Row], refs: Mapping[str, Sequence[str]], screen: int | None) -> Iterator[str]:
    # A version with a tag is shown, however old.
    shown = [row for n, row in enumerate(rows) if screen is None or n < MOST or row.tags]
    wide = max(len(str(row.number)) for row in shown) + 1
    for row in shown:
        facts = [
            ", ".join(row.tags),
            (row.base or "").rpartition("/")[2],
            row.method if row.method != "lora" else "",
            f"r {row.r}" if row.r is not None else "",
            output.size(row.size) if row.size is not None else "",
            row.time[:10],
        ]
        yield "  ".join(filter(None, [f"v{row.number}".ljust(wide), *facts]))
        if row.parents:
            yield f"  from {_parents(row.parents, refs, screen)}"
    if len(shown) < len(rows):
        yield f"… {output.plural(len(rows) - len(shown), 'older version')}"


def _parents(parents: Sequence[str], refs: Mapping[str, Sequence[str]], screen: int | None) -> str:
    """The refs of the parents; of one that several names have, as which of them it was used is not known, all of them."""
    shown = [_known_as(refs.get(parent, ())) or output.digest(parent) for parent in parents]
    more = len(shown) - MOST if screen is not None else 0
    return ", ".join(shown if more <= 0 else [*shown[:MOST], f"{more} more"])


def _known_as(refs: Sequence[str]) -> str:
    return refs[0] + (f" (also {shortened(refs[1:], MOST)})" if refs[1:] else "") if refs else ""
