"""Forms of the pages, accepted only from pages of this hub.

The browser says where a form comes from, and within a session the form carries the session's CSRF token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import wraps
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub.access_control import ForbiddenError, NoTokenError
from adapterhub.hub.request_context import read_form
from adapterhub.hub.signed_fields import is_equal
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import AdapterhubError, UsageError

from .site import Page, PageRequest, answer_page, error_page, redirect_to, render_page

MAX_FORM = 8192
"""Bytes of a form, unless it says otherwise."""
_MAX_FIELDS = 20
_LOCAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/%?=&+:,")
FormWork = Callable[[PageRequest, dict[str, str]], Page | str]
"""The work of a form with these fields: returns the address to go to, or a page."""


def local_path(url: str) -> str:
    """Return a path of this hub, or else its first page, because a link may name any address."""
    return url if url.startswith("/") and not url.startswith("//") and _LOCAL.issuperset(url) else "/"


async def answer_form(
    request: Request,
    work: Callable[[PageRequest, Worker, dict[str, str]], Response],
    *,
    check: Callable[[PageRequest, Worker, dict[str, str]], object] | None = None,
    lock: Callable[[dict[str, str]], AbstractAsyncContextManager[None]] = lambda _fields: nullcontext(),
    limit: int = MAX_FORM,
) -> Response:
    """Answer a form of `limit` bytes within a session.

    `work` gets its fields, while what `lock` returns for them is held; `check` refuses before that who may not do it.
    """

    def check_sender(page_request: PageRequest, _worker: Worker) -> None:
        check_origin(page_request)
        if page_request.who is None:
            raise NoTokenError

    if refusal := await answer_page(request, check_sender):
        return refusal
    fields = await read_fields(request, limit)

    def run_check(page_request: PageRequest, worker: Worker) -> None:
        check_origin(page_request)
        check_session(page_request, fields)
        if check:
            check(page_request, worker, fields)

    def run_checked(page_request: PageRequest, worker: Worker) -> Response:
        run_check(page_request, worker)
        return work(page_request, worker, fields)

    if check and (refusal := await answer_page(request, run_check)):
        return refusal
    try:
        guard = lock(fields)
    except AdapterhubError as error:  # what is to be locked is no name
        raised = error
        return await answer_page(request, lambda page_request, _worker: error_page(page_request, raised))
    async with guard:
        return await answer_page(request, run_checked)


def form_endpoint(work: FormWork) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a form; `work` returns the address to go to, or a page with a secret, which nothing may keep."""

    @wraps(work)
    async def endpoint(request: Request) -> Response:
        def run(page_request: PageRequest, _worker: Worker, fields: dict[str, str]) -> Response:
            result = work(page_request, fields)
            if isinstance(result, str):
                return redirect_to(result)
            answer = render_page(page_request, result)
            answer.headers["cache-control"] = "no-store"
            return answer

        return await answer_form(request, run)

    return endpoint


def number_in(fields: dict[str, str], key: str) -> int:
    """Return a whole number in a form; UsageError if it is none."""
    text = fields.get(key, "").strip()
    if not (text.isdecimal() and text.isascii() and len(text) <= 18):
        raise UsageError(key, f"{text[:80]!r} is not a number")
    return int(text)


def gigabytes_in(fields: dict[str, str], key: str) -> int | None:
    """Return a number of gigabytes as bytes; None for an empty field, which is no limit."""
    text = fields.get(key, "").strip()
    if not text:
        return None
    if len(text) > 18 or not text.isascii() or not text.replace(".", "", 1).isdecimal():
        raise UsageError(key, f"{text[:80]!r} is not a number of gigabytes", "Write it like 50 or 0.5")
    return int(float(text) * 1e9)


def count_in(fields: dict[str, str], key: str) -> int | None:
    """Return a whole number; None for an empty field, which is no limit."""
    return number_in(fields, key) if fields.get(key, "").strip() else None


def claims_in(fields: dict[str, str], key: str) -> dict[str, str]:
    """Return claims and their values, one `NAME=VALUE` a line."""
    pairs = [line.strip().partition("=") for line in fields.get(key, "").splitlines() if line.strip()]
    if any(not name or not equals or not value for name, equals, value in pairs):
        raise UsageError(key, "are not claims and their values", "Write one a line, like groups=ml")
    return {name: value for name, _, value in pairs}


def check_session(page_request: PageRequest, fields: dict[str, str]) -> None:
    """Refuse a form without the CSRF token of the session."""
    if not is_equal(fields.get("csrf", ""), page_request.csrf):
        raise ForbiddenError("This form belongs to another session. Go back, load the page again, and retry.")


def check_origin(page_request: PageRequest) -> None:
    """Refuse a form sent by another site. A client that is not a browser sends no Origin."""
    origin = page_request.request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != urlsplit(page_request.url).netloc:
        raise ForbiddenError("This form was sent by another site. Open the page on this hub, and retry.")


async def read_fields(request: Request, limit: int = MAX_FORM) -> dict[str, str]:
    """Return the fields of a form of a page, of at most `limit` bytes. UsageError for one with more than any page has."""
    return await read_form(request, limit, _MAX_FIELDS)
