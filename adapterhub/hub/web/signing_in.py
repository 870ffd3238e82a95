"""Signing in and out: with a token that is typed in, or at the OpenID Connect provider of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub import asking
from adapterhub.hub.access import ForbiddenError
from adapterhub.hub.people import admissions, oidc, sessions
from adapterhub.hub.people.oidc import Login
from adapterhub.hub.settings import Provider
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub_converters.errors import AdapterhubError, NotFoundError

from .posting import check_origin, local, posted, sent
from .site import COOKIE, SIGN_IN, Asked, Page, answered, leading_to, rendered

PROVIDER, BACK = f"{SIGN_IN}/provider", f"{SIGN_IN}/back"
_LOGIN = "adapterhub_login"


@dataclass(frozen=True)
class SignInPage(Page):
    """The ways to sign in.

    Attributes:
        following: The page to show then.
        provider: The host of the provider; empty without one.
        elsewhere: Where the way through the provider begins.
        wrong: Why the last token was refused.
    """

    following: str
    provider: str
    elsewhere: str
    wrong: str = ""
    template: ClassVar[str] = "sign_in.html"


def sign_in_page(asked: Asked, _worker: Worker) -> SignInPage:
    """GET /-/sign-in."""
    return _page(asked, local(asked.query("next")))


def _page(asked: Asked, following: str, wrong: str = "") -> SignInPage:
    provider = asked.hub.settings.provider
    host = urlsplit(provider.issuer).netloc if provider else ""
    # At the address that the provider leads back to: cookies of another one would be missing there.
    return SignInPage(following, host, f"{asked.url}{PROVIDER}", wrong)


async def login(request: Request) -> Response:
    """GET /login, as it is called elsewhere."""
    return leading_to(f"{SIGN_IN}?{request.url.query}" if request.url.query else SIGN_IN)


async def sign_in(request: Request) -> Response:
    """POST /-/sign-in."""
    fields = await sent(request)

    def work(asked: Asked, _worker: Worker) -> Response:
        check_origin(asked)
        who = asked.hub.access.known(fields.get("token", "").strip())
        following = local(fields.get("next", ""))
        if who is None:
            asked.hub.access.attempt(asked.hub.access.failures)
            return rendered(asked, _page(asked, following, "This token is unknown, revoked or expired."), 401)
        asking.now().known(who.account, who.prefix)
        return _begun(asked, following, sessions.start(asked.hub.database, who.token), sessions.LIFETIME)

    return await answered(request, work, public=True)


def _begun(asked: Asked, following: str, session: str, lifetime: int) -> Response:
    """The answer that begins a session, and ends the one before it."""
    answer = leading_to(following)
    _end(asked, answer)
    _keep(asked, answer, COOKIE, session, lifetime)
    return answer


def _keep(asked: Asked, answer: Response, name: str, value: str, lifetime: int) -> None:
    """Have the browser keep a cookie that no script and no form of another site uses."""
    secure = asked.url.startswith("https:")
    answer.set_cookie(name, value, max_age=lifetime, httponly=True, secure=secure, samesite="lax")


async def sign_out(request: Request) -> Response:
    """POST /-/sign-out."""

    def work(asked: Asked, _worker: Worker, _fields: dict[str, str]) -> Response:
        answer = leading_to("/")
        _end(asked, answer)
        return answer

    return await posted(request, work)


def _end(asked: Asked, answer: Response) -> None:
    if cookie := asked.request.cookies.get(COOKIE):
        sessions.end(asked.hub.database, cookie)
        answer.delete_cookie(COOKIE, httponly=True, samesite="lax")


# ---- at the provider


async def leave(request: Request) -> Response:
    """GET /-/sign-in/provider: to the provider."""

    def work(asked: Asked, _worker: Worker) -> Response:
        provider, back = _provider(asked)
        begun = Login.begin(asked.hub.secret, local(asked.query("next")))
        with _naming_the_provider():
            where = oidc.address(provider, asked.hub.issuers, begun, back)
        answer = leading_to(where)
        _keep(asked, answer, _LOGIN, begun.cookie, oidc.LIFETIME)
        return answer

    return await answered(request, work, public=True, workers=request.app.state.hub.sign_ins)


async def arrive(request: Request) -> Response:
    """GET /-/sign-in/back: from the provider, with a code."""

    def work(asked: Asked, worker: Worker) -> Response:
        provider, back = _provider(asked)
        begun = Login(asked.request.cookies.get(_LOGIN, ""), asked.hub.secret)
        try:
            following = local(begun.check(asked.query("state")))
            who = oidc.complete(provider, asked.hub.issuers, begun, back, dict(asked.request.query_params))
            asking.now().changes(f"{who.claims.get('sub')} at {who.issuer}")
            mirrors = asked.hub.mirror is not None
            account = admissions.enter(asked.hub.database, who, _namespaces(worker), mirrors=mirrors)
        except AdapterhubError as error:
            raise ForbiddenError(str(error)) from error
        asking.now().known(account, "")
        answer = _begun(asked, following, sessions.sign_in(asked.hub.database, account), sessions.SIGNED_IN)
        answer.delete_cookie(_LOGIN, httponly=True, samesite="lax")
        return answer

    return await answered(request, work, public=True, workers=request.app.state.hub.sign_ins)


@contextmanager
def _naming_the_provider() -> Iterator[None]:
    """Refuse with the whole of an error: it is the provider that is out of reach or wrong, and not this hub."""
    try:
        yield
    except AdapterhubError as error:
        raise ForbiddenError(str(error)) from error


def _provider(asked: Asked) -> tuple[Provider, str]:
    """The provider, and where it leads back to; an address tries it only so often."""
    if asked.hub.settings.provider is None:
        raise NotFoundError(asked.path, "this hub has no provider to sign in with")
    asked.hub.access.attempt(asked.hub.access.logins)
    return asked.hub.settings.provider, asked.hub.own_url(asked.request) + BACK


def _namespaces(worker: Worker) -> set[str]:
    """The namespaces that have anything, or had."""
    names = [*(one.name for one in queries.names(worker.registry.index)), *worker.repositories.names()]
    return {name.partition("/")[0] for name in names}
