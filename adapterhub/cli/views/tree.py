"""A registry as a tree: namespaces, names, versions and their parents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.manifest.package_files import shorten_names

if TYPE_CHECKING:
    from adapterhub.index.queries import VersionRow

MAX_SHOWN = 10  # the most versions of a name and parents of a version on a terminal; a pipe gets all


def document(rows: Sequence[VersionRow], deprecated: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    """Return the tree as JSON; `rows` are sorted by name, newest first."""
    from adapterhub.remotes.version_documents import row_document

    return {
        "namespaces": [
            {
                "namespace": space,
                "names": [
                    {"name": name, "versions": [row_document(row, deprecated) for row in versions]} for name, versions in names
                ],
            }
            for space, names in _group_by_namespace(rows)
        ]
    }


def lines(rows: Sequence[VersionRow], holding: Callable[[str], Sequence[VersionRow]], *, screen: int | None) -> Iterator[str]:
    """Yield the lines of the tree within `screen` columns; None for no limit, and all versions.

    `holding` returns the versions with a digest, for parents that are not among `rows`.
    """
    refs: dict[str, list[str]] = {}
    for row in rows:
        refs.setdefault(row.digest, []).append(str(row.ref))
    # Only parents outside of `rows` are looked up, because each costs a query.
    for parent in {parent for row in rows for parent in row.parents if parent.startswith("sha256:")} - refs.keys():
        refs[parent] = [str(row.ref) for row in holding(parent)]
    for space, names in _group_by_namespace(rows):
        yield output.cut(f"{space}/  {output.plural(len(names), 'name')}", screen)
        for name, versions in names:
            yield output.cut(f"  {name.partition('/')[2]}  {output.plural(len(versions), 'version')}", screen)
            yield from (output.cut(f"    {line}", screen) for line in _versions(versions, refs, screen))


def _group_by_namespace(rows: Sequence[VersionRow]) -> list[tuple[str, list[tuple[str, list[VersionRow]]]]]:
    by_name = [(name, list(versions)) for name, versions in groupby(rows, lambda row: row.name)]
    return [(space, list(names)) for space, names in groupby(by_name, lambda item: item[0].partition("/")[0])]


def _versions(rows: Sequence[VersionRow], refs: Mapping[str, Sequence[str]], screen: int | None) -> Iterator[str]:
    # A version with a tag is shown even if it is old: somebody uses it by that name.
    visible = [row for n, row in enumerate(rows) if screen is None or n < MAX_SHOWN or row.tags]
    number_width = max(len(str(row.number)) for row in visible) + 1
    for row in visible:
        facts = [
            ", ".join([*row.tags, *(["(withdrawn)"] if row.withdrawn is not None else [])]),
            (row.base or "").rpartition("/")[2],
            row.method if row.method != "lora" else "",
            f"r {row.rank}" if row.rank else "",
            output.size(row.size) if row.size is not None else "",
            row.time[:10],
        ]
        yield "  ".join(filter(None, [f"v{row.number}".ljust(number_width), *facts]))
        if row.parents:
            yield f"  from {_parents(row.parents, refs, screen)}"
    if len(visible) < len(rows):
        yield f"… {output.plural(len(rows) - len(visible), 'older version')}"


def _parents(parents: Sequence[str], refs: Mapping[str, Sequence[str]], screen: int | None) -> str:
    """Return the refs of the parents. A parent may have several names; all are shown, as the one used is not recorded."""
    labels = [_known_as(refs.get(parent, ())) or output.digest(parent) for parent in parents]
    hidden_count = len(labels) - MAX_SHOWN if screen is not None else 0
    return ", ".join(labels if hidden_count <= 0 else [*labels[:MAX_SHOWN], f"{hidden_count} more"])


def _known_as(refs: Sequence[str]) -> str:
    return refs[0] + (f" (also {shorten_names(refs[1:], MAX_SHOWN)})" if refs[1:] else "") if refs else ""
