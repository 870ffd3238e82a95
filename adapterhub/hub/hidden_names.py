"""The names that are hidden from a client, for its lists, counts and searches to leave out.

They are the same for all clients with the same roles. The index has a row for each repository, so that they are looked up once,
and then follow the rows that change and the versions that are added. What a list shows is still checked one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import field

from adapterhub.index import queries, repository_rows
from adapterhub.index.queries import VersionKey
from adapterhub.index.repository_rows import RepositoryRow
from adapterhub.registry.repository_documents import Repository
from adapterhub_converters.lazy_dataclass import dataclass

from .access_control import Access
from .accounts.access_tokens import Identity
from .accounts.accounts import READERS, Namespace
from .commits import is_arriving
from .workers import Worker

_MAX_ROLES = 100  # different roles for which the names are remembered


@dataclass(frozen=True)
class HiddenSet:
    """The names that are hidden from some roles.

    Attributes:
        namespaces: The settings of namespaces that they were looked up with.
        change: The greatest `changed` of a row by then.
        newest: The version that was added to the index last by then.
        serial: A number that no other set of this process has, by which results are cached: the names may take megabytes.
    """

    names: frozenset[str]
    namespaces: Mapping[str, Namespace]
    change: int
    newest: VersionKey
    serial: int = field(default_factory=itertools.count().__next__)


class HiddenNames:
    """The names of one hub that are hidden from its clients."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._sets: dict[Hashable, HiddenSet] = {}

    def current(self, worker: Worker, identity: Identity | None) -> HiddenSet:
        """Return what is hidden from a client; roles and settings of namespaces are as of the last few seconds."""
        index, namespaces = worker.registry.index, self._access.namespaces()
        # A rebuilt index counts its changes anew.
        key = index.file, _roles(identity)
        current = self._sets.get(key)
        # Before the names are read: what changes meanwhile is looked at next time.
        change, added = repository_rows.last_change(index), queries.added_after(index, current.newest) if current else None
        if current is None or added is None or current.namespaces != namespaces:
            current = self._look_up(worker, identity, namespaces, change)
        elif added or change != current.change:
            rows = repository_rows.changed_after(index, current.change)
            names = dict.fromkeys([*(name for _, name, _ in added), *(row.name for row in rows)])
            hidden = {name for name in names if not self.may_read(worker, identity, name, worker.repositories.get(name))}
            newest = added[-1] if added else current.newest
            current = HiddenSet(current.names.difference(names).union(hidden), namespaces, change, newest)
        if key not in self._sets and len(self._sets) >= _MAX_ROLES:
            self._sets.clear()
        self._sets[key] = current
        return current

    def _look_up(
        self, worker: Worker, identity: Identity | None, namespaces: Mapping[str, Namespace], change: int
    ) -> HiddenSet:
        index, may_read = worker.registry.index, self._access.may_read
        newest, hidden_by_namespace = queries.newest_added(index), dict[str, bool]()
        own_names = frozenset(identity.namespaces if identity else ())

        def is_hidden(name: str, *, private: bool) -> bool:
            namespace = name.partition("/")[0]
            if name in own_names:
                return not may_read(identity, name, Repository(private=private))
            if namespace not in hidden_by_namespace:
                hidden_by_namespace[namespace] = not may_read(identity, name, Repository(private=private))
            return hidden_by_namespace[namespace]

        rows = repository_rows.restricted(index)
        names = {row.name for row in rows if not row.moved_from and is_hidden(row.name, private=True)}
        names |= {
            name
            for name, state in as_repositories(row for row in rows if row.moved_from).items()
            if not self.may_read(worker, identity, name, state)
        }
        hidden_by_namespace.clear()
        # Names without a record have no state of their own: their namespace decides.
        for namespace, settings in namespaces.items():
            if settings.readers != READERS[0]:
                in_namespace = (row.name for row in queries.names(index, namespace))
                names |= {name for name in in_namespace if is_hidden(name, private=False)}
        return HiddenSet(frozenset(names), namespaces, change, newest)

    def may_read(self, worker: Worker, identity: Identity | None, name: str, repository: Repository | None) -> bool:
        """Return whether a client may see a repository in this state; one still being renamed to is hidden from everybody."""
        return not is_arriving(worker, name, repository) and self._access.may_read(identity, name, repository)


def _roles(identity: Identity | None) -> Hashable:
    """Return what of a client decides which repositories it may see."""
    if identity is None:
        return None
    # A token with a role of its own has it everywhere.
    return identity.role, identity.namespaces, None if identity.roles is None else frozenset(identity.roles.items())


def as_repositories(rows: Iterable[RepositoryRow]) -> dict[str, Repository]:
    """Return repositories by name, with what says who may see them alone."""
    return {row.name: Repository(private=row.private, moved_from=row.moved_from) for row in rows}
