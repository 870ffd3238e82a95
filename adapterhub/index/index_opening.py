"""Opening of registry.db, which is created, rebuilt, or copied into memory if it cannot be written.

A database of an older adapterhub, or one to be rebuilt, is never changed: a new file is made from the logs and takes its name,
so that nothing of its schema survives.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from adapterhub.store.store import HUB, Store, open_regular
from adapterhub_converters.containers.file_lock import wait_for_lock
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, NotFoundError, RefusedError

from . import replay, schema
from .index_database import (
    APPLICATION_ID,
    VERSION,
    Index,
    broken_index_error,
    connect,
    connect_memory,
    errors,
    identity,
    is_ours,
    let_triggers_search,
    remove,
    rename,
)


def create_index(path: Path, store: Store) -> None:
    """Create the index of a store.

    The file gets its name only when it is complete; if another process has created an index meanwhile, that one is kept.
    """
    _create(path, store)


def replace_index(path: Path, store: Store) -> list[AdapterhubError]:
    """Make a new index in place of the one at `path`, which becomes registry.db.old; return the errors of its logs."""
    return _create(path, store, replace_existing=True)


def _create(path: Path, store: Store, *, replace_existing: bool = False, wal: bool = True) -> list[AdapterhubError]:
    """Make an index and give it its name; return the errors of logs that could not be replayed.

    Args:
        path: The name.
        store: The store with the logs.
        replace_existing: Rename the index that has the name.
        wal: Use a write-ahead log, if the file system can share memory as that requires.
    """
    with store.lease("index", required=False) as lease:  # tells a gc that the writer of the temporary file still runs
        temporary = store.root / "tmp" / f"{lease.id}-{os.urandom(6).hex()}.db"
        try:
            with errors(path), contextlib.closing(connect(temporary, "rwc")) as connection:
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                replay_errors = fill(Index(temporary, let_triggers_search(connection)), store)
                if wal:
                    with contextlib.suppress(sqlite3.OperationalError):  # it then keeps its rollback journal
                        connection.execute("PRAGMA journal_mode = WAL")
            with errors(path):
                if replace_existing:
                    # Only the last replaced file is kept.
                    remove(Path(f"{path}.old"))
                    rename(path, f"{path}.old")
                _take_name(temporary, path, store)
        finally:
            remove(temporary)
    return replay_errors


def _take_name(temporary: Path, path: Path, store: Store) -> None:
    """Give a complete database its name unless that is taken.

    SQLite would replay a log that a killed process left next to a database deleted since (sqlite.org/howtocorrupt.html,
    "Unlinking or renaming a database file while in use"). Such logs are removed only under a lock, as they may belong to a
    database that another process has just created.
    """
    mark = store.root / "oci-layout"
    while True:
        with store.files.open(mark) as file:
            wait_for_lock(file.fileno())
            # If another process that creates the store has replaced the file, the new file has to be locked.
            if store.files.still_has_name(file, mark):
                _link_or_rename(temporary, path)
                return


def _link_or_rename(temporary: Path, path: Path) -> None:
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
    """Open registry.db; a file from an older adapterhub is replaced with a new one first.

    Raises:
        NotFoundError: There is no such file.
        IntegrityError: The file is damaged, or not a registry.db, or it has other tables, views or triggers.
        RefusedError: A newer adapterhub wrote it.
    """
    if not path.exists():
        raise NotFoundError(str(path), "no such registry", "Create one", code="no-registry", folder=str(path.parent))
    if not is_ours(path):
        raise IntegrityError(str(path), "not an adapterhub registry", "Rebuild the index", code="broken-index")
    try:
        return _open(path, store)
    except LocalIOError as error:
        # The disk is too full for the shared memory of a write-ahead log.
        if getattr(error.__cause__, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE":
            return _open(path, store, exclusive=True)
        # A database in WAL mode cannot be opened on such a file system: replace it with one without.
        if not _lacks_wal(path, error.__cause__):
            raise
    _create(path, store, replace_existing=True, wal=False)
    return _open(path, store)


def _open(path: Path, store: Store, *, exclusive: bool = False) -> Index:
    """Open the file; `exclusive` locks it until it is closed, which needs no shared memory and so works on a full disk."""
    with errors(path):
        # Taken before the file is opened: if the file is replaced in between, `is_replaced` notices, and it is opened again.
        file_identity = identity(path)
        index = Index(path, connect(path, "rw"), file_identity)
        try:
            if exclusive:
                index.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            if _is_behind(index):
                return _replace_outdated(index, store)
            if not _has_our_schema(index.connection):
                raise broken_index_error(path, "it does not have exactly adapterhub's tables")
            let_triggers_search(index.connection)
        except BaseException:
            index.close()
            raise
    return index


def _replace_outdated(index: Index, store: Store) -> Index:
    """Replace an index of an older adapterhub under its lock, so that processes that wait for the lock find it replaced."""
    path = index.path
    with contextlib.closing(index), index.transaction():
        if not index.is_replaced():
            replace_index(path, store)
    return _open(path, store)


def _has_our_schema(connection: sqlite3.Connection) -> bool:
    actual_digest = schema.digest(connection)
    if actual_digest == schema.DIGEST:
        return True
    # Another version of sqlite-utils may write the same statements differently: compare with what this one makes.
    from . import migrations

    with contextlib.closing(connect_memory()) as reference:
        migrations.apply(reference)
        return schema.digest(reference) == actual_digest


def _lacks_wal(path: Path, cause: BaseException | None) -> bool:
    """Return True if an error means that the file system, such as one over a network, cannot share memory as WAL requires."""
    name = getattr(cause, "sqlite_errorname", "")
    with open_regular(path) as file:
        is_wal = file.read(20)[18:] == b"\2\2"  # sqlite.org/fileformat.html, "file format version numbers"
    return is_wal and (name in ("SQLITE_CANTOPEN", "SQLITE_PROTOCOL") or name.startswith("SQLITE_IOERR_SHM"))


def copy_in_memory(path: Path, store: Store) -> Index:
    """Open an index in memory for a process that may not write `path`: a copy of it, or one built from the logs.

    SQLite cannot read a WAL database that it may not write unless no other process writes it (`immutable`). The file is
    therefore copied only if no process has it open for writing, before and after.
    """
    index = _in_memory(path)
    before = _state_at_rest(path)
    if before and is_ours(path):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(connect(path, "ro&immutable=1")) as file:
            if file.execute("PRAGMA user_version").fetchone() == (VERSION,) and _has_our_schema(file):
                file.backup(index.connection)
    # A writer may have started while the file was copied.
    if index.select("SELECT 1 FROM sqlite_master") and (before != _state_at_rest(path) or not _is_sound(index)):
        index.close()
        index = _in_memory(path)
    if _is_behind(index):
        fill(index, store)
    return index


def _in_memory(path: Path) -> Index:
    return Index(path, connect_memory())


def _is_sound(index: Index) -> bool:
    try:
        return bool(index.connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False


def _state_at_rest(path: Path) -> tuple[int, ...] | None:
    """Return what identifies a state of the file; None if a process has it open for writing, or if there is no file."""
    try:
        if any(os.stat(f"{path}{suffix}").st_size for suffix in ("-wal", "-journal") if os.path.exists(f"{path}{suffix}")):
            return None
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def fill(index: Index, store: Store) -> list[AdapterhubError]:
    """Create the tables in an empty database and fill them; return the errors of logs that could not be replayed."""
    with index.transaction():
        schema.create(index.connection)
        return replay.rebuild(index, store) if store.log.names() or store.log.names(HUB) else []


def _is_behind(index: Index) -> bool:
    version = index.version
    if version > VERSION:
        problem = f"made by a newer adapterhub (index version {version}; this one supports {VERSION})"
        raise RefusedError(str(index.path), problem, "Upgrade adapterhub, or rebuild the index", code="newer-index")
    return version < VERSION
