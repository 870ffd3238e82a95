"""registry.db: an index of the store's logs, in SQLite, so that listing and resolving need not read them.

It holds nothing of its own: it replays the logs, and deleted it is rebuilt. Its write lock is also the lock under which
every writer moves refs. Plain `sqlite3`, as a command that resolves a ref must start fast. STRICT tables need SQLite 3.37.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, NotFoundError, RefusedError

from . import manifest
from .digest import Digest
from .ref import LATEST, Ref
from .store import Entry, Store

FILE = "registry.db"
APPLICATION_ID = 0x41644862  # "AdHb", at offset 68 of the file (sqlite.org/fileformat.html, "The Database Header")
_WAY_OUT = "`adapterhub fsck --rebuild-index` makes it anew from .adapterhub beside it, and keeps this one as registry.db.old"
_LOCK_SECONDS = 30
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
    """One version as lists show it. `size` is the bytes of its files; what its facts don't say is None."""

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
    licence: str | None
    description: str | None
    tags: tuple[str, ...] = ()

    @property
    def ref(self) -> Ref:
        """The name with the running number."""
        return Ref(self.name, number=self.number)


_SUMMARY: dict[str, type] = {
    "size": int, "base": str, "revision": str, "method": str, "r": int, "alpha": float, "format": str, "dtype": str,
    "parameters": int, "licence": str, "description": str,
}  # fmt: skip


