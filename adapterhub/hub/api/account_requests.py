"""What the handlers about accounts and namespaces share: who asks, the body of a change, and an answer that nobody keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.access_control import NoTokenError, check_admin
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hf.reading import path_part
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.request_context import read_object
from adapterhub_converters.errors import UsageError

_MAX_BODY = 64 << 10  # bytes
_NO_STORE = {"cache-control": "no-store"}
Fields = dict[str, Any]
Read = Callable[[HubDatabase, Identity | None], Any]
Change = Callable[[HubDatabase, Identity | None, Fields], Any]


async def answer_read(hub: Hub, request: Request, read: Read) -> Response:
    """Return the response with what a client may see of the tables; `read` checks its rights."""
    identity = hub.identify(request)
    document = await hub.workers.run(lambda worker: read(worker.database, identity))
    return JSONResponse(document, headers=_NO_STORE)


async def answer_change(hub: Hub, request: Request, change: Change, *, admin_of: str = "", status: int = 200) -> Response:
    """Make a change with the fields of the body; `change` checks the client's rights.

    Who has no token, or is not an admin of the namespace `admin_of`, is refused before the body is read.
    """
    _check_sender(hub, request, admin_of)
    fields = await read_object(request, _MAX_BODY)
    # Looked up again: the token or the role may be gone since the body began.
    identity = hub.identify(request)
    document = await hub.workers.run(lambda worker: change(worker.database, identity, fields))
    return JSONResponse(document or {}, status, headers=_NO_STORE)


def _check_sender(hub: Hub, request: Request, admin_of: str) -> None:
    identity = hub.identify(request)
    if identity is None:
        raise NoTokenError
    if admin_of:
        check_admin(identity, admin_of)


def number_of(request: Request) -> int:
    """Return the number in a path; UsageError if it is none."""
    text = path_part(request, "ident")
    if not text.isdecimal() or not text.isascii() or len(text) > 18:
        raise UsageError(text[:80], "is not a number")
    return int(text)
