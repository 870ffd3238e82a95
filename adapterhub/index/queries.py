"""Queries of registry.db for lists, refs and maintenance. Searches are in `version_search` and `tensor_search`."""

from __future__ import annotations

import bisect
import heapq
import json
from collections.abc import Collection, Sequence
from typing import Any

from adapterhub.digest import Digest
from adapterhub.manifest.document import rank_text
from adapterhub.ref import Ref, is_name
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub.store.oci_index import Line
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from . import version_extract
from .index_database import Index, broken_index_error

UNINDEXED = "unindexed"
"""Kind of mark for a version that is not indexed because its documents could not be read; its value is the reason."""
_MAX_DIGITS = 9  # of a version number
# Kinds of the columns of `names`, and of a version with its parents, its tags and why it was withdrawn.
_NAME = "sisii"
_ROW = "sisis" + "".join({int: "I", str: "S", float: "F"}[kind] for kind in version_extract.COLUMNS.values()) + "sSS"


@dataclass(frozen=True, slots=True)
class LogState:
    """The state of a name's log: its last entry, that entry's digest, the last version number, and whether it is deleted."""

    name: str
    seq: int = 0
    head: Digest = ""
    number: int = 0
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One version as lists show it; a field is None if adapter.json lacks it.

    Attributes:
        size: Bytes of its files.
        r: The largest rank of any module; `least_r` is the smallest.
        parents: Refs of the adapters it was made from; digests where no ref was recorded.
        withdrawn: Why it was withdrawn; None if it was not.
    """

    name: str
    number: int
    digest: Digest
    manifest_size: int
    time: str
    size: int | None
    base: str | None
    revision: str | None
    method: str | None
    r: int | None
    least_r: int | None
    alpha: float | None
    format: str | None
    dtype: str | None
    parameters: int | None
    license: str | None
    description: str | None
    parents: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    withdrawn: str | None = None

    @property
    def ref(self) -> Ref:
        """The name with the version number."""
        return Ref(self.name, number=self.number)

    @property
    def rank(self) -> str:
        """The rank as text: `16`, or `4 to 16` where ranks differ; empty without one."""
        return rank_text(self.least_r, self.r)


# ---- names


def name(index: Index, name: str) -> LogState:
    """Return the state of a name when its log was last replayed; number 0 for an unknown name."""
    matches = index.select("SELECT name, seq, head, number, deleted FROM names WHERE name = ?", name, kinds=_NAME)
    return _name(matches[0]) if matches else LogState(name)


def names(index: Index, namespace: str = "") -> list[LogState]:
    """Return every name, including deleted ones, or those in a namespace, sorted."""
    condition, values = ("WHERE name > ? || '/' AND name < ? || '0'", (namespace,) * 2) if namespace else ("", ())
    sql = f"SELECT name, seq, head, number, deleted FROM names {condition} ORDER BY name"  # noqa: S608 - fixed text
    records = index.select(sql, *values, kinds=_NAME)
    for name, *_ in records:
        # Names become paths of logs: one from a hostile file must not lead elsewhere.
        if not is_name(name):
            raise broken_index_error(index.path, f"{name[:80]!r} is not a name")
    return [_name(row) for row in records]


def log_states_after(index: Index, last: str, limit: int) -> list[LogState]:
    """Return the first names after `last`, including deleted ones, sorted."""
    sql = "SELECT name, seq, head, number, deleted FROM names WHERE name > ? ORDER BY name LIMIT ?"
    return [_name(row) for row in index.select(sql, last, limit, kinds=_NAME) if is_name(row[0])]


def _name(row: Sequence[Any]) -> LogState:
    name, seq, head, number, deleted = row
    return LogState(name, seq, head, number, bool(deleted))


def tags(index: Index, name: str) -> dict[str, int]:
    """Return the tags of a name with the numbers they point to, sorted."""
    return dict(index.select("SELECT tag, number FROM tags WHERE name = ? ORDER BY tag", name, kinds="si"))


@of_one_snapshot
def tag_names(index: Index, name: str, last: str, most: int) -> list[str]:
    """Return the tags of a name and its numbers, `v3`, in the order of their letters: at most so many that come after `last`.

    No more rows are read than that, times the digits of a number.
    """
    sql = "SELECT tag FROM tags WHERE name = ? AND tag > ? ORDER BY tag LIMIT ?"
    names = {tag for (tag,) in index.select(sql, name, last, most, kinds="s")}
    sql = "SELECT number FROM versions WHERE name = ? AND number BETWEEN ? AND ? ORDER BY number LIMIT ?"
    for digits in range(1, _MAX_DIGITS + 1):
        # Numbers with as many digits come in the same order as their letters.
        numbers = range(10 ** (digits - 1), 10**digits)
        first = bisect.bisect_right(numbers, last, key=lambda number: f"v{number}")
        if first < len(numbers):
            names |= {f"v{number}" for (number,) in index.select(sql, name, numbers[first], numbers[-1], most, kinds="i")}
    return heapq.nsmallest(most, names)


@of_one_snapshot
def digests_by_tag(index: Index, name: str, limit: int = -1) -> dict[str, Digest]:
    """Return the tags of a name with their manifests: the first `limit`, and the numbers, `v3`, of as many newest versions.

    No limit by default. No row of a version is built, of which a name may have a hundred thousand.
    """
    sql = "SELECT tag, digest FROM tags JOIN versions USING (name, number) WHERE name = ? ORDER BY tag LIMIT ?"
    tagged = index.select(sql, name, limit, kinds="ss")
    sql = "SELECT number, digest FROM versions WHERE name = ? ORDER BY number DESC LIMIT ?"
    return {**{f"v{number}": digest for number, digest in index.select(sql, name, limit, kinds="is")}, **dict(tagged)}


def marks(index: Index, kind: str, name: str) -> dict[str, str]:
    """Return the settings of one kind of a name: key to value.

    Keys and values by kind: `protect`: tag to an empty string. `deprecate`: number, or 0 for the whole name, to the reason.
    `keep`: an empty string to the number of newest versions, and the seconds for which others stay too. `evaluate`: number
    and name to a measurement. `withdraw`: digest to the reason. `rollout`: digest and route to a state. UNINDEXED: number
    to the reason.
    """
    return dict(index.select("SELECT key, value FROM marks WHERE kind = ? AND name = ?", kind, name, kinds="ss"))


def deprecations(index: Index, names: Collection[str]) -> dict[tuple[str, int], str]:
    """Return the reason of each deprecation of some names by name and version number; number 0 means the whole name."""
    sql = (
        "SELECT m.name, CAST(m.key AS INTEGER), m.value FROM json_each(?) j"
        " CROSS JOIN marks m ON m.kind = 'deprecate' AND m.name = j.value"
    )
    return {(name, number): value for name, number, value in index.select(sql, json.dumps([*names]), kinds="sis")}


# ---- versions

# A name, or the names in a namespace as a range that the index on `name` answers: 0 is the character after the slash.
IN_NAMESPACE = "(name = ? OR (name > ? || '/' AND name < ? || '0'))"


def namespace_values(prefix: str) -> tuple[str, str, str]:
    """Return the values for IN_NAMESPACE: a name or namespace, three times."""
    return (prefix.rstrip("/"),) * 3


def versions(
    index: Index,
    *,
    name: str | None = None,
    number: int | None = None,
    prefix: str | None = None,
    digest: Digest | None = None,
    digest_prefix: str | None = None,
    parent: Digest | None = None,
    file: Digest | None = None,
) -> list[VersionRow]:
    """Return the versions that meet all conditions, sorted by name, newest first.

    Args:
        index: The index to search.
        name: Versions of this name.
        number: With this version number.
        prefix: Of this name or namespace.
        digest: With this manifest.
        digest_prefix: With a manifest whose digest begins like this.
        parent: Made from this manifest.
        file: With a file of this digest.
    """
    conditions = {
        "name = ?": (name,),
        "number = ?": (number,),
        IN_NAMESPACE: (None,) if prefix is None else namespace_values(prefix),
        "digest = ?": (digest,),
        # A subquery, so that the index on digests answers it, and not the one on names; `g` follows all digits.
        "id IN (SELECT id FROM versions WHERE digest >= ? AND digest < ? || 'g')": (digest_prefix, digest_prefix),
        "id IN (SELECT version FROM made_from WHERE parent = ?)": (parent,),
        "id IN (SELECT version FROM files WHERE digest = ?)": (file,),
    }
    used = {condition: values for condition, values in conditions.items() if values[0] is not None}
    return select(index, " AND ".join(used) or "1", *(value for values in used.values() for value in values))


def version_before(index: Index, name: str, number: int) -> VersionRow | None:
    """Return the version of a name with the greatest number below `number`; None if there is none."""
    sql = "name = ? AND number = (SELECT max(number) FROM versions WHERE name = ? AND number < ?)"
    return next(iter(select(index, sql, name, name, number)), None)


@of_one_snapshot
def versions_after(
    index: Index, prefix: str | None, after: Ref | None, limit: int, without: Collection[str] = ()
) -> list[VersionRow]:
    """Return at most `limit` versions of a name or namespace, or of all, that `versions` lists after the one of a ref.

    Args:
        index: The index.
        prefix: A name or a namespace; None for all.
        after: A name and a number; None for the beginning of the list.
        limit: The number of versions.
        without: Names to leave out.
    """
    conditions, values = [visible_condition(index, without)], list[object]()
    if prefix is not None:
        conditions.append(IN_NAMESPACE)
        values += namespace_values(prefix)
    if after is not None:
        conditions.append("(name > ? OR (name = ? AND number < ?))")
        values += (after.name, after.name, after.number)
    sql = f"SELECT id FROM versions v WHERE {' AND '.join(conditions)} ORDER BY name, number DESC LIMIT ?"  # noqa: S608 - ours
    return rows_by_id(index, [version for (version,) in index.select(sql, *values, limit, kinds="i")])


VersionKey = tuple[int, str, int]
"""The row of a version in the index, its name and its number. A rebuild or a removal may give the row to another version."""


def newest_added(index: Index) -> VersionKey:
    """Return the version that was added to the index last; one that cannot be without versions."""
    rows = index.select("SELECT id, name, number FROM versions ORDER BY id DESC LIMIT 1", kinds="isi")
    return rows[0] if rows else (0, "", 0)


def added_after(index: Index, version: VersionKey) -> list[VersionKey] | None:
    """Return the versions that were added to the index after one; None if that is not there any more."""
    rows = index.select("SELECT id, name, number FROM versions WHERE id >= ? ORDER BY id", version[0], kinds="isi")
    return rows[1:] if rows and rows[0] == version else None


def digests(index: Index, name: str) -> list[Digest]:
    """Return the digests of the manifests of a name's versions."""
    return [digest for (digest,) in index.select("SELECT digest FROM versions WHERE name = ?", name, kinds="s")]


