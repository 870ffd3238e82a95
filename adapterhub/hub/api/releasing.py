"""Handlers that promote, approve, roll back and withdraw versions, for accounts with the role `write` in the namespace.

Every move of a tag is decided by the registry (`registry.releases.tag_gate`); here is who asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hub import Hub
from adapterhub.hub.oci.manifest_handlers import move_branches
from adapterhub.hub.request_context import read_object
from adapterhub.hub.workers import Worker
from adapterhub.index.queries import VersionRow
from adapterhub.manifest.release_statement import MAX_BUNDLE, ReleaseStatement
from adapterhub.ref import LATEST, Ref
from adapterhub.registry import withdrawals
from adapterhub.registry.releases import release_moves, withdrawal_rights
from adapterhub.registry.releases.release_moves import Withdrawal
from adapterhub.registry.releases.withdrawal_rights import WithdrawalClaim
from adapterhub.registry.repository_records import ENTRY_SIZE
from adapterhub.registry.version_lookup import Version
from adapterhub.remotes import release_documents, version_documents
from adapterhub_converters.errors import RefusedError, UsageError

from .api_requests import name_of, ref_of, ref_to, tag_of, visible_view
from .changing import begin, change, refuse_condition
from .name_changes import check_writer, checked_tag
from .reading import version_response
from .request_fields import text_field

T = TypeVar("T")
_MAX_BODY = 2 * MAX_BUNDLE


async def _fields(hub: Hub, request: Request) -> dict[str, Any]:
    """Return the document of a request by an account that may write to the name."""
    refuse_condition(request)
    await begin(hub, request)
    return await read_object(request, _MAX_BODY)


async def _move(hub: Hub, request: Request, move: Callable[[Worker, Identity | None, str], T], *, size: int = ENTRY_SIZE) -> T:
    """Make a change of a name that the client may write to, with room for `size` bytes of its log."""

    def work(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> T:
        check_writer(worker, hub, identity, name, size=size)
        return move(worker, identity, name)

    return await change(hub, request, work)


async def assess(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/tags/{tag}/promotion?reference=: which requirements of a tag a version meets; nothing moves."""
    identity, name = hub.identify(request), name_of(request)
    # A scan reads all files, so a network gets only so many without a token.
    if identity is None:
        hub.access.count_attempt(hub.access.conversions)
    ref = ref_to(name, request.query_params.get("reference", "") or LATEST)

    def work(worker: Worker) -> dict[str, Any]:
        visible_view(worker, hub, identity, name)
        assessment = worker.registry.assess(ref, checked_tag(name, tag_of(request)))
        return release_documents.promotion_document(release_documents.report_of(assessment))

    return JSONResponse(await hub.workers.run(work))


