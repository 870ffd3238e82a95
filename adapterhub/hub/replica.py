"""One name of this hub at another place, which is a hub that runs adapterhub or an OCI registry.

The moves of the name's log are made there too, in their order, but those that a later one undid. Each can be made again: blobs
and manifests that are there stay, and a tag that is at its version is not moved. So a process that is killed anywhere goes on
with the first move that was not noted as made, and a refused move is made again with all those after it. Nothing is removed
there but tags: what was lost or removed here is still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Self

from adapterhub.digest import Digest
from adapterhub.http.http_errors import DeniedError
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import release_statement
from adapterhub.ref import LATEST, Ref
from adapterhub.remotes import attached_signatures, named_remotes, remote_address
from adapterhub.remotes.hub import hub_catalog, hub_repository
from adapterhub.remotes.hub.hub_client import HubAddress
from adapterhub.remotes.local_name import LocalName
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub.store.ref_log import TAG_MOVES, Entry
from adapterhub_converters.errors import AdapterhubError, LocalIOError, NotFoundError, RefusedError, RemoteError

from .workers import Worker

if TYPE_CHECKING:
    from .settings import Replication


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
        self.target = target
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

    def replay(self, entries: Sequence[Entry]) -> Iterator[tuple[int, AdapterhubError | None]]:
        """Make the moves of consecutive entries of the log there; yield the number of each entry when it is done.

        With the number comes the error of a move that the target refuses, for instance by its policy: it is passed over.

        Raises:
            RemoteError: The target does not answer, or denies it.
        """
        refusals = dict[int, AdapterhubError]()
        # First, so that nothing else keeps a withdrawal from the target.
        for entry in entries:
            if entry.op in ("withdraw", "unwithdraw"):
                with _catch_refusal(entry.seq, refusals):
                    self._set_withdrawal(entry)
        for entry in entries:
            with _catch_refusal(entry.seq, refusals):
                self._make_move(entry)
            yield entry.seq, refusals.get(entry.seq)

    def _make_move(self, entry: Entry) -> None:
        row = self._usable_version(entry.number)
        if entry.op == "untag":
            present = queries.tags(self._worker.registry.index, self._local.name)
            self._remove_tags([tag for tag in entry.tags if tag not in present])
        elif entry.op in (*TAG_MOVES, "unwithdraw") and row is not None:
            self._push(row, entry.message if entry.op == "push" else "")
            self._move_tags(row, [tag for tag in entry.tags if tag in row.tags])
        elif entry.op in ("deprecate", "undeprecate"):
            self._set_deprecation(entry, row)

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
        repository = self.remote.as_referring_target()
        if not isinstance(repository, OciRepository):
            return
        for tag in tags:
            if repository.digest_of(tag) == row.digest:
                continue
            if self._catalog and tag != LATEST:
                self._catalog.tag(Ref(self._local.name, digest=row.digest), tag)
                continue
            # A hub of ours is an OCI registry, too, where `latest` can go back to an earlier version.
            try:
                repository.put_reference(self._local.manifest(row.digest), tag)
            except DeniedError as error:  # the version is there by now: it is the tag that may not be moved
                raise RefusedError(f"{self._local.name}:{tag}", error.what, "Allow the tag to be moved there") from error

    def _remove_tags(self, tags: Sequence[str]) -> None:
        for tag in tags:
            # Some registries cannot remove a tag and keep its version.
            with suppress(NotFoundError, RefusedError):
                self.remote.untag(tag)

    def _set_withdrawal(self, entry: Entry) -> None:
        reason = self._marks("withdraw").get(entry.digest)
        text = release_statement.parse(entry.message).text if entry.op == "withdraw" else None
        if self._catalog is None or reason != text:
            return
        ref = Ref(self._local.name, digest=entry.digest)
        with suppress(NotFoundError):  # it was never there
            if text is not None:
                self._catalog.withdraw(ref, text)
            else:
                self._catalog.undo_withdrawal(ref)

    def _set_deprecation(self, entry: Entry, row: VersionRow | None) -> None:
        reason = self._marks("deprecate").get(str(entry.number))
        is_undone = reason != (entry.message if entry.op == "deprecate" else None)
        if self._catalog is None or is_undone or (entry.number and row is None):
            return
        ref = Ref(self._local.name, digest=row.digest) if row else Ref(self._local.name)
        with suppress(NotFoundError):
            self._catalog.deprecate(ref, entry.message, undo=entry.op == "undeprecate")

    def _marks(self, kind: str) -> Mapping[str, str]:
        return queries.marks(self._worker.registry.index, kind, self._local.name)


@contextmanager
def _catch_refusal(seq: int, refusals: dict[int, AdapterhubError]) -> Iterator[None]:
    """Keep the error of a move that is refused; that of a target which does not answer is raised."""
    try:
        yield
    except (RemoteError, LocalIOError):
        raise
    except AdapterhubError as error:
        refusals[seq] = error
