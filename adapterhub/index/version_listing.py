# ruff: noqa: S608 - what is put into a statement here is fixed, checked by `require_allowed`, or a `?`
"""Pages of the newest version of every name, by the time of its or the first push, at a cost that depends on the page alone.

A page begins after a position, the time and name of the last version of the page before: an index leads there, however far it
is. Versions that the conditions leave out are read and skipped, so a page also ends after SCANNED versions, with fewer results
or none, and says where the next one begins. If few versions meet a condition, these are looked up instead.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import field

from adapterhub.manifest.measurement import REPORTED
from adapterhub.ref import is_name
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .index_database import Index
from .queries import VersionRow, rows_by_id, visible_condition
from .version_search import (
    COLUMNS,
    IN_NAMESPACE,
    NEWEST,
    Bounds,
    Statement,
    bounds_condition,
    few_candidates,
    phrases,
    require_allowed,
    storable,
    words_condition,
)

SCANNED = 2_000
"""The most versions that a page reads."""
_SCANNED_FOR_WORDS = 500  # the most versions that a page compares with words which many versions contain

_PROBED = 100  # the most versions that are read to find one that has a value and is not hidden

_FIRST = "NOT EXISTS (SELECT 1 FROM versions e WHERE e.name = k.name AND e.number < k.number)"  # of its name
_AMONG = f"SELECT v.id FROM json_each(?) j CROSS JOIN versions v ON v.name = j.value WHERE {NEWEST}"


@dataclass(frozen=True, slots=True)
class Position:
    """The last version that a page read: the time that lists are sorted by, and its name."""

    time: str
    name: str

    def __str__(self) -> str:
        return f"{self.time} {self.name}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Parse the text of a position; UsageError for any other text."""
        time, _, name = text.partition(" ")
        if not 0 < len(time) <= 40 or not time.isascii() or not is_name(name):
            raise UsageError("cursor", "is not from a page of this list", "Follow the link of the page before")
        return cls(time, name)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the listed versions must meet; every condition must hold.

    Attributes:
        words: As typed; all of them must begin words of the version's texts.
        facets: Kinds of facets, of which one must have a value, and the value, ignoring case.
        namespace: The namespace of the name; empty for all.
        bounds: Columns of `version_search.COLUMNS` and the bounds of their numbers.
        metrics: Names of metrics and the bounds of their values.
        among: Names of which the version's must be one; None for any.
        without: Names to leave out.
    """

    words: str = ""
    facets: tuple[tuple[tuple[str, ...], str], ...] = ()
    namespace: str = ""
    bounds: tuple[tuple[str, Bounds], ...] = ()
    metrics: tuple[tuple[str, Bounds], ...] = ()
    among: tuple[str, ...] | None = None
    without: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Page:
    """Versions with the position of each by name, and the position after which there may be more; None at the end."""

    rows: list[VersionRow]
    end: Position | None
    positions: Mapping[str, Position] = field(default_factory=dict)


_Match = tuple[int, str, str]  # id, time and name of a version


@of_one_snapshot
def page(
    index: Index,
    wanted: Conditions,
    *,
    after: Position | None = None,
    limit: int = 100,
    oldest_first: bool = False,
    by_creation: bool = False,
) -> Page:
    """Return the newest version of each name that meets the conditions, the last push first.

    Args:
        index: The index.
        wanted: The conditions.
        after: Where the page before ended.
        limit: The most versions of the page.
        oldest_first: Return the first push first.
        by_creation: Sort by the first push of each name, and not by the last.
    """
    words = phrases(wanted.words)
    # Hidden names are left out first: neither where a page ends nor how it is found may depend on them.
    visible = visible_condition(index, wanted.without)
    key = "k" if by_creation else "v"  # the version by whose time a name is sorted; `v` is the one that is listed
    keyset, position = "1", []
    if after:
        keyset, position = f"({key}.time, {key}.name) {'>' if oldest_first else '<'} (?, ?)", [after.time, after.name]
    order = f"ORDER BY {key}.time, {key}.name" if oldest_first else f"ORDER BY {key}.time DESC, {key}.name DESC"
    listed = f"{keyset} AND {NEWEST} AND {visible}" + (f" AND {_FIRST}" if by_creation else "")
    conditions, values = _conditions(wanted)
    candidates = few_candidates(index, _statements(wanted, words), visible)
    end = None
    if candidates:
        source = f"({candidates[0]}) c CROSS JOIN versions v ON v.id = c.id"
        if words:
            conditions += f" AND {words_condition(wanted.words)}"
            values.append(words)
        source += " CROSS JOIN versions k ON k.name = v.name" if by_creation else ""
        sql = f"SELECT v.id, {key}.time, v.name FROM {source} WHERE {listed} AND {conditions} {order} LIMIT ?"
        matches = index.select(sql, *candidates[1], *position, *values, limit + 1, kinds="iss")
    else:
        most = _SCANNED_FOR_WORDS if words else SCANNED
        source = "versions k CROSS JOIN versions v ON v.name = k.name" if by_creation else "versions v"
        columns = f"v.id AS id, {key}.time AS time, v.name AS name, v.r AS r, v.size AS size, v.parameters AS parameters"
        scanned = f"SELECT {columns} FROM {source} WHERE {listed} {order} LIMIT {most}"
        # Without an order of its own, the outer statement takes the rows as the inner one walks the index, and stops in time.
        sql = f"SELECT v.id, v.time, v.name FROM ({scanned}) v WHERE {conditions} LIMIT ?"
        matches = index.select(sql, *position, *values, most if words else limit + 1, kinds="iss")
        if words:
            matches = _with_words(index, matches, words)
        if len(matches) <= limit:
            last = index.select(f"SELECT time, name FROM ({scanned}) LIMIT 1 OFFSET {most - 1}", *position, kinds="ss")
            end = Position(*last[0]) if last else None
    if len(matches) > limit:
        matches = matches[:limit]
        end = Position(*matches[-1][1:])
    rows = rows_by_id(index, [version for version, _, _ in matches])
    return Page(rows, end, {name: Position(time, name) for _, time, name in matches})


def first_times(index: Index, names: Collection[str]) -> dict[str, str]:
    """Return the time of the first push of each of a page of names, as far as its version is still there."""
    sql = (
        "SELECT j.value, (SELECT time FROM versions v WHERE v.name = j.value ORDER BY number LIMIT 1) AS first"
        " FROM json_each(?) j WHERE first IS NOT NULL"
    )
    return dict(index.select(sql, json.dumps([*names]), kinds="ss"))


def facets(index: Index, rows: list[VersionRow]) -> dict[tuple[str, int], dict[str, list[str]]]:
    """Return the facets of versions: name and number to kind to values, sorted."""
    by_version: dict[tuple[str, int], dict[str, list[str]]] = {(row.name, row.number): {} for row in rows}
    sql = (
        "SELECT v.name, v.number, f.kind, f.value FROM json_each(?) j"
        " CROSS JOIN versions v ON v.name = json_extract(j.value, '$[0]') AND v.number = json_extract(j.value, '$[1]')"
        " JOIN facets f ON f.version = v.id"
    )
    for name, number, kind, value in sorted(index.select(sql, json.dumps([*by_version]), kinds="siss")):
        by_version[name, number].setdefault(kind, []).append(value)
    return by_version


def values_of_kinds(index: Index, kinds: tuple[str, ...], without: frozenset[str], most: int) -> dict[str, list[str]]:
    """Return facets of the newest versions of names not in `without`: of each kind at most `most` values, sorted.

    They are among the `2 * most` most frequent ones, and on one of the last `_PROBED` versions with that value.
    """
    frequent = "SELECT value FROM facet_counts WHERE kind = ?1 AND n > 0 ORDER BY n DESC, value LIMIT 2 * ?2"
    recent = f"SELECT version FROM facets WHERE kind = ?1 AND value = c.value ORDER BY version DESC LIMIT {_PROBED}"
    match_query = f"SELECT 1 FROM ({recent}) f CROSS JOIN versions v ON v.id = f.version WHERE {NEWEST}"
    match_query += f" AND {visible_condition(index, without)}"
    sql = f"SELECT value FROM ({frequent}) c WHERE EXISTS ({match_query}) LIMIT ?2"
    return {kind: sorted(value for (value,) in index.select(sql, kind, most, kinds="s")) for kind in kinds}


def count_names(index: Index, namespace: str, without: Collection[str], most: int) -> int:
    """Return the number of names with versions in a namespace, except those in `without`; `most` for more."""
    names = f"SELECT 1 FROM versions v WHERE {IN_NAMESPACE} AND {NEWEST} AND {visible_condition(index, without)} LIMIT ?"
    return int(index.select(f"SELECT count(*) FROM ({names})", namespace, namespace, most, kinds="i")[0][0])


def names_after(index: Index, last: str, limit: int, without: Collection[str]) -> list[str]:
    """Return names with versions after `last`, except those in `without`, sorted."""
    index.left_out = frozenset(without)
    sql = "SELECT name FROM names WHERE name > ? AND deleted = 0 AND number > 0 AND NOT left_out(name) ORDER BY name LIMIT ?"
    return [name for (name,) in index.select(sql, storable(last), limit, kinds="s") if is_name(name)]


def _statements(wanted: Conditions, words: str) -> Iterator[Statement]:
    """Yield statements for the ids of the versions that meet each condition which an index leads to."""
    if words:
        yield "SELECT rowid AS id FROM texts_fts WHERE texts_fts MATCH ?", (words,)
    for kinds, value in wanted.facets:
        yield f"SELECT DISTINCT version AS id FROM facets WHERE {_one_of(kinds)} AND value = ?", (*kinds, storable(value))
    if wanted.namespace:
        yield f"SELECT id FROM versions v WHERE {IN_NAMESPACE}", (storable(wanted.namespace),) * 2
    if wanted.among is not None:
        yield _AMONG, (json.dumps(wanted.among),)


def _conditions(wanted: Conditions) -> tuple[str, list[object]]:
    """Return the conditions but the words, with their values."""
    conditions, values = ["1"], list[object]()
    for kinds, value in wanted.facets:
        # Looked up for each version: the list of all versions with the facet may be long.
        conditions.append(f"EXISTS (SELECT 1 FROM facets f WHERE f.version = v.id AND {_one_of(kinds)} AND value = ?)")
        values += [*kinds, storable(value)]
    if wanted.namespace:
        conditions.append(IN_NAMESPACE)
        values += [storable(wanted.namespace)] * 2
    if wanted.among is not None:
        conditions.append(f"v.id IN ({_AMONG})")
        values.append(json.dumps(wanted.among))
    for column, bounds in wanted.bounds:
        condition, limits = bounds_condition(f"v.{require_allowed(column, COLUMNS)}", bounds)
        conditions.append(condition)
        values += limits
    for name, bounds in wanted.metrics:
        condition, limits = bounds_condition("m.value", bounds)
        conditions.append(f"EXISTS (SELECT 1 FROM metrics m WHERE m.version = v.id AND m.name IN (?, ?) AND {condition})")
        values += [storable(name), storable(f"{REPORTED}_{name}"), *limits]
    return " AND ".join(conditions), values


def _with_words(index: Index, matches: list[_Match], words: str) -> list[_Match]:
    """Return the versions that contain words: one look at the full-text index, in the range of their ids."""
    if not matches:
        return []
    ids = [version for version, _, _ in matches]
    sql = "SELECT rowid FROM texts_fts WHERE texts_fts MATCH ? AND rowid BETWEEN ? AND ?"
    with_words = {version for (version,) in index.select(sql, words, min(ids), max(ids), kinds="i")}
    return [match for match in matches if match[0] in with_words]


def _one_of(kinds: tuple[str, ...]) -> str:
    return f"kind IN ({', '.join('?' * len(kinds))})"
