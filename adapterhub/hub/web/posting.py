"""Forms of the pages: taken only from a page of this hub.

The browser says where a form comes from, and within a session it has that session's own mark.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub.access import ForbiddenError
from adapterhub.hub.workers import Worker

from .site import Asked, answered

_MOST, _MOST_FIELDS = 8192, 20  # bytes and fields of a form
_LOCAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/%?=&+:,")


def local(url: str) -> str:
    """A path of this hub, else its first page: a link may name any."""
    return url if url.startswith("/") and not url.startswith("//") and _LOCAL.issuperset(url) else "/"


async def posted(request: Request, work: Callable[[Asked, Worker, dict[str, str]], Response]) -> Response:
    """Answer a form of a session, whose fields `work` gets."""
    fields = await sent(request)

    def checked(asked: Asked, worker: Worker) -> Response:
        check_origin(asked)
        check_session(asked, fields)
        return work(asked, worker, fields)

    return await answered(request, checked)


def check_session(asked: Asked, fields: dict[str, str]) -> None:
    """Refuse a form without the mark of the session."""
    if not hmac.compare_digest(fields.get("csrf", "").encode(), asked.csrf.encode()):
        raise ForbiddenError("This form is of another session. Go back, load the page again, and retry.")


def check_origin(asked: Asked) -> None:
    """Refuse a form that another site sent; a client that is no browser sends no Origin."""
    origin = asked.request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != urlsplit(asked.url).netloc:
        raise ForbiddenError("This form was sent by another site. Open the page on this hub, and retry.")


async def sent(request: Request) -> dict[str, str]:
    """The fields of a form that was sent; empty for one that is too large, which none of ours is."""
    raw = b""
    async for piece in request.stream():
        raw += piece
        if len(raw) > _MOST:
            return {}
    try:
        return {key: values[0] for key, values in parse_qs(raw.decode("utf-8", "replace"), max_num_fields=_MOST_FIELDS).items()}
    except ValueError:
        return {}
