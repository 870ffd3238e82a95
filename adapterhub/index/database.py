"""registry.db: an index of the store's logs, in SQLite, so that listing and resolving need not read them.

It holds nothing of its own: it replays the logs, and deleted it is rebuilt. Its write lock is also the lock under which
every writer moves refs. Plain `sqlite3`, as a command that resolves a ref must start fast.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest
from adapterhub.manifest import measurement
from adapterhub.manifest.measurement import Evaluation
from adapterhub.ref import LATEST, Ref
from adapterhub.store.leases import wait_for
from adapterhub.store.oci_index import Line
from adapterhub.store.store import Entry, Store
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, NotFoundError, RefusedError

from . import rows as extract
from . import tensor_rows
from .migrations import FILLED, MIGRATIONS, Migration
from .rows import Extract

FILE = "registry.db"
APPLICATION_ID = 0x41644862  # "AdHb", at offset 68 of the file (sqlite.org/fileformat.html, "The Database Header")
_WAY_OUT = "`adapterhub fsck --rebuild-index` makes it anew from .adapterhub beside it, and keeps this one as registry.db.old"
_LOCK_SECONDS = 30
_CACHE = 64 << 10  # KiB that a rebuild may use: tensors come in no order, and with SQLite's 2 MB it takes twice as long
_MOST_CHANGED = 8  # names; beyond that index.json is made anew
# What the newest version of every name says; the empty facet counts the names.
_SAID = (
    "WITH said AS (SELECT version, kind, value FROM facets UNION ALL SELECT id, '', '' FROM versions"
    " UNION ALL SELECT id, 'r', CAST(r AS TEXT) FROM versions WHERE r IS NOT NULL)"
    " SELECT kind, value FROM versions v JOIN said ON version = v.id"
    " WHERE NOT EXISTS (SELECT 1 FROM versions n WHERE n.name = v.name AND n.number > v.number)"
)
_SUFFIXES = ("", "-wal", "-shm", "-journal")


@dataclass(frozen=True, slots=True)
class Name:
    """Where a name's log stands: its last entry and that entry's digest, the last number allotted, and if it is deleted."""

    name: str
    seq: int = 0
    head: Digest = ""
    number: int = 0
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One version as lists show it. `size` is the bytes of its files; what its facts don't say is None.

    `parents` are the refs of the adapters it was made from, digests where no ref was recorded.
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
    alpha: float | None
    format: str | None
    dtype: str | None
    parameters: int | None
    license: str | None
    description: str | None
    parents: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def ref(self) -> Ref:
        """The name with the running number."""
        return Ref(self.name, number=self.number)


def is_ours(path: Path) -> bool:
    """Whether a file is a catalog, by its first 100 bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except OSError:
        return False
    return head.startswith(b"SQLite format 3\0") and head[68:72] == APPLICATION_ID.to_bytes(4, "big")