def metrics(index: Index, digest: Digest) -> dict[str, float]:
    """Return what was measured of a manifest, in its training and under any of its names, by the names that a search uses."""
    sql = "SELECT m.name, value FROM metrics m JOIN versions v ON v.id = version WHERE digest = ? ORDER BY v.name, number"
    return {name: value for name, value in index.select(sql, digest, kinds="sF") if value is not None}


def measured_version(index: Index, digest: Digest, metric: str) -> tuple[str, int]:
    """Return the name and the number of the version whose value of a metric `metrics` has; a name that cannot be for none."""
    sql = "SELECT v.name, number FROM metrics m JOIN versions v ON v.id = version WHERE digest = ? AND m.name = ?"
    rows = index.select(f"{sql} AND value IS NOT NULL ORDER BY v.name DESC, number DESC LIMIT 1", digest, metric, kinds="si")
    return rows[0] if rows else ("", 0)


def has_blob(index: Index, name: str, digest: Digest) -> bool:
    """Return True if a version of a name has a file with this digest, or this manifest.

    The number of other names with the file makes no difference to the steps that this takes (sqlite.org/optoverview.html,
    "CROSS JOIN").
    """
    file_query = "SELECT 1 FROM versions v CROSS JOIN files f ON f.version = v.id WHERE v.name = ? AND f.digest = ?"
    sql = f"SELECT EXISTS (SELECT 1 FROM versions WHERE name = ? AND digest = ?) OR EXISTS ({file_query})"  # noqa: S608 - ours
    return bool(index.select(sql, name, digest, name, digest)[0][0])


