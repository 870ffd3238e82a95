"""The names of all repositories that have a record, as of a few seconds ago, for lists and for what lists leave out.

Reading the records of all repositories takes time, so they are read again only after a multiple of it, by one thread, while the
others get the earlier names. Changes by this process are seen at once. What a list shows is still checked one by one.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection
from dataclasses import field
from itertools import islice

from adapterhub.index.queries import VersionKey
from adapterhub.registry.repository_documents import Repository
from adapterhub_converters.lazy_dataclass import dataclass

from .workers import Worker

_TTL = 5.0  # seconds
_PAUSE = 20  # times what reading took: at most a twentieth of a processor


@dataclass(frozen=True)
class HiddenNames:
    """The names hidden from a token.

    Attributes:
        names: The names.
        newest: The version that was added to the index last when they were looked for; one added later may have another.
    """

    names: tuple[str, ...]
    newest: VersionKey


@dataclass
class RepositoryNames:
    """The names of all repositories, as they were read.

    Attributes:
        names: All names with a record, sorted.
        restricted: Those not everybody may see by their record, with what it says about that alone.
        hidden: The names hidden from a token, filled in by the reader; 0 is nobody's token.
    """

    names: list[str]
    restricted: dict[str, Repository]
    hidden: dict[int, HiddenNames] = field(default_factory=dict)

    def after(self, last: str, limit: int, without: Collection[str]) -> list[str]:
        """Return the first names after `last` that are not in `without`."""
        later = islice(self.names, bisect_right(self.names, last), None)
        return [*islice((name for name in later if name not in without), limit)]


class RepositoryListing:
    """The records of one hub."""

    def __init__(self) -> None:
        self._until, self._current = 0.0, RepositoryNames([], {})
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._changes_while_reading: list[tuple[str, Repository | None]] | None = None

    def current(self, worker: Worker) -> RepositoryNames:
        """Return the names, read again if they are too old; by one thread, while others go on with what there is."""
        if self._until < time.monotonic() and self._reading.acquire(blocking=not self._until):
            try:
                if self._until < time.monotonic():
                    self._read(worker)
            finally:
                self._reading.release()
        return self._current

    def _read(self, worker: Worker) -> None:
        start, changes = time.monotonic(), list[tuple[str, Repository | None]]()
        with self._lock:
            self._changes_while_reading = changes
        try:
            states = {name: state for name in worker.repositories.names() if (state := worker.repositories.get(name))}
            restricted = {name: _visibility(state) for name, state in states.items() if is_restricted(state)}
            fresh = RepositoryNames([*states], restricted)
            with self._lock:
                for name, repository in changes:
                    _apply(fresh, name, repository)
                self._current = fresh
                self._until = time.monotonic() + max(_TTL, _PAUSE * (time.monotonic() - start))
        finally:
            with self._lock:
                self._changes_while_reading = None

    def note(self, name: str, repository: Repository | None) -> None:
        """Note a change by this process; None for a removal."""
        with self._lock:
            if self._changes_while_reading is not None:
                self._changes_while_reading.append((name, repository))
            _apply(self._current, name, repository)


def _apply(names: RepositoryNames, name: str, repository: Repository | None) -> None:
    at = bisect_left(names.names, name)
    is_listed = at < len(names.names) and names.names[at] == name
    if repository and not is_listed:
        insort(names.names, name)
    elif not repository and is_listed:
        del names.names[at]
    before = names.restricted.pop(name, None)
    if repository and is_restricted(repository):
        names.restricted[name] = _visibility(repository)
    if before or name in names.restricted:
        names.hidden.clear()


def _visibility(repository: Repository) -> Repository:
    """Return what says who may see a repository: the rest of a document may take megabytes."""
    return Repository(private=repository.private, moved_from=repository.moved_from)


def is_restricted(repository: Repository) -> bool:
    """Return whether not everybody may see a repository, by its record."""
    return repository.private or bool(repository.moved_from)
