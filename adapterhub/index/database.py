"""registry.db: a SQLite index of the store, so that listing, resolving and searching need not read the logs.

It contains no data of its own: it replays the logs, and a deleted one is rebuilt from them. Its write lock is also the lock
under which every writer moves refs.

Commands open and query it with plain `sqlite3`, which takes 10 ms to import. sqlite-utils takes 0.2 s (0.4 s of CPU time where
pandas is installed, which it imports), twice as long as `adapterhub list` runs, and is imported only to migrate or rebuild
the tables (`migrations`, `replay.rebuild`); new ones are created by plain SQL (`schema`).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import IntegrityError, LocalIOError, RefusedError

FILE = "registry.db"
SUFFIXES = ("", "-wal", "-shm", "-journal")
"""Of the database and the files that SQLite keeps next to it."""
APPLICATION_ID = 0x41644862  # "AdHb", at offset 68 of the file (sqlite.org/fileformat.html, "The Database Header")
VERSION = 8
"""`user_version` of a database with the current tables: the number of migrations."""
_LOCK_SECONDS = 30


def is_ours(path: Path) -> bool:
    """Return True if a file is a registry.db, by its first 100 bytes."""
    try:
        with open_regular(path, follow=False) as file:
            head = file.read(100)
    except (OSError, RefusedError):
        return False
    return head.startswith(b"SQLite format 3\0") and head[68:72] == APPLICATION_ID.to_bytes(4, "big")


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Connect to a database file in a mode of SQLite's URIs (sqlite.org/uri.html): `ro`, `rw` or `rwc`."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_LOCK_SECONDS)


def identity(path: Path) -> tuple[int, int]:
    """Return device and inode of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


class Index:
    """An open registry.db. Use `opening.create_index` and `opening.open_index`.

    Attributes:
        path: The file, also of a copy in memory.
        connection: The connection, in autocommit mode.
        file: Device and inode of the file that was opened; None for a database in memory.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, file: tuple[int, int] | None = None) -> None:
        self.path = path
        self.connection = connection
        self.file = file

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
        """True while the write lock is held."""
        return self.connection.in_transaction

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; commit at the end, or roll back after an error. A nested call joins the outer transaction."""
        if self.connection.in_transaction:
            yield
            return
        with errors(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def select(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with errors(self.path):
            return self.connection.execute(sql, values).fetchall()

    def execute(self, sql: str, *values: object) -> int | None:
        """Run a statement in a transaction; return the id of the row it inserted."""
        return self.connection.execute(sql, values).lastrowid

    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement for each of `rows`, in a transaction."""
        self.connection.executemany(sql, rows)


@contextmanager
def errors(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as LocalIOError or IntegrityError with the way to fix them; constraint violations pass."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            hint = "Try again when the other adapterhub process has ended"
        else:
            hint = "Free some space and try again" if "full" in str(error) else ""
        raise LocalIOError(str(path), str(error), hint) from error
    except sqlite3.DatabaseError as error:
        raise IntegrityError(str(path), f"a broken registry ({error})", "Rebuild the index", code="broken-index") from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


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
