"""Decorators that turn functions which read or change the tables into handlers of requests about accounts and namespaces.

A decorated function gets a `Call` and the parsed parts of the path, and returns the document of the answer, which no cache may
keep. It checks the client's rights itself; `by` refuses a client earlier, before the body of a change is read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.access_control import NoTokenError, check_admin
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import EVERYWHERE, check_namespace
from adapterhub.hub.hf.reading import path_part
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.request_context import read_object
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .api_requests import is_set

_MAX_BODY = 64 << 10  # bytes
_NO_STORE = {"cache-control": "no-store"}
Fields = dict[str, Any]
Document = dict[str, Any]
Handler = Callable[[Hub, Request], Awaitable[Response]]
PathParser = Callable[[Request], Any]


@dataclass(frozen=True)
class Call:
    """A request while a worker answers it.

    Attributes:
        fields: The body of a change.
    """

    request: Request
    database: HubDatabase
    identity: Identity | None
    fields: Fields

    @property
    def force(self) -> bool:
        """Whether the client forces a change that leaves no admin who could undo it."""
        return is_set(self.request, "force")


# ---- parts of the path


def account_of(request: Request) -> str:
    """Return the account in a path."""
    return path_part(request, "account")


def namespace_of(request: Request) -> str:
    """Return the namespace in a path; UsageError for text that cannot be one."""
    return check_namespace(path_part(request, "namespace"))


def number_of(request: Request) -> int:
    """Return the number in a path; UsageError for any other text."""
    text = path_part(request, "ident")
    if not text.isdecimal() or not text.isascii() or len(text) > 18:
        raise UsageError(text[:80], "is not a number")
    return int(text)


# ---- who may make a change


def anybody(_identity: Identity, _request: Request) -> None:
    """Accept every client that has a token."""


def hub_admin(identity: Identity, _request: Request) -> None:
    """Refuse a client that is not an admin of the hub."""
    check_admin(identity, EVERYWHERE)


def namespace_admin(identity: Identity, request: Request) -> None:
    """Refuse a client that is not an admin of the namespace in the path."""
    check_admin(identity, namespace_of(request))


# ---- handlers


def read_handler(*parsers: PathParser) -> Callable[[Callable[..., Document]], Handler]:
    """Decorate a function that reads the tables."""

    def decorate(read: Callable[..., Document]) -> Handler:
        @wraps(read)
        async def answer_read(hub: Hub, request: Request) -> Response:
            parts = [parse(request) for parse in parsers]
            identity = hub.identify(request)
            document = await hub.workers.run(lambda worker: read(Call(request, worker.database, identity, {}), *parts))
            return JSONResponse(document, headers=_NO_STORE)

        return answer_read

    return decorate


def change_handler(
    *parsers: PathParser, by: Callable[[Identity, Request], None] = anybody, status: int = 200
) -> Callable[[Callable[..., Document]], Handler]:
    """Decorate a function that changes the tables.

    Args:
        parsers: Functions that read the parts of the path; a malformed part is refused first.
        by: Raises an error for a client that may not make the change, before the body is read.
        status: The status of a success.
    """

    def decorate(change: Callable[..., Document]) -> Handler:
        @wraps(change)
        async def answer_change(hub: Hub, request: Request) -> Response:
            parts = [parse(request) for parse in parsers]
            sender = hub.identify(request)
            if sender is None:
                raise NoTokenError
            by(sender, request)
            fields = await read_object(request, _MAX_BODY)
            # Looked up again: the token or the role may be gone since the body began.
            identity = hub.identify(request)
            document = await hub.workers.run(lambda worker: change(Call(request, worker.database, identity, fields), *parts))
            return JSONResponse(document, status, headers=_NO_STORE)

        return answer_change

    return decorate
