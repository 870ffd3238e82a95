"""One name of this hub at another place, which is a hub that runs adapterhub or an OCI registry.

The moves of the name's log are made there too, in their order, and each can be made again: blobs and manifests that are there
stay, and a tag that is at its version is not moved. So a process that is killed anywhere goes on with the first move that was
not noted as made. Nothing is removed there but tags: what was lost or removed here is still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Self

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import release_statement
from adapterhub.ref import Ref
from adapterhub.remotes import attached_signatures, named_remotes, remote_address
from adapterhub.remotes.hub import hub_catalog, hub_repository
from adapterhub.remotes.hub.hub_client import HubAddress
from adapterhub.remotes.local_name import LocalName
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub.store.store import Entry
from adapterhub_converters.errors import NotFoundError, RefusedError, RemoteError

from .workers import Worker

if TYPE_CHECKING:
    from .settings import Replication

_MOVES_OF_TAGS = ("push", "tag", "rollback", "restore")


class Replica:
    """A name at a target; a context manager that closes the connections to it.

    Args:
        worker: Has the registry of this hub.
        name: The name, here and below the target's URL.
        target: The target.

    Raises:
        RemoteError: The target is no hub that runs adapterhub, or does not answer.
    """

    def __init__(self, worker: Worker, name: str, target: Replication) -> None:
        self._worker, self._local, self._stack = worker, LocalName(worker.registry, name), ExitStack()
        self._there: set[Digest] = set()
        address = remote_address.parse(named_remotes.address_below(target.url, name))
        try:
            self.remote = self._stack.enter_context(remote_address.connect(address, target.user))
            self._catalog = None
            if isinstance(address, HubAddress):
                self._catalog = hub_catalog.connect(address, hub_repository.hub_for(address, target.user))
                if self._catalog is None:
                    raise RemoteError(target.url, "is no hub that runs adapterhub", "Name one, or an OCI registry")
                self._stack.callback(self._catalog.close)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make_private(self) -> None:
        """Hide the name there, before it is there at all, from all but members of its namespace."""
        if self._catalog:
            self._catalog.make_private(self._local.name)

    def replay(self, entries: Sequence[Entry]) -> Iterator[int]:
        """Make the moves of consecutive entries of the log there, and yield the number of each entry that is done.

        Raises:
            RemoteError: The target does not answer, or denies it.
            RefusedError, ConflictError: It refuses a move, for instance by its policy.
        """
        # First, so that nothing else that the target refuses keeps a withdrawal from it.
        for entry in entries:
            if entry.op in ("withdraw", "unwithdraw"):
                self._set_withdrawal(entry)
        last_moves = {tag: entry.seq for entry in entries if _moves_tags(entry) for tag in entry.tags}
        for entry in entries:
            tags = [tag for tag in entry.tags if last_moves.get(tag) == entry.seq] if _moves_tags(entry) else []
            row = self._usable_version(entry.number)
            if entry.op == "untag":
                self._remove_tags(tags)
            elif entry.op in (*_MOVES_OF_TAGS, "unwithdraw") and row is not None:
                self._push(row, entry.message if entry.op == "push" else "")
                self._move_tags(row, tags)
            elif entry.op in ("deprecate", "undeprecate"):
                self._set_deprecation(entry, row)
            yield entry.seq

    def _usable_version(self, number: int) -> VersionRow | None:
        """Return a version; None if it was removed or withdrawn since, so that it stays where it is."""
        rows = queries.versions(self._worker.registry.index, name=self._local.name, number=number) if number else []
        return rows[0] if rows and rows[0].withdrawn is None else None

    def _push(self, row: VersionRow, message: str) -> None:
        """Copy a version with its signatures, unless that is done; an OCI registry gives it the number that it has here."""
        if row.digest in self._there:
            return
        with self._worker.registry.lease_version(row.ref):
            manifest = self._local.manifest(row.digest)
            signatures = self._worker.registry.gate.read_signatures(row.name, row.digest)
            # Before the version where that is possible: a policy there may ask for them.
            with suppress(NotFoundError, RefusedError, RemoteError):
                attached_signatures.attach_all(self.remote, manifest, signatures)
            if self._catalog:
                self.remote.annotate(message)
            copy_version(self._local, row.digest, self.remote, None if self._catalog else f"v{row.number}")
            attached_signatures.attach_all(self.remote, manifest, signatures)
        self._there.add(row.digest)

    def _move_tags(self, row: VersionRow, tags: Sequence[str]) -> None:
        # A hub of ours is an OCI registry, too, where `latest` can go back to an earlier version.
        repository = self.remote.as_referring_target()
        if not isinstance(repository, OciRepository):
            return
        for tag in tags:
            if repository.digest_of(tag) != row.digest:
                repository.put_reference(self._local.manifest(row.digest), tag)

    def _remove_tags(self, tags: Sequence[str]) -> None:
        for tag in tags:
            # Some registries cannot remove a tag and keep its version.
            with suppress(NotFoundError, RefusedError):
                self.remote.untag(tag)

    def _set_withdrawal(self, entry: Entry) -> None:
        if self._catalog is None:
            return
        ref = Ref(self._local.name, digest=entry.digest)
        with suppress(NotFoundError):  # it was never there
            if entry.op == "withdraw":
                self._catalog.withdraw(ref, release_statement.parse(entry.message).text)
            else:
                self._catalog.undo_withdrawal(ref)

    def _set_deprecation(self, entry: Entry, row: VersionRow | None) -> None:
        if self._catalog is None or (entry.number and row is None):
            return
        ref = Ref(self._local.name, digest=row.digest) if row else Ref(self._local.name)
        with suppress(NotFoundError):
            self._catalog.deprecate(ref, entry.message, undo=entry.op == "undeprecate")


def _moves_tags(entry: Entry) -> bool:
    return entry.op in (*_MOVES_OF_TAGS, "untag")