class Catalog:
    """An open registry.db. Use `Catalog.create` and `Catalog.open`."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db
        self._file: tuple[int, int] | None = None
        self._rebuilding = False

    @classmethod
    def create(cls, path: Path, store: Store, *, instead: bool = False) -> None:
        """Make the catalog of a store; it gets its name when it is complete. One made meanwhile is left as it is.

        `instead`: It takes the place of one whose write-ahead log this file system cannot hold, and has none itself.
        """
        temporary = store.root / "tmp" / f"{os.urandom(6).hex()}.db"
        try:
            with _errors(path), contextlib.closing(_connect(temporary, "rwc")) as db:
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                cls(temporary, db).migrate(store)
                if not instead:
                    with contextlib.suppress(sqlite3.OperationalError):  # then it stays with a rollback journal
                        db.execute("PRAGMA journal_mode = WAL")
            with _errors(path):
                if instead:
                    os.replace(temporary, path)
                else:
                    _take_name(temporary, path, store.root / "oci-layout")
        finally:
            for suffix in _SUFFIXES:
                Path(f"{temporary}{suffix}").unlink(missing_ok=True)

    @classmethod
    def open(cls, path: Path, store: Store) -> Catalog:
        """The catalog in the file `path`, rebuilt from `store` if its tables are an older adapterhub's.

        One line says what is wrong with it, and the way out.
        """
        if not path.exists():
            raise NotFoundError(str(path), "no such registry", "Run `adapterhub init`")
        if not is_ours(path):
            raise IntegrityError(str(path), "not an adapterhub registry", _WAY_OUT)
        try:
            return cls._open(path, store)
        except LocalIOError as error:
            if getattr(error.__cause__, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE":
                return cls._open(path, store, alone=True)
            if not _lacks_wal(path, error.__cause__):
                raise
        cls.create(path, store, instead=True)
        return cls._open(path, store)

    @classmethod
    def _open(cls, path: Path, store: Store, *, alone: bool = False) -> Catalog:
        """`alone`: Keep others out until it is closed, which takes no shared memory: a full disk has no room for that."""
        with _errors(path):
            identity = _identity(path)
            db = _connect(path, "rw")
            if alone:
                db.execute("PRAGMA locking_mode = EXCLUSIVE")
            catalog = cls(path, db)
            catalog._file = identity  # replaced in between: then the wrong one, and it is opened again
            try:
                catalog.migrate(store)
                db.execute("PRAGMA foreign_keys = ON")
            except BaseException:
                db.close()
                raise
        return catalog

    @classmethod
    def in_memory(cls, path: Path, store: Store) -> Catalog:
        """A catalog for who may not write `path`: a copy of it or, where that may not be whole, made from the logs.

        SQLite cannot read a WAL database that it may not write, unless nobody else writes it (`immutable`): so nobody may have
        it open for writing, before and after it is copied.
        """
        catalog = cls(path, sqlite3.connect(":memory:", isolation_level=None))
        before = _at_rest(path)
        if before and is_ours(path):
            with contextlib.suppress(sqlite3.Error), contextlib.closing(_connect(path, "ro&immutable=1")) as db:
                if db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),):
                    db.backup(catalog._db)
        if catalog.select("SELECT 1 FROM sqlite_master") and (before != _at_rest(path) or not catalog._is_whole()):
            catalog.close()
            catalog = cls(path, sqlite3.connect(":memory:", isolation_level=None))
        catalog.migrate(store)
        return catalog

    def _is_whole(self) -> bool:
        try:
            return bool(self._db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
        except sqlite3.DatabaseError:
            return False

    @staticmethod
    def set_aside(path: Path) -> None:
        """Give a database that cannot be used another name, so that one is made from the logs."""
        with _errors(path):
            for suffix in _SUFFIXES:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{path}{suffix}", f"{path}.old{suffix}")

    def migrate(self, store: Store) -> None:
        """Bring the tables up to date and fill them again, in one transaction; RefusedError for a newer adapterhub's."""
        if self._behind():
            with self.transaction():
                for step in self._behind():  # looked at again: another process may have been first
                    step(self._db)
                self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
                self.rebuild(store)

    def _behind(self) -> list[Migration]:
        ((version,),) = self.select("PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise RefusedError(
                str(self.path),
                f"made by a newer adapterhub (catalog {version}; this one knows {len(MIGRATIONS)})",
                f"Upgrade adapterhub. Or: {_WAY_OUT}",
            )
        return MIGRATIONS[version:]

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def in_transaction(self) -> bool:
        """Whether the write lock is held."""
        return self._db.in_transaction

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; commit at the end, or roll back if that isn't reached. One within another is part of it."""
        if self._db.in_transaction:
            yield
            return
        with _errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def select(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """What a SELECT finds."""
        with _errors(self.path):
            return self._db.execute(sql, values).fetchall()

    # ---- what it says

    def name(self, name: str) -> Name:
        """Where the log of `name` stood when it was last replayed; number 0 for one never seen."""
        found = self.select("SELECT name, seq, head, number, deleted FROM names WHERE name = ?", name)
        return _name(found[0]) if found else Name(name)

    def names(self) -> list[Name]:
        """Every name, sorted, deleted ones too."""
        return [_name(row) for row in self.select("SELECT name, seq, head, number, deleted FROM names ORDER BY name")]

    def rows(self, where: str = "1", *values: object) -> list[Row]:
        """The versions that match a condition, by name, newest first."""
        columns = ", ".join(("name", "number", "digest", "manifest_size", "time", *extract.COLUMNS, "parents"))
        tags = "(SELECT group_concat(tag) FROM tags t WHERE t.name = versions.name AND t.number = versions.number)"
        sql = f"SELECT {columns}, {tags} FROM versions WHERE {where} ORDER BY name, number DESC"  # noqa: S608
        found = []
        for *fields, parents, joined in self.select(sql, *values):
            fields += [
                tuple(json.loads(parents)) if parents != "[]" else (),
                tuple(sorted(joined.split(",") if joined else ())),
            ]
            found.append(Row(*fields))
        return found

    def tags(self, name: str) -> dict[str, int]:
        """Tag to running number, sorted."""
        return dict(self.select("SELECT tag, number FROM tags WHERE name = ? ORDER BY tag", name))

    def marks(self, kind: str, name: str) -> dict[str, str]:
        """What the log of a name says of one kind: `protect` tag to nothing, `deprecate` number or 0 to why, `keep`,
        `evaluate` number and name to what was measured."""
        return dict(self.select("SELECT key, value FROM marks WHERE kind = ? AND name = ?", kind, name))

    def deprecations(self) -> dict[tuple[str, int], str]:
        """Why versions, and with the number 0 whole names, should not be used any more."""
        found = self.select("SELECT name, key, value FROM marks WHERE kind = 'deprecate'")
        return {(name, int(key)): value for name, key, value in found}

    def unlisted(self) -> dict[Digest, int]:
        """Files of weights, with their sizes, of which it isn't known what tensors they have."""
        return dict(tensor_rows.unlisted(self.select))

    def is_replaced(self) -> bool:
        """Whether the file was deleted or replaced since it was opened, so that its lock keeps nobody out."""
        if self._file is None:
            return False
        try:
            return _identity(self.path) != self._file
        except FileNotFoundError:
            return True

    def index(self, name: str | None = None) -> list[Line]:
        """What index.json says: by name its versions by number, then its tags. Of one name if it is given."""
        one, values = ("", ()) if name is None else ("WHERE name = ?", (name,))
        numbers = f"SELECT name, number, 'v' || number, digest, manifest_size FROM versions {one}"  # noqa: S608
        tags = f"SELECT name, NULL, tag, digest, manifest_size FROM tags JOIN versions USING (name, number) {one}"  # noqa: S608
        found = self.select(f"{numbers} UNION ALL {tags} ORDER BY 1, 2 NULLS LAST, 3", *values, *values)
        return [(f"{name}:{tag}", digest, size) for name, _, tag, digest, size in found]

    def write_index(self, store: Store) -> None:
        """Bring index.json up to date; call this in the transaction of what has moved.

        If the file is still the one that was written last, only the lines of names that have moved since are changed.
        """
        # Backwards, so that the name which another goes before is there already.
        moved = [name for (name,) in self.select("SELECT name FROM unwritten ORDER BY name DESC LIMIT ?", _MOST_CHANGED + 1)]
        stamp = ""
        if len(moved) <= _MOST_CHANGED and self.is_level(store):
            stamp = store.change_index([(name, self.index(name), self._after(name)) for name in moved])
        self._set_written(stamp or store.write_index(self.index()))

    def is_level(self, store: Store) -> bool:
        """Whether index.json is the one that was written last from here: if not, others may have moved refs meanwhile."""
        return self.select("SELECT stamp FROM index_file") == [(store.index_stamp(),)]

    def adopt_index(self, store: Store) -> None:
        """Take index.json for what was written last if it says just what the logs do, else write it; in a transaction."""
        lines = self.index()
        stamp = store.index_stamp()
        self._set_written(stamp if stamp and store.index_is_ours(lines) else store.write_index(lines))

    def _set_written(self, stamp: str) -> None:
        self._db.execute("DELETE FROM unwritten")
        self._db.execute("DELETE FROM index_file")
        self._db.execute("INSERT INTO index_file VALUES (?)", (stamp,))

    def _after(self, name: str) -> str | None:
        found = self.select("SELECT name FROM versions WHERE name > ? ORDER BY name LIMIT 1", name)
        return found[0][0] if found else None

    # ---- replaying the log; call these in a transaction

    def rebuild(self, store: Store) -> list[AdapterhubError]:
        """Forget everything and replay every log; what could not be replayed is returned, and left out."""
        self._db.execute(f"PRAGMA cache_size = -{_CACHE}")
        with self.transaction():
            self._rebuilding = True  # what counts is counted in the end
            for table in FILLED:
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608
            try:
                logs = self._replay_all(store)
            finally:
                self._rebuilding = False
            self._db.execute(f"INSERT INTO facet_counts SELECT kind, value, count(*) FROM ({_SAID}) GROUP BY 1, 2")  # noqa: S608
        return [log.error for log in logs if log.error]

    def _replay_all(self, store: Store) -> list[_Log]:
        """Every log, in the order of the entries' times, so that versions have their ids in the order of their pushes."""
        logs = [_Log(store, name) for name in store.names()]
        waiting = [(log.time, log.name, log) for log in logs if log.time]
        heapq.heapify(waiting)
        while waiting:
            log = waiting[0][2]
            try:
                log.state = self._replay(store, log.state, *log.take())
            except AdapterhubError as error:
                log.error, log.time = error, ""  # nothing after it can follow
            if log.time:
                heapq.heapreplace(waiting, (log.time, log.name, log))
            else:
                heapq.heappop(waiting)
        return logs

    def catch_up(self, store: Store, name: str) -> Name:
        """Replay what the log of `name` has beyond what is known; an entry that cannot follow is an IntegrityError."""
        state = self.name(name)
        while found := store.entry(name, state.seq + 1):
            state = self._replay(store, state, *found)
        return state

    def _replay(self, store: Store, state: Name, entry: Entry, digest: Digest) -> Name:
        where = str(store.entry_path(entry.name, entry.seq))
        if entry.previous != state.head:
            raise IntegrityError(where, "does not follow the entry before it: the log was changed", "Run `adapterhub fsck`")
        try:
            return self._apply(store, state, entry, digest)
        except sqlite3.IntegrityError as error:
            raise IntegrityError(where, f"contradicts the entries before it ({error})", "Run `adapterhub fsck`") from error

    def _apply(self, store: Store, state: Name, entry: Entry, digest: Digest) -> Name:
        number = max(state.number, entry.number)
        after = Name(entry.name, entry.seq, digest, number, entry.op == "delete" or (state.deleted and entry.op != "push"))
        self._db.execute(
            "INSERT INTO names VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET seq = excluded.seq,"
            " head = excluded.head, number = excluded.number, deleted = excluded.deleted",
            (after.name, after.seq, after.head, after.number, after.deleted),
        )
        self._db.execute("INSERT OR IGNORE INTO unwritten VALUES (?)", (entry.name,))
        if entry.op == "delete":
            self._forget(store, entry.name)
        elif entry.op == "push":
            found = extract.read(store, entry.digest)
            self._add(entry, found)
            for file in found.weights:
                self.add_tensors(store, file)
        elif entry.op == "drop":
            for number in entry.numbers:
                self._forget(store, entry.name, number)
        if entry.op in ("push", "tag", "untag"):
            self._move_tags(entry)
        self._mark(entry)
        return after

    def _forget(self, store: Store, name: str, number: int | None = None) -> None:
        """Forget a name, or one version of it, which has no tag."""
        if number is None:
            where: str = "name = ?"
            values: list[object] = [name]
            self._db.execute("DELETE FROM tags WHERE name = ?", (name,))
            self._db.execute("DELETE FROM marks WHERE name = ?", (name,))
        else:
            where, values = "name = ? AND number = ?", [name, number]
            self._db.execute(
                "DELETE FROM marks WHERE kind = 'deprecate' AND name = ? AND key = CAST(? AS TEXT)", (name, number)
            )
            of_version = "DELETE FROM marks WHERE kind = 'evaluate' AND name = ? AND key LIKE ? || ' %'"
            self._db.execute(of_version, (name, str(number)))
        of_it = f"IN (SELECT id FROM versions WHERE {where})"  # noqa: S608
        self._count_facets(name, -1)
        files = self.select(f"SELECT DISTINCT digest FROM files WHERE version {of_it}", *values)  # noqa: S608
        self._db.execute(f"DELETE FROM search WHERE rowid {of_it}", values)  # noqa: S608
        for table in ("facets", "metrics", "files", "made_from"):
            self._db.execute(f"DELETE FROM {table} WHERE version {of_it}", values)  # noqa: S608
        tensor_rows.drop(self._db, (digest for (digest,) in files), store.tensors.read)
        self._db.execute(f"DELETE FROM versions WHERE {where}", values)  # noqa: S608
        self._count_facets(name, 1)

    def _add(self, entry: Entry, found: Extract) -> None:
        values = (entry.name, entry.number, entry.digest, entry.size, entry.time, *found.columns, extract.dump_parents(found))
        places = ", ".join("?" * len(values))
        self._count_facets(entry.name, -1)
        version = self._db.execute(f"INSERT INTO versions VALUES (NULL, {places})", values).lastrowid  # noqa: S608
        words = (entry.name, found.title, "", found.description, found.words, found.prose)
        self._db.execute(
            "INSERT INTO search (rowid, name, title, tags, description, facts, card) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (version, *words),
        )
        self._db.executemany("INSERT OR IGNORE INTO facets VALUES (?, ?, ?)", [(version, *facet) for facet in found.facets])
        self._db.executemany("INSERT OR IGNORE INTO metrics VALUES (?, ?, ?)", [(version, *m) for m in found.metrics.items()])
        self._db.executemany(
            "INSERT INTO files VALUES (?, ?, ?, ?)", [(digest, version, path, size) for path, digest, size in found.files]
        )
        self._db.executemany("INSERT INTO made_from VALUES (?, ?)", [(parent, version) for parent in found.parent_digests])
        self._count_facets(entry.name, 1)

    def _count_facets(self, name: str, n: int) -> None:
        """Count what the newest version of a name says `n` times more."""
        if not self._rebuilding:
            self._db.execute(
                f"INSERT INTO facet_counts SELECT kind, value, ?2 FROM ({_SAID} AND v.name = ?1) WHERE 1"  # noqa: S608
                " ON CONFLICT (kind, value) DO UPDATE SET n = n + excluded.n",
                (name, n),
            )

    def add_tensors(self, store: Store, digest: Digest) -> None:
        """Note what tensors a file of weights has, if the store says it; in a transaction."""
        tensor_rows.add(self._db, digest, store.tensors.read)

    def _move_tags(self, entry: Entry) -> None:
        before = self.tags(entry.name)
        for tag in entry.tags:
            if entry.op == "untag":
                self._db.execute("DELETE FROM tags WHERE name = ? AND tag = ?", (entry.name, tag))
            elif entry.op in ("push", "tag"):
                self._db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", (entry.name, tag, entry.number))
        # `latest` says nothing that words could find; to index it anew with each push would cost the last version's card.
        moved = [tag for tag in entry.tags if tag != LATEST]
        touched = {before[tag] for tag in moved if tag in before} | ({entry.number} if moved and entry.op != "untag" else set())
        for number in touched:
            self._db.execute(
                "UPDATE search SET tags = (SELECT coalesce(group_concat(tag, ' '), '') FROM"
                " (SELECT tag FROM tags WHERE name = ?1 AND number = ?2 AND tag != ?3 ORDER BY tag))"
                " WHERE rowid = (SELECT id FROM versions WHERE name = ?1 AND number = ?2)",
                (entry.name, number, LATEST),
            )

    def _mark(self, entry: Entry) -> None:
        number = str(entry.number)
        set_by = {
            "protect": [(tag, "") for tag in entry.tags],
            "deprecate": [(number, entry.message.encode(errors="replace").decode())],
            "keep": [("", str(entry.keep))],
        }
        for key, value in set_by.get(entry.op, ()):
            self._db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?)", (entry.name, entry.op, key, value))
        if entry.op == "evaluate" and (measured := measurement.parse(entry.message)):
            self._evaluated(entry, measured)
        undone = {
            "unprotect": [("protect", tag) for tag in entry.tags],
            "undeprecate": [("deprecate", number)],
            "keep-all": [("keep", "")],
        }
        for kind, key in undone.get(entry.op, ()):
            self._db.execute("DELETE FROM marks WHERE kind = ? AND name = ? AND key = ?", (kind, entry.name, key))

    def _evaluated(self, entry: Entry, measured: Evaluation) -> None:
        """Keep what was measured of a version, and its numbers for searches; of one name the last counts."""
        key = f"{entry.number} {measured.name}"
        self._db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?)", (entry.name, entry.op, key, measured.dump()))
        of_it = "INSERT OR REPLACE INTO metrics SELECT id, ?, ? FROM versions WHERE name = ? AND number = ?"
        self._db.executemany(of_it, [(*metric, entry.name, entry.number) for metric in measured.found_by.items()])


