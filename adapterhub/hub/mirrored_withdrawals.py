"""Withdrawals that a mirror learns from its upstream, if that runs adapterhub: by the log of the name, in which they are.

A version that was mirrored under the upstream's digest is withdrawn here for the upstream's reason, and can be used again once
the upstream takes that back, unless it was withdrawn here for a reason of our own.
"""

from __future__ import annotations

from contextlib import closing

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import release_statement
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.ref import Ref
from adapterhub.registry import withdrawals
from adapterhub.registry.releases import release_moves
from adapterhub.remotes.hub import hub_api
from adapterhub.remotes.hub.hub_api import HubApi
from adapterhub.remotes.hub.hub_catalog import HubCatalog
from adapterhub.remotes.hub.hub_client import HubAddress
from adapterhub_converters.errors import NotFoundError

from . import mirror_origin
from .settings import Upstream
from .workers import Worker

_MAX_REASON = 1000  # characters


def learn(worker: Worker, address: HubAddress, upstream: Upstream) -> bool:
    """Withdraw the mirrored versions of a name that its upstream has withdrawn, and undo what it has undone.

    Returns:
        Whether the upstream runs adapterhub.

    Raises:
        RemoteError: The upstream does not answer.
    """
    wire = hub_api.open_wire(address, upstream.endpoint, None, upstream.proxy, ())
    with closing(wire):
        if not hub_api.api_description(upstream.endpoint, wire, str(address)):
            return False
        try:
            entries = HubCatalog(HubApi(upstream.endpoint, wire, str(address))).log(Ref(address.name))
        except NotFoundError:
            return True
    last = {
        entry.digest: (entry.op, release_statement.parse(entry.message).text)
        for entry in reversed(entries)
        if entry.op in ("withdraw", "unwithdraw")
    }
    _apply(worker, address.name, {digest: text for digest, (op, text) in last.items() if op == "withdraw"}, set(last))
    return True


def _apply(worker: Worker, name: str, reasons: dict[Digest, str], decided: set[Digest]) -> None:
    """Withdraw the versions with a reason; let the others of those that the upstream `decided` about be used again."""
    local_reasons = withdrawals.reasons(worker.registry.index, name)
    for row in queries.versions(worker.registry.index, name=name):
        if not mirror_origin.is_mirrored(worker.database, name, row.digest):
            continue
        if row.digest in reasons and row.digest not in local_reasons:
            reason = reasons[row.digest][:_MAX_REASON] or "its upstream gives no reason"
            release_moves.withdraw(worker.registry.ledger, row.ref, ReleaseStatement(reason))
        elif row.digest in local_reasons and row.digest in decided and row.digest not in reasons and _was_learned(worker, row):
            release_moves.undo_withdrawal(worker.registry.ledger, row.ref)


def _was_learned(worker: Worker, row: VersionRow) -> bool:
    """Return whether a version was withdrawn for its upstream: what somebody here withdrew is theirs to take back."""
    return withdrawals.last_author(worker.registry.store.log, row.name, row.digest) == worker.registry.author