def names_with(index: Index, file: Digest, without: Collection[str] = ()) -> list[str]:
    """Return the names that have a version with this file, except those in `without`, sorted."""
    names_query = "SELECT DISTINCT name FROM files f JOIN versions v ON v.id = f.version WHERE f.digest = ?"
    records = index.select(f"{names_query} AND {visible_condition(index, without)} ORDER BY name", file, kinds="s")
    return [name for (name,) in records]


@of_one_snapshot
def newest(index: Index, prefix: str, limit: int, without: Collection[str] = ()) -> list[VersionRow]:
    """Return the newest version of each name in a namespace, except the names in `without`, last pushed first."""
    newest = "(SELECT max(number) FROM versions n WHERE n.name = v.name)"
    last = f"SELECT id FROM versions v WHERE {IN_NAMESPACE} AND number = {newest}"  # noqa: S608
    records = index.select(
        f"{last} AND {visible_condition(index, without)} ORDER BY time DESC, name LIMIT ?",
        *namespace_values(prefix),
        limit,
        kinds="i",
    )
    return rows_by_id(index, [version for (version,) in records])


def visible_condition(index: Index, without: Collection[str]) -> str:
    """Return a condition that leaves names out of `versions v` in the statements that follow.

    It takes one step for each name that it is asked about, however many are left out. A list in SQL would be built when the
    first row needs it, and the time for that would reveal whether any hidden name matches.
    """
    index.left_out = frozenset(without)
    return "NOT left_out(v.name)"


