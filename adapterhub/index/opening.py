"""Opening of registry.db: created, migrated, or copied into memory where it cannot be written."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from adapterhub.store.leases import wait_for
from adapterhub.store.store import Store, open_regular
from adapterhub_converters.errors import IntegrityError, LocalIOError, NotFoundError, RefusedError

from . import replay, schema
from .database import APPLICATION_ID, VERSION, Index, connect, errors, identity, is_ours, remove, rename


def create_index(path: Path, store: Store, *, replace: bool = False) -> None:
    """Create the index of a store. The file gets its name when it is complete; an index created meanwhile is left alone.

    `replace`: Replace an index whose write-ahead log the file system does not support with one that has a rollback journal.
    """
    temporary = store.root / "tmp" / f"{os.urandom(6).hex()}.db"
    try:
        with errors(path), contextlib.closing(connect(temporary, "rwc")) as connection:
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            migrate(Index(temporary, connection), store)
            if not replace:
                with contextlib.suppress(sqlite3.OperationalError):  # then it keeps its rollback journal
                    connection.execute("PRAGMA journal_mode = WAL")
        with errors(path):
            if replace:
                os.replace(temporary, path)
            else:
                _take_name(temporary, path, store)
    finally:
        remove(temporary)


def _take_name(temporary: Path, path: Path, store: Store) -> None:
    """Give a complete database its name unless that is taken.

    SQLite would replay a log that a killed process left next to a database deleted since (sqlite.org/howtocorrupt.html,
    "Unlinking or renaming a database file while in use"). Such logs are removed only under a lock, as they may belong to a
    database that another process has just created.
    """
    mark = store.root / "oci-layout"
    while True:
        with store.files.open(mark) as file:
            wait_for(file.fileno())
            # Another process that creates the store may have replaced the file: then that one has to be locked.
            if store.files.is_at(file, mark):
                _link(temporary, path)
                return


def _link(temporary: Path, path: Path) -> None:
    if path.exists():
        return
    remove(path, ("-wal", "-shm", "-journal"))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:  # no hard links on this file system
        os.rename(temporary, path)


def open_index(path: Path, store: Store) -> Index:
    """Open registry.db, migrated and filled from `store` if an older adapterhub wrote it.

    Raises:
        NotFoundError: No such file.
        IntegrityError: The file is damaged, or not a registry.db.
        RefusedError: A newer adapterhub wrote it.
    """
    if not path.exists():
        raise NotFoundError(str(path), "no such registry", "Create one", code="no-registry")
    if not is_ours(path):
        raise IntegrityError(str(path), "not an adapterhub registry", "Rebuild the index", code="broken-index")
    try:
        return _open(path, store)
    except LocalIOError as error:
        if getattr(error.__cause__, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE":
            return _open(path, store, exclusive=True)
        if not _lacks_wal(path, error.__cause__):
            raise
    create_index(path, store, replace=True)
    return _open(path, store)


def _open(path: Path, store: Store, *, exclusive: bool = False) -> Index:
    """Open the file; `exclusive` locks it until it is closed, which needs no shared memory, as on a full disk."""
    with errors(path):
        opened = identity(path)  # before it is opened: if it is replaced in between, `is_replaced` has it opened again
        index = Index(path, connect(path, "rw"), opened)
        try:
            if exclusive:
                index.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            migrate(index, store)
            index.connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            index.close()
            raise
    return index


def _lacks_wal(path: Path, cause: BaseException | None) -> bool:
    """Return True if an error means that the file system, such as one over a network, cannot share memory as WAL requires."""
    name = getattr(cause, "sqlite_errorname", "")
    with open_regular(path) as file:
        is_wal = file.read(20)[18:] == b"\2\2"  # sqlite.org/fileformat.html, "file format version numbers"
    return is_wal and (name in ("SQLITE_CANTOPEN", "SQLITE_PROTOCOL") or name.startswith("SQLITE_IOERR_SHM"))


def copy_in_memory(path: Path, store: Store) -> Index:
    """Open an index in memory for a process that may not write `path`: a copy of it, or built from the logs.

    SQLite cannot read a WAL database that it may not write, unless no other process writes it (`immutable`). The file is
    therefore copied only if no process has it open for writing, before and after.
    """
    index = _in_memory(path)
    before = _at_rest(path)
    if before and is_ours(path):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(connect(path, "ro&immutable=1")) as file:
            if file.execute("PRAGMA user_version").fetchone() == (VERSION,):
                file.backup(index.connection)
    if index.select("SELECT 1 FROM sqlite_master") and (before != _at_rest(path) or not _is_sound(index)):
        index.close()
        index = _in_memory(path)
    migrate(index, store)
    return index


def _in_memory(path: Path) -> Index:
    return Index(path, sqlite3.connect(":memory:", isolation_level=None))


def _is_sound(index: Index) -> bool:
    try:
        return bool(index.connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False


def _at_rest(path: Path) -> tuple[int, ...] | None:
    """Return what identifies a state of the file; None while a process has it open for writing, or without a file."""
    try:
        if any(os.stat(f"{path}{suffix}").st_size for suffix in ("-wal", "-journal") if os.path.exists(f"{path}{suffix}")):
            return None
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def set_aside(path: Path) -> None:
    """Rename an unusable database to registry.db.old, so that a new one is built from the logs."""
    rename(path, f"{path}.old")


def migrate(index: Index, store: Store) -> None:
    """Bring the tables up to date and fill them again, in one transaction; RefusedError for a newer adapterhub's."""
    if not _is_behind(index):
        return
    with index.transaction():
        if not _is_behind(index):  # checked again, as another process may have been first
            return
        if index.select("SELECT 1 FROM sqlite_master LIMIT 1"):
            from . import migrations  # imports sqlite-utils

            migrations.apply(index.connection)
        else:
            schema.create(index.connection)
            if not store.log.names():
                return
        replay.rebuild(index, store)


def _is_behind(index: Index) -> bool:
    version = index.version
    if version > VERSION:
        what = f"made by a newer adapterhub (index version {version}; this one supports {VERSION})"
        raise RefusedError(str(index.path), what, "Upgrade adapterhub, or rebuild the index", code="newer-index")
    return version < VERSION
