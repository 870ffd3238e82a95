"""Signing in and out: with a token, or at the hub's OpenID Connect provider."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub import request_context
from adapterhub.hub.access_control import ForbiddenError
from adapterhub.hub.accounts import admissions, oidc, sessions
from adapterhub.hub.accounts.oidc import Login
from adapterhub.hub.settings import Provider
from adapterhub.hub.workers import Worker
from adapterhub.index import repository_rows
from adapterhub_converters.errors import AdapterhubError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from .form_requests import answer_form, check_origin, local_path, read_fields
from .site import SIGN_IN, Page, PageRequest, answer_page, redirect_to, render_page

PROVIDER, BACK = f"{SIGN_IN}/provider", f"{SIGN_IN}/back"
_LOGIN = "adapterhub_login"


@dataclass(frozen=True)
class SignInPage(Page):
    """The ways to sign in.

    Attributes:
        following: The page to show after signing in.
        provider: The host of the provider; empty if there is none.
        elsewhere: The address that leads to the provider.
        wrong: Why the last token was refused.
    """

    following: str
    provider: str
    elsewhere: str
    wrong: str = ""
    template: ClassVar[str] = "sign_in.html"


def sign_in_page(page_request: PageRequest, _worker: Worker) -> SignInPage:
    """GET /-/sign-in."""
    return _sign_in_page(page_request, local_path(page_request.query("next")))


def _sign_in_page(page_request: PageRequest, next_page: str, wrong: str = "") -> SignInPage:
    provider = page_request.hub.settings.provider
    host = urlsplit(provider.issuer).netloc if provider else ""
    # Start at the address the provider redirects back to: cookies of another address would be missing there.
    return SignInPage(next_page, host, f"{page_request.url}{PROVIDER}", wrong)


async def login(request: Request) -> Response:
    """GET /login, the usual address elsewhere."""
    return redirect_to(f"{SIGN_IN}?{request.url.query}" if request.url.query else SIGN_IN)


async def sign_in(request: Request) -> Response:
    """POST /-/sign-in."""
    fields = await read_fields(request)

    def work(page_request: PageRequest, _worker: Worker) -> Response:
        check_origin(page_request)
        identity = page_request.hub.access.token_identity(fields.get("token", "").strip())
        next_page = local_path(fields.get("next", ""))
        if identity is None:
            page_request.hub.access.count_attempt(page_request.hub.access.failures)
            return render_page(
                page_request, _sign_in_page(page_request, next_page, "This token is unknown, revoked or expired."), 401
            )
        request_context.current().set_account(identity.account, identity.prefix, identity.token)
        return _session_response(
            page_request, next_page, sessions.start(page_request.hub.database, identity.token), sessions.LIFETIME
        )

    return await answer_page(request, work, public=True)


def _session_response(page_request: PageRequest, next_page: str, session: str, lifetime: int) -> Response:
    """Return a response that starts a session, and ends the previous one."""
    answer = redirect_to(next_page)
    _end_session(page_request, answer)
    _set_cookie(page_request, answer, sessions.COOKIE, session, lifetime)
    return answer


def _set_cookie(page_request: PageRequest, answer: Response, name: str, value: str, lifetime: int) -> None:
    """Set a cookie that no script can read and no other site's form can use."""
    secure = page_request.url.startswith("https:")
    answer.set_cookie(name, value, max_age=lifetime, httponly=True, secure=secure, samesite="lax")


async def sign_out(request: Request) -> Response:
    """POST /-/sign-out."""

    def work(page_request: PageRequest, _worker: Worker, _fields: dict[str, str]) -> Response:
        answer = redirect_to("/")
        _end_session(page_request, answer)
        return answer

    return await answer_form(request, work)


def _end_session(page_request: PageRequest, answer: Response) -> None:
    if cookie := page_request.request.cookies.get(sessions.COOKIE):
        sessions.end(page_request.hub.database, cookie)
        answer.delete_cookie(sessions.COOKIE, httponly=True, samesite="lax")


# ---- at the provider


async def leave(request: Request) -> Response:
    """GET /-/sign-in/provider: redirect to the provider."""

    def work(page_request: PageRequest, _worker: Worker) -> Response:
        provider, redirect_uri = _provider(page_request)
        login_attempt = Login.begin(page_request.hub.secret, local_path(page_request.query("next")))
        with _naming_the_provider():
            url = oidc.login_url(provider, page_request.hub.issuers, login_attempt, redirect_uri)
        answer = redirect_to(url)
        _set_cookie(page_request, answer, _LOGIN, login_attempt.cookie, oidc.LIFETIME)
        return answer

    return await answer_page(request, work, public=True, workers=request.app.state.hub.sign_ins)


async def arrive(request: Request) -> Response:
    """GET /-/sign-in/back: the browser returns from the provider, with a code."""

    def work(page_request: PageRequest, worker: Worker) -> Response:
        provider, redirect_uri = _provider(page_request)
        login_attempt = Login(page_request.request.cookies.get(_LOGIN, ""), page_request.hub.secret)
        try:
            next_page = local_path(login_attempt.check(page_request.query("state")))
            id_token = oidc.complete(
                provider, page_request.hub.issuers, login_attempt, redirect_uri, dict(page_request.request.query_params)
            )
            request_context.current().record_change(f"{id_token.claims.get('sub')} at {id_token.issuer}")
            mirrors = bool(page_request.hub.mirror or page_request.hub.upstream)
            # Those that have or had anything in them.
            namespaces = repository_rows.namespaces(worker.registry.index)
            account = admissions.admit(page_request.hub.database, id_token, namespaces, mirrors=mirrors)
        except AdapterhubError as error:
            raise ForbiddenError(str(error)) from error
        request_context.current().set_account(account, "")
        answer = _session_response(
            page_request, next_page, sessions.sign_in(page_request.hub.database, account), sessions.SIGNED_IN
        )
        answer.delete_cookie(_LOGIN, httponly=True, samesite="lax")
        return answer

    return await answer_page(request, work, public=True, workers=request.app.state.hub.sign_ins)


@contextmanager
def _naming_the_provider() -> Iterator[None]:
    """Refuse with the complete error, because it names the provider: that one is down or wrong, not this hub."""
    try:
        yield
    except AdapterhubError as error:
        raise ForbiddenError(str(error)) from error


def _provider(page_request: PageRequest) -> tuple[Provider, str]:
    """Return the provider, and the address it redirects back to; the number of attempts per network is limited."""
    if page_request.hub.settings.provider is None:
        raise NotFoundError(page_request.path, "this hub has no provider to sign in with")
    page_request.hub.access.count_attempt(page_request.hub.access.logins)
    return page_request.hub.settings.provider, page_request.hub.own_url(page_request.request) + BACK
