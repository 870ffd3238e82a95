"""Replay of the store's logs into registry.db. Call these functions in a transaction."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import sqlite3
from collections.abc import Collection, Mapping

from adapterhub.digest import Digest
from adapterhub.manifest import measurement, release_statement, rollout_state
from adapterhub.manifest.measurement import Evaluation
from adapterhub.ref import LATEST
from adapterhub.store.ref_log import MAX_RESTORES, TAG_MOVES, entries_in_force
from adapterhub.store.store import HUB, Entry, Store
from adapterhub_converters.errors import AdapterhubError, IntegrityError

from . import queries, tensor_search, version_extract
from .index_database import Index
from .queries import LogState

_CACHE = 64 << 10  # KiB for a rebuild: tensors come in no order, and with SQLite's default of 2 MB it takes twice as long
# Facets of the newest version of every name; the empty facet counts the names.
NEWEST_FACETS = (
    "WITH has AS (SELECT version, kind, value FROM facets UNION ALL SELECT id, '', '' FROM versions"
    " UNION ALL SELECT id, 'r', CAST(r AS TEXT) FROM versions WHERE r IS NOT NULL)"
    " SELECT kind, value FROM versions v JOIN has ON version = v.id"
    " WHERE NOT EXISTS (SELECT 1 FROM versions n WHERE n.name = v.name AND n.number > v.number)"
)

# The same for the one name ?1. With the statement above, SQLite would build all of `has` to look for one version in it: 0.1 s
# at 10,000 versions.
FACETS_OF_NEWEST = (
    "WITH newest AS (SELECT id, r FROM versions WHERE name = ?1 ORDER BY number DESC LIMIT 1)"
    " SELECT kind, value FROM facets WHERE version = (SELECT id FROM newest) UNION ALL SELECT '', '' FROM newest"
    " UNION ALL SELECT 'r', CAST(r AS TEXT) FROM newest WHERE r IS NOT NULL"
)


_SET_MARK = "INSERT OR REPLACE INTO marks (name, kind, key, value) VALUES (?, ?, ?, ?)"
Extracts = Mapping[Digest, version_extract.VersionExtract]
# What reading a document that was never checked may raise beyond our own errors.
_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, MemoryError)


def extracts(store: Store, entry: Entry) -> Extracts:
    """Return what the index will contain of a version, for `catch_up`; call this before the entry is in the log for good."""
    return {entry.digest: _extract(store, entry.digest)} if entry.op == "push" else {}


def _extract(store: Store, digest: Digest) -> version_extract.VersionExtract:
    """Return the indexed data of a version; if a document cannot be read, only the reason."""
    try:
        return version_extract.read(store, digest)
    except _UNREADABLE as error:
        return version_extract.VersionExtract(unindexed=f"{type(error).__name__}: {error}"[: version_extract.MAX_REASON])


def catch_up(
    index: Index, store: Store, name: str, known_extracts: Extracts | None = None, *, counting: bool = True
) -> LogState:
    """Replay the entries of a name's log that the index lacks; IntegrityError for one that cannot follow.

    Args:
        index: In a transaction.
        store: The logs, and the documents of versions.
        name: The name.
        known_extracts: Versions that were read already.
        counting: Keep the counts of facets, which are about all names, up to date.
    """
    state = queries.name(index, name)
    replay = _Replay(index, store, counting=counting, known_extracts=known_extracts)
    while logged := store.log.entry(name, state.seq + 1):
        state = replay.entry(state, *logged)
    return state


def rebuild(index: Index, store: Store) -> list[AdapterhubError]:
    """Empty the index and replay every log; return the errors of logs that could not be replayed completely."""
    from . import migrations  # imports sqlite-utils

    db = migrations.sqlite_utils_view(index.connection)
    db.execute(f"PRAGMA cache_size = -{_CACHE}")
    with index.transaction():
        migrations.drop_search(db)
        for table in migrations.REBUILT_TABLES:
            db.table(table).delete_where()
        logs = _replay_all(index, store)
        errors = _read_repositories(index, store)
        # Built for everything at once, counts and full-text index take a tenth of the time that they take version by version.
        counted = f"SELECT kind, value, count(*) FROM ({NEWEST_FACETS}) GROUP BY 1, 2"  # noqa: S608 - our own statement
        db.execute(f"INSERT INTO facet_counts (kind, value, n) {counted}")
        migrations.build_search(db)
    return [*(log.error for log in logs if log.error), *errors]


def _read_repositories(index: Index, store: Store) -> list[AdapterhubError]:
    """Write the rows of all repositories; return the errors of logs that cannot be read."""
    from . import repository_rows  # which most commands do without

    errors = list[AdapterhubError]()
    for name in store.log.names(HUB):
        try:
            repository_rows.catch_up(index, store, name)
        except AdapterhubError as error:
            errors.append(error)
    return errors


def _replay_all(index: Index, store: Store) -> list[_LogCursor]:
    """Replay every log in the order of the entries' times, so that the ids of versions are in the order of their pushes."""
    replay = _Replay(index, store, counting=False)
    logs = [_LogCursor(store, name) for name in store.log.names()]
    waiting = [(log.time, log.name, log) for log in logs if log.time]
    heapq.heapify(waiting)
    while waiting:
        log = waiting[0][2]
        try:
            log.state = replay.entry(log.state, *log.take())
        except AdapterhubError as error:
            log.error, log.time = error, ""  # no later entry can follow
        if log.time:
            heapq.heapreplace(waiting, (log.time, log.name, log))
        else:
            heapq.heappop(waiting)
    return logs


