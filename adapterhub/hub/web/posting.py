"""Forms of the pages, accepted only from pages of this hub.

The browser says where a form comes from, and within a session the form carries the session's CSRF token.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub.access_control import ForbiddenError, NoTokenError
from adapterhub.hub.request_context import read_body
from adapterhub.hub.workers import Worker

from .site import PageRequest, answer_page

_MAX_FORM, _MAX_FIELDS = 8192, 20  # limits of a form: bytes and fields
_LOCAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/%?=&+:,")


def local_path(url: str) -> str:
    """Return a path of this hub, or else its first page, because a link may name any address."""
    return url if url.startswith("/") and not url.startswith("//") and _LOCAL.issuperset(url) else "/"


async def answer_form(request: Request, work: Callable[[PageRequest, Worker, dict[str, str]], Response]) -> Response:
    """Answer a form within a session; `work` gets its fields."""

    def check_sender(page_request: PageRequest, _worker: Worker) -> None:
        check_origin(page_request)
        if page_request.who is None:
            raise NoTokenError

    if refusal := await answer_page(request, check_sender):
        return refusal
    fields = await read_fields(request)

    def run_checked(page_request: PageRequest, worker: Worker) -> Response:
        check_origin(page_request)
        check_session(page_request, fields)
        return work(page_request, worker, fields)

    return await answer_page(request, run_checked)


def check_session(page_request: PageRequest, fields: dict[str, str]) -> None:
    """Refuse a form without the CSRF token of the session."""
    # Constant time, as for any secret.
    if not hmac.compare_digest(fields.get("csrf", "").encode(), page_request.csrf.encode()):
        raise ForbiddenError("This form belongs to another session. Go back, load the page again, and retry.")


def check_origin(page_request: PageRequest) -> None:
    """Refuse a form sent by another site. A client that is not a browser sends no Origin."""
    origin = page_request.request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != urlsplit(page_request.url).netloc:
        raise ForbiddenError("This form was sent by another site. Open the page on this hub, and retry.")


async def read_fields(request: Request) -> dict[str, str]:
    """Return the fields of a form; none if it has more than any form of these pages."""
    raw = await read_body(request, _MAX_FORM)
    try:
        return {key: values[0] for key, values in parse_qs(raw.decode("utf-8", "replace"), max_num_fields=_MAX_FIELDS).items()}
    except ValueError:
        return {}
