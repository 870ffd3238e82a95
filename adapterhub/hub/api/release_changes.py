"""Promotions, approvals, rollbacks and withdrawals, each with its checks: the API and the forms of the pages make them.

Every move of a tag is decided by the registry (`registry.releases.tag_gate`); here is who may ask for it: who may write to the
name. Callers hold `Hub.change`.
"""

from __future__ import annotations

from dataclasses import replace

from adapterhub.digest import Digest
from adapterhub.hub.access_control import NOBODY
from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hub import Hub
from adapterhub.hub.oci.manifest_handlers import move_branches
from adapterhub.hub.withdrawal_roles import check_withdrawal, may_withdraw
from adapterhub.hub.workers import Worker
from adapterhub.index.queries import VersionRow
from adapterhub.manifest.measurement import Evaluation
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log, withdrawals
from adapterhub.registry.releases import release_moves
from adapterhub.registry.releases.release_moves import Withdrawal
from adapterhub.registry.releases.withdrawal_rights import WithdrawalClaim
from adapterhub.registry.repository_records import ENTRY_SIZE
from adapterhub.registry.version_lookup import Version
from adapterhub.remotes import release_documents
from adapterhub.remotes.release_documents import PromotionReport
from adapterhub_converters.errors import RefusedError

from .api_requests import ref_to
from .name_changes import check_writer, checked_tag

_MAX_EVALUATIONS = 100  # of one version


def promote(
    worker: Worker,
    hub: Hub,
    identity: Identity | None,
    name: str,
    *,
    reference: str,
    tag: str,
    message: str,
    expect: Digest | None = None,
) -> PromotionReport:
    """Point a tag at a version that meets its requirements, if it is where `expect` says."""
    check_writer(worker, hub, identity, name, size=ENTRY_SIZE + len(message))
    tag = checked_tag(name, tag)
    assessment, version = worker.registry.promote(ref_to(name, reference), tag, message, expect=expect)
    move_branches(worker, name, version, (tag,))
    return release_documents.report_of(assessment, moved=assessment.candidate.current != version.number)


def sent_by(identity: Identity | None, evaluation: Evaluation) -> Evaluation:
    """Return an evaluation as a claim of the account that sent it."""
    return replace(evaluation, account=identity.account if identity else NOBODY)


def evaluate(
    worker: Worker, hub: Hub, identity: Identity | None, name: str, *, reference: str, evaluation: Evaluation
) -> Version:
    """Record an evaluation of a version as what the account that asks says of it, whatever tool it names.

    Raises:
        RefusedError: The version was evaluated too often: whoever asks for a promotion reads all evaluations.
    """
    evaluation = sent_by(identity, evaluation)
    check_writer(worker, hub, identity, name, size=ENTRY_SIZE + len(evaluation.dump()))
    version = worker.registry.resolve(ref_to(name, reference))
    entries = worker.registry.store.log.entries(name)
    if sum(entry.op == "evaluate" and entry.number == version.number for entry in entries) >= _MAX_EVALUATIONS:
        problem = f"was evaluated {_MAX_EVALUATIONS} times, which is the limit"
        raise RefusedError(f"{name}:v{version.number}", problem, "Push a new version")
    measurement_log.record(worker.registry, Ref(name, number=version.number), evaluation)
    return version


def approve(
    worker: Worker, hub: Hub, identity: Identity | None, name: str, *, reference: str, tag: str, text: str, bundle: str = ""
) -> Version:
    """Approve a version for a tag, as the account that asks, or as the signer of `bundle`.

    Raises:
        RefusedError: The account's token is one of a program, and the approval is not signed.
    """
    check_writer(worker, hub, identity, name, size=ENTRY_SIZE + len(text) + len(bundle))
    is_program = identity is not None and access_tokens.is_of_program(worker.database, identity.token)
    if is_program and not bundle:
        problem = "is approved by people, and this is a token of a program"
        raise RefusedError(name, problem, "Use a token of your account, or sign the approval")
    account = identity.account if identity and not is_program else ""
    statement = ReleaseStatement(text, bundle, account)
    return release_moves.approve(worker.registry.ledger, ref_to(name, reference), checked_tag(name, tag), statement)


def rollback(
    worker: Worker,
    hub: Hub,
    identity: Identity | None,
    name: str,
    *,
    tag: str,
    message: str,
    expect: Digest | None = None,
) -> tuple[Version, Version]:
    """Point a tag at the version it had before, if it is where `expect` says; return the version it left and its new one."""
    check_writer(worker, hub, identity, name, size=ENTRY_SIZE + len(message))
    tag = checked_tag(name, tag)
    versions = release_moves.rollback(worker.registry.ledger, Ref(name, tag=tag), message, expect=expect)
    move_branches(worker, name, versions[1], (tag,))
    return versions


def withdraw(
    worker: Worker,
    hub: Hub,
    identity: Identity | None,
    name: str,
    *,
    reference: str,
    text: str,
    claim: WithdrawalClaim | None = None,
    everywhere: bool = False,
) -> list[Withdrawal]:
    """Withdraw a version, or with `everywhere` all with its bytes in the namespaces where the account may do this.

    Raises:
        RefusedError: It is signed, and the account is no admin of the namespace, nor `claim` by its signer.
    """
    # A withdrawal is never refused for lack of room.
    check_writer(worker, hub, identity, name, size=0)
    registry = worker.registry
    row = registry.row(ref_to(name, reference))
    check_withdrawal(worker, identity, row, claim)
    copies = [version for version in registry.versions_with(row.digest) if version != row] if everywhere else []

    def may_withdraw_copy(version: VersionRow) -> bool:
        return hub.may_read_name(worker, identity, version.name) and may_withdraw(worker, identity, version, claim)

    rows = [row, *(version for version in copies if may_withdraw_copy(version))]
    statement = ReleaseStatement(text, claim.bundle.decode() if claim else "")
    return [release_moves.withdraw(registry.ledger, version.ref, statement) for version in rows]


def undo_withdrawal(worker: Worker, hub: Hub, identity: Identity | None, name: str, *, reference: str) -> Version:
    """Let a version be used again: as an admin of the namespace, or as the account that withdrew it, if it is not signed."""
    check_writer(worker, hub, identity, name)
    row = worker.registry.row(ref_to(name, reference))
    check_withdrawal(worker, identity, row, None)
    author = withdrawals.last_author(worker.registry.store.log, row.name, row.digest)
    if not (identity and (identity.account == author or identity.has_role("admin", row.name))):
        problem = "was withdrawn by another account, and only that or an admin takes it back"
        raise RefusedError(str(row.ref), problem, "Ask them", code="withdrawn-by-another")
    return release_moves.undo_withdrawal(worker.registry.ledger, row.ref)