@dataclass(frozen=True, slots=True)
class NamespaceTotals:
    """What a namespace has: names, versions, and bytes of their distinct files."""

    namespace: str
    names: int
    versions: int
    size: int


def namespace_totals(index: Index) -> list[NamespaceTotals]:
    """Return what each namespace has, the largest first."""
    space = "substr(name, 1, instr(name, '/') - 1)"
    counts = f"SELECT {space} AS space, count(DISTINCT name) AS names, count(*) AS n FROM versions GROUP BY space"  # noqa: S608
    sizes = (
        f"SELECT space, sum(size) AS size FROM (SELECT DISTINCT {space} AS space, f.digest, f.size"  # noqa: S608
        " FROM files f JOIN versions v ON v.id = f.version) GROUP BY space"
    )
    joined = f"({counts}) c LEFT JOIN ({sizes}) s USING (space)"
    sql = f"SELECT c.space, names, n, coalesce(s.size, 0) FROM {joined} ORDER BY 4 DESC, 1"  # noqa: S608
    return [NamespaceTotals(*row) for row in index.select(sql, kinds="siii")]


def similar(index: Index, row: VersionRow, columns: Sequence[str]) -> list[VersionRow]:
    """Return the versions of other names in the namespace of `row` that agree with it in some `columns` of `versions`."""
    space = row.name.partition("/")[0]
    same = "".join(f" AND {column} IS ?" for column in columns)
    condition = f"name > ? || '/' AND name < ? || '0' AND name <> ?{same}"
    return select(index, condition, space, space, row.name, *(getattr(row, column) for column in columns))


def select(index: Index, condition: str, *values: object) -> list[VersionRow]:
    """Return the versions that meet an SQL condition, sorted by name, newest first. Only for use in this package."""
    columns = ", ".join(("name", "number", "digest", "manifest_size", "time", *version_extract.COLUMNS, "parents"))
    tags = "(SELECT group_concat(tag) FROM tags t WHERE t.name = versions.name AND t.number = versions.number)"
    reason = "(SELECT value FROM marks m WHERE m.kind = 'withdraw' AND m.name = versions.name AND m.key = versions.digest)"
    sql = f"SELECT {columns}, {tags}, {reason} FROM versions WHERE {condition} ORDER BY name, number DESC"  # noqa: S608 - fixed text
    result = []
    for *fields, parents, joined, withdrawn in index.select(sql, *values, kinds=_ROW):
        # Most versions have no parents, and no tag contains a comma.
        made_from = _parents(index, parents) if parents != "[]" else ()
        fields += [made_from, tuple(sorted(joined.split(","))) if joined else (), withdrawn]
        result.append(VersionRow(*fields))
    return result


