"""Accept, refuse and withdraw proposals, each with its checks: the API, the forms and the calls of clients make them.

Callers hold the turn of the name (`proposing.turn`): the processes of a hub decide one after the other, and each looks at the
proposal again. An accepted one is committed to `main` as any commit is, by the account that accepts it: the same checks,
policy and requirements decide.
"""

from __future__ import annotations

from contextlib import suppress

from adapterhub.hub import proposals, request_context
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import Commit, View
from adapterhub.hub.hub import Hub
from adapterhub.hub.staged_files import StagedFiles
from adapterhub.hub.workers import Worker
from adapterhub.registry.repository_documents import ACCEPTED, MAIN, REFUSED, WITHDRAWN, Proposal
from adapterhub_converters.errors import ConflictError, RefusedError, UsageError

from .commit_requests import Changes
from .reading import visible_view
from .writing import MovedMeanwhileError, commit_changes

_ATTEMPTS = 30  # of an acceptance: with each that fails, a push has succeeded


def accept(
    worker: Worker, hub: Hub, identity: Identity | None, name: str, number: str, *, commit: str = "", reason: str = ""
) -> Commit:
    """Commit an open proposal to `main`, for a writer of it; return the commit that it became.

    Args:
        worker: The worker of this thread.
        hub: The hub.
        identity: The account that accepts it.
        name: The repository.
        number: The number of the proposal.
        commit: The id of its commit where the client has seen it; empty for any.
        reason: A remark.

    Raises:
        ConflictError: It is closed, or another commit by now; or `main` has changed the same files.
        RefusedError: No push of these files would be accepted either.
    """
    staged = hub.stage_files(name)
    try:
        for _ in range(_ATTEMPTS - 1):
            with suppress(MovedMeanwhileError):
                return _accept(worker, hub, identity, name, number, staged=staged, commit=commit, reason=reason)
        return _accept(worker, hub, identity, name, number, staged=staged, commit=commit, reason=reason)
    finally:
        staged.close()


def _accept(
    worker: Worker,
    hub: Hub,
    identity: Identity | None,
    name: str,
    number: str,
    *,
    staged: StagedFiles,
    commit: str,
    reason: str,
) -> Commit:
    view = visible_view(worker, hub, identity, name)
    account = hub.access.check_write(identity, name).account
    request_context.current().record_detail(proposal=number, state=ACCEPTED)
    proposal = proposals.find_open(view, number)
    if commit and commit != proposal.commit:
        raise ConflictError(f"{name}: proposal {number}", f"is the commit {proposal.commit} now", "Look at it again")
    _check_reason(reason)
    change = proposals.change_of(worker, view, proposal)
    if not change.files:
        raise RefusedError(f"{name}: proposal {number}", "changes nothing yet", "Wait until its author commits to it")
    if change.conflicts:
        problem = f"main has changed {', '.join(change.conflicts[:6])} since"
        raise ConflictError(
            f"{name}: proposal {number}", problem, "Propose it for the newest version", code="proposal-conflict"
        )
    files = {path: file for path, file in change.files.items() if file is not None}
    removed = {path for path, file in change.files.items() if file is None}
    description = f"{change.record.description}\n\nProposal {number} of {proposal.author}, accepted by {account}".strip()
    changes = Changes(
        staged, proposal.title, description, author=proposal.author, files=files, inline={*files}, removed=removed
    )
    try:
        accepted, _ = commit_changes(worker, hub, identity, f"{name}@{MAIN}", changes)
    except ConflictError as error:
        raise MovedMeanwhileError(412, "", f"{name}@{MAIN} has moved meanwhile: accept it again") from error
    proposals.close(worker, name, number, state=ACCEPTED, account=account, reason=reason, became=accepted.id)
    proposals.settle(worker, hub.webhooks, name, proposal.commit)
    return accepted


def refuse(worker: Worker, hub: Hub, identity: Identity | None, name: str, number: str, *, reason: str) -> Proposal:
    """Refuse an open proposal with a reason, for a writer of the repository; its files go with the next gc."""
    return _close(worker, hub, identity, name, number, state=REFUSED, reason=reason)


def withdraw(worker: Worker, hub: Hub, identity: Identity | None, name: str, number: str, *, reason: str = "") -> Proposal:
    """Withdraw an open proposal, for its author and the writers of the repository."""
    return _close(worker, hub, identity, name, number, state=WITHDRAWN, reason=reason)


def check_closer(
    worker: Worker, hub: Hub, identity: Identity | None, name: str, number: str, *, state: str
) -> tuple[View, str]:
    """Return a repository, and the account that may close a proposal to it so: a writer, or its author who withdraws it."""
    view = visible_view(worker, hub, identity, name)
    if identity is None:
        raise NoTokenError
    # Looked at first, as an author needs no role to withdraw a proposal.
    proposal = view.repository.proposals.get(number) if view.repository else None
    is_withdrawn_by_author = state == WITHDRAWN and proposal is not None and proposal.author == identity.account
    if is_withdrawn_by_author:
        request_context.current().record_change(name)
    else:
        hub.access.check_write(identity, name)
    return view, identity.account


def check_acceptor(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> View:
    """Return a repository that a client may accept proposals of."""
    view = visible_view(worker, hub, identity, name)
    hub.access.check_write(identity, name)
    return view


def _close(worker: Worker, hub: Hub, identity: Identity | None, name: str, number: str, *, state: str, reason: str) -> Proposal:
    view, account = check_closer(worker, hub, identity, name, number, state=state)
    request_context.current().record_detail(proposal=number, state=state)
    proposal = proposals.find_open(view, number)
    _check_reason(reason)
    if state == REFUSED and not reason:
        raise UsageError("reason", "is empty", "Say why it is refused")
    proposals.close(worker, name, number, state=state, account=account, reason=reason)
    proposals.settle(worker, hub.webhooks, name, proposal.commit)
    return proposals.find(visible_view(worker, hub, identity, name), number)


def _check_reason(reason: str) -> None:
    if len(reason) > proposals.MAX_REASON:
        raise UsageError("reason", f"has more than {proposals.MAX_REASON:,} characters")
