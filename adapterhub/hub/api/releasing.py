"""Handlers that evaluate, promote, approve, roll back and withdraw versions (`release_changes`)."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.hf.reading import path_part
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_object
from adapterhub.hub.workers import Worker
from adapterhub.manifest import measurement
from adapterhub.manifest.release_statement import MAX_BUNDLE
from adapterhub.ref import LATEST
from adapterhub.registry.releases.withdrawal_rights import WithdrawalClaim
from adapterhub.remotes import release_documents, version_documents
from adapterhub_converters.errors import UsageError

from . import release_changes
from .api_requests import name_of, ref_to, tag_of, visible_view
from .changing import begin, change, refuse_condition
from .name_changes import checked_tag
from .reading import version_response
from .request_fields import text_field

_MAX_BODY = 2 * MAX_BUNDLE


async def _fields(hub: Hub, request: Request) -> dict[str, Any]:
    """Return the document of a request by an account that may write to the name."""
    refuse_condition(request)
    await begin(hub, request)
    return await read_object(request, _MAX_BODY)


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
    move = partial(release_changes.promote, reference=reference, tag=tag_of(request), message=message)
    return JSONResponse(release_documents.promotion_document(await change(hub, request, move)))


async def evaluate(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/versions/{reference}/evaluations: record an evaluation, in the form in which `show` has it."""
    refuse_condition(request)
    await begin(hub, request)
    document = await read_object(request, measurement.MAX_TEXT)
    evaluation = measurement.parse(json.dumps(document))
    # What `parse` leaves out of a log from elsewhere is refused here.
    if evaluation is None or evaluation.document() != document or evaluation.account:
        raise UsageError("evaluation", "is not the document of an evaluation", "Send one as a version's document has it")
    move = partial(release_changes.evaluate, reference=path_part(request, "reference"), evaluation=evaluation)
    return version_response(await change(hub, request, move))


async def approve(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/versions/{reference}/approvals: approve a version for the tag `tag`, as the account that asks.

    A program with a deploy key, or as a trusted publisher, is not that account, and only brings an approval that is signed.
    """
    fields = await _fields(hub, request)
    text, bundle, tag = text_field(fields, "message"), text_field(fields, "bundle", ""), text_field(fields, "tag")
    move = partial(release_changes.approve, reference=path_part(request, "reference"), tag=tag, text=text, bundle=bundle)
    return version_response(await change(hub, request, move))


async def rollback(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/tags/{tag}/rollback: point a tag at the version it had before, one step back."""
    message = text_field(await _fields(hub, request), "message", "")
    versions = await change(hub, request, partial(release_changes.rollback, tag=tag_of(request), message=message))
    documents = ({**version_documents.version_document(version), "moved": version.moved} for version in versions)
    return JSONResponse(dict(zip(("left", "current"), documents, strict=True)))


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
    reference = path_part(request, "reference")
    move = partial(release_changes.withdraw, reference=reference, text=text, claim=claim, everywhere=everywhere)
    documents = [release_documents.withdrawal_document(withdrawal) for withdrawal in await change(hub, request, move)]
    return JSONResponse({"withdrawn": documents})


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
    await begin(hub, request)
    move = partial(release_changes.undo_withdrawal, reference=path_part(request, "reference"))
    return version_response(await change(hub, request, move))
