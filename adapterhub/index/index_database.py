"""registry.db: a SQLite index of the store, so that listing, resolving and searching need not read the logs.

It contains no data of its own: it replays the logs, and a deleted one is rebuilt from them. Its write lock is also the lock
under which every writer moves refs.

The file may come from anybody. Its schema must be that of `schema`, its values must have the types of their columns, and no
statement runs longer than the size of the file justifies. What a ref means is compared with the log (`registry.log_check`).

Commands open and query it with plain `sqlite3`, which takes 10 ms to import. sqlite-utils takes 0.2 s (0.4 s of CPU time if
pandas is installed, which it imports), twice as long as `adapterhub list` runs, and is imported only to fill the tables from
logs (`migrations`, `replay.rebuild`); empty tables are created by plain SQL (`schema`).
"""

from __future__ import annotations

import functools
import os
import sqlite3
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import IntegrityError, LocalIOError, RefusedError

FILE = "registry.db"
SUFFIXES = ("", "-wal", "-shm", "-journal")
"""Of the database and the files that SQLite keeps next to it."""
APPLICATION_ID = 0x41644862  # "AdHb", at offset 68 of the file (sqlite.org/fileformat.html, "The Database Header")
VERSION = 13
"""`user_version` of a database with the current tables: the number of migrations."""
_LOCK_SECONDS = 30  # to wait for another process that holds the write lock
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # the end of a journal that names another
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 256 << 20,  # bytes of a value; a chain of pages that is a circle has no end
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 8,
}
# Steps of SQLite's virtual machine that a statement may take. In a hostile file a page may be its own child many times over,
# which makes a tree without an end. Listing a version takes some 200 steps, and its row with everything that belongs to it has
# over 1,000 bytes.
_STEPS, _STEPS_PER_BYTE = 20_000_000, 100
_TICK = 1_000_000  # steps between two calls of the handler
# Errors of SQLite that mean the file system or another process, not the contents of the file (sqlite.org/rescode.html).
_LOCAL_ERRORS = (
    "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM",
    "SQLITE_NOMEM", "SQLITE_PROTOCOL", "SQLITE_NOLFS", "SQLITE_AUTH",
)  # fmt: skip
_NONE_TYPE = type(None)
_KINDS: dict[str, set[type]] = {
    "s": {str},
    "i": {int},
    "S": {str, _NONE_TYPE},
    "I": {int, _NONE_TYPE},
    "F": {float, _NONE_TYPE},
}


class _Connection(sqlite3.Connection):
    """A connection that knows which file it is open on, by `identity`."""

    file: tuple[int, int] | None = None

    def close(self) -> None:
        self.file = None
        super().close()


_opening = threading.Lock()
_connections: weakref.WeakSet[_Connection] = weakref.WeakSet()


def is_ours(path: Path) -> bool:
    """Return True if a file is a registry.db, by its first 100 bytes or because this process has it open.

    A file that is open is not read: closing it again would release the locks that SQLite has on it for other threads
    (sqlite.org/howtocorrupt.html, 2.2), and another process could then remove the write-ahead log that they still use.
    """
    try:
        with _opening:
            if not os.path.islink(path) and identity(path) in {connection.file for connection in _connections}:
                return True
            with open_regular(path, follow=False) as file:
                head = file.read(100)
    except (OSError, RefusedError):
        return False
    return head.startswith(b"SQLite format 3\0") and head[68:72] == APPLICATION_ID.to_bytes(4, "big")


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Connect to a database file in a mode of SQLite's URIs (sqlite.org/uri.html): `ro`, `rw` or `rwc`."""
    _check_journal(path)
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with _opening:
        # Without implicit transactions: `Index.transaction` begins and ends them.
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_LOCK_SECONDS, factory=_Connection)
        connection.file = identity(path)
        _connections.add(connection)
    return _harden(connection)


def _check_journal(path: Path) -> None:
    """Raise IntegrityError for a journal that names another file: SQLite would delete that file after the rollback.

    Only a transaction over several databases writes such a name (sqlite.org/fileformat2.html, "The Rollback Journal"), and
    there are none here.
    """
    journal = Path(f"{path}-journal")
    try:
        with open_regular(journal, follow=False) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(_SUPER_JOURNAL)))
            names_another = file.read(len(_SUPER_JOURNAL)) == _SUPER_JOURNAL
    except FileNotFoundError:
        return
    except OSError as error:
        raise LocalIOError(str(journal), error.strerror or str(error)) from error
    if names_another:
        raise broken_index_error(path, "its journal names another file, which SQLite would delete")


def connect_memory() -> sqlite3.Connection:
    """Connect to a new database in memory."""
    return let_triggers_search(_harden(sqlite3.connect(":memory:", isolation_level=None)))


