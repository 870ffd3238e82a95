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
from adapterhub.index.database import FILE, SUFFIXES, Index, is_ours
from adapterhub.index.opening import copy_in_memory, create_index, open_index, replace_index
from adapterhub.index.queries import Name
from adapterhub.store.store import FOLDER, Entry, Store, local_errors
from adapterhub.user_files import is_mine
from adapterhub_converters.containers.open_file import check_regular
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, NotFoundError, RemoteError

from . import log_check


def find(start: Path, *, explicit: Path | None = None, default: Path | None = None) -> Path:
    """Find the folder of the registry to use.

    Args:
        start: The folder to search from: the nearest one at or above it with a registry that belongs to the user, as git
            requires of `.git`.
        explicit: A registry.db or its folder, used without a search.
        default: The folder to return, existing or not, if the search finds none.

    Raises:
        NotFoundError: No registry found and no `default`.
    """
    if explicit is not None:
        return explicit.parent if explicit.name == FILE else explicit
    start = start.absolute()
    for folder in (start, *start.parents):
        if _is_registry(folder):
            return folder
    if default is None:
        raise NotFoundError(str(start), f"no {FILE} here or above", "Create a registry", code="no-registry")
    return default


def _is_registry(folder: Path) -> bool:
    database, store = folder / FILE, folder / FOLDER
    # A store with a damaged database counts, and one behind a link, so that opening it reports that: the next registry up is
    # another one.
    if not (is_ours(database) or os.path.lexists(store / "oci-layout")):
        return False
    # A registry that another user put in a shared folder above is not trusted unless it is named; nor are files of the user's
    # that it links to, so that every part has to be the user's own.
    return all(is_mine(path) for path in (database, store, store / "oci-layout") if os.path.lexists(path))


def check_files(root: Path) -> None:
    """Raise RefusedError for a database, or a file that SQLite keeps next to it, that is a link, a pipe or a device."""
    for suffix in SUFFIXES:
        path = Path(f"{root / FILE}{suffix}")
        with local_errors(path), contextlib.suppress(FileNotFoundError):
            check_regular(path.lstat(), path)


