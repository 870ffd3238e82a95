"""The store of a registry and the index that follows its logs: opened together, locked together, moved together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from adapterhub.digest import Digest
from adapterhub.index import index_file, queries, replay
from adapterhub.index.index_database import FILE, SUFFIXES, Index, is_ours
from adapterhub.index.index_opening import copy_in_memory, create_index, open_index, replace_index
from adapterhub.index.queries import LogState
from adapterhub.store.store import FOLDER, HUB, Entry, Store, local_errors
from adapterhub.user_files import is_mine
from adapterhub_converters.containers.open_file import check_regular
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, NotFoundError, RemoteError

from . import log_check


def find(start: Path, *, explicit: Path | None = None, default: Path | None = None) -> Path:
    """Find the folder of the registry to use.

    Args:
        start: Search from this folder upwards for the nearest registry that belongs to the user, as git requires of `.git`.
        explicit: A registry.db or its folder, to be used without a search.
        default: The folder to return, existing or not, if the search finds none.

    Raises:
        NotFoundError: No registry was found, and there is no `default`.
    """
    if explicit is not None:
        return explicit.parent if explicit.name == FILE else explicit
    start = start.absolute()
    for folder in (start, *start.parents):
        if _is_registry(folder):
            return folder
    if default is None:
        raise NotFoundError(str(start), f"no {FILE} here or above", "Create a registry", code="no-registry", folder=str(start))
    return default


def _is_registry(folder: Path) -> bool:
    database, store = folder / FILE, folder / FOLDER
    # A store whose database is damaged, or that is a link, counts as well: opening it then reports that, where going on to the
    # next folder up would silently use another registry.
    if not (is_ours(database) or os.path.lexists(store / "oci-layout")):
        return False
    # A registry that another user put into a shared folder above is not trusted unless it is named explicitly. It may link to
    # files of the user's own, so every part has to belong to the user.
    return all(is_mine(path) for path in (database, store, store / "oci-layout") if os.path.lexists(path))


def check_files(root: Path) -> None:
    """Raise RefusedError if the database, or a file that SQLite keeps next to it, is a link, a pipe or a device."""
    for suffix in SUFFIXES:
        path = Path(f"{root / FILE}{suffix}")
        # SQLite follows links, and would write wherever they lead.
        with local_errors(path), contextlib.suppress(FileNotFoundError):
            check_regular(path.lstat(), path)


class StartOverError(Exception):
    """Ends a move whose decision takes what cannot be found out under the lock: call `prepare` without it, and start over."""

    def __init__(self, prepare: Callable[[], object]) -> None:
        super().__init__("start over")
        self.prepare = prepare


class Ledger:
    """A store and its index. Create one with `Ledger.create`, open one with `Ledger.open`.

    Attributes:
        root: The folder that contains registry.db and .adapterhub.
        store: The truth: blobs and logs.
        index: Derived from the logs. `write_lock` opens it again if registry.db was deleted or replaced meanwhile.
        author: The user that the log names as the author of each move; empty to name nobody.
        check_entry: Called under the lock with an entry that is about to be committed, to refuse it by an error.
        has_requirements: Returns whether a tag has requirements: then it is never a range, also where it was removed.
        on_commit: Callback for each committed log entry; None for no callback.
        rehearses: Whether moves are rehearsed (`rehearsal`): none is written.
        can_start_over: Whether who took the lock starts over at a StartOverError, so that `check_entry` may raise one.
        verified_heads: Log heads already compared with the index, by version and tag.
    """

    def __init__(self, root: Path, store: Store, index: Index) -> None:
        self.root = root
        self.store = store
        self.index = index
        self.author = ""
        self.check_entry: Callable[[Entry], object] = lambda _entry: None
        self.has_requirements: Callable[[str], bool] = lambda _tag: False
        self.on_commit: Callable[[Entry], object] | None = None
        self.rehearses = self.can_start_over = False
        self.verified_heads: dict[tuple[object, ...], Digest] = {}
        self._verified_states: dict[str, LogState] = {}  # the last state of each name that agreed with its log

    @classmethod
    def create(cls, root: Path, store: Store | None = None) -> Ledger:
        """Open the registry in the folder `root`, creating it if there is none. `store` is as in `open`."""
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalIOError(str(root), error.strerror or str(error)) from error
        check_files(root)
        store = store or Store(root / FOLDER)
        store.create()
        if not (root / FILE).exists():
            create_index(root / FILE, store)
            # Record the stamp of index.json: without it, every later command would take the index for outdated.
            with contextlib.closing(cls.open(root, store)) as ledger, ledger.write_lock():
                index_file.write(ledger.index, ledger.store)
        return cls.open(root, store)

    @classmethod
    def open(cls, path: Path, store: Store | None = None) -> Ledger:
        """Open a registry, and finish in its index the moves of writers that were killed.

        Args:
            path: The folder of the registry, or its registry.db.
            store: The store with its blobs and logs; None for the one in the folder.

        Raises:
            NotFoundError: There is no registry.
            IntegrityError: The store is missing, or registry.db is damaged.
            RefusedError: It was made by a newer adapterhub.
        """
        root = path.parent if path.name == FILE else path
        store = store or Store(root / FOLDER)
        store.check()
        check_files(root)
        has_index = (root / FILE).exists()
        if not store.exists():
            if has_index:
                problem = f"the store is missing, and {FILE} contains no adapters itself"
                raise IntegrityError(str(store.root), problem, "Restore the store from a backup")
            raise NotFoundError(str(root), "no registry there", "Create one", code="no-registry", folder=str(root))
        # Opened for writing whenever possible, even by commands that only read: there may be moves of killed writers to finish.
        if not (
            os.access(root, os.W_OK) and os.access(store.root, os.W_OK) and (not has_index or os.access(root / FILE, os.W_OK))
        ):
            return cls._open_read_only(root, store)
        if not has_index:
            return cls.create(root, store)
        ledger = cls(root, store, open_index(root / FILE, store))
        try:
            ledger.finish_moves()
            ledger._catch_up_if_behind()
        except BaseException:
            # On a full disk the connection locks the file exclusively: left open, it would block the next process to open it.
            ledger.close()
            raise
        return ledger

    @classmethod
    def _open_read_only(cls, root: Path, store: Store) -> Ledger:
        """Open a registry that cannot be written, with a copy of its index in memory that is brought up to the logs."""
        ledger = cls(root, store, copy_in_memory(root / FILE, store))
        if store.log.pending_moves() or not index_file.is_current(ledger.index, store):
            with ledger.index.transaction():
                ledger.catch_up_all()
        return ledger

    @classmethod
    def open_with_new_index(cls, path: Path) -> tuple[Ledger, list[AdapterhubError]]:
        """Rebuild a registry's index from the logs, and open the registry; also return the errors of unreadable logs.

        Nothing in the old file is used; it is kept as registry.db.old.
        """
        root = path.parent if path.name == FILE else path
        store = Store(root / FOLDER)
        if not ((root / FILE).exists() and store.exists() and os.access(root, os.W_OK)):
            ledger = cls.open(root)
            return ledger, ledger.rebuild()
        errors = replace_index(root / FILE, store)
        ledger = cls.open(root)
        with ledger.write_lock():
            index_file.write(ledger.index, store)
        return ledger, errors

    def close(self) -> None:
        """Close the index."""
        self.index.close()

    @contextmanager
    def write_lock(self) -> Iterator[None]:
        """Hold the write lock of the current registry.db, creating and opening the file again if it was deleted meanwhile."""
        if self.index.in_transaction:
            yield
            return
        while True:
            with self.store.lease("move", required=False), self.index.transaction():
                # Checked while the lock is held: the lock of a deleted file excludes nobody.
                if not self.index.is_replaced():
                    yield
                    return
            if not (self.root / FILE).exists():
                create_index(self.root / FILE, self.store)
            self._reopen()

    def reopen_if_replaced(self) -> None:
        """Open the index again if there is another registry.db now: reads of the old one would never see what has moved."""
        if not self.index.in_transaction and self.index.is_replaced() and (self.root / FILE).exists():
            self._reopen()

    def _reopen(self) -> None:
        """Open the current index, and close the old one only then: if its folder is unmounted for a while, it may come back."""
        old_index, self.index = self.index, open_index(self.root / FILE, self.store)
        old_index.close()

    def current(self, name: str) -> LogState:
        """Return the state of a name, after replaying the entries of its log that the index lacks."""
        state = queries.name(self.index, name)
        if not self.store.log.ends_at(name, state.seq):
            with self.write_lock():
                state = replay.catch_up(self.index, self.store, name)
        return state

    def move(self, name: str, decide: Callable[[LogState], Entry | None]) -> None:
        """Commit the entry that `decide` returns for the state of a name; call it again if another writer committed first."""
        committed, takes_lock = False, not self.index.in_transaction
        while not committed:
            try:
                with self.write_lock(), self._starting_over() if takes_lock else contextlib.nullcontext():
                    state = replay.catch_up(self.index, self.store, name)
                    entry = decide(state)
                    if entry is None:
                        return
                    entry = replace(entry, author=self.author)
                    self.check_entry(entry)
                    log_check.check_end(self.store.log, state, self.index.path, verified_state=self._verified_states.get(name))
                    if not self.rehearses:
                        self._verified_states[name] = state
                    # Read the version before its entry is in the log: a document that crashes this process would otherwise
                    # crash every later process that replays the entry.
                    extracts = replay.extracts(self.store, entry)
                    # The pending file outlives a kill, so that the next process to open the registry replays the name into the
                    # index.
                    pending = self.store.log.begin_move(name)
                    committed = self.store.log.append(entry)
                    replay.catch_up(self.index, self.store, name, extracts)
                    if not self.rehearses:
                        index_file.write(self.index, self.store)
            except StartOverError as interruption:
                if not takes_lock:
                    raise
                interruption.prepare()
                continue
            except LocalIOError as error:
                # Once the log has the entry, the move has happened: only the index is behind, and the error says so.
                if not committed:
                    raise
                problem = f"{error.what}; {name} has moved nevertheless; the next command that can write updates the index"
                raise LocalIOError(error.where, problem, error.hint) from error
            with contextlib.suppress(OSError):  # a process that finds the file only replays the log again
                self.store.files.remove(pending)
            # Called without the lock, which the callback may need itself.
            if committed and self.on_commit and not self.rehearses:
                self.on_commit(entry)

    @contextmanager
    def _starting_over(self) -> Iterator[None]:
        self.can_start_over = True
        try:
            yield
        finally:
            self.can_start_over = False

    def rebuild(self) -> list[AdapterhubError]:
        """Rebuild registry.db and index.json from the logs; return the errors of logs that could not be replayed."""
        if self.index.file is None:  # a copy in memory
            return replay.rebuild(self.index, self.store)
        # Hold the lock until the new file has taken the name: a process that waits for it then opens the new file.
        with self.write_lock():
            errors = replace_index(self.root / FILE, self.store)
        self._reopen()
        with self.write_lock():
            index_file.write(self.index, self.store)
        return errors

    def finish_moves(self) -> None:
        """Replay the names whose writers were killed before they updated the index.

        A move whose writer is still running is waited for, as that writer holds the write lock.
        """
        replayed_markers = []
        for pending, name in self.store.log.pending_moves():
            with contextlib.suppress(AdapterhubError), self.write_lock():
                replay.catch_up(self.index, self.store, name)
                self.catch_up((), [name])
                index_file.write(self.index, self.store)
                replayed_markers.append(pending)
        # Removed only now that the transactions are committed. A damaged log keeps its file, so that it is tried again.
        for pending in replayed_markers:
            with contextlib.suppress(FileNotFoundError):
                self.store.files.remove(pending)

    def _catch_up_if_behind(self) -> None:
        """Replay all logs if the index may be behind them, as one from a backup is; a damaged log stays behind."""
        if index_file.is_current(self.index, self.store):
            return
        with self.write_lock():
            # Another process may have caught up while this one waited for the lock.
            if not index_file.is_current(self.index, self.store):
                self.catch_up_all()
                index_file.adopt(self.index, self.store)

    def catch_up_all(self) -> None:
        """Replay what the index lacks of all names, and read their repositories; call this under the write lock."""
        self.catch_up(self.store.log.names(), self.store.log.names(HUB))

    def catch_up(self, names: Iterable[str], repositories: Iterable[str] = ()) -> None:
        """Replay what the index lacks of some names; a damaged log stays behind. Call this under the write lock.

        Args:
            names: Names in the log of versions.
            repositories: Names in the log of repositories.

        Raises:
            RemoteError: The store fetches blobs from elsewhere, and cannot reach them.
        """
        for name in names:
            with _skipping_damage():
                replay.catch_up(self.index, self.store, name)
        for name in repositories:
            from adapterhub.index import repository_rows  # which most commands do without

            with _skipping_damage():
                repository_rows.catch_up(self.index, self.store, name)


@contextmanager
def _skipping_damage() -> Iterator[None]:
    """Ignore what is wrong with a log, but not that the store cannot be reached."""
    try:
        yield
    except RemoteError:
        raise
    except AdapterhubError:
        pass
