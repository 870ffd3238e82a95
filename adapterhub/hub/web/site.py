"""What all pages share: the account behind a request, the templates, the headers, and error pages."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shlex
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from adapterhub.http_server.request_bodies import client_network
from adapterhub.hub import error_responses, request_context
from adapterhub.hub.access_control import BadTokenError, ForbiddenError, NoTokenError, ThrottledError
from adapterhub.hub.accounts import sessions
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import EVERYWHERE
from adapterhub.hub.commits import View
from adapterhub.hub.hub import Hub
from adapterhub.hub.lru_cache import LRUCache
from adapterhub.hub.signed_fields import signature
from adapterhub.hub.workers import Worker, Workers
from adapterhub.index.queries import VersionRow
from adapterhub.index.version_search import SearchResult
from adapterhub.registry import withdrawals
from adapterhub.version import __version__
from adapterhub_converters import display
from adapterhub_converters.containers import open_file
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import facts
from .facts import Facts

if TYPE_CHECKING:
    from jinja2 import Environment

    from adapterhub.analysis.diff_result import Difference
    from adapterhub.analysis.norms import NormHeatMap
    from adapterhub.registry.signature_policy import SignatureSummary

    from .channel_board import Board

SIGN_IN = "/-/sign-in"
_MAX_CACHE_BYTES = 16 << 20  # bytes of each of the six caches
# Comparisons and heat maps that wait at a time, and those of an account, or of a network without one.
_MAX_SLOW, _MAX_SLOW_OF_CLIENT = 200, 16
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
    """The pages of a hub, and what they cache about its versions."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.facts: LRUCache[Facts] = LRUCache(_MAX_CACHE_BYTES)
        self.heats: LRUCache[NormHeatMap | str] = LRUCache(_MAX_CACHE_BYTES)
        self.differences: LRUCache[Difference | str] = LRUCache(_MAX_CACHE_BYTES)
        self.signed: LRUCache[Sequence[SignatureSummary]] = LRUCache(_MAX_CACHE_BYTES)
        self.counts: LRUCache[SearchResult] = LRUCache(_MAX_CACHE_BYTES)
        self.boards: LRUCache[Board] = LRUCache(_MAX_CACHE_BYTES)
        # Reading weights takes seconds: do it one at a time, in a thread that no other request waits for.
        self.slow = Workers(hub.storage, 1, caches=hub.workers.caches)
        self._slow_work: Counter[str] = Counter()  # by account, or by network

    def facts_of(self, worker: Worker, row: VersionRow) -> Facts:
        """Return what is read from the bytes of a version, and of its base if that was uploaded or is kept here."""
        base = self.hub.model_bases.local_base(worker, row)
        key = row.digest, base.fingerprint if base else None
        return self.facts.get(key, lambda: facts.read(worker, row, base))

    def start_slowly(self, work: Callable[[Worker], T]) -> asyncio.Future[T] | None:
        """Start work that reads weights, which goes on if its client leaves; None if too much of it waits."""
        context = request_context.current()
        client = context.account or client_network(context.address)
        if self._slow_work.total() >= _MAX_SLOW or self._slow_work[client] >= _MAX_SLOW_OF_CLIENT:
            return None
        self._slow_work[client] += 1

        def release(_: object) -> None:
            self._slow_work[client] -= 1
            if not self._slow_work[client]:
                del self._slow_work[client]

        future = asyncio.ensure_future(self.slow.run(work))
        future.add_done_callback(release)
        return future

    def close(self) -> None:
        """Wait for running work."""
        self.slow.close()


