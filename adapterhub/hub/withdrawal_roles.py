"""Who may withdraw a version at a hub: who may write to its name, and of a signed one an admin or its signer."""

from __future__ import annotations

from adapterhub.index.queries import VersionRow
from adapterhub.registry.releases import withdrawal_rights
from adapterhub.registry.releases.withdrawal_rights import WithdrawalClaim
from adapterhub_converters.errors import RefusedError

from .accounts.access_tokens import Identity
from .workers import Worker


def check_withdrawal(worker: Worker, identity: Identity | None, row: VersionRow, claim: WithdrawalClaim | None) -> None:
    """Raise RefusedError unless an account is an admin of a version's namespace, or the version is not signed by others."""
    if not (identity and identity.has_role("admin", row.name)):
        signatures = worker.registry.gate.read_signatures(row.name, row.digest)
        withdrawal_rights.check(row.name, row.number, worker.manifest(row), signatures, claim)


def may_withdraw(worker: Worker, identity: Identity | None, row: VersionRow, claim: WithdrawalClaim | None = None) -> bool:
    """Return whether an account may withdraw a version that it sees."""
    if identity is None or not identity.has_role("write", row.name):
        return False
    try:
        check_withdrawal(worker, identity, row, claim)
    except RefusedError:
        return False
    return True
