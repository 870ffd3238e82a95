"""Forms on the page of a proposal: accept, refuse and withdraw it."""

from __future__ import annotations

from adapterhub.hub.hf import proposal_changes
from adapterhub.hub.web.site import PageRequest
from adapterhub.hub.workers import Worker
from adapterhub.registry.repository_documents import WITHDRAWN

Fields = dict[str, str]


def accept_proposal(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/accept-proposal: make it the next version; `commit` is what the page showed."""
    number, commit, reason = fields.get("proposal", ""), fields.get("commit", ""), fields.get("message", "")
    proposal_changes.accept(worker, page_request.hub, page_request.who, name, number, commit=commit, reason=reason)
    return proposal_url(name, number)


def refuse_proposal(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/refuse-proposal: with a reason."""
    number, reason = fields.get("proposal", ""), fields.get("message", "").strip()
    proposal_changes.refuse(worker, page_request.hub, page_request.who, name, number, reason=reason)
    return proposal_url(name, number)


def check_withdrawal(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> None:
    """Refuse a client that is neither the author of a proposal nor a writer."""
    number = fields.get("proposal", "")
    proposal_changes.check_closer(worker, page_request.hub, page_request.who, name, number, state=WITHDRAWN)


def withdraw_proposal(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/withdraw-proposal: as its author."""
    number = fields.get("proposal", "")
    proposal_changes.withdraw(worker, page_request.hub, page_request.who, name, number)
    return proposal_url(name, number)


def proposal_url(name: str, number: str) -> str:
    """Return the address of the page of a proposal."""
    return f"/{name}/discussions/{number}"