@dataclass(frozen=True)
class PageRequest:
    """A request for a page, with the account behind it.

    Attributes:
        who: The identity of a header or a session; None for an anonymous visitor.
    """

    site: Site
    request: Request
    who: Identity | None

    @classmethod
    def from_request(cls, site: Site, request: Request) -> PageRequest:
        """Identify the client by a header or a cookie. Raises `BadTokenError`."""
        return cls(site, request, site.hub.identify_visitor(request))

    @property
    def hub(self) -> Hub:
        """The hub."""
        return self.site.hub

    @property
    def path(self) -> str:
        """The path, with escaped slashes decoded."""
        return str(self.request.url.path).replace("%2F", "/")

    def part(self, key: str) -> str:
        """Return a path parameter."""
        return str(self.request.path_params.get(key, "")).replace("%2F", "/")

    def query(self, key: str) -> str:
        """Return a query parameter, empty if absent."""
        return self.request.query_params.get(key, "")[:1000]

    @property
    def url(self) -> str:
        """The hub's address as the client reaches it."""
        return self.hub.url(self.request)

    @property
    def is_admin(self) -> bool:
        """Whether the account may manage the hub: an admin of every namespace, as far as its token allows."""
        return self.who is not None and self.who.has_role("admin", EVERYWHERE)

    @property
    def csrf(self) -> str:
        """The token in forms of the session, which no other site knows."""
        cookie = self.request.cookies.get(sessions.COOKIE, "")
        return signature(self.hub.secret, "csrf", cookie)

    def may_read(self, worker: Worker, name: str) -> bool:
        """Return whether the account may see an existing repository."""
        return self.hub.may_read_name(worker, self.who, name)

    def repository(self, worker: Worker) -> View:
        """Return the repository of the path.

        Raises:
            NotFoundError: It does not exist, or may not be seen.
        """
        name = f"{self.part('namespace')}/{self.part('repo')}"
        view = self.hub.visible(worker, self.who, name)
        if view is None:
            raise self.no_such_repository(name)
        return view

    def current_repository(self, worker: Worker, subpage: str = "", *, root: str = "") -> View:
        """Return the repository of the path; MovedError, to its `subpage` below `root`, if it has another name now."""
        view = self.repository(worker)
        if view.repository and (new_name := view.repository.moved_to):
            if self.hub.visible(worker, self.who, new_name) is None:
                raise self.no_such_repository(view.name)
            raise MovedError(f"{root}/{new_name}{subpage}")
        return view

    def no_such_repository(self, name: str) -> NotFoundError:
        """Return the error for a repository that does not exist or may not be seen."""
        return NotFoundError(name, "no such adapter, or it is private")


class Page:
    """The value that a template shows: a frozen dataclass with the template's name."""

    template: ClassVar[str]


class MovedError(Exception):
    """A redirect to another page."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url


@dataclass(frozen=True)
class ErrorPage(Page):
    """An error in words."""

    code: int
    title: str
    message: str
    template: ClassVar[str] = "error.html"


T = TypeVar("T")
PageOf = Callable[[PageRequest, Worker], Page]
_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (NotFoundError, 404, "Not found"),
    (UsageError, 400, "That does not work"),
    (ForbiddenError, 403, "Not allowed"),
    (ThrottledError, 429, "Too many attempts"),
    (BadTokenError, 401, "Unknown token"),
    (AdapterhubError, 400, "That does not work"),
)


def page_endpoint(make: PageOf, *, public: bool = False) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a page; `public` for a page shown without a login."""

    async def endpoint(request: Request) -> Response:
        return await answer_page(
            request, lambda page_request, worker: render_page(page_request, make(page_request, worker)), public=public
        )

    return endpoint


async def answer_page(
    request: Request, work: Callable[[PageRequest, Worker], T], *, public: bool = False, workers: Workers | None = None
) -> T | Response:
    """Return the result of `work`, called in a thread of `workers` (by default the hub's), or the response for its error."""
    site: Site = request.app.state.site

    def run_guarded(worker: Worker) -> T | Response:
        page_request = PageRequest(site, request, None)
        try:
            page_request = PageRequest.from_request(site, request)
            if page_request.who is None and site.hub.settings.require_login and not public:
                raise NoTokenError
            return work(page_request, worker)
        except MovedError as moved:
            return RedirectResponse(moved.url, 303, _HEADERS)
        except (AdapterhubError, ForbiddenError, NoTokenError) as error:
            return error_page(page_request, error)

    try:
        return await (workers or site.hub.workers).run(run_guarded)
    except AdapterhubError as error:  # the database or the index failed before the work began
        return error_page(PageRequest(site, request, None), error)