class _LogCursor:
    """A position in a name's log during a rebuild: the next entry, and its time (empty at the end of the log)."""

    def __init__(self, store: Store, name: str) -> None:
        self.name, self.state = name, LogState(name)
        self._store = store
        self.time = ""
        self._next: tuple[Entry, Digest] | None = None
        self.error: AdapterhubError | None = None
        self._read(1)

    def _read(self, seq: int) -> None:
        try:
            self._next = self._store.log.entry(self.name, seq)
        except AdapterhubError as error:
            self._next, self.error = None, error
        # Not before an earlier entry's time: a clock that was set back must not change the order within a log.
        self.time = max(self.time, self._next[0].time or "0") if self._next else ""

    def take(self) -> tuple[Entry, Digest]:
        """Return the next entry, and read the one after it."""
        assert self._next is not None  # noqa: S101 - as `time` is not empty
        current = self._next
        self._read(current[0].seq + 1)
        return current


class _Replay:
    """Applies entries to the index; with `counting`, it keeps the counts of facets up to date."""

    def __init__(self, index: Index, store: Store, *, counting: bool = True, known_extracts: Extracts | None = None) -> None:
        self.index, self.store, self.counting = index, store, counting
        self.known_extracts = known_extracts or {}

    def entry(self, state: LogState, entry: Entry, digest: Digest) -> LogState:
        """Apply the entry that follows `state`; IntegrityError if it cannot follow."""
        location = str(self.store.log.path(entry.name, entry.seq))
        if entry.previous != state.head:
            problem = "does not follow the entry before it: the log was changed"
            raise IntegrityError(location, problem, "Check the registry", code="check-registry")
        try:
            return self._apply(state, entry, digest)
        except sqlite3.IntegrityError as error:
            problem = f"contradicts the entries before it ({error})"
            raise IntegrityError(location, problem, "Check the registry", code="check-registry") from error

    def _apply(self, state: LogState, entry: Entry, digest: Digest) -> LogState:
        number = max(state.number, entry.number)
        # A setting does not bring back a removed name; only a push or a restore does.
        deleted = entry.op == "delete" or (state.deleted and entry.op not in ("push", "restore"))
        after = LogState(entry.name, entry.seq, digest, number, deleted)
        self.index.execute(
            "INSERT INTO names (name, seq, head, number, deleted) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET seq = excluded.seq,"
            " head = excluded.head, number = excluded.number, deleted = excluded.deleted",
            *(after.name, after.seq, after.head, after.number, after.deleted),
        )
        # Its lines in index.json are out of date now (`index_file.write`).
        self.index.execute("INSERT OR IGNORE INTO unwritten (name) VALUES (?)", entry.name)
        if entry.op == "delete":
            self._forget_name(entry.name)
        elif entry.op == "restore":
            self._restore(entry)
        else:
            self._take_effect(entry)
        return after

    def _take_effect(self, entry: Entry) -> None:
        if entry.op == "push":
            self._add(entry, self.known_extracts.get(entry.digest) or _extract(self.store, entry.digest))
        elif entry.op == "drop":
            for number in entry.numbers:
                self._forget_version(entry.name, number)
        if entry.op in (*TAG_MOVES, "untag"):
            self._move_tags(entry)
        self._mark(entry)

    def _restore(self, entry: Entry) -> None:
        """Apply again what the last removal of the name undid; a tag of a version that is gone is removed instead."""
        earlier = list(itertools.takewhile(lambda before: before.seq < entry.seq, self.store.log.entries(entry.name)))
        if sum(before.op == "restore" for before in earlier) >= MAX_RESTORES:
            location = str(self.store.log.path(entry.name, entry.seq))
            raise IntegrityError(location, f"restores {entry.name} more than {MAX_RESTORES} times", "No later entry is read")
        for undone in entries_in_force(earlier)[1]:
            if undone.number in (0, *entry.numbers):
                self._take_effect(undone)
            elif undone.op in TAG_MOVES:
                self._take_effect(dataclasses.replace(undone, op="untag"))
            elif undone.op == "withdraw":
                self._mark(undone)  # it also forbids to push these bytes again
        self._take_effect(entry)  # its tag `latest`, whose version is gone

    # ---- versions

    def _add(self, entry: Entry, extract: version_extract.VersionExtract) -> None:
        index = self.index
        values = {
            "name": entry.name, "number": entry.number, "digest": entry.digest, "manifest_size": entry.size, "time": entry.time,
            **dict(zip(version_extract.COLUMNS, extract.columns, strict=True)),
            "parents": version_extract.dump_parents(extract), "seq": entry.seq,
        }  # fmt: skip
        columns, places = ", ".join(values), ", ".join("?" * len(values))
        # The version may replace the newest one, whose facets are then no longer counted.
        self._count_facets(entry.name, -1)
        version = index.execute(f"INSERT INTO versions ({columns}) VALUES ({places})", *values.values())  # noqa: S608 - our own
        index.execute(
            "INSERT INTO texts (version, name, title, tags, description, facts, card) VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(version, entry.name, extract.title, "", extract.description, extract.words, extract.prose),
        )
        index.execute_many(
            "INSERT OR IGNORE INTO facets (version, kind, value) VALUES (?, ?, ?)",
            [(version, *facet) for facet in extract.facets],
        )
        index.execute_many(
            "INSERT OR IGNORE INTO metrics (version, name, value) VALUES (?, ?, ?)",
            [(version, *metric) for metric in extract.metrics.items()],
        )
        index.execute_many(
            "INSERT INTO files (version, path, digest, size) VALUES (?, ?, ?, ?)", [(version, *file) for file in extract.files]
        )
        index.execute_many(
            "INSERT INTO made_from (parent, version) VALUES (?, ?)", [(parent, version) for parent in extract.parent_digests]
        )
        self._count_facets(entry.name, 1)
        if extract.unindexed:
            # Marked, so that lists and fsck can tell why the version has no data.
            index.execute(_SET_MARK, entry.name, queries.UNINDEXED, str(entry.number), extract.unindexed)
        for file in extract.weights:  # only files whose tensors an earlier search has listed
            tensor_search.add(index, file, self.store.tensors.read)

    def _forget_name(self, name: str) -> None:
        self.index.execute("DELETE FROM tags WHERE name = ?", name)
        self.index.execute("DELETE FROM marks WHERE name = ?", name)
        self._forget(name, "name = ?", name)

    def _forget_version(self, name: str, number: int) -> None:
        """Remove a version that has no tag."""
        delete_marks = "DELETE FROM marks WHERE kind IN ('deprecate', ?) AND name = ? AND key = CAST(? AS TEXT)"
        self.index.execute(delete_marks, queries.UNINDEXED, name, number)
        delete_evaluations = "DELETE FROM marks WHERE kind = 'evaluate' AND name = ? AND key LIKE ? || ' %'"
        self.index.execute(delete_evaluations, name, str(number))
        self._forget(name, "name = ? AND number = ?", name, number)

    def _forget(self, name: str, condition: str, *values: object) -> None:
        index = self.index
        of_versions = f"version IN (SELECT id FROM versions WHERE {condition})"  # noqa: S608 - one of two fixed conditions
        self._count_facets(name, -1)
        files = index.select(f"SELECT DISTINCT digest FROM files WHERE {of_versions}", *values)  # noqa: S608
        for table in ("texts", "facets", "metrics", "files", "made_from"):
            index.execute(f"DELETE FROM {table} WHERE {of_versions}", *values)  # noqa: S608
        tensor_search.drop(index, (digest for (digest,) in files), self.store.tensors.read)
        index.execute(f"DELETE FROM versions WHERE {condition}", *values)  # noqa: S608
        self._count_facets(name, 1)

    def _count_facets(self, name: str, n: int) -> None:
        """Add `n` to the counts of the facets of the newest version of a name."""
        if self.counting:
            self.index.execute(
                f"INSERT INTO facet_counts (kind, value, n) SELECT kind, value, ?2 FROM ({FACETS_OF_NEWEST}) WHERE 1"  # noqa: S608 - ours
                " ON CONFLICT (kind, value) DO UPDATE SET n = n + excluded.n",
                name,
                n,
            )

    # ---- tags and settings

    def _move_tags(self, entry: Entry) -> None:
        before = queries.tags(self.index, entry.name)
        for tag in entry.tags:
            if entry.op == "untag":
                self.index.execute("DELETE FROM tags WHERE name = ? AND tag = ?", entry.name, tag)
            else:
                sql = "INSERT OR REPLACE INTO tags (name, tag, number) VALUES (?, ?, ?)"
                self.index.execute(sql, entry.name, tag, entry.number)
        # `latest` is not searched: indexing it again with each push would take as long as indexing the last version's card.
        moved = [tag for tag in entry.tags if tag != LATEST]
        touched = {before[tag] for tag in moved if tag in before} | ({entry.number} if moved and entry.op != "untag" else set())
        for number in touched:
            self.index.execute(
                "UPDATE texts SET tags = (SELECT coalesce(group_concat(tag, ' '), '') FROM"
                " (SELECT tag FROM tags WHERE name = ?1 AND number = ?2 AND tag != ?3 ORDER BY tag))"
                " WHERE version = (SELECT id FROM versions WHERE name = ?1 AND number = ?2)",
                *(entry.name, number, LATEST),
            )

    def _mark(self, entry: Entry) -> None:
        number = str(entry.number)
        set_by = {
            "protect": [(tag, "") for tag in entry.tags],
            "deprecate": [(number, entry.message.encode(errors="replace").decode())],
            "keep": [("", f"{entry.keep} {entry.ttl}" if entry.ttl else str(entry.keep))],
            "withdraw": [(entry.digest, release_statement.parse(entry.message).text)],
        }
        if entry.op == "rollout" and (state := rollout_state.parse(entry.message)):
            set_by["rollout"] = [(f"{entry.digest} {state.route}", entry.message)]
        for key, value in set_by.get(entry.op, ()):
            self.index.execute(_SET_MARK, entry.name, entry.op, key, value)
        if entry.op == "evaluate" and (measured := measurement.parse(entry.message)):
            self._add_evaluation(entry, measured)
        undone = {
            "unprotect": [("protect", tag) for tag in entry.tags],
            "undeprecate": [("deprecate", number)],
            "keep-all": [("keep", "")],
            "unwithdraw": [("withdraw", entry.digest)],
        }
        for kind, key in undone.get(entry.op, ()):
            self.index.execute("DELETE FROM marks WHERE kind = ? AND name = ? AND key = ?", kind, entry.name, key)

    def _add_evaluation(self, entry: Entry, measured: Evaluation) -> None:
        """Record a measurement of a version, and its metrics for searches; it replaces an earlier one with the same name."""
        key = f"{entry.number} {measured.name}"
        replaced = measurement.parse(queries.marks(self.index, entry.op, entry.name).get(key, ""))
        self.index.execute(_SET_MARK, entry.name, entry.op, key, measured.dump())
        metrics = dict(measured.searchable_metrics)
        # Names of metrics differ by more than their case, as in the table.
        current = {name.lower() for name in metrics}
        if replaced and (dropped := {name for name in replaced.searchable_metrics if name.lower() not in current}):
            metrics |= self._metrics_without(entry, dropped)
        insert_metrics = (
            "INSERT OR REPLACE INTO metrics (version, name, value) SELECT id, ?, ? FROM versions WHERE name = ? AND number = ?"
        )
        self.index.execute_many(insert_metrics, [(*metric, entry.name, entry.number) for metric in metrics.items()])

    def _metrics_without(self, entry: Entry, dropped: Collection[str]) -> dict[str, float]:
        """Remove metrics of a replaced measurement; return those of the same names by the training and other measurements."""
        rows = self.index.select(
            "SELECT id, digest FROM versions WHERE name = ? AND number = ?", entry.name, entry.number, kinds="is"
        )
        remaining: dict[str, float] = {}
        for version, digest in rows:
            delete_metric = "DELETE FROM metrics WHERE version = ? AND name = ?"
            self.index.execute_many(delete_metric, [(version, name) for name in dropped])
            remaining |= _extract(self.store, digest).metrics
        for evaluation in measurement.evaluations_of(queries.marks(self.index, entry.op, entry.name), entry.number):
            remaining |= evaluation.searchable_metrics
        names = {name.lower() for name in dropped}
        return {name: value for name, value in remaining.items() if name.lower() in names}