def _v1(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE names (name TEXT PRIMARY KEY, seq INTEGER NOT NULL, head TEXT NOT NULL, number INTEGER NOT NULL,"
        " deleted INTEGER NOT NULL) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE versions (name TEXT NOT NULL REFERENCES names, number INTEGER NOT NULL, digest TEXT NOT NULL,"
        " manifest_size INTEGER NOT NULL, time TEXT NOT NULL, size INTEGER, base TEXT, revision TEXT, method TEXT, r INTEGER,"
        " alpha REAL, format TEXT, dtype TEXT, parameters INTEGER, licence TEXT, description TEXT,"
        " PRIMARY KEY (name, number), UNIQUE (name, digest)) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE tags (name TEXT NOT NULL, tag TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, tag),"
        " FOREIGN KEY (name, number) REFERENCES versions) STRICT, WITHOUT ROWID"
    )


def _v2(db: sqlite3.Connection) -> None:
    """What logs say besides where refs are: `kind` is an operation of `Entry`, `key` a tag or a version's number."""
    db.execute(
        "CREATE TABLE marks (name TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,"
        " PRIMARY KEY (kind, name, key)) STRICT, WITHOUT ROWID"
    )


Migration = Callable[[sqlite3.Connection], None]
MIGRATIONS: list[Migration] = [_v1, _v2]


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
                    _take_name(temporary, path)
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
            if not _lacks_wal(path, error.__cause__):
                raise
        cls.create(path, store, instead=True)
        return cls._open(path, store)

    @classmethod
    def _open(cls, path: Path, store: Store) -> Catalog:
        with _errors(path):
            identity = _identity(path)
            db = _connect(path, "rw")
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
        if catalog._all("SELECT 1 FROM sqlite_master") and (before != _at_rest(path) or not catalog._is_whole()):
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
        ((version,),) = self._all("PRAGMA user_version")
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

    def _all(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with _errors(self.path):
            return self._db.execute(sql, values).fetchall()

    # ---- what it says

    def name(self, name: str) -> Name:
        """Where the log of `name` stood when it was last replayed; number 0 for one never seen."""
        found = self._all("SELECT name, seq, head, number, deleted FROM names WHERE name = ?", name)
        return _name(found[0]) if found else Name(name)

    def names(self) -> list[Name]:
        """Every name, sorted, deleted ones too."""
        return [_name(row) for row in self._all("SELECT name, seq, head, number, deleted FROM names ORDER BY name")]

    def rows(self, where: str = "1", *values: object) -> list[Row]:
        """The versions that match a condition, by name, newest first."""
        columns = ", ".join(("name", "number", "digest", "manifest_size", "time", *_SUMMARY))
        tags = "(SELECT group_concat(tag) FROM tags t WHERE t.name = versions.name AND t.number = versions.number)"
        sql = f"SELECT {columns}, {tags} FROM versions WHERE {where} ORDER BY name, number DESC"  # noqa: S608
        found = []
        for *fields, joined in self._all(sql, *values):
            fields.append(tuple(sorted(joined.split(",") if joined else ())))
            found.append(Row(*fields))
        return found

    def tags(self, name: str) -> dict[str, int]:
        """Tag to running number, sorted."""
        return dict(self._all("SELECT tag, number FROM tags WHERE name = ? ORDER BY tag", name))

    def marks(self, kind: str, name: str) -> dict[str, str]:
        """What the log of a name says of one kind: `protect` tag to nothing, `deprecate` number or 0 to why, `keep`."""
        return dict(self._all("SELECT key, value FROM marks WHERE kind = ? AND name = ?", kind, name))

    def deprecations(self) -> dict[tuple[str, int], str]:
        """Why versions, and with the number 0 whole names, should not be used any more."""
        found = self._all("SELECT name, key, value FROM marks WHERE kind = 'deprecate'")
        return {(name, int(key)): value for name, key, value in found}

    def stamp(self) -> str:
        """What `index_stamp` of the store was when the logs were last replayed."""
        return self.marks("stamp", "").get("", "")

    def set_stamp(self, stamp: str) -> None:
        """Remember that the logs are replayed up to there; in a transaction."""
        self._db.execute("INSERT OR REPLACE INTO marks VALUES ('', 'stamp', '', ?)", (stamp,))

    def is_replaced(self) -> bool:
        """Whether the file was deleted or replaced since it was opened, so that its lock keeps nobody out."""
        if self._file is None:
            return False
        try:
            return _identity(self.path) != self._file
        except FileNotFoundError:
            return True

    def index(self) -> list[tuple[str, Digest, int]]:
        """What index.json says: every version by number, then every tag."""
        numbers = "SELECT name || ':v' || number, digest, manifest_size FROM versions ORDER BY name, number"
        tags = (
            "SELECT name || ':' || tag, digest, manifest_size FROM tags JOIN versions USING (name, number) ORDER BY name, tag"
        )
        return self._all(numbers) + self._all(tags)

    # ---- replaying the log; call these in a transaction

    def rebuild(self, store: Store) -> list[AdapterhubError]:
        """Forget everything and replay every log; what could not be replayed is returned, and left out."""
        errors = []
        with self.transaction():
            for table in ("marks", "tags", "versions", "names"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608
            for name in store.names():
                try:
                    self.catch_up(store, name)
                except AdapterhubError as error:
                    errors.append(error)
        return errors

    def catch_up(self, store: Store, name: str) -> Name:
        """Replay what the log of `name` has beyond what is known; an entry that cannot follow is an IntegrityError."""
        state = self.name(name)
        while found := store.entry(name, state.seq + 1):
            entry, digest = found
            where = str(store.entry_path(name, entry.seq))
            if entry.previous != state.head:
                raise IntegrityError(where, "does not follow the entry before it: the log was changed", "Run `adapterhub fsck`")
            try:
                state = self._apply(store, state, entry, digest)
            except sqlite3.IntegrityError as error:
                raise IntegrityError(where, f"contradicts the entries before it ({error})", "Run `adapterhub fsck`") from error
        return state

    def _apply(self, store: Store, state: Name, entry: Entry, digest: Digest) -> Name:
        number = max(state.number, entry.number)
        after = Name(entry.name, entry.seq, digest, number, entry.op == "delete" or (state.deleted and entry.op != "push"))
        self._db.execute(
            "INSERT INTO names VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET seq = excluded.seq,"
            " head = excluded.head, number = excluded.number, deleted = excluded.deleted",
            (after.name, after.seq, after.head, after.number, after.deleted),
        )
        if entry.op == "delete":
            self._db.execute("DELETE FROM tags WHERE name = ?", (entry.name,))
            self._db.execute("DELETE FROM versions WHERE name = ?", (entry.name,))
            self._db.execute("DELETE FROM marks WHERE name = ?", (entry.name,))
        elif entry.op == "push":
            values = [entry.name, entry.number, entry.digest, entry.size, entry.time, *_summary(store, entry.digest)]
            self._db.execute(f"INSERT INTO versions VALUES ({', '.join('?' * len(values))})", values)  # noqa: S608
        elif entry.op == "drop":
            of = [(entry.name, number) for number in entry.numbers]
            self._db.executemany("DELETE FROM versions WHERE name = ? AND number = ?", of)
            self._db.executemany("DELETE FROM marks WHERE kind = 'deprecate' AND name = ? AND key = CAST(? AS TEXT)", of)
        self._move_tags(entry)
        self._mark(entry)
        return after

    def _move_tags(self, entry: Entry) -> None:
        for tag in entry.tags:
            if entry.op == "untag":
                self._db.execute("DELETE FROM tags WHERE name = ? AND tag = ?", (entry.name, tag))
            elif entry.op in ("push", "tag"):
                self._db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", (entry.name, tag, entry.number))

    def _mark(self, entry: Entry) -> None:
        number = str(entry.number)
        set_by = {
            "protect": [(tag, "") for tag in entry.tags],
            "deprecate": [(number, entry.message.encode(errors="replace").decode())],
            "keep": [("", str(entry.keep))],
        }
        for key, value in set_by.get(entry.op, ()):
            self._db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?)", (entry.name, entry.op, key, value))
        undone = {
            "unprotect": [("protect", tag) for tag in entry.tags],
            "undeprecate": [("deprecate", number)],
            "keep-all": [("keep", "")],
        }
        for kind, key in undone.get(entry.op, ()):
            self._db.execute("DELETE FROM marks WHERE kind = ? AND name = ? AND key = ?", (kind, entry.name, key))


def _summary(store: Store, digest: Digest) -> list[object]:
    """What lists show of a version; None for what can't be read or isn't what it should be, so that it hides no others."""
    try:
        found = manifest.parse(store.read_document(digest), digest)
        layer = found.facts
        facts = manifest.parse_json(store.read_document(layer.digest), digest) if layer else {}
    except AdapterhubError:
        return [None] * len(_SUMMARY)
    base = facts.get("base")
    values = {
        **facts,
        "size": found.size,
        "base": base.get("repo") if isinstance(base, dict) else None,
        "revision": base.get("revision") if isinstance(base, dict) else None,
    }
    return [_column(values.get(key), kind) for key, kind in _SUMMARY.items()]


def _column(value: object, kind: type) -> object:
    """`value` if SQLite can hold it in a column of that kind, else None."""
    if isinstance(value, str):
        return value if kind is str and value.encode(errors="replace").decode() == value else None
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not isinstance(value, int)):
        return None
    return value if kind is not str and abs(value) < 2**63 else None


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


def _take_name(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:  # no hard links here
        if not path.exists():
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