def error_page(page_request: PageRequest, error: Exception) -> Response:
    """Return the response for an error: a page in words, or a redirect to sign in."""
    if isinstance(error, NoTokenError) and not isinstance(error, BadTokenError):
        query = {"next": page_request.path} if page_request.request.method in ("GET", "HEAD") else {}
        return RedirectResponse(f"{SIGN_IN}?{urlencode(query)}" if query else SIGN_IN, 303, _HEADERS)
    code, message, headers = error_responses.error_status(error) if isinstance(error, AdapterhubError) else (0, "", {})
    title = "Not now"
    if isinstance(error, RefusedError) and error.code == withdrawals.CODE:
        code, title, message = 410, "Withdrawn", str(error)
    if not code:
        code, title = next((status, title) for kind, status, title in _STATUS if isinstance(error, kind))
        message = str(error) or "The token is unknown, revoked or expired."
    answer = render_page(page_request, ErrorPage(code, title, message), code)
    answer.headers.update(headers)
    if isinstance(error, ThrottledError):
        answer.headers["retry-after"] = str(error.seconds)
    return answer


def redirect_to(url: str) -> Response:
    """Return a redirect to another page, after a form or a login."""
    return RedirectResponse(url, 303, {**_HEADERS, "cache-control": "no-store"})


def render_page(
    page_request: PageRequest, page: Page, status: int = 200, *, media_type: str = "text/html; charset=utf-8"
) -> Response:
    """Return the response with a page, or 304 if the client has it."""
    body = templates().get_template(page.template).render(page=page, asked=page_request).encode("utf-8", "replace")
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": etag, "cache-control": "private, no-cache"}
    if status == 200 and page_request.request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(body, status, headers, media_type)


# ---- templates and files


class _Assets:
    """The static files of the pages, each at an address that contains its digest."""

    @cached_property
    def files(self) -> dict[str, bytes]:
        """File name to bytes."""
        return {path.name: open_file.read_bytes(path) for path in sorted((_FOLDER / "static").iterdir())}

    def url(self, name: str) -> str:
        """Return the address of a file."""
        return f"/-/static/{hashlib.sha256(self.files[name]).hexdigest()[:12]}/{name}"


_assets = _Assets()


async def static(request: Request) -> Response:
    """GET /-/static/{digest}/{name}: immutable, because the address contains the digest."""
    name = request.path_params["name"]
    if name not in _assets.files or _assets.url(name) != request.url.path:
        return Response("no such file", 404, _HEADERS)
    headers = {**_HEADERS, "cache-control": "public, max-age=31536000, immutable", "etag": f'"{request.path_params["digest"]}"'}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(_assets.files[name], 200, headers, _TYPES[Path(name).suffix])


class _Templates:
    """The environment of the templates, created with the first page."""

    @cached_property
    def environment(self) -> Environment:
        """The Jinja environment; it escapes everything, in SVG, too."""
        from jinja2 import Environment, FileSystemLoader

        environment = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {
            "size": display.format_size,
            "number": display.format_count,
            "printable": display.printable,
            "day": lambda time: str(time)[:10],
            "path": lambda text: quote(str(text)),
            "moment": _moment,
            "instant": lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)),
            # Quote what people paste into a shell: a base may have any name.
            "sh": lambda text: shlex.quote(display.printable(str(text))),
            "py": lambda text: json.dumps(str(text)),
            "short": lambda digest: str(digest).removeprefix("sha256:")[:12],
            "percent": _percent,
        }
        environment.globals |= {
            "asset": _assets.url,
            "release": __version__,
            "plural": display.format_plural,
            "with_query": with_query,
        }
        return environment


_templates = _Templates()


def templates() -> Environment:
    """Return the environment of the templates."""
    return _templates.environment


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds)) if seconds else "never"


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.1e}"


def with_query(path: str, **fields: Any) -> str:
    """Return a path with the non-empty fields as its query."""
    query = urlencode({key: value for key, value in fields.items() if value not in (None, "", 0)}, doseq=True)
    return f"{path}?{query}" if query else path
