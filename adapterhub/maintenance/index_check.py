# ruff: noqa: S608 - every name interpolated into a statement is a constant of this package
"""The comparison of registry.db with the logs.

The rows of each name are compared with a replay of its log; counts and the full-text index are compared with the rows. The
replay goes into an index in memory, one name after the other, using the same functions that fill registry.db.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from adapterhub.digest import Digest
from adapterhub.index import queries, replay, schema, tensor_search, version_extract
from adapterhub.index.index_database import Index, connect_memory, errors
from adapterhub.index.queries import LogState, VersionRow
from adapterhub.store.store import Store
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

from .findings import REBUILD, Finding

_OF_VERSION = "JOIN versions v ON v.id = t.version WHERE v.name = ?1 ORDER BY"
# What an index knows about a name: first from the log alone, then from the documents of its versions.
_FROM_LOG = {
    "state": "SELECT number, deleted FROM names WHERE name = ?1",
    "versions": "SELECT number, digest, manifest_size, time, seq FROM versions WHERE name = ?1 ORDER BY number",
    "tags": "SELECT tag, number FROM tags WHERE name = ?1 ORDER BY tag",
    "settings": f"SELECT kind, key, value FROM marks WHERE name = ?1 AND kind != '{queries.UNINDEXED}' ORDER BY kind, key",
}
_FROM_DOCUMENTS = {
    "columns": f"SELECT number, {', '.join(version_extract.COLUMNS)}, parents FROM versions WHERE name = ?1 ORDER BY number",
    "unreadable documents": f"SELECT key, value FROM marks WHERE name = ?1 AND kind = '{queries.UNINDEXED}' ORDER BY key",
    "files": f"SELECT v.number, t.path, t.digest, t.size FROM files t {_OF_VERSION} 1, 2, 3",
    "parents": f"SELECT v.number, t.parent FROM made_from t {_OF_VERSION} 1, 2",
    "facets": f"SELECT v.number, t.kind, t.value FROM facets t {_OF_VERSION} 1, 2, 3",
    "metrics": f"SELECT v.number, t.name, t.value FROM metrics t {_OF_VERSION} 1, 2",
    "texts": f"SELECT v.number, t.name, t.title, t.tags, t.description, t.facts, t.card FROM texts t {_OF_VERSION} 1",
}
_STRAY_ROWS = {
    "names": "SELECT name FROM versions UNION SELECT name FROM tags UNION SELECT name FROM marks EXCEPT SELECT name FROM names",
    **{
        table: f"SELECT version FROM {table} WHERE version NOT IN (SELECT id FROM versions)"
        for table in ("texts", "facets", "metrics", "files", "made_from")
    },
}
_COUNTS = f"SELECT kind, value, count(*) FROM ({replay.NEWEST_FACETS}) GROUP BY 1, 2"
_MAX_CHARACTERS = 60


@dataclass
class ReplayedLog:
    """A name as its log describes it.

    Attributes:
        state: Its last entry.
        rows: Its versions, newest first.
        unindexed: Why the documents of a version could not be indexed, by version number.
        error: The error that ended the replay early, if any.
    """

    state: LogState
    rows: list[VersionRow]
    unindexed: dict[str, str]
    error: AdapterhubError | None = None


class Catalog:
    """An index under examination, and an index in memory for replays; what differs is confirmed under the write lock."""

    def __init__(self, index: Index, store: Store) -> None:
        self.index, self.store = index, store
        self._expected = Index(index.path, connect_memory())
        schema.create(self._expected.connection)

    def names(self) -> tuple[set[str], list[Finding]]:
        """Return all names, from the logs and the index, with a finding if those of the index cannot be read."""
        names = set(self.store.log.names())
        try:
            return names.union(name.name for name in queries.names(self.index)), []
        except IntegrityError as error:
            return names, [_wrong_finding(self.index, error.what)]

    @contextmanager
    def replayed_log(self, name: str) -> Iterator[ReplayedLog]:
        """Replay the log of a name into memory.

        The result, and the rows that `differences` compares with, are gone when the context ends.
        """
        expected = self._expected
        expected.connection.execute("BEGIN")
        try:
            error: AdapterhubError | None = None
            try:
                replay.catch_up(expected, self.store, name, counting=False)
            except AdapterhubError as replay_error:
                error = replay_error
            unindexed = queries.marks(expected, queries.UNINDEXED, name)
            yield ReplayedLog(queries.name(expected, name), queries.versions(expected, name=name), unindexed, error)
        finally:
            expected.connection.execute("ROLLBACK")

    def differences(self, replayed_log: ReplayedLog, *, documents: bool) -> Iterator[Finding]:
        """Compare the rows of a replayed name with the index, including those from documents if `documents` are readable."""
        name = replayed_log.state.name
        try:
            indexed_name = queries.name(self.index, name)
            if replayed_log.state.seq and not indexed_name.seq:
                yield _behind_finding(self.index, f"the index lacks {name}")
            elif (indexed_name.seq, indexed_name.head) != (replayed_log.state.seq, replayed_log.state.head):
                yield _behind_finding(
                    self.index, f"the index is at entry {indexed_name.seq} of {name}, the log at {replayed_log.state.seq}"
                )
            else:
                for aspect, sql in {**_FROM_LOG, **(_FROM_DOCUMENTS if documents else {})}.items():
                    indexed, replayed = self.index.select(sql, name), self._expected.select(sql, name)
                    if indexed != replayed:
                        yield _wrong_finding(
                            self.index,
                            f"the {aspect} of {name} do not match its log: {_first_difference(indexed, replayed)}",
                        )
        except (IntegrityError, UnicodeError) as error:
            yield _wrong_finding(self.index, f"the rows of {name} cannot be read: {getattr(error, 'what', error)}")

    def inconsistencies(self, is_listed: Callable[[Digest], bool] | None) -> Iterator[Finding]:
        """Check what concerns no single name: stray rows, counts, the full-text index.

        Args:
            is_listed: Tells of which files the indexed tensors are compared with the store's lists of tensors, which are known
                to be right; None compares none.
        """
        try:
            for table, sql in _STRAY_ROWS.items():
                if self.index.select(f"{sql} LIMIT 1"):
                    yield _wrong_finding(
                        self.index, f"there are rows of no {'log' if table == 'names' else 'version'} in it ({table})"
                    )
            counted = self.index.select("SELECT kind, value, n FROM facet_counts WHERE n != 0")
            if {(kind, value.lower(), n) for kind, value, n in counted} != {
                (kind, value.lower(), n) for kind, value, n in self.index.select(_COUNTS)
            }:
                yield _wrong_finding(self.index, "the counts of facets do not match its versions")
            if is_listed:
                yield from self._compare_tensors(is_listed)
            with suppress(LocalIOError):  # needs the write lock for a moment, which SQLite cannot take on a full disk
                self._check_full_text_index()
        except (IntegrityError, AttributeError, TypeError) as error:
            yield _wrong_finding(self.index, f"cannot be read: {getattr(error, 'what', error)}")

    def _check_full_text_index(self) -> None:
        with self.index.transaction(), errors(self.index.path):
            self.index.execute("INSERT INTO texts_fts (texts_fts, rank) VALUES ('integrity-check', 1)")

    def _compare_tensors(self, is_listed: Callable[[Digest], bool]) -> Iterator[Finding]:
        """Compare the indexed tensors of files with their lists, by their count, their bytes and the sum of their keys."""
        sums = "SELECT file, count(*), sum(size), sum(key >> 16) FROM tensors GROUP BY file"
        indexed = {file: tuple(totals) for file, *totals in self.index.select(sums, kinds="iiii")}
        for file, digest in self.index.select("SELECT id, digest FROM weights", kinds="is"):
            totals = indexed.pop(file, (0, 0, 0))
            listed = self._listed_totals(digest) if is_listed(digest) else None
            if listed is not None and totals != listed:
                yield _wrong_finding(self.index, f"the tensors of {digest[:19]} do not match its list")
        if indexed:
            yield _wrong_finding(self.index, "it has tensors without a file")

    def _listed_totals(self, digest: Digest) -> tuple[int, int, int] | None:
        """Return the number, the bytes and the key sum of the tensors in a file's list; None if the list cannot be read."""
        try:
            listed = self.store.tensors.read(digest)
        except AdapterhubError:
            listed = None
        if listed is None:
            return None
        pairs = {(tensor_search.key(tensor.digest), tensor.size) for tensor in listed if tensor.size}
        return len(pairs), sum(size for _, size in pairs), sum(key >> 16 for key, _ in pairs)


def _first_difference(indexed: list[tuple[object, ...]], replayed: list[tuple[object, ...]]) -> str:
    """Describe the first row that each list has and the other lacks."""
    missing = [row for row in replayed if row not in indexed][:1]
    extra = [row for row in indexed if row not in replayed][:1]
    return " instead of ".join(_row_text(row[0]) if row else "nothing" for row in (extra, missing))


def _row_text(row: tuple[object, ...]) -> str:
    return ", ".join(str(value)[:_MAX_CHARACTERS] for value in row)[: 2 * _MAX_CHARACTERS]


def _behind_finding(index: Index, problem: str) -> Finding:
    return Finding("catalog-behind", "error", str(index.path), problem, *REBUILD)


def _wrong_finding(index: Index, problem: str) -> Finding:
    return Finding("catalog-wrong", "error", str(index.path), problem, *REBUILD)
