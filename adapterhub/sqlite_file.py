"""A database of SQLite that is not derived from anything else: its tables grow by migrations, and each thread has a connection.

It is in SQLite's write-ahead mode, in which readers never wait for writers, and several processes may use it.

A function that asks a database more than once is decorated with `of_one_snapshot`, so that its answers agree.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from adapterhub_converters.errors import LocalIOError, RefusedError

UNTRUSTED = "trusted_schema = OFF"
_LOCK_SECONDS = 30.0
_BUSY_SECONDS = 0.01  # between two tries to set a pragma


class _Database(Protocol):
    def snapshot(self) -> AbstractContextManager[None]: ...


D = TypeVar("D", bound=_Database)
P = ParamSpec("P")
T = TypeVar("T")


def of_one_snapshot(function: Callable[Concatenate[D, P], T]) -> Callable[Concatenate[D, P], T]:
    """Make a function read a database, its first argument, as of one moment, however many statements it runs."""

    @functools.wraps(function)
    def wrapper(database: D, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with database.snapshot():
            return function(database, *args, **kwargs)

    return wrapper


class _RollbackError(Exception):
    """Ends a rehearsal."""


class ConstraintError(Exception):
    """A statement would break a constraint of a table; its transaction can only be rolled back."""


class SqliteFile:
    """An open database of SQLite, created if missing; only its owner can read the file.

    Args:
        migrations: The statements that take it from each version to the next.
        lock_seconds: Seconds to wait for the lock of another process.

    Attributes:
        location: Its path, or the address of another database, for errors.
    """

    _parameters: str = "mode=rw"
    _pragmas: tuple[str, ...] = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", UNTRUSTED)

    def __init__(self, path: Path, migrations: Sequence[str], *, lock_seconds: float = _LOCK_SECONDS) -> None:
        self._set_path(path, lock_seconds)
        self._migrations = migrations
        with self._errors():
            if self.path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            # Never open and close an existing file: closing it would release this process's SQLite locks (POSIX advisory
            # locks).
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        self._migrate()

    def _set_path(self, path: Path, lock_seconds: float = _LOCK_SECONDS) -> None:
        self.path, self.location, self._lock_seconds = path, str(path), lock_seconds
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._connections:
            connection.close()

    def copy(self, path: Path) -> None:
        """Write a consistent copy to a new file."""
        with self._errors(), closing(sqlite3.connect(path)) as target:
            self._connection().backup(target)
            target.execute("PRAGMA journal_mode = DELETE")

    def select(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with self._errors():
            return self._connection().execute(sql, values).fetchall()

    def execute(self, sql: str, *values: object) -> int:
        """Run a statement, and return the number of rows it changed."""
        with self._errors():
            return self._connection().execute(sql, values).rowcount

    def execute_many(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        """Run a statement once for each of `rows`, in one transaction, or in that of this thread."""
        with nullcontext() if self._connection().in_transaction else self.transaction(), self._errors():
            self._connection().executemany(sql, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock for the block; commit at its end, or roll back after an error. In a rehearsal, join that."""
        if self.is_rehearsing:
            yield
            return
        with self._errors():
            self._connection().execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._connection().in_transaction:  # a full disk, for one, has ended it already
                self._connection().execute("ROLLBACK")
            raise
        with self._errors():
            self._connection().execute("COMMIT")

    @property
    def is_rehearsing(self) -> bool:
        """Whether this thread is in the block of a `rehearsal`."""
        return getattr(self._local, "is_rehearsing", False)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Roll back, at the end of the block, everything that this thread has changed in it."""
        with suppress(_RollbackError), self.transaction():
            self._local.is_rehearsing = True
            try:
                yield
            finally:
                self._local.is_rehearsing = False
            raise _RollbackError

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read as of one moment in the block, which changes nothing; in a transaction or snapshot of this thread, join that."""
        if self._connection().in_transaction:
            yield
            return
        with self._errors():
            self._connection().execute("BEGIN")
        try:
            yield
        finally:
            if self._connection().in_transaction:
                self._connection().execute("ROLLBACK")

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # Do not create the file here: if it is away for a moment, as on a network disk, an empty one would take its place.
            uri = f"{self.path.absolute().as_uri()}?{self._parameters}"
            connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, timeout=self._lock_seconds, check_same_thread=False
            )
            for pragma in self._pragmas:
                self._set(connection, pragma)
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    def _set(self, connection: sqlite3.Connection, pragma: str) -> None:
        """Set a pragma, waiting for other processes: SQLite itself does not when the first ones of a file choose its mode."""
        deadline = time.monotonic() + self._lock_seconds
        while True:
            try:
                connection.execute(f"PRAGMA {pragma}")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(_BUSY_SECONDS)

    def has_table(self, name: str) -> bool:
        """Return whether a table of this name exists."""
        return bool(self.select("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", name))

    def _migrate(self) -> None:
        with self.transaction():
            version = self.select("PRAGMA user_version")[0][0]
            if version > len(self._migrations):
                raise RefusedError(str(self.path), "a newer adapterhub made it", "Upgrade adapterhub", code="newer-store")
            for script in self._migrations[version:]:
                for statement in script.split(";"):
                    self.execute(statement)
            self.execute(f"PRAGMA user_version = {len(self._migrations)}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.DatabaseError) as error:
            if isinstance(error, sqlite3.IntegrityError):
                raise ConstraintError(str(error)) from error
            raise LocalIOError(self.location, str(error)) from error


class SqliteReader(SqliteFile):
    """A database of any version and owner, opened only for reading: neither it nor the files next to it are changed.

    To read a database in write-ahead mode, SQLite needs its -wal and -shm files, which exist if a process has it open, or was
    killed. Otherwise the database is complete and does not change, or the folder is a copy without them: then they are created
    elsewhere.
    """

    _parameters = "mode=ro"
    _pragmas = ("query_only = ON", UNTRUSTED)

    def __init__(self, path: Path) -> None:
        self._set_path(path)
        self._copy_folder: tempfile.TemporaryDirectory[str] | None = None
        with self._errors():
            if not stat.S_ISREG(self.path.lstat().st_mode):  # lstat, not open: closing the file would release SQLite's locks
                raise OSError(errno.EINVAL, "is no regular file")
            wal, shm = (self.path.with_name(f"{path.name}-{suffix}") for suffix in ("wal", "shm"))
            if shm.exists():
                return
            if not wal.exists() or not wal.stat().st_size:
                self._parameters = "mode=ro&immutable=1"
            else:
                self._copy_folder = tempfile.TemporaryDirectory(prefix="adapterhub-")
                for source in (self.path, wal):
                    shutil.copyfile(source, Path(self._copy_folder.name) / source.name)
                self.path = Path(self._copy_folder.name) / path.name

    def close(self) -> None:
        """Close the connections, and delete the temporary copy."""
        super().close()
        if self._copy_folder:
            self._copy_folder.cleanup()