def push_entry_number(index: Index, row: VersionRow) -> int:
    """Return the number of the log entry that pushed a version; 0 if the version is gone."""
    records = index.select("SELECT seq FROM versions WHERE name = ? AND number = ?", row.name, row.number, kinds="i")
    return int(records[0][0]) if records else 0


@dataclass(frozen=True, slots=True)
class RegistryTotals:
    """What a registry has: names with versions, versions, and bytes of their distinct files."""

    names: int
    versions: int
    bytes: int


def registry_totals(index: Index) -> RegistryTotals:
    """Return what the whole registry has."""
    sql = (
        "SELECT (SELECT COUNT(DISTINCT name) FROM versions), (SELECT COUNT(*) FROM versions),"
        " (SELECT COALESCE(SUM(size), 0) FROM (SELECT DISTINCT digest, size FROM files))"
    )
    return RegistryTotals(*index.select(sql, kinds="iii")[0])


def files(index: Index, prefix: str) -> dict[Digest, int]:
    """Return the files of all versions of a name or a namespace: digest to bytes."""
    sql = f"SELECT DISTINCT files.digest, files.size FROM versions JOIN files ON version = versions.id WHERE {IN_NAMESPACE}"  # noqa: S608
    return dict(index.select(sql, *namespace_values(prefix), kinds="si"))


def sizes_of(index: Index, prefix: str, paths: Collection[str]) -> list[tuple[str, str, int]]:
    """Return the name, path and bytes of files with some paths, in lowercase, of each version of a name or a namespace."""
    sql = (
        f"SELECT name, files.path, files.size FROM versions JOIN files ON version = versions.id WHERE {IN_NAMESPACE}"  # noqa: S608
        f" AND lower(files.path) IN ({', '.join('?' * len(paths))})"
    )
    return index.select(sql, *namespace_values(prefix), *paths, kinds="ssi")


def _parents(index: Index, text: str) -> tuple[str, ...]:
    try:
        parents = json_file.parse(text, str(index.path))
    except FormatError:
        parents = None
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise broken_index_error(index.path, "the parents of a version cannot be read")
    return tuple(parents)


@of_one_snapshot
def rows_by_id(index: Index, ids: Sequence[int]) -> list[VersionRow]:
    """Return the versions with these ids, in this order. Only for use in this package."""
    # One parameter for all ids, as SQLite limits the number of parameters.
    ids_json = json.dumps(ids)
    pairs = index.select("SELECT id, name, number FROM versions WHERE id IN (SELECT value FROM json_each(?))", ids_json)
    keys = {version: (name, number) for version, name, number in pairs}
    if not keys.keys() >= set(ids):
        raise broken_index_error(index.path, "it refers to a version that it lacks")
    row_by_key = {(row.name, row.number): row for row in select(index, "id IN (SELECT value FROM json_each(?))", ids_json)}
    return [row_by_key[keys[version]] for version in ids]


def ref_lines(index: Index, name: str | None = None) -> list[Line]:
    """Return the lines of index.json, for one name or for all: by name, its versions by number, then its tags."""
    name_filter, values = ("", ()) if name is None else ("WHERE name = ?", (name,))
    numbers = f"SELECT name, number, 'v' || number, digest, manifest_size FROM versions {name_filter}"  # noqa: S608 - fixed text
    tags = f"SELECT name, NULL, tag, digest, manifest_size FROM tags JOIN versions USING (name, number) {name_filter}"  # noqa: S608
    records = index.select(f"{numbers} UNION ALL {tags} ORDER BY 1, 2 NULLS LAST, 3", *values, *values, kinds="sIssi")
    return [(f"{name}:{tag}", digest, size) for name, _, tag, digest, size in records]
