"""Changes of the gate of a repository and of the access to it, which handlers of every protocol and the forms of pages make."""

from __future__ import annotations

from functools import partial

from adapterhub.hub import aliases, gates, request_context
from adapterhub.hub.access_control import NoTokenError, check_admin, check_scope
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import source_name
from adapterhub.hub.gates import AccessRequest, Gate
from adapterhub.hub.hub import Hub
from adapterhub.hub.workers import Worker
from adapterhub.registry.moves import now

from .reading import visible_view

REQUESTED, DECIDED = "access.requested", "access.decided"
"""Events for webhooks."""


def ask(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> AccessRequest:
    """Ask for access to a gated repository, or that of an alias, for the account of a client, which accepts the terms."""
    name = source_name(visible_view(worker, hub, identity, name))
    if identity is None:
        raise NoTokenError
    check_scope(identity, name)
    request = gates.ask(worker.database, name, identity.account, on_change=partial(_queue_event, hub, REQUESTED))
    request_context.current().record_detail(status=request.status, terms=request.terms)
    hub.webhooks.wake()
    return request


def decide(
    worker: Worker,
    hub: Hub,
    identity: Identity | None,
    name: str,
    *,
    account: str,
    status: str,
    reason: str = "",
    unasked: bool = False,
) -> AccessRequest:
    """Set the status of the request of an account, as an admin of the namespace; `unasked` also if there is none."""
    decider = check_decider(worker, hub, identity, name)
    request_context.current().record_detail(account=account, status=status, reason=reason or None)
    queue = partial(_queue_event, hub, DECIDED)
    options = {"decider": decider.account, "reason": reason}
    request = gates.decide(worker.database, name, account, status, **options, unasked=unasked, on_change=queue)
    hub.webhooks.wake()
    return request


def _queue_event(hub: Hub, event: str, request: AccessRequest) -> None:
    about = {"account": request.account, "status": request.status}
    hub.webhooks.queue_event(request.name, {"event": event, "name": request.name, "time": now(), **about})


def set_gate(worker: Worker, hub: Hub, identity: Identity | None, name: str, gate: Gate | None) -> None:
    """Gate a repository, or with None let all who see it read it, as an admin of the namespace."""
    check_decider(worker, hub, identity, name)
    gates.set_gate(worker.database, name, gate)


def check_decider(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> Identity:
    """Return the identity of a client that may decide on access to a repository it sees; RefusedError for an alias."""
    visible_view(worker, hub, identity, name)
    aliases.check_writable_name(name)
    return check_admin(identity, name)
