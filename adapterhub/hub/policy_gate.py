"""The policy gate: what a hub still serves under a policy that may be stricter than when a version was pushed.

A version is compared when its manifest or its files are requested, and a blob through the versions that have it when it is
requested by digest. A verdict is remembered for one state of the logs of its name: a measurement, an attached signature or
another version may change it. Manifests that are not versions, such as images, are not compared. Clients that may write to a
namespace get everything in it, so that they can sign or attest what is missing; but nobody gets a version that was withdrawn,
and only accounts with access get anything of a gated name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry import withdrawals
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.errors import RefusedError

from . import proposals
from .access_control import ForbiddenError, may_write
from .accounts.access_tokens import Identity
from .commits import Commit, View, source_name
from .lru_cache import LRUCache
from .publishing import check_released
from .workers import Worker

_MAX_VERDICTS = 16 << 20  # bytes of verdicts kept in memory
_MAX_COMPARED = 100  # newest versions of a name, and other names, that are tried to justify serving a blob


class PolicyGate:
    """The gate between a hub's versions and its clients.

    Args:
        policy: Requirements on what is served; None for no requirements.
        check_files: Refuses a client that may not read the files of a name.
        views_with_file: Yields the repositories with a version that has a file, as far as a client may see and read them.
    """

    def __init__(
        self,
        policy: Policy | None,
        check_files: Callable[[Identity | None, str], None],
        views_with_file: Callable[[Worker, Identity | None, Digest], Iterator[View]],
    ) -> None:
        self._policy, self._check_files, self._views_with_file = policy, check_files, views_with_file
        self._verdicts: LRUCache[RefusedError | None] = LRUCache(_MAX_VERDICTS)

    def check(self, worker: Worker, identity: Identity | None, view: View, row: VersionRow | None) -> None:
        """Raise GatedError or RefusedError for a version that a client may not read.

        Other manifests of the repository (`row` None) are not compared with the policy.
        """
        self._check_files(identity, view.name)
        if row is not None:
            check_not_withdrawn(worker, row)
        if self._policy is not None and row is not None and not may_write(identity, row.name):
            _raise(self._version_refusal(worker, self._policy, row))

    def check_file(self, worker: Worker, identity: Identity | None, view: View, commit: Commit, digest: Digest) -> None:
        """Raise ForbiddenError or RefusedError for a file of a commit that a client may not read."""
        if commit.row:
            self.check(worker, identity, view, commit.row)
        else:
            self.check_proposal(identity, view, commit.id)
            self.check_blob(worker, identity, view, digest)

    def check_blob(self, worker: Worker, identity: Identity | None, view: View, digest: Digest) -> None:
        """Raise RefusedError for a blob that a repository has only in versions the policy does not allow.

        Versions of other repositories that the client may read count, too: it could get the blob there.

        Raises:
            GatedError: The client may not read the files of this repository.
            RefusedError: Also for one that this repository has only in versions that were withdrawn.
        """
        self._check_files(identity, view.name)
        self.check_blob_not_withdrawn(worker, view, digest)
        if self._policy is None or may_write(identity, view.name):
            return
        if refusal := self._blob_refusal(worker, self._policy, view, digest):
            # Bounded: a common blob, such as an empty file, may be in thousands of repositories.
            for other_view in islice(self._views_with_file(worker, identity, digest), _MAX_COMPARED):
                if may_write(identity, other_view.name) or self._blob_refusal(worker, self._policy, other_view, digest) is None:
                    return
            _raise(refusal)

    def check_proposal(self, identity: Identity | None, view: View, ident: str) -> None:
        """Raise ForbiddenError for a commit that somebody has proposed, which no policy has allowed yet.

        Only its author and the writers of the repository get its files.
        """
        if self._policy is None or may_write(identity, view.name):
            return
        if not proposals.can_read(view, ident, identity.account if identity else ""):
            problem = "is a proposal, and under the policy of this hub only its author and maintainers get the files of one"
            raise ForbiddenError(f"{view.name}@{ident} {problem}. Wait until it is accepted")

    def check_blob_not_withdrawn(self, worker: Worker, view: View, digest: Digest) -> None:
        """Raise RefusedError for a blob that a repository has only in versions that were withdrawn."""
        source = source_name(view)
        # Nor through a manifest that is no version: a writer could name the blob in one, and an image of the same
        # adapter has the bytes that were withdrawn.
        if not withdrawals.reasons(worker.registry.index, source):
            return
        refusal: RefusedError | None = None
        for row in islice(_rows_with_blob(worker, view, digest), _MAX_COMPARED):
            try:
                check_not_withdrawn(worker, row)
            except RefusedError as error:
                refusal = error
            else:
                return
        _raise(refusal)

    def check_weights_not_withdrawn(
        self, worker: Worker, identity: Identity | None, view: View, files: Iterable[tuple[str, Digest]]
    ) -> None:
        """Raise RefusedError for weights among a new version's files that are in withdrawn versions only, whatever their name.

        A mended version may have other files of those that were withdrawn. An admin, who could also undo the withdrawal, may
        publish the weights again: what was withdrawn may have been the card.
        """
        index = worker.registry.index
        if not withdrawals.reasons(index, source_name(view)) or (identity and identity.has_role("admin", view.name)):
            return
        for path, digest in files:
            rows = queries.versions(index, name=view.name, file=digest)
            try:
                if rows:  # a file that is new here is in no version
                    self.check_blob_not_withdrawn(worker, view, digest)
            except RefusedError as error:
                layers = (layer for row in rows[:_MAX_COMPARED] for layer in worker.manifest(row).layers)
                if is_weights(path) or any(layer.digest == digest and is_weights(layer.path) for layer in layers):
                    raise withdrawals.error_of_weights(error) from error

    def _version_refusal(self, worker: Worker, policy: Policy, row: VersionRow) -> RefusedError | None:
        # Both logs: versions and marks are in one, attached signatures in the other.
        position = f"{worker.registry.ledger.current(row.name).head} {worker.repositories.current(row.name)[0]}"
        return self._verdicts.get((row.name, row.digest, position), lambda: _refusal(worker, policy, row))

    def _blob_refusal(self, worker: Worker, policy: Policy, view: View, digest: Digest) -> RefusedError | None:
        return self._verdicts.get(
            (view.name, digest, view.head, "blob"), lambda: self._compare_blob(worker, policy, view, digest)
        )

    def _compare_blob(self, worker: Worker, policy: Policy, view: View, digest: Digest) -> RefusedError | None:
        """Return the refusal of the newest version with a blob, if all are refused and no other manifest has the blob."""
        if _is_in_other_manifest(view, digest):
            return None
        verdicts = [
            self._version_refusal(worker, policy, row) for row in islice(_rows_with_blob(worker, view, digest), _MAX_COMPARED)
        ]
        return verdicts[0] if verdicts and all(verdicts) else None


def check_not_withdrawn(worker: Worker, row: VersionRow) -> None:
    """Raise RefusedError for a version that was withdrawn, or a conversion of one."""
    reasons = withdrawals.reasons(worker.registry.index, row.name)
    if reasons:
        version = worker.registry.row(Ref(row.name, number=row.number))  # `row` may be a conversion of it
        withdrawals.check(worker.registry.index, row.name, row.number, version.digest)


def _is_in_other_manifest(view: View, digest: Digest) -> bool:
    """Return whether a blob belongs to a manifest of a repository that is no version."""
    manifests = {} if view.frozen or view.repository is None else view.repository.manifests
    return digest in manifests or any(digest in manifest.blobs for manifest in manifests.values())


def _refusal(worker: Worker, policy: Policy, row: VersionRow) -> RefusedError | None:
    try:
        check_released(worker, policy, row)
    except RefusedError as refused:
        return refused
    return None


def _raise(refusal: RefusedError | None) -> None:
    if refusal:
        raise refusal.with_traceback(None)  # a remembered error would grow with each raise


def _rows_with_blob(worker: Worker, view: View, digest: Digest) -> Iterator[VersionRow]:
    """Yield the versions of a repository that have a blob as a file, manifest or config, the newest first."""
    if view.frozen:
        yield from (view.newest,) if view.newest else ()
        return
    index = worker.registry.index
    yield from (
        queries.versions(index, name=view.name, file=digest)
        # Cheapest first: the index has files and manifests, but configs have to be read.
        or queries.versions(index, name=view.name, digest=digest)
        or (row for row in queries.versions(index, name=view.name) if worker.config(row.digest) == digest)
    )
