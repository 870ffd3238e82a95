"""Handlers of the gate of a name: its mode, its terms, and the access that the client has.

Requests for access are asked for and decided at the addresses of the Hugging Face Hub's API (`hub.hf.access_requests`).
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import gates, request_context
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.commits import source_name
from adapterhub.hub.gates import Gate
from adapterhub.hub.hf import gating
from adapterhub.hub.hf.reading import visible_view
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_object
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import UsageError

from .api_requests import name_of
from .changing import refuse_condition
from .request_fields import text_field

_MAX_BODY = 64 << 10


async def show_gate(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/gate: its mode, null without a gate, its terms, and whether the client may read its files."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> dict[str, Any]:
        source = source_name(visible_view(worker, hub, identity, name))
        gate = gates.find_gate(worker.database, source)
        status = gates.access_status(worker.database, source, identity.account) if identity else None
        may_read = hub.access.may_read_files(identity, name)
        return {**_document(name, gate), "request": status or None, "may_read": may_read}

    return JSONResponse(await hub.workers.run(work))


async def set_gate(hub: Hub, request: Request) -> Response:
    """PUT or DELETE …/names/{name}/gate: gate a name by a mode and terms, which stay as they are if missing; or no longer."""
    refuse_condition(request)
    identity, name = hub.identify(request), name_of(request)
    if identity is None:
        raise NoTokenError
    await hub.workers.run(gating.check_decider, hub, identity, name)
    fields = await read_object(request, _MAX_BODY) if request.method == "PUT" else {}
    if request.method == "PUT" and "mode" not in fields:
        raise UsageError("mode", "is missing", f"Send one of {', '.join(gates.MODES)}")

    def work(worker: Worker) -> Gate | None:
        gate = None
        if request.method == "PUT":
            before = gates.find_gate(worker.database, name) or Gate(gates.MANUAL)
            gate = Gate(text_field(fields, "mode"), text_field(fields, "terms", before.terms))
        gating.set_gate(worker, hub, identity, name, gate)
        return gate

    request_context.current().record_detail(gated=fields.get("mode", False))
    return JSONResponse(_document(name, await hub.workers.run(work)))


def _document(name: str, gate: Gate | None) -> dict[str, Any]:
    return {"name": name, "mode": gate.mode if gate else None, "terms": gate.terms if gate else ""}