class Ledger:
    """A store and its index. Create one with `Ledger.create`, open one with `Ledger.open`.

    Attributes:
        root: The folder that contains registry.db and .adapterhub.
        store: The truth: blobs and logs.
        index: Derived from the logs. `locked` replaces it when registry.db was deleted or replaced meanwhile.
        author: The user that the log names as the author of each move; empty to name nobody.
        moved: Called with each entry that was committed; None to tell nobody.
        checked: What was found to be as in a log, a version and the tag that led to it, with the digest of the log's end then.
    """

    def __init__(self, root: Path, store: Store, index: Index) -> None:
        self.root = root
        self.store = store
        self.index = index
        self.author = ""
        self.moved: Callable[[Entry], object] | None = None
        self.checked: dict[tuple[object, ...], Digest] = {}
        self._ends: dict[str, Name] = {}  # the last state of each name that was found to be that of its log

    @classmethod
    def create(cls, root: Path, store: Store | None = None) -> Ledger:
        """Open the registry in the folder `root`; create it if there is none. `store` as in `open`."""
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalIOError(str(root), error.strerror or str(error)) from error
        check_files(root)
        store = store or Store(root / FOLDER)
        store.create()
        if not (root / FILE).exists():
            create_index(root / FILE, store)
            with contextlib.closing(cls.open(root, store)) as made, made.locked():
                index_file.write(made.index, made.store)
        return cls.open(root, store)

    @classmethod
    def open(cls, path: Path, store: Store | None = None) -> Ledger:
        """Open the registry in a folder, or of a registry.db, and finish in the index the moves of killed writers.

        Args:
            path: The folder or the file.
            store: Where its blobs and logs are; None for those in the folder.

        Raises:
            NotFoundError: There is no registry.
            IntegrityError: The store is missing, or registry.db is damaged.
            RefusedError: A newer adapterhub made it.
        """
        root = path.parent if path.name == FILE else path
        store = store or Store(root / FOLDER)
        store.check()
        check_files(root)
        there = (root / FILE).exists()
        if not store.exists():
            if there:
                what = f"the store is missing, and {FILE} contains no adapters itself"
                raise IntegrityError(str(store.root), what, "Restore the store from a backup")
            raise NotFoundError(str(root), "no registry there", "Create one", code="no-registry")
        if not (os.access(root, os.W_OK) and os.access(store.root, os.W_OK) and (not there or os.access(root / FILE, os.W_OK))):
            return cls._open_read_only(root, store)
        if not there:
            return cls.create(root, store)
        ledger = cls(root, store, open_index(root / FILE, store))
        try:
            ledger.finish_moves()
            ledger._catch_up_if_behind()
        except BaseException:
            ledger.close()  # on a full disk it holds the one lock, for which the next one to open would wait in vain
            raise
        return ledger

    @classmethod
    def _open_read_only(cls, root: Path, store: Store) -> Ledger:
        """Open a registry that cannot be written: a copy of the index in memory, brought up to the logs there."""
        ledger = cls(root, store, copy_in_memory(root / FILE, store))
        if store.log.pending_moves() or not index_file.is_current(ledger.index, store):
            with ledger.index.transaction():
                ledger.catch_up(ledger.store.log.names())
        return ledger

    @classmethod
    def rebuilt(cls, path: Path) -> tuple[Ledger, list[AdapterhubError]]:
        """Open a registry with its index rebuilt from the logs; the errors are of logs that could not be replayed.

        Nothing of the old file is used, which is kept as registry.db.old.
        """
        root = path.parent if path.name == FILE else path
        store = Store(root / FOLDER)
        if not ((root / FILE).exists() and store.exists() and os.access(root, os.W_OK)):
            ledger = cls.open(root)
            return ledger, ledger.rebuild()
        errors = replace_index(root / FILE, store)
        ledger = cls.open(root)
        with ledger.locked():
            index_file.write(ledger.index, store)
        return ledger, errors

    def close(self) -> None:
        """Close the index."""
        self.index.close()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the write lock of the current registry.db; one that was deleted meanwhile is created and opened again."""
        if self.index.in_transaction:
            yield
            return
        while True:
            with self.store.lease("move", required=False), self.index.transaction():
                if not self.index.is_replaced():
                    yield
                    return
            if not (self.root / FILE).exists():
                create_index(self.root / FILE, self.store)
            self._reopen()

    def _reopen(self) -> None:
        """Open the index that is there now, and only then close the one before: a folder that is away may come back."""
        before, self.index = self.index, open_index(self.root / FILE, self.store)
        before.close()

    def current(self, name: str) -> Name:
        """Return the state of a name, after replaying the entries of its log that the index lacks."""
        state = queries.name(self.index, name)
        if not self.store.log.ends_at(name, state.seq):
            with self.locked():
                state = replay.catch_up(self.index, self.store, name)
        return state

    def move(self, name: str, decide: Callable[[Name], Entry | None]) -> None:
        """Commit the entry that `decide` returns for the state of a name; call it again when another writer was first."""
        committed = False
        while not committed:
            try:
                with self.locked():
                    state = replay.catch_up(self.index, self.store, name)
                    entry = decide(state)
                    if entry is None:
                        return
                    entry = replace(entry, author=self.author)
                    log_check.check_end(self.store.log, state, self.index.path, known=self._ends.get(name))
                    self._ends[name] = state
                    # Before the entry is in the log: a version that ended this process would end every later one there.
                    known = replay.extracts(self.store, entry)
                    pending = self.store.log.begin_move(name)
                    committed = self.store.log.append(entry)
                    replay.catch_up(self.index, self.store, name, known)
                    index_file.write(self.index, self.store)
            except LocalIOError as error:
                if not committed:
                    raise
                what = f"{error.what}; {name} has moved all the same, and the next command that can write updates the index"
                raise LocalIOError(error.where, what, error.hint) from error
            with contextlib.suppress(OSError):  # a process that finds the file only replays the log again
                self.store.files.remove(pending)
            if committed and self.moved:
                self.moved(entry)

    def rebuild(self) -> list[AdapterhubError]:
        """Rebuild registry.db and index.json from the logs; return the errors of logs that could not be replayed."""
        if self.index.file is None:  # a copy in memory
            return replay.rebuild(self.index, self.store)
        with self.locked():  # until the new one has the name: a process that waits for the lock opens that
            errors = replace_index(self.root / FILE, self.store)
        self._reopen()
        with self.locked():
            index_file.write(self.index, self.store)
        return errors

    def finish_moves(self) -> None:
        """Replay the names whose writers were killed before they updated the index; running writers hold the lock meanwhile."""
        done = []
        for pending, name in self.store.log.pending_moves():
            with contextlib.suppress(AdapterhubError), self.locked():
                replay.catch_up(self.index, self.store, name)
                index_file.write(self.index, self.store)
                done.append(pending)
        for pending in done:
            with contextlib.suppress(FileNotFoundError):
                self.store.files.remove(pending)

    def _catch_up_if_behind(self) -> None:
        """Replay all logs into an index that may be behind them, as one from a backup; a damaged log stays behind."""
        if index_file.is_current(self.index, self.store):
            return
        with self.locked():
            if not index_file.is_current(self.index, self.store):
                self.catch_up(self.store.log.names())
                index_file.adopt(self.index, self.store)

    def catch_up(self, names: Iterable[str]) -> None:
        """Replay what the index lacks of some names, under the write lock; a damaged log stays behind.

        Raises:
            RemoteError: The store fetches blobs, and cannot.
        """
        for name in names:
            try:
                replay.catch_up(self.index, self.store, name)
            except RemoteError:
                raise
            except AdapterhubError:
                continue
