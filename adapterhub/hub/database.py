"""hub.db: what a hub knows and no registry: accounts and who enters, tokens, sessions, its secret, uploads, forms, mirrors.

Next to registry.db, and unlike it not derived from anything: back it up. Only its owner can read the file. Each thread has its
own connection, in SQLite's write-ahead mode, in which reading never waits for writing.

A hub of several machines has the same tables in PostgreSQL (`storage.postgres`), which runs the same statements. So they are
what both understand: `?` for a value and nowhere else, `ON CONFLICT … DO …` rather than `INSERT OR …`, whole numbers for
truths. Only the statements that create tables are in SQLite's words.
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
_WAIT = 30  # seconds for the lock of another process
# The statements that bring the database from each version to the next; `user_version` counts them.
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
    """A statement would break a constraint of a table; the transaction that it is in can only end."""


class HubDatabase:
    """An open hub.db, created if it is missing.

    Attributes:
        where: Its path, or the address of another database, for errors.
    """

    _parameters: str = "mode=rw"
    _pragmas: tuple[str, ...] = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", _UNTRUSTED)

    def __init__(self, folder: Path) -> None:
        self._at(folder / FILE)
        with self._errors():
            if self.path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            # Only a new file: to close one that a connection of this process has open would release the locks of SQLite.
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        self._migrate()

    def _at(self, path: Path) -> None:
        self.path, self.where = path, str(path)
        self._local = threading.local()
        self._open: list[sqlite3.Connection] = []

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._open:
            connection.close()

    def copy(self, path: Path) -> None:
        """Write a copy, as of one moment, to a new file."""
        with self._errors(), closing(sqlite3.connect(path)) as to:
            self._connection().backup(to)
            to.execute("PRAGMA journal_mode = DELETE")

    def select(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        with self._errors():
            return self._connection().execute(sql, values).fetchall()

    def execute(self, sql: str, *values: object) -> int:
        """Run a statement; return the number of rows that it changed."""
        with self._errors():
            return self._connection().execute(sql, values).rowcount

    def execute_many(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        """Run a statement for each of `rows`."""
        with self.transaction(), self._errors():
            self._connection().executemany(sql, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; commit at the end, or roll back after an error."""
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
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            # Not created here: an empty file in place of one that is away for a while would stay open.
            where = f"{self.path.absolute().as_uri()}?{self._parameters}"
            found = sqlite3.connect(where, uri=True, isolation_level=None, timeout=_WAIT, check_same_thread=False)
            for pragma in self._pragmas:
                found.execute(f"PRAGMA {pragma}")
            self._local.connection = found
            self._open.append(found)
        return found

    def has_table(self, name: str) -> bool:
        """Return True if there is a table of this name."""
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
            raise LocalIOError(self.where, str(error)) from error


class ReadDatabase(HubDatabase):
    """A hub.db as it is, of any version and of any owner, which is only read: neither it nor what is next to it is changed.

    To read a database in write-ahead mode, SQLite needs files next to it, which are there if a hub runs or was killed. Else the
    database is whole and does not change; or the folder is a copy without them, and they are made elsewhere.
    """

    _parameters = "mode=ro"
    _pragmas = ("query_only = ON", _UNTRUSTED)

    def __init__(self, folder: Path) -> None:
        self._at(folder / FILE)
        self._copied: tempfile.TemporaryDirectory[str] | None = None
        with self._errors():
            if not stat.S_ISREG(self.path.lstat().st_mode):  # not opened: to close it would release SQLite's locks
                raise OSError(errno.EINVAL, "is no regular file")
            writes, shared = (self.path.with_name(f"{FILE}-{suffix}") for suffix in ("wal", "shm"))
            if shared.exists():
                return
            if not writes.exists() or not writes.stat().st_size:
                self._parameters = "mode=ro&immutable=1"
            else:
                self._copied = tempfile.TemporaryDirectory(prefix="adapterhub-")
                for path in (self.path, writes):
                    shutil.copyfile(path, Path(self._copied.name) / path.name)
                self.path = Path(self._copied.name) / FILE

    def close(self) -> None:
        """Close the connections."""
        super().close()
        if self._copied:
            self._copied.cleanup()
