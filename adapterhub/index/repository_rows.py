"""A row for each repository that a hub has a record of (`registry.repository_records`): what lists must know of all at once.

A record says far more, and is read wherever its repository is shown; a million of them take minutes to read. `changed` grows
with each change of any row, so that whoever has read the rows looks only at those that changed since.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import NamedTuple

from adapterhub.digest import Digest
from adapterhub.ref import is_name
from adapterhub.store.store import HUB, Store
from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import RemoteError

from .index_database import Index

_RESTRICTED = "removed = 0 AND (private = 1 OR moved_from <> '')"


class RepositoryRow(NamedTuple):
    """What lists know of a repository.

    Attributes:
        private: Whether it is hidden from everybody without a role in its namespace.
        moved_from: The name it is being moved from; empty otherwise.
        removed: Whether it has no record any more.
    """

    name: str
    private: bool = False
    moved_from: str = ""
    removed: bool = False

    @property
    def is_restricted(self) -> bool:
        """Whether not everybody may see it, by its record."""
        return not self.removed and (self.private or bool(self.moved_from))


def row(index: Index, name: str) -> RepositoryRow | None:
    """Return the row of a repository; None if there was never one."""
    rows = _select(index, "name = ?", name)
    return rows[0] if rows else None


def write(index: Index, new_row: RepositoryRow) -> None:
    """Write a row, if it is not as it is; call this in a transaction."""
    if row(index, new_row.name) != new_row:
        sql = (
            "INSERT INTO repositories (name, private, moved_from, removed, changed)"
            " VALUES (?, ?, ?, ?, (SELECT coalesce(max(changed), 0) + 1 FROM repositories)) ON CONFLICT (name) DO UPDATE SET"
            " private = excluded.private, moved_from = excluded.moved_from, removed = excluded.removed,"
            " changed = excluded.changed"
        )
        index.execute(sql, new_row.name, int(new_row.private), new_row.moved_from, int(new_row.removed))


def catch_up(index: Index, store: Store, name: str) -> None:
    """Bring the row of a repository up to its log; call this in a transaction.

    Raises:
        AdapterhubError: Its last entry cannot be read.
    """
    files = [path for path in store.log.files_after(name, 0, log=HUB) if path.suffix == ".json"]
    if files and (logged := store.log.entry(name, int(files[-1].stem), log=HUB)):
        entry = logged[0]
        write(index, RepositoryRow(name, removed=True) if entry.op == "delete" else _read(store, name, entry.digest))


def _read(store: Store, name: str, digest: Digest) -> RepositoryRow:
    """Return what a document says; one that cannot be read is hidden from everybody without a role."""
    try:
        document = parse_object(store.read_document(digest).decode("utf-8", "replace"), name)
        return RepositoryRow(name, document.get("private") is not False, str(document.get("moved_from", "")))
    except RemoteError:
        raise
    except Exception:  # noqa: BLE001 - whatever a document that was never checked may raise
        return RepositoryRow(name, private=True)


def last_change(index: Index) -> int:
    """Return the greatest `changed` of any row."""
    ((change,),) = index.select("SELECT coalesce(max(changed), 0) FROM repositories", kinds="i")
    return int(change)


def changed_after(index: Index, change: int) -> list[RepositoryRow]:
    """Return the rows that changed after one did."""
    return _select(index, "changed > ?", change)


def restricted(index: Index) -> list[RepositoryRow]:
    """Return the repositories that not everybody may see."""
    return _select(index, _RESTRICTED)


def restricted_among(index: Index, names: Collection[str]) -> list[RepositoryRow]:
    """Return those of some names that not everybody may see."""
    among = "name IN (SELECT value FROM json_each(?)) AND "
    return _select(index, among + _RESTRICTED, json.dumps([*names]))


def names_after(index: Index, last: str, limit: int, without: Collection[str]) -> list[str]:
    """Return the first repositories after a name, except those in `without`, sorted."""
    index.left_out = frozenset(without)
    sql = "SELECT name FROM repositories WHERE name > ? AND removed = 0 AND NOT left_out(name) ORDER BY name LIMIT ?"
    return [name for (name,) in index.select(sql, last, limit, kinds="s") if is_name(name)]


def names_without_versions(index: Index) -> list[str]:
    """Return the repositories that have no version, sorted."""
    has_versions = "SELECT 1 FROM versions v WHERE v.name = r.name"
    sql = f"SELECT name FROM repositories r WHERE removed = 0 AND NOT EXISTS ({has_versions}) ORDER BY name"  # noqa: S608 - fixed
    return [name for (name,) in index.select(sql, kinds="s") if is_name(name)]


def namespaces(index: Index) -> set[str]:
    """Return the namespaces that have or had anything in them."""
    sql = (
        "SELECT DISTINCT substr(name, 1, instr(name, '/') - 1) FROM"
        " (SELECT name FROM names UNION ALL SELECT name FROM repositories)"
    )
    return {name for (name,) in index.select(sql, kinds="s")}


def _select(index: Index, condition: str, *values: object) -> list[RepositoryRow]:
    sql = f"SELECT name, private, moved_from, removed FROM repositories WHERE {condition}"  # noqa: S608 - our own conditions
    rows = index.select(sql, *values, kinds="sisi")
    return [RepositoryRow(name, bool(private), moved_from, bool(removed)) for name, private, moved_from, removed in rows]
