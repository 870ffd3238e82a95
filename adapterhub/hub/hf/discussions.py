"""Proposals as the pull requests that huggingface_hub lists, merges and closes (`community.py`). It has no discussions."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import file_differences, proposals
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import View
from adapterhub.hub.hub import Hub
from adapterhub.hub.workers import Worker
from adapterhub.registry.repository_documents import ACCEPTED, OPEN, WITHDRAWN, Proposal

from . import proposal_changes, proposing
from .hf_errors import ResponseError
from .reading import name_of, path_part, query_number, visible_view
from .repositories import identify_account, read_document

_PAGE = 50
_STATUS = {OPEN: "open", ACCEPTED: "merged"}  # all others are closed


def _status_of(proposal: Proposal) -> str:
    return _STATUS.get(proposal.state, "closed")


def _summary(name: str, number: str, proposal: Proposal) -> dict[str, Any]:
    return {
        "num": int(number),
        "title": proposal.title,
        "status": _status_of(proposal),
        "author": {"name": proposal.author},
        "createdAt": proposal.opened,
        "isPullRequest": True,
        "repo": {"name": name, "type": "model"},
        "repoOwner": {"name": name.partition("/")[0]},
    }


async def list_discussions(hub: Hub, request: Request) -> Response:
    """GET …/discussions: a page of the proposals, the newest first."""
    identity, name, params = hub.identify(request), name_of(request), request.query_params
    author, kind, status = (params.get(key, "") for key in ("author", "type", "status"))
    start = query_number(request, "p") * _PAGE

    def work(worker: Worker) -> list[dict[str, Any]]:
        view = visible_view(worker, hub, identity, name)
        stored = list(view.repository.proposals.items()) if view.repository and kind != "discussion" else []
        summaries = [_summary(name, *entry) for entry in reversed(stored)]
        return [
            summary
            for summary in summaries
            if author in ("", summary["author"]["name"])
            and (status in ("", "all") or (status == "open") == (summary["status"] == "open"))
        ]

    listed = await hub.workers.run(work)
    return JSONResponse({"discussions": listed[start : start + _PAGE], "count": len(listed), "start": start})


async def discussion(hub: Hub, request: Request) -> Response:
    """GET …/discussions/{number}: a proposal with what it changes, as far as it is open."""
    identity, name, number = hub.identify(request), name_of(request), path_part(request, "number")

    def work(worker: Worker) -> dict[str, Any]:
        view = visible_view(worker, hub, identity, name)
        return _details(worker, hub, identity, view, number)

    return JSONResponse(await hub.workers.run(work))


def _details(worker: Worker, hub: Hub, identity: Identity | None, view: View, number: str) -> dict[str, Any]:
    proposal = proposals.find(view, number)
    conflicts: list[str] = []
    diff: list[str] = []
    if proposal.state == OPEN:
        change = proposals.change_of(worker, view, proposal)
        conflicts = list(change.conflicts)
        files, _ = file_differences.of_proposal(worker, hub, identity, view, change)
        for file in files:
            diff += [f"--- a/{file.path}", f"+++ b/{file.path}", *file.lines]
    events = [_event(proposal.commit, "commit", proposal.opened, proposal.author, subject=proposal.title, oid=proposal.commit)]
    if proposal.state != OPEN:
        events.append(_status_change(proposal))
    changes = {"base": "refs/heads/main", **({"mergeCommitId": proposal.became} if proposal.became else {})}
    extras = {"events": events, "filesWithConflicts": conflicts, "changes": changes, "diff": "\n".join(diff)}
    return {**_summary(view.name, number, proposal), **extras}


def _event(ident: str, kind: str, created: str, author: str, **data: str) -> dict[str, Any]:
    return {"id": ident, "type": kind, "createdAt": created, "author": {"name": author}, "data": data}


def _status_change(proposal: Proposal) -> dict[str, Any]:
    ident = proposal.commit[::-1]  # any that differs from the commit's
    return _event(ident, "status-change", proposal.closed, proposal.closed_by, status=_status_of(proposal))


async def merge(hub: Hub, request: Request) -> Response:
    """POST …/discussions/{number}/merge: accept a proposal; the answer has the commit that it became, as its details do."""
    identity, name, number = identify_account(hub, request), name_of(request), path_part(request, "number")
    await hub.workers.run(proposal_changes.check_acceptor, hub, identity, name)
    reason = str((await read_document(request)).get("comment") or "")
    work = partial(proposal_changes.accept, reason=reason)
    async with proposing.turn(hub, name):
        accepted = await hub.workers.run(work, hub, identity, name, number)
    return JSONResponse({"mergeCommitId": accepted.id})


async def set_status(hub: Hub, request: Request) -> Response:
    """POST …/discussions/{number}/status: close a proposal, as its author or a writer of the repository."""
    identity, name, number = identify_account(hub, request), name_of(request), path_part(request, "number")
    # Its author withdraws it, a writer refuses it.
    await hub.workers.run(partial(proposal_changes.check_closer, state=WITHDRAWN), hub, identity, name, number)
    fields = await read_document(request)
    if fields.get("status") != "closed":
        problem = "the files of a closed proposal are gone: open another one"
        raise ResponseError(501, "NotImplemented", f"{name}: {problem}")
    reason = str(fields.get("comment") or "")

    def work(worker: Worker) -> Proposal:
        proposal = proposals.find(visible_view(worker, hub, identity, name), number)
        if proposal.author == identity.account:
            return proposal_changes.withdraw(worker, hub, identity, name, number, reason=reason)
        return proposal_changes.refuse(worker, hub, identity, name, number, reason=reason or "closed without a comment")

    async with proposing.turn(hub, name):
        closed = await hub.workers.run(work)
    return JSONResponse({"newStatus": _status_change(closed)})