class _Log:
    """A name's log while all are replayed: the entry that comes next, with its time (empty when there is none)."""

    def __init__(self, store: Store, name: str) -> None:
        self.name, self.state = name, Name(name)
        self._store = store
        self.time = ""
        self._next: tuple[Entry, Digest] | None = None
        self.error: AdapterhubError | None = None
        self._read(1)

    def _read(self, seq: int) -> None:
        try:
            self._next = self._store.entry(self.name, seq)
        except AdapterhubError as error:
            self._next, self.error = None, error
        # Never before what the log said earlier: a clock that went back changes no order.
        self.time = max(self.time, self._next[0].time or "0") if self._next else ""

    def take(self) -> tuple[Entry, Digest]:
        """The next entry; the one after it is read."""
        assert self._next is not None  # noqa: S101 - it has a time
        found = self._next
        self._read(found[0].seq + 1)
        return found


def _name(row: tuple[Any, ...]) -> Name:
    name, seq, head, number, deleted = row
    return Name(name, seq, head, number, bool(deleted))


def latest_tags(tag: str | None) -> tuple[str, ...]:
    """The tags that a push moves."""
    return (LATEST,) if tag in (None, LATEST) else (LATEST, str(tag))


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_LOCK_SECONDS)


def _lacks_wal(path: Path, cause: BaseException | None) -> bool:
    """Whether an error means that the file system cannot share the memory that a write-ahead log needs, as over a network."""
    name = getattr(cause, "sqlite_errorname", "")
    with open(path, "rb") as file:
        is_wal = file.read(20)[18:] == b"\2\2"  # sqlite.org/fileformat.html, "file format version numbers"
    return is_wal and (name in ("SQLITE_CANTOPEN", "SQLITE_PROTOCOL") or name.startswith("SQLITE_IOERR_SHM"))


def _at_rest(path: Path) -> tuple[int, ...] | None:
    """What tells one state of the file from another; None while somebody has it open for writing, or it isn't there."""
    try:
        if any(os.stat(f"{path}{suffix}").st_size for suffix in ("-wal", "-journal") if os.path.exists(f"{path}{suffix}")):
            return None
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _take_name(temporary: Path, path: Path, lock: Path) -> None:
    """Give a complete database its name unless that is taken.

    What a killed process left beside one that was deleted since would be replayed into this one (sqlite.org/howtocorrupt.html,
    "Unlinking or renaming a database file while in use"). Only under a lock may it go, as it may be another's by now.
    """
    with open(lock, "rb") as file:
        wait_for(file.fileno())
        if path.exists():
            return
        for suffix in _SUFFIXES[1:]:
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # no hard links here
            os.rename(temporary, path)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """SQLite's complaints as one line with the way out."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            hint = "Another adapterhub holds it; try again when that has ended"
        else:
            hint = "Free some space and try again" if "full" in str(error) else ""
        raise LocalIOError(str(path), str(error), hint) from error
    except sqlite3.DatabaseError as error:
        raise IntegrityError(str(path), f"a broken registry ({error})", _WAY_OUT) from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
