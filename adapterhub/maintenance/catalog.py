# ruff: noqa: S608 - what is put into a statement here is fixed
"""Holds registry.db against the logs: the rows of each name against a replay of its log, counts and searches against the rows.

The replay goes into an index in memory, one name after the other, by the functions that fill registry.db.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from adapterhub.digest import Digest
from adapterhub.index import queries, replay, rows, schema, tensors
from adapterhub.index.database import Index, connect_memory, errors
from adapterhub.index.queries import Name, Row
from adapterhub.store.store import Store
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError

from .findings import REBUILD, Finding

_OF_VERSION = "JOIN versions v ON v.id = t.version WHERE v.name = ?1 ORDER BY"
# What an index has of a name: from the log alone, and from the documents of its versions.
_FROM_LOG = {
    "state": "SELECT number, deleted FROM names WHERE name = ?1",
    "versions": "SELECT number, digest, manifest_size, time, seq FROM versions WHERE name = ?1 ORDER BY number",
    "tags": "SELECT tag, number FROM tags WHERE name = ?1 ORDER BY tag",
    "settings": f"SELECT kind, key, value FROM marks WHERE name = ?1 AND kind != '{queries.UNINDEXED}' ORDER BY kind, key",
}
_FROM_DOCUMENTS = {
    "columns": f"SELECT number, {', '.join(rows.COLUMNS)}, parents FROM versions WHERE name = ?1 ORDER BY number",
    "unreadable documents": f"SELECT key, value FROM marks WHERE name = ?1 AND kind = '{queries.UNINDEXED}' ORDER BY key",
    "files": f"SELECT v.number, t.path, t.digest, t.size FROM files t {_OF_VERSION} 1, 2, 3",
    "parents": f"SELECT v.number, t.parent FROM made_from t {_OF_VERSION} 1, 2",
    "facets": f"SELECT v.number, t.kind, t.value FROM facets t {_OF_VERSION} 1, 2, 3",
    "metrics": f"SELECT v.number, t.name, t.value FROM metrics t {_OF_VERSION} 1, 2",
    "texts": f"SELECT v.number, t.name, t.title, t.tags, t.description, t.facts, t.card FROM texts t {_OF_VERSION} 1",
}
_STRAYS = {
    "names": "SELECT name FROM versions UNION SELECT name FROM tags UNION SELECT name FROM marks EXCEPT SELECT name FROM names",
    **{
        table: f"SELECT version FROM {table} WHERE version NOT IN (SELECT id FROM versions)"
        for table in ("texts", "facets", "metrics", "files", "made_from")
    },
}
_COUNTS = f"SELECT kind, value, count(*) FROM ({replay.NEWEST_FACETS}) GROUP BY 1, 2"
_WIDTH = 60


@dataclass
class Replayed:
    """A name by its log.

    Attributes:
        state: Its last entry.
        rows: Its versions, newest first.
        unindexed: The reasons why nothing is indexed of versions, by their numbers.
        error: What ended the replay, if anything did.
    """

    state: Name
    rows: list[Row]
    unindexed: dict[str, str]
    error: AdapterhubError | None = None


class Catalog:
    """An index under examination, and one in memory for replays."""

    def __init__(self, index: Index, store: Store) -> None:
        self.index, self.store = index, store
        self._expected = Index(index.path, connect_memory())
        schema.create(self._expected.connection)

    def names(self) -> tuple[set[str], list[Finding]]:
        """Return all names, of logs and of the index, and a finding where those of the index cannot be read."""
        names = set(self.store.log.names())
        try:
            return names.union(name.name for name in queries.names(self.index)), []
        except IntegrityError as error:
            return names, [_wrong(self.index, error.what)]

    @contextmanager
    def replayed(self, name: str) -> Iterator[Replayed]:
        """Replay the log of a name; the result, and what `differences` compares with, are gone when the context ends."""
        expected = self._expected
        expected.connection.execute("BEGIN")
        try:
            error: AdapterhubError | None = None
            try:
                replay.catch_up(expected, self.store, name, counting=False)
            except AdapterhubError as found:
                error = found
            unindexed = queries.marks(expected, queries.UNINDEXED, name)
            yield Replayed(queries.name(expected, name), queries.versions(expected, name=name), unindexed, error)
        finally:
            expected.connection.execute("ROLLBACK")

    def differences(self, log: Replayed, *, documents: bool) -> Iterator[Finding]:
        """Compare the rows of a replayed name; those from the documents of its versions only where these can be read."""
        name = log.state.name
        try:
            known = queries.name(self.index, name)
            if log.state.seq and not known.seq:
                yield _behind(self.index, f"the index lacks {name}")
            elif (known.seq, known.head) != (log.state.seq, log.state.head):
                yield _behind(self.index, f"the index is at entry {known.seq} of {name}, the log at {log.state.seq}")
            else:
                for part, sql in {**_FROM_LOG, **(_FROM_DOCUMENTS if documents else {})}.items():
                    here, there = self.index.select(sql, name), self._expected.select(sql, name)
                    if here != there:
                        yield _wrong(self.index, f"the {part} of {name} are not those of its log: {_first(here, there)}")
        except (IntegrityError, UnicodeError) as error:
            yield _wrong(self.index, f"the rows of {name} cannot be read: {getattr(error, 'what', error)}")

    def inconsistencies(self, *, lists: bool) -> Iterator[Finding]:
        """Check what is not about one name: rows that belong to none, counts, the full-text index.

        `lists`: Compare the tensors in it with the lists of the store, which are right.
        """
        try:
            for table, sql in _STRAYS.items():
                if self.index.select(f"{sql} LIMIT 1"):
                    yield _wrong(self.index, f"there are rows of no {'log' if table == 'names' else 'version'} in it ({table})")
            counted = self.index.select("SELECT kind, value, n FROM facet_counts WHERE n != 0")
            if {(kind, value.lower(), n) for kind, value, n in counted} != {
                (kind, value.lower(), n) for kind, value, n in self.index.select(_COUNTS)
            }:
                yield _wrong(self.index, "the counts of facets are not those of its versions")
            if lists:
                yield from self._tensors()
            with suppress(LocalIOError):  # it takes the write lock for a moment, which a full disk does not give
                self._search()
        except (IntegrityError, AttributeError, TypeError) as error:
            yield _wrong(self.index, f"cannot be read: {getattr(error, 'what', error)}")

    def _search(self) -> None:
        with self.index.transaction(), errors(self.index.path):
            self.index.execute("INSERT INTO texts_fts (texts_fts, rank) VALUES ('integrity-check', 1)")

    def _tensors(self) -> Iterator[Finding]:
        """Compare the tensors of each file with its list, by their number, their bytes and the sum of their keys."""
        sums = "SELECT file, count(*), sum(size), sum(key >> 16) FROM tensors GROUP BY file"
        found = {file: tuple(rest) for file, *rest in self.index.select(sums, kinds="iiii")}
        for file, digest in self.index.select("SELECT id, digest FROM weights", kinds="is"):
            listed = self._listed(digest)
            if listed is not None and found.pop(file, (0, 0, 0)) != listed:
                yield _wrong(self.index, f"the tensors of {digest[:19]} are not those of its list")
        if found.keys() - {file for (file,) in self.index.select("SELECT id FROM weights")}:
            yield _wrong(self.index, "there are tensors of no file in it")

    def _listed(self, digest: Digest) -> tuple[int, int, int] | None:
        try:
            listed = self.store.tensors.read(digest)
        except AdapterhubError:
            listed = None
        if listed is None:
            return None
        pairs = {(tensors.key(tensor.digest), tensor.size) for tensor in listed if tensor.size}
        return len(pairs), sum(size for _, size in pairs), sum(key >> 16 for key, _ in pairs)


def _first(here: list[tuple[object, ...]], there: list[tuple[object, ...]]) -> str:
    """Name the first rows that two lists do not share."""
    missing = [row for row in there if row not in here][:1]
    extra = [row for row in here if row not in there][:1]
    return " instead of ".join(_short(row[0]) if row else "nothing" for row in (extra, missing))


def _short(row: tuple[object, ...]) -> str:
    return ", ".join(str(value)[:_WIDTH] for value in row)[: 2 * _WIDTH]


def _behind(index: Index, what: str) -> Finding:
    return Finding("catalog-behind", "error", str(index.path), what, *REBUILD)


def _wrong(index: Index, what: str) -> Finding:
    return Finding("catalog-wrong", "error", str(index.path), what, *REBUILD)
