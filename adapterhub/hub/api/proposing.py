"""Handlers that list, show, accept, refuse and withdraw proposals (`hf.proposal_changes`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import commits, file_differences, proposals
from adapterhub.hub.hf import proposal_changes, proposing
from adapterhub.hub.hf.reading import path_part, visible_view
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_object
from adapterhub.hub.workers import Worker
from adapterhub.registry.repository_documents import OPEN, WITHDRAWN, Proposal

from .api_requests import name_of
from .changing import begin, refuse_condition
from .request_fields import text_field

_MAX_BODY = 64 << 10  # bytes of a document with a reason


def _summary(name: str, number: str, proposal: Proposal) -> dict[str, Any]:
    """Return a proposal of a list."""
    return {
        "name": name,
        "proposal": int(number),
        "revision": f"{commits.PROPOSALS}{number}",
        "commit": proposal.commit,
        "title": proposal.title,
        "author": proposal.author,
        "opened": proposal.opened,
        "state": proposal.state,
        "objection": proposal.objection or None,
        "closed_by": proposal.closed_by or None,
        "closed": proposal.closed or None,
        "reason": proposal.reason or None,
        "became": proposal.became or None,
    }


async def proposals_of(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/proposals: the newest first; with `state`, those in that state."""
    identity, name, state = hub.identify(request), name_of(request), request.query_params.get("state", "")

    def work(worker: Worker) -> list[dict[str, Any]]:
        view = visible_view(worker, hub, identity, name)
        listed = list(view.repository.proposals.items()) if view.repository else []
        return [_summary(view.name, *entry) for entry in listed[::-1] if state in ("", entry[1].state)]

    return JSONResponse({"proposals": await hub.workers.run(work)})


async def proposal(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/proposals/{number}: an open one with what it changes, and what stands in its way."""
    identity, name, number = hub.identify(request), name_of(request), path_part(request, "ident")

    def work(worker: Worker) -> dict[str, Any]:
        view = visible_view(worker, hub, identity, name)
        shown = proposals.find(view, number)
        document = _summary(view.name, number, shown)
        if shown.state != OPEN:
            return document
        change = proposals.change_of(worker, view, shown)
        files, more = file_differences.of_proposal(worker, hub, identity, view, change)
        listed = [{"path": file.path, "before": file.before, "after": file.after, "lines": [*file.lines]} for file in files]
        about = {"description": change.record.description, "parent": change.record.parent, "conflicts": change.conflicts}
        return {**document, **about, "files": listed, "more_files": more}

    return JSONResponse(await hub.workers.run(work))


async def accept(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/proposals/{number}/acceptance: commit it to `main`, if it is still the commit `commit`."""
    refuse_condition(request)
    identity, name = await begin(hub, request, visible_view)
    fields = await read_object(request, _MAX_BODY)
    number = path_part(request, "ident")
    commit, reason = text_field(fields, "commit", ""), text_field(fields, "reason", "")
    work = partial(proposal_changes.accept, commit=commit, reason=reason)
    async with proposing.turn(hub, name):
        accepted = await hub.workers.run(work, hub, identity, name, number)
    version = f"{name}:v{accepted.row.number}" if accepted.row else None
    return JSONResponse({"name": name, "proposal": int(number), "commit": accepted.id, "version": version})


async def refuse(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/proposals/{number}/refusal: refuse it with a `reason`; its files go with the next gc."""
    refuse_condition(request)
    identity, name = await begin(hub, request, visible_view)
    reason = text_field(await read_object(request, _MAX_BODY), "reason")
    number = path_part(request, "ident")
    async with proposing.turn(hub, name):
        closed = await hub.workers.run(proposal_changes.refuse, hub, identity, name, number, reason=reason)
    return JSONResponse(_summary(name, number, closed))


async def withdraw(hub: Hub, request: Request) -> Response:
    """DELETE …/names/{name}/proposals/{number}: withdraw it, as its author or a writer of the name."""
    refuse_condition(request)
    identity, name, number = hub.identify(request), name_of(request), path_part(request, "ident")
    await hub.workers.run(partial(proposal_changes.check_closer, state=WITHDRAWN), hub, identity, name, number)
    async with proposing.turn(hub, name):
        closed = await hub.workers.run(proposal_changes.withdraw, hub, identity, name, number)
    return JSONResponse(_summary(name, number, closed))