def _harden(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Keep a database from anybody from running code or reading other files (sqlite.org/security.html)."""
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    # mmap_size = 0: a file that is truncated meanwhile would otherwise end the process with SIGBUS.
    for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def let_triggers_search(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Let triggers write to the full-text index of a database whose schema is ours, as has been checked."""
    if not fts5_is_safe_in_triggers():
        connection.execute("PRAGMA trusted_schema = ON")
    return connection


@functools.cache
def fts5_is_safe_in_triggers() -> bool:
    """Return whether triggers of an untrusted schema may write to FTS5 tables; not in SQLite 3.40, that of Debian 12."""
    with closing(sqlite3.connect(":memory:")) as probe:
        probe.execute("PRAGMA trusted_schema = OFF")
        probe.execute("CREATE TABLE texts (text)")
        probe.execute("CREATE VIRTUAL TABLE texts_fts USING fts5 (text)")
        probe.execute("CREATE TRIGGER texts_ai AFTER INSERT ON texts BEGIN INSERT INTO texts_fts VALUES (new.text); END")
        try:
            probe.execute("INSERT INTO texts VALUES ('')")
        except sqlite3.OperationalError:
            return False
        return True


def identity(path: Path) -> tuple[int, int]:
    """Return device and inode of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


class Index:
    """An open registry.db. Create one with `index_opening.create_index`, open one with `index_opening.open_index`.

    Attributes:
        path: The file, also for a copy in memory.
        connection: The connection, in autocommit mode.
        file: Device and inode of the file that was opened; None for a database in memory.
        left_out: The names that statements skip with `NOT left_out(name)`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, file: tuple[int, int] | None = None) -> None:
        self.path = path
        self.connection = connection
        self.file = file
        self.left_out: Collection[object] = ()
        self._steps = 0
        self._holds_lock = False
        connection.set_progress_handler(self._tick, _TICK)
        # A weak reference: SQLite holds the function, which the garbage collector does not see, so self would never be freed.
        index_ref = weakref.ref(self)
        connection.create_function("left_out", 1, lambda name: (index := index_ref()) is not None and name in index.left_out)

    def _tick(self) -> bool:
        """Count the steps of a statement; return True, which interrupts it, if no database of this size justifies them."""
        self._steps += _TICK
        return self._steps > _STEPS and self._steps > _STEPS + _STEPS_PER_BYTE * self._size()

    def _size(self) -> int:
        """Return the bytes of the file and its write-ahead log; for a database in memory, a number without effect."""
        if self.file is None:
            return 1 << 40
        return sum(os.stat(path).st_size for path in (self.path, f"{self.path}-wal") if os.path.exists(path))

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def is_replaced(self) -> bool:
        """Return True if the file was deleted or replaced since it was opened, so that its lock excludes nobody."""
        if self.file is None:
            return False
        try:
            return identity(self.path) != self.file
        except FileNotFoundError:
            return True

    @property
    def version(self) -> int:
        """`user_version` of the database."""
        return int(self.select("PRAGMA user_version")[0][0])

    @property
    def in_transaction(self) -> bool:
        """Whether the write lock is held."""
        return self._holds_lock

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; commit at the end, or roll back after an error. A nested call joins the outer transaction."""
        if self._holds_lock:
            yield
            return
        with errors(self.path):
            # IMMEDIATE takes the write lock now; a lock taken at the first write could find that what was read is outdated.
            self.connection.execute("BEGIN IMMEDIATE")
            self._holds_lock = True
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
            finally:
                self._holds_lock = False

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read as of one moment in the block, which takes no lock; in a transaction or snapshot, join that."""
        if self.connection.in_transaction:
            yield
            return
        with errors(self.path):
            self.connection.execute("BEGIN")
        try:
            yield
        finally:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def select(self, sql: str, *values: object, kinds: str = "") -> list[tuple[Any, ...]]:
        """Return the rows of a query.

        Args:
            sql: The statement.
            values: Its parameters.
            kinds: A letter for each column: `s` for text, `i` for an integer; upper-case letters, and `F` for a float, allow
                NULL.

        Raises:
            IntegrityError: A value is not of its column's kind: a file can have values that its STRICT tables would not accept.
        """
        self._steps = 0
        with errors(self.path):
            rows = self.connection.execute(sql, values).fetchall()
        for kind, column in zip(kinds, zip(*rows, strict=True), strict=False):
            if not set(map(type, column)) <= _KINDS[kind]:
                raise broken_index_error(self.path, "a value has the wrong type")
        return rows

    def execute(self, sql: str, *values: object) -> int | None:
        """Run a statement in a transaction; return the id of the row it inserted."""
        self._steps = 0
        return self.connection.execute(sql, values).lastrowid

    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement for each of `rows`, in a transaction."""
        self._steps = 0
        self.connection.executemany(sql, rows)


@contextmanager
def errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a LocalIOError or an IntegrityError with a way to fix them; constraint violations pass."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        if not (
            isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorname", "").startswith(_LOCAL_ERRORS)
        ):
            problem = "a query does not end" if getattr(error, "sqlite_errorname", "") == "SQLITE_INTERRUPT" else str(error)
            raise broken_index_error(path, problem) from error
        if "locked" in str(error):
            hint = "Try again when the other adapterhub process has ended"
        else:
            hint = "Free some space and try again" if "full" in str(error) else ""
        raise LocalIOError(str(path), str(error), hint) from error
    except UnicodeDecodeError as error:  # SQLite quoted bytes of the file in its message
        raise broken_index_error(path, "damaged") from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def broken_index_error(path: Path, problem: str) -> IntegrityError:
    """Return the error for a database that cannot be used."""
    return IntegrityError(str(path), f"a broken registry ({problem})", "Rebuild the index", code="broken-index")


def remove(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Remove a database file and the files that SQLite keeps next to it."""
    for suffix in suffixes:
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def rename(path: Path, to: str) -> None:
    """Rename a database file and the files that SQLite keeps next to it."""
    with errors(path):
        for suffix in SUFFIXES:
            if os.path.exists(f"{path}{suffix}"):
                os.replace(f"{path}{suffix}", f"{to}{suffix}")
