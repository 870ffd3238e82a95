"""What the page of a gated name says: the terms, and what became of the client's request for access."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.hub import gates
from adapterhub.hub.commits import View, source_name
from adapterhub.hub.gates import AccessRequest, Gate
from adapterhub.hub.workers import Worker
from adapterhub_converters.lazy_dataclass import dataclass

from .site import PageRequest

_SHOWN = 100  # requests of each status


@dataclass(frozen=True, slots=True)
class GatePanel:
    """The gate of a name, whether the client may read its files, and the status of its request; empty without one."""

    name: str
    gate: Gate
    may_read: bool
    status: str


def gate_panel(page_request: PageRequest, worker: Worker, view: View) -> GatePanel | None:
    """Return what a page says of the gate of a repository; None without one."""
    name, identity = source_name(view), page_request.who
    gate = gates.find_gate(worker.database, name)
    if gate is None:
        return None
    status = gates.access_status(worker.database, name, identity.account) if identity else ""
    return GatePanel(name, gate, page_request.hub.access.may_read_files(identity, name), status or "")


def access_requests(worker: Worker, name: str) -> Sequence[AccessRequest]:
    """Return the first requests of each status, those that wait first."""
    return [
        request for status in gates.STATUSES for request in gates.list_requests(worker.database, name, status, limit=_SHOWN)
    ]
