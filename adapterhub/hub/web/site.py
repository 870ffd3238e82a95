"""What all pages share: who asks, the templates, the headers, and the pages of errors."""

from __future__ import annotations

import hashlib
import hmac
import json
import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from adapterhub.hub import asking, failures
from adapterhub.hub.access import BadTokenError, ForbiddenError, NoTokenError, ThrottledError
from adapterhub.hub.commits import View
from adapterhub.hub.hub import Hub
from adapterhub.hub.people import sessions
from adapterhub.hub.people.accounts import EVERYWHERE
from adapterhub.hub.people.tokens import Identity
from adapterhub.hub.remembered import Remembered
from adapterhub.hub.workers import Worker, Workers
from adapterhub.index.search import Found
from adapterhub.version import __version__
from adapterhub_converters import display
from adapterhub_converters.containers import open_file
from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError

from .facts import Facts

if TYPE_CHECKING:
    from jinja2 import Environment

    from adapterhub.analysis.diff import Difference
    from adapterhub.analysis.norms import Heat
    from adapterhub.registry.signatures import Shown

COOKIE = "adapterhub_session"
SIGN_IN = "/-/sign-in"
_FOLDER = Path(str(resources.files(__package__)))
_POLICY = "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    # Forms need the Origin header, which `no-referrer` would make null.
    "referrer-policy": "same-origin",
    "vary": "Cookie, Authorization",
}
_TYPES = {".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


class Site:
    """The pages of a hub, and what they remember of its versions."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.facts: Remembered[Facts] = Remembered(256)
        self.heats: Remembered[Heat | str] = Remembered(128)
        self.differences: Remembered[Difference | str] = Remembered(64)
        self.signed: Remembered[Sequence[Shown]] = Remembered(256)
        self.counts: Remembered[Found] = Remembered(512)
        # What reads weights takes seconds: one at a time, and no other request waits for it.
        self.slow = Workers(hub.storage, 1)

    def close(self) -> None:
        """Wait for what has begun."""
        self.slow.close()


@dataclass(frozen=True)
class Asked:
    """A request for a page."""

    site: Site
    request: Request
    who: Identity | None

    @classmethod
    def of(cls, site: Site, request: Request) -> Asked:
        """Find out who asks, by a header or a cookie; raises `BadTokenError`."""
        who = site.hub.identify(request)
        if who is None and (cookie := request.cookies.get(COOKIE)):
            who = sessions.find(site.hub.database, cookie)
            if who:
                asking.now().known(who.account, who.prefix)
        return cls(site, request, who)

    @property
    def hub(self) -> Hub:
        """The hub."""
        return self.site.hub

    @property
    def path(self) -> str:
        """The path, with the slashes that a part of it had in its encoded form."""
        return str(self.request.url.path).replace("%2F", "/")

    def part(self, key: str) -> str:
        """A part of the path."""
        return str(self.request.path_params.get(key, "")).replace("%2F", "/")

    def query(self, key: str) -> str:
        """A parameter, empty if absent."""
        return self.request.query_params.get(key, "")[:1000]

    @property
    def url(self) -> str:
        """The hub's address as the client reaches it."""
        return self.hub.url(self.request)

    @property
    def is_admin(self) -> bool:
        """Whether they may manage the hub: an admin of every namespace, whatever the most is that their token may do."""
        return self.who is not None and self.who.may("admin", EVERYWHERE)

    @property
    def csrf(self) -> str:
        """What forms of the session have, and no other site knows."""
        cookie = self.request.cookies.get(COOKIE, "")
        return hmac.new(self.hub.secret, f"csrf\n{cookie}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def may_read(self, worker: Worker, name: str) -> bool:
        """Whether they may see a repository that exists."""
        return self.hub.may_read(worker, self.who, name, worker.repositories.get(name))

    def repository(self, worker: Worker) -> View:
        """The repository of the path; NotFoundError for one that does not exist or may not be seen."""
        name = f"{self.part('namespace')}/{self.part('repo')}"
        found = self.hub.visible(worker, self.who, name)
        if found is None:
            raise self.no_such_repository(name)
        return found

    def no_such_repository(self, name: str) -> NotFoundError:
        """The error for a repository that does not exist, or that they may not see."""
        return NotFoundError(name, "no such adapter, or it is private")


class Page:
    """What a template shows: a frozen dataclass with its name."""

    template: ClassVar[str]


class MovedError(Exception):
    """The page is elsewhere."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url


@dataclass(frozen=True)
class ErrorPage(Page):
    """An error, in words."""

    code: int
    title: str
    message: str
    template: ClassVar[str] = "error.html"


T = TypeVar("T")
PageOf = Callable[[Asked, Worker], Page]
_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (NotFoundError, 404, "Not found"),
    (UsageError, 400, "That does not work"),
    (ForbiddenError, 403, "Not allowed"),
    (ThrottledError, 429, "Too many attempts"),
    (BadTokenError, 401, "Unknown token"),
    (AdapterhubError, 400, "That does not work"),
)


def showing(make: PageOf, *, public: bool = False) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a page; `public` for one that is shown before a login."""

    async def endpoint(request: Request) -> Response:
        return await answered(request, lambda asked, worker: rendered(asked, make(asked, worker)), public=public)

    return endpoint


async def answered(
    request: Request, work: Callable[[Asked, Worker], T], *, public: bool = False, workers: Workers | None = None
) -> T | Response:
    """What `work` returns, in a thread of `workers` or of those for all; or the answer for its error."""
    site: Site = request.app.state.site

    def guarded(worker: Worker) -> T | Response:
        asked = Asked(site, request, None)
        try:
            asked = Asked.of(site, request)
            if asked.who is None and site.hub.settings.require_login and not public:
                raise NoTokenError
            return work(asked, worker)
        except MovedError as moved:
            return RedirectResponse(moved.url, 303, _HEADERS)
        except (AdapterhubError, ForbiddenError, NoTokenError) as error:
            return refused(asked, error)

    try:
        return await (workers or site.hub.workers).run(guarded)
    except AdapterhubError as error:  # of the database or the index, before anything was asked
        return refused(Asked(site, request, None), error)


def refused(asked: Asked, error: Exception) -> Response:
    """The answer for an error: a page in words, or the way to sign in."""
    if isinstance(error, NoTokenError) and not isinstance(error, BadTokenError):
        back = {"next": asked.path} if asked.request.method in ("GET", "HEAD") else {}
        return RedirectResponse(f"{SIGN_IN}?{urlencode(back)}" if back else SIGN_IN, 303, _HEADERS)
    code, message, headers = failures.told(error) if isinstance(error, AdapterhubError) else (0, "", {})
    title = "Not now"
    if not code:
        code, title = next((status, title) for kind, status, title in _STATUS if isinstance(error, kind))
        message = str(error) or "The token is unknown, revoked or expired."
    answer = rendered(asked, ErrorPage(code, title, message), code)
    answer.headers.update(headers)
    if isinstance(error, ThrottledError):
        answer.headers["retry-after"] = str(error.seconds)
    return answer


def leading_to(url: str) -> Response:
    """The answer to a form, or to a login: another page."""
    return RedirectResponse(url, 303, {**_HEADERS, "cache-control": "no-store"})


def rendered(asked: Asked, page: Page, status: int = 200, *, media_type: str = "text/html; charset=utf-8") -> Response:
    """The answer with a page, or 304 where the client has it."""
    body = templates().get_template(page.template).render(page=page, asked=asked).encode("utf-8", "replace")
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": etag, "cache-control": "private, no-cache"}
    if status == 200 and asked.request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(body, status, headers, media_type)


# ---- templates and files


class _Assets:
    """The files of the package that pages load, each under an address with its digest."""

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Name to bytes."""
        return {path.name: open_file.read_bytes(path) for path in sorted((_FOLDER / "static").iterdir())}

    def url(self, name: str) -> str:
        """The address of a file."""
        return f"/-/static/{hashlib.sha256(self.files[name]).hexdigest()[:12]}/{name}"


_assets = _Assets()


async def static(request: Request) -> Response:
    """GET /-/static/{digest}/{name}: the same forever."""
    name = request.path_params["name"]
    if name not in _assets.files or _assets.url(name) != request.url.path:
        return Response("no such file", 404, _HEADERS)
    headers = {**_HEADERS, "cache-control": "public, max-age=31536000, immutable", "etag": f'"{request.path_params["digest"]}"'}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(_assets.files[name], 200, headers, _TYPES[Path(name).suffix])


class _Templates:
    """The environment of the templates, made with the first page."""

    @cached_property
    def environment(self) -> Environment:
        """Escapes everything, in SVG too."""
        from jinja2 import Environment, FileSystemLoader

        made = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        made.filters |= {
            "size": display.size,
            "number": display.number,
            "printable": display.printable,
            "day": lambda time: str(time)[:10],
            "path": lambda text: quote(str(text)),
            "moment": _moment,
            "instant": lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)),
            # What is meant to be pasted means what it shows: a base may have any name.
            "sh": lambda text: shlex.quote(display.printable(str(text))),
            "py": lambda text: json.dumps(str(text)),
            "short": lambda digest: str(digest).removeprefix("sha256:")[:12],
            "percent": _percent,
        }
        made.globals |= {"asset": _assets.url, "release": __version__, "plural": display.plural, "with_query": with_query}
        return made


_made = _Templates()


def templates() -> Environment:
    """The environment of the templates."""
    return _made.environment


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds)) if seconds else "never"


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.1e}"


def with_query(path: str, **fields: Any) -> str:
    """A path with those fields of a query that are not empty."""
    query = urlencode({key: value for key, value in fields.items() if value not in (None, "", 0)}, doseq=True)
    return f"{path}?{query}" if query else path