async def promote(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/tags/{tag}/promotion: point a tag at the version `reference` if it meets all requirements."""
    fields = await _fields(hub, request)
    reference, message = text_field(fields, "reference"), text_field(fields, "message", "")

    def move(worker: Worker, _identity: Identity | None, name: str) -> dict[str, Any]:
        tag = checked_tag(name, tag_of(request))
        assessment, version = worker.registry.promote(ref_to(name, reference), tag, message)
        move_branches(worker, name, version, (tag,))
        moved = assessment.candidate.current != version.number
        return release_documents.promotion_document(release_documents.report_of(assessment, moved=moved))

    return JSONResponse(await _move(hub, request, move, size=ENTRY_SIZE + len(message)))


async def approve(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/versions/{reference}/approvals: approve a version for the tag `tag`, as the account that asks.

    A program with a deploy key, or as a trusted publisher, is not that account, and only brings an approval that is signed.
    """
    fields = await _fields(hub, request)
    text, bundle = text_field(fields, "message"), text_field(fields, "bundle", "")

    def move(worker: Worker, identity: Identity | None, name: str) -> Version:
        is_program = identity is not None and access_tokens.is_of_program(worker.database, identity.token)
        if is_program and not bundle:
            problem = "is approved by people, and this is a token of a program"
            raise RefusedError(name, problem, "Use a token of your account, or sign the approval")
        account = identity.account if identity and not is_program else ""
        tag, statement = checked_tag(name, text_field(fields, "tag")), ReleaseStatement(text, bundle, account)
        return release_moves.approve(worker.registry.ledger, ref_of(request, name), tag, statement)

    return version_response(await _move(hub, request, move, size=ENTRY_SIZE + len(text) + len(bundle)))


async def rollback(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/tags/{tag}/rollback: point a tag at the version it had before, one step back."""
    message = text_field(await _fields(hub, request), "message", "")

    def move(worker: Worker, _identity: Identity | None, name: str) -> dict[str, Any]:
        tag = checked_tag(name, tag_of(request))
        versions = release_moves.rollback(worker.registry.ledger, Ref(name, tag=tag), message)
        move_branches(worker, name, versions[1], (tag,))
        documents = ({**version_documents.version_document(version), "moved": version.moved} for version in versions)
        return dict(zip(("left", "current"), documents, strict=True))

    return JSONResponse(await _move(hub, request, move, size=ENTRY_SIZE + len(message)))


async def withdraw(hub: Hub, request: Request) -> Response:
    """PUT …/names/{name}/versions/{reference}/withdrawal: withdraw a version, or with `everywhere` all with its bytes.

    A signed version is withdrawn by an admin of its namespace, or by its signer: with the PEM of the key as `key`, and the
    claim that it signed as `bundle`. `everywhere` is every name in whose namespace the account may do this.
    """
    fields = await _fields(hub, request)
    text, everywhere = text_field(fields, "message"), fields.get("everywhere", False)
    if type(everywhere) is not bool:
        raise UsageError("everywhere", "is neither true nor false")
    claim = await hub.workers.read(_claim, fields)
    statement = ReleaseStatement(text, claim.bundle.decode() if claim else "")

    def move(worker: Worker, identity: Identity | None, name: str) -> list[Withdrawal]:
        registry = worker.registry
        row = registry.row(ref_of(request, name))
        _check_right(worker, identity, row, claim)
        copies = [version for version in registry.versions_with(row.digest) if version != row] if everywhere else []
        rows = [row, *(version for version in copies if _may_withdraw(worker, hub, identity, version, claim))]
        return [release_moves.withdraw(registry.ledger, version.ref, statement) for version in rows]

    # A withdrawal is never refused for lack of room.
    withdrawals = await _move(hub, request, move, size=0)
    documents = [release_documents.withdrawal_document(withdrawal) for withdrawal in withdrawals]
    return JSONResponse({"withdrawn": documents})


def _check_right(worker: Worker, identity: Identity | None, row: VersionRow, claim: WithdrawalClaim | None) -> None:
    """Raise RefusedError unless an account is an admin of a version's namespace, or the version is not signed by others."""
    if not (identity and identity.has_role("admin", row.name)):
        signatures = worker.registry.gate.read_signatures(row.name, row.digest)
        withdrawal_rights.check(row.name, row.number, worker.manifest(row), signatures, claim)


def _may_withdraw(worker: Worker, hub: Hub, identity: Identity | None, row: VersionRow, claim: WithdrawalClaim | None) -> bool:
    """Return whether an account sees a version of another name, and may withdraw it."""
    if identity is None or not identity.has_role("write", row.name) or not hub.may_read_name(worker, identity, row.name):
        return False
    try:
        _check_right(worker, identity, row, claim)
    except RefusedError:
        return False
    return True


def _claim(fields: dict[str, Any]) -> WithdrawalClaim | None:
    """Return the signed claim in a document; None without one. Reads a key, and so runs in a thread."""
    bundle, key = text_field(fields, "bundle", ""), text_field(fields, "key", "")
    if not bundle or not key:
        return None
    from adapterhub.trust.keys import parse_public  # needs cryptography

    return WithdrawalClaim(bundle.encode(), parse_public(key, "key"))


async def undo_withdrawal(hub: Hub, request: Request) -> Response:
    """DELETE …/names/{name}/versions/{reference}/withdrawal: let a version be used again.

    As an admin of the namespace; or as the account that withdrew it, if it is not signed.
    """
    refuse_condition(request)

    def move(worker: Worker, identity: Identity | None, name: str) -> Version:
        row = worker.registry.row(ref_of(request, name))
        _check_right(worker, identity, row, None)
        author = withdrawals.last_author(worker.registry.store.log, row.name, row.digest)
        if not (identity and (identity.account == author or identity.has_role("admin", row.name))):
            problem = "was withdrawn by another account, and only that or an admin takes it back"
            raise RefusedError(str(row.ref), problem, "Ask them", code="withdrawn-by-another")
        return release_moves.undo_withdrawal(worker.registry.ledger, row.ref)

    return version_response(await _move(hub, request, move))
