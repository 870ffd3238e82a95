"""What a hub gives out by its policy, which may have become stricter since a version came.

A version is compared when somebody asks for its manifest or its files, and a blob by the versions that have it when somebody
asks for it by its own digest. A verdict is remembered for a state of the logs of its name: a measurement, a signature that is
attached, or another version may change it. What is no version, such as an image, is not compared. Those who may write to a
namespace get what it has, to sign or attest what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import Row
from adapterhub.project.policy import Policy
from adapterhub_converters.errors import RefusedError

from .access import writes
from .commits import View
from .people.tokens import Identity
from .publishing import check_released
from .remembered import Remembered
from .workers import Worker

_MOST = 100_000  # verdicts that are remembered
_COMPARED = 100  # versions of a name, the newest, and other names, by which a blob may be given out


class Releases:
    """The door out of a hub.

    Args:
        policy: Requirements on what is given out; None for none.
        others: The repositories with a version that has a file, as far as somebody may see them.
    """

    def __init__(self, policy: Policy | None, others: Callable[[Worker, Identity | None, Digest], Iterator[View]]) -> None:
        self._policy, self._others = policy, others
        self._verdicts: Remembered[RefusedError | None] = Remembered(_MOST)

    def check(self, worker: Worker, who: Identity | None, row: Row | None) -> None:
        """Raise RefusedError for a version that the policy does not allow; what is no version is not compared."""
        if self._policy is not None and row is not None and not writes(who, row.name):
            _raise(self._of_version(worker, self._policy, row))

    def check_blob(self, worker: Worker, who: Identity | None, of: View, digest: Digest) -> None:
        """Raise RefusedError for a blob of a repository that only versions have which the policy does not allow.

        Versions of other repositories that `who` may read count too: they would get it there.
        """
        if self._policy is None or writes(who, of.name):
            return
        if refused := self._of_blob(worker, self._policy, of, digest):
            for other in islice(self._others(worker, who, digest), _COMPARED):
                if writes(who, other.name) or self._of_blob(worker, self._policy, other, digest) is None:
                    return
            _raise(refused)

    def _of_version(self, worker: Worker, policy: Policy, row: Row) -> RefusedError | None:
        position = f"{worker.registry.ledger.current(row.name).head} {worker.repositories.current(row.name)[0]}"
        return self._verdicts.get((row.name, row.digest, position), lambda: _refusal(worker, policy, row))

    def _of_blob(self, worker: Worker, policy: Policy, of: View, digest: Digest) -> RefusedError | None:
        return self._verdicts.get((of.name, digest, of.head, "blob"), lambda: self._compared(worker, policy, of, digest))

    def _compared(self, worker: Worker, policy: Policy, of: View, digest: Digest) -> RefusedError | None:
        """The refusal of the newest version that has a blob, if all are refused, and nothing else of the repository has it."""
        manifests = {} if of.frozen or of.repository is None else of.repository.manifests
        if digest in manifests or any(digest in manifest.blobs for manifest in manifests.values()):
            return None
        verdicts = [self._of_version(worker, policy, row) for row in islice(_with(worker, of, digest), _COMPARED)]
        return verdicts[0] if verdicts and all(verdicts) else None


def _refusal(worker: Worker, policy: Policy, row: Row) -> RefusedError | None:
    try:
        check_released(worker, policy, row)
    except RefusedError as refused:
        return refused
    return None


def _raise(refused: RefusedError | None) -> None:
    if refused:
        raise refused.with_traceback(None)  # or each time it is raised would add to it


def _with(worker: Worker, of: View, digest: Digest) -> Iterator[Row]:
    """The versions of a repository that have a blob as a file, as their manifest or as their config, the newest first."""
    if of.frozen:
        yield from (of.newest,) if of.newest else ()
        return
    index = worker.registry.index
    yield from (
        queries.versions(index, name=of.name, file=digest)
        or queries.versions(index, name=of.name, digest=digest)
        or (row for row in queries.versions(index, name=of.name) if worker.config(row.digest) == digest)
    )
