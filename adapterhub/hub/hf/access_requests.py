"""Handlers that ask for access to gated repositories, and decide on it.

The routes are those of the Hub's API (`HfApi.list_pending_access_requests` and the methods beside it), and of the form of its
pages at `/{id}/ask-access`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import gates
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.gates import AccessRequest
from adapterhub.hub.hub import Hub
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import ConflictError, NotFoundError, UsageError

from . import gating
from .accounts import user_documents
from .api_documents import time_of
from .hf_errors import ResponseError
from .reading import name_of, path_part, query_number
from .repositories import read_document

_PAGE = 100


async def ask_access(hub: Hub, request: Request) -> Response:
    """POST …/ask-access: accept the terms, and ask for access."""
    identity, name = hub.identify(request), name_of(request)
    if identity is None:
        raise NoTokenError
    answer = await hub.workers.run(gating.ask, hub, identity, name)
    return JSONResponse({"status": answer.status})


async def list_requests(hub: Hub, request: Request) -> Response:
    """GET …/user-access-request/{status}, in pages."""
    identity, name, status = hub.identify(request), name_of(request), path_part(request, "status")
    after = query_number(request, "cursor")

    def work(worker: Worker) -> tuple[list[AccessRequest], list[dict[str, str]]]:
        gating.check_decider(worker, hub, identity, name)
        if status not in gates.STATUSES:
            raise UsageError("status", f"{status[:40]!r} is not one of {', '.join(gates.STATUSES)}")
        gates.check_gated(worker.database, name)
        listed = gates.list_requests(worker.database, name, status, after=after, limit=_PAGE + 1)
        return listed, user_documents(worker.database, [entry.account for entry in listed])

    listed, users = await hub.workers.run(work)
    headers = {}
    if len(listed) > _PAGE:
        path = f"/api/models/{name}/user-access-request/{status}?cursor={listed[_PAGE - 1].id}"
        headers["link"] = f'<{hub.url(request)}{path}>; rel="next"'
    return JSONResponse([*map(_document, listed[:_PAGE], users)], headers=headers)


def _document(request: AccessRequest, user: dict[str, str]) -> dict[str, Any]:
    document = {"requestId": _request_id(request), "user": user, "status": request.status, "timestamp": time_of(request.asked)}
    return document | ({"rejectionReason": request.reason} if request.reason else {})


def _request_id(request: AccessRequest) -> str:
    """Return the id of a request, 24 hexadecimal digits as on the Hub."""
    return f"{request.id:024x}"


async def handle(hub: Hub, request: Request) -> Response:
    """POST …/user-access-request/handle: accept or reject a request, or let it wait again."""
    identity, name = await _identify_decider(hub, request)
    fields = await read_document(request)
    status, reason = str(fields.get("status", "")), fields.get("rejectionReason") or ""
    account, ident = fields.get("user"), fields.get("requestId")

    def work(worker: Worker) -> None:
        chosen = _account_of_request(worker, name, account, ident)
        gating.decide(
            worker, hub, identity, name, account=chosen, status=status, reason=reason if isinstance(reason, str) else ""
        )

    await _run(hub, work)
    return JSONResponse({})


def _account_of_request(worker: Worker, name: str, account: object, ident: object) -> str:
    if isinstance(account, str):
        return account
    if not isinstance(ident, str) or len(ident) != 24 or not set(ident) <= set("0123456789abcdef") or int(ident, 16) >= 1 << 63:
        raise UsageError("user", "is missing", "Send the name of the account, or the requestId of a list")
    return gates.request_account(worker.database, name, int(ident, 16))


async def grant(hub: Hub, request: Request) -> Response:
    """POST …/user-access-request/grant: give an account access that it need not have asked for."""
    identity, name = await _identify_decider(hub, request)
    account = str((await read_document(request)).get("user", ""))
    work = partial(gating.decide, account=account, status=gates.ACCEPTED, unasked=True)
    await _run(hub, lambda worker: work(worker, hub, identity, name))
    return JSONResponse({"user": account, "status": gates.ACCEPTED})


async def _identify_decider(hub: Hub, request: Request) -> tuple[Identity | None, str]:
    """Return who asks and the repository of the path, if they may decide on access to it: before the body is read."""
    identity, name = hub.identify(request), name_of(request)
    await hub.workers.run(gating.check_decider, hub, identity, name)
    return identity, name


async def _run(hub: Hub, work: Callable[[Worker], object]) -> None:
    try:
        await hub.workers.run(work)
    except ConflictError as error:  # the Hub's status for it
        raise ResponseError(400, "", str(error)) from error
    except NotFoundError as error:  # of an account or a request, which clients must not take for one of a revision
        raise ResponseError(404, "", str(error)) from error
