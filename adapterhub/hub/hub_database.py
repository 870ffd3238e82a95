"""hub.db: what only the hub knows: accounts, members, tokens, sessions, its secret, uploads, conversions, mirrored commits.

It lies next to registry.db but, unlike that, is not derived from anything: back it up. Only its owner can read the file. Each
thread has its own connection, in SQLite's write-ahead mode, in which readers never wait for writers.

A hub on several machines has the same tables in PostgreSQL (`storage.postgres`), which runs the same statements. They therefore
use only what both understand: `?` for values and nowhere else, `ON CONFLICT … DO …` rather than `INSERT OR …`, integers for
booleans. Only the statements that create tables are in SQLite's dialect.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import LocalIOError, RefusedError

FILE = "hub.db"
_LOCK_TIMEOUT = 30  # seconds to wait for the lock of another process
# The statements that take the database from each version to the next; `user_version` counts them. Never edit one: append.
MIGRATIONS = (
    """
    CREATE TABLE accounts (name TEXT PRIMARY KEY, created TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE tokens (
        id INTEGER PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts, hash TEXT NOT NULL UNIQUE, prefix TEXT NOT NULL,
        role TEXT NOT NULL, namespaces TEXT NOT NULL, kind TEXT NOT NULL, created REAL NOT NULL, expires REAL, revoked REAL,
        used REAL
    ) STRICT;
    CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE uploaded (name TEXT NOT NULL, digest TEXT NOT NULL, time REAL NOT NULL, PRIMARY KEY (name, digest))
        STRICT, WITHOUT ROWID;
    """,
    "CREATE TABLE xet_epochs (id TEXT PRIMARY KEY, since REAL NOT NULL) STRICT, WITHOUT ROWID",
    """
    CREATE TABLE sha512 (digest TEXT PRIMARY KEY, sha256 TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE INDEX sha512_sha256 ON sha512 (sha256);
    CREATE TABLE forms (source TEXT NOT NULL, form TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (source, form))
        STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE accounts ADD COLUMN removed REAL;
    CREATE TABLE members (
        namespace TEXT NOT NULL, account TEXT NOT NULL REFERENCES accounts, role TEXT NOT NULL, PRIMARY KEY (namespace, account)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE namespaces (
        name TEXT PRIMARY KEY, readers TEXT NOT NULL, max_bytes INTEGER, max_files INTEGER
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE sessions (id TEXT PRIMARY KEY, token INTEGER NOT NULL REFERENCES tokens, expires REAL NOT NULL)
        STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE devices (
        hash TEXT PRIMARY KEY, code TEXT NOT NULL UNIQUE, address TEXT NOT NULL, expires REAL NOT NULL, polled REAL NOT NULL,
        answer TEXT, account TEXT, role TEXT, namespaces TEXT, kind TEXT
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE refreshes (
        hash TEXT PRIMARY KEY, family TEXT NOT NULL, token INTEGER NOT NULL REFERENCES tokens, expires REAL NOT NULL, used REAL
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY, time REAL NOT NULL, account TEXT NOT NULL, token TEXT NOT NULL, action TEXT NOT NULL,
        name TEXT NOT NULL, detail TEXT NOT NULL, address TEXT NOT NULL, hash TEXT NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE webhooks (
        id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, url TEXT NOT NULL, secret TEXT NOT NULL, private INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE deliveries (
        id INTEGER PRIMARY KEY AUTOINCREMENT, webhook INTEGER NOT NULL REFERENCES webhooks, event TEXT NOT NULL,
        body TEXT NOT NULL, due REAL NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL, error TEXT NOT NULL
    ) STRICT;
    CREATE INDEX deliveries_due ON deliveries (state, due)
    """,
    """
    CREATE TABLE publishers (
        id INTEGER PRIMARY KEY, scope TEXT NOT NULL, issuer TEXT NOT NULL, claims TEXT NOT NULL,
        account TEXT NOT NULL REFERENCES accounts
    ) STRICT;
    CREATE TABLE exchanged (ident TEXT PRIMARY KEY, expires REAL NOT NULL) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE mirrored (
        name TEXT NOT NULL, origin TEXT NOT NULL, digest TEXT NOT NULL, time REAL NOT NULL, PRIMARY KEY (name, origin)
    ) STRICT, WITHOUT ROWID
    """,
    "ALTER TABLE namespaces ADD COLUMN adapters_only INTEGER NOT NULL DEFAULT 0",
    """
    DELETE FROM xet_epochs;
    ALTER TABLE xet_epochs ADD COLUMN name TEXT NOT NULL DEFAULT '';
    CREATE INDEX xet_epochs_name ON xet_epochs (name)
    """,
    """
    CREATE TABLE identities (
        issuer TEXT NOT NULL, subject TEXT NOT NULL, account TEXT NOT NULL REFERENCES accounts, linked INTEGER NOT NULL,
        PRIMARY KEY (issuer, subject)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE admissions (
        id INTEGER PRIMARY KEY, issuer TEXT NOT NULL, claims TEXT NOT NULL, namespace TEXT NOT NULL, role TEXT NOT NULL
    ) STRICT;
    ALTER TABLE members ADD COLUMN admission INTEGER
    """,
    "CREATE TABLE jobs (job TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) STRICT, WITHOUT ROWID",
    """
    ALTER TABLE webhooks ADD COLUMN since TEXT NOT NULL DEFAULT '';
    CREATE TABLE announced (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE arriving (id TEXT PRIMARY KEY, name TEXT NOT NULL, size INTEGER NOT NULL, until REAL NOT NULL)
        STRICT, WITHOUT ROWID;
    CREATE INDEX arriving_name ON arriving (name)
    """,
    "CREATE TABLE moves (new TEXT PRIMARY KEY, old TEXT NOT NULL, account TEXT NOT NULL) STRICT, WITHOUT ROWID",
)


_UNTRUSTED = "trusted_schema = OFF"


class ConstraintError(Exception):
    """A statement would break a constraint of a table; its transaction can only be rolled back."""


class HubDatabase:
    """An open hub.db, created if missing.

    Attributes:
        where: Its path, or the address of another database, for errors.
    """

    _parameters: str = "mode=rw"
    _pragmas: tuple[str, ...] = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", _UNTRUSTED)

    def __init__(self, folder: Path) -> None:
        self._set_path(folder / FILE)
        with self._errors():
            if self.path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            # Never open and close an existing file: closing it would release this process's SQLite locks (POSIX advisory
            # locks).
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        self._migrate()

    def _set_path(self, path: Path) -> None:
        self.path, self.location = path, str(path)
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
        """Run a statement once for each of `rows`, in one transaction."""
        with self.transaction(), self._errors():
            self._connection().executemany(sql, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock for the block; commit at its end, or roll back after an error."""
        with self._errors():
            self._connection().execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection().execute("ROLLBACK")
            raise
        with self._errors():
            self._connection().execute("COMMIT")

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # Do not create the file here: if it is away for a moment, as on a network disk, an empty one would take its place.
            uri = f"{self.path.absolute().as_uri()}?{self._parameters}"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_LOCK_TIMEOUT, check_same_thread=False)
            for pragma in self._pragmas:
                connection.execute(f"PRAGMA {pragma}")
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    def has_table(self, name: str) -> bool:
        """Return whether a table of this name exists."""
        return bool(self.select("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", name))

    def _migrate(self) -> None:
        with self.transaction():
            version = self.select("PRAGMA user_version")[0][0]
            if version > len(MIGRATIONS):
                raise RefusedError(str(self.path), "a newer adapterhub made it", "Upgrade adapterhub", code="newer-version")
            for script in MIGRATIONS[version:]:
                for statement in script.split(";"):
                    self.execute(statement)
            self.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.DatabaseError) as error:
            if isinstance(error, sqlite3.IntegrityError):
                raise ConstraintError(str(error)) from error
            raise LocalIOError(self.location, str(error)) from error


class ReadDatabase(HubDatabase):
    """A hub.db of any version and owner, opened only for reading: neither it nor the files next to it are changed.

    To read a database in write-ahead mode, SQLite needs its -wal and -shm files, which exist if a hub is running or was killed.
    Otherwise the database is complete and does not change, or the folder is a copy without them: then they are created
    elsewhere.
    """

    _parameters = "mode=ro"
    _pragmas = ("query_only = ON", _UNTRUSTED)

    def __init__(self, folder: Path) -> None:
        self._set_path(folder / FILE)
        self._copy_folder: tempfile.TemporaryDirectory[str] | None = None
        with self._errors():
            if not stat.S_ISREG(self.path.lstat().st_mode):  # lstat, not open: closing the file would release SQLite's locks
                raise OSError(errno.EINVAL, "is no regular file")
            wal, shm = (self.path.with_name(f"{FILE}-{suffix}") for suffix in ("wal", "shm"))
            if shm.exists():
                return
            if not wal.exists() or not wal.stat().st_size:
                self._parameters = "mode=ro&immutable=1"
            else:
                self._copy_folder = tempfile.TemporaryDirectory(prefix="adapterhub-")
                for path in (self.path, wal):
                    shutil.copyfile(path, Path(self._copy_folder.name) / path.name)
                self.path = Path(self._copy_folder.name) / FILE

    def close(self) -> None:
        """Close the connections, and delete the temporary copy."""
        super().close()
        if self._copy_folder:
            self._copy_folder.cleanup()
