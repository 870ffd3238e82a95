"""The request being answered: its client, its account and its id in the log.

It lives in the context of the task that answers, and of the threads working for it, so that values needed deep down, such as
the author of a move, need not be passed through every call.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import field
from functools import partial
from typing import Any

from starlette.requests import Request

from adapterhub.http_server.request_bodies import WINDOW, body_of
from adapterhub.http_server.work_time import WorkMeter
from adapterhub_converters.display import printable
from adapterhub_converters.lazy_dataclass import dataclass

from . import request_texts


@dataclass
class RequestContext:
    """The context of one request.

    Attributes:
        address: The client's address; empty if there is none.
        account: The account of the client, once known; empty for an anonymous one.
        prefix: The first characters of its token.
        token: The number of its token; 0 without one.
        unknown_secret: The token or the cookie of a session that it has and that nobody has made; empty for none.
        names: The repositories and namespaces it asked to change.
        detail: What it asked to change them to, for the audit log; empty if its path says that.
        work: The CPU that it has taken in threads that work on the registry.
        is_rehearsal: Whether the request changes nothing, and so has no row of the audit log unless it is refused.
        warning: A warning for the client, sent in a header of the response; empty for none.
        id: 16 hexadecimal digits, in the log and in the response.
    """

    address: str = ""
    account: str = ""
    prefix: str = ""
    token: int = 0
    unknown_secret: str = ""
    names: list[str] = field(default_factory=list)
    detail: str = ""
    is_rehearsal: bool = False
    warning: str = ""
    work: WorkMeter = field(default_factory=WorkMeter)
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    def set_account(self, account: str, prefix: str, token: int = 0) -> None:
        """Record the account behind the request, and its token."""
        self.account, self.prefix, self.token = account, prefix, token

    def record_change(self, name: str) -> None:
        """Record a repository or namespace the request is about to change."""
        if name not in self.names:
            self.names.append(name)

    def record_detail(self, **values: object) -> None:
        """Record what the request changes something to: values by their names, without secrets."""
        texts = {key: printable(str(value))[:100] for key, value in values.items() if value is not None}
        # Quoted, as a value with a blank might look like further values.
        quoted = {key: json.dumps(text) if " " in text or '"' in text else text for key, text in texts.items()}
        self.detail = " ".join(f"{key}={text}" for key, text in quoted.items())


_CURRENT: ContextVar[RequestContext | None] = ContextVar("_CURRENT", default=None)


def begin(address: str) -> RequestContext:
    """Start the context of a request in the task that answers it."""
    request = RequestContext(address)
    _CURRENT.set(request)
    return request


def current() -> RequestContext:
    """Return the context of the request this task answers; an empty one outside of any request."""
    return _CURRENT.get() or RequestContext()


# ---- its body, which counts for the account that was identified before


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of at most `limit` bytes. `BodyError` if it is too large or too slow, or there are too many."""
    return await body_of(request).read(limit, current().account)


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    """Return the JSON object in a body, an empty one without a body; errors as for `read_body` and `parse_object`."""
    parse = partial(request_texts.parse_object, location=request.url.path)
    return await body_of(request).read_object(limit, current().account, parse)


async def read_form(request: Request, limit: int, max_fields: int) -> dict[str, str]:
    """Return the fields of a form, the first value of each; errors as for `read_body` and `parse_form`."""
    fields = request_texts.parse_form(await read_body(request, limit), max_fields)
    return {name: values[0] for name, values in fields.items()}


def stream_body(request: Request, limit: int | None = None, *, window: int = WINDOW) -> AsyncIterator[bytes]:
    """Yield the pieces of a body of which `window` bytes are in memory at a time; errors as for `read_body`."""
    return body_of(request).stream(limit, current().account, window=window)
