"""The ASGI application of a hub: every protocol's routes over one `Hub`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_converters.display import printable
from adapterhub_converters.errors import IntegrityError, LocalIOError, RemoteError

from . import asking, failures, openapi
from .hf import routes as hf
from .hub import Hub
from .middleware import Audit, RateLimits
from .oauth import routes as oauth
from .oci import routes as oci
from .operations import routes as operations
from .operations.metrics import Measure, Metrics
from .settings import HubSettings
from .web import routes as web
from .web.site import Site
from .xet import routes as xet

_log = logging.getLogger("adapterhub.hub")


def create_app(settings: HubSettings) -> ASGIApp:
    """Make the application; its `Hub` is opened when the server starts, and closed when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        hub = app.state.hub = Hub(settings)
        app.state.site = Site(hub)
        sending, maintaining = asyncio.create_task(hub.webhooks.run()), asyncio.create_task(hub.maintain())
        try:
            yield
        finally:
            hub.webhooks.stop()
            maintaining.cancel()
            await asyncio.wait([sending, maintaining])
            app.state.site.close()
            hub.close()

    routes = [*api_routes(), *web.routes()]
    metrics = Metrics(routes)
    around = [
        Middleware(Measure, metrics=metrics),
        Middleware(RateLimits, limits=dict(settings.limits)),
        Middleware(Audit),
    ]
    late = dict.fromkeys((LocalIOError, RemoteError, IntegrityError), failures.answer)
    app = Starlette(lifespan=lifespan, middleware=around, exception_handlers=late)
    app.router.default = ByFirstPart(routes)
    app.state.metrics = metrics
    return Guard(app, behind_proxy=settings.behind_proxy)


def api_routes() -> list[BaseRoute]:
    """The routes for programs, all but those of the pages."""
    return [*openapi.routes(), *operations.routes(), *oauth.routes(), *oci.routes(), *xet.routes(), *hf.routes()]


class ByFirstPart:
    """Routes, of which only those are tried whose paths begin with the first part of a request's, or with any."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        by_part = [(_first_part(route), route) for route in routes]
        parts = {part for part, _ in by_part}
        self._below = {part: Router([route for of, route in by_part if of in (part, "")]) for part in parts}
        self._others = Router([route for of, route in by_part if not of])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self.below(scope["path"])(scope, receive, send)

    def below(self, path: str) -> Router:
        """The routes for a path."""
        return self._below.get(path[1:].partition("/")[0], self._others)


def _first_part(route: BaseRoute) -> str:
    """The part that all paths of a route begin with; empty for none."""
    part = route.path[1:].partition("/")[0] if isinstance(route, Route) else ""
    return "" if "{" in part else part


class Guard:
    """Around the application: paths as they were sent, a log line a request, and no traceback in an answer."""

    def __init__(self, app: ASGIApp, *, behind_proxy: bool = False) -> None:
        self._app = app
        self._behind_proxy = behind_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A slash within a part of the path, as in refs%2Fpr%2F1, must not divide it: `hf.reading.part` brings it back.
        raw = scope.get("raw_path") or scope["path"].encode()
        kept = raw.decode("latin-1").replace("%2f", "%252F").replace("%2F", "%252F")
        kept = kept if kept.startswith("/") else f"/{kept}"  # as of OPTIONS *
        # No name has a line break, and no route matches one: with another character in its place, each protocol says so itself.
        scope = {**scope, "path": unquote(kept).replace("\n", "\ufffd")}
        shown = printable(scope["path"])
        started, status = time.monotonic(), 0
        call = asking.begin(self._address(scope))

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", call.id.encode())]
                if call.warning:
                    more.append((b"x-hf-warning", f"mirror; {printable(call.warning)[:500]}".encode("latin-1", "replace")))
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            _log.exception("%s %s failed (%s)", scope["method"], shown, call.id)
            if status:
                raise
            failed = JSONResponse({"error": f"internal error; the hub's log has it as {call.id}"}, 500)
            await failed(scope, receive, sending)
        finally:
            took = round((time.monotonic() - started) * 1000, 1)
            fields = {"id": call.id, "method": scope["method"], "path": shown, "status": status, "ms": took}
            fields |= {"account": call.account, "token": call.prefix, "address": call.address}
            who = call.account or "-"
            line = "%s %s %d %.1f ms %s %s (%s)"
            _log.info(line, scope["method"], shown, status, took, who, call.address, call.id, extra={"fields": fields})

    def _address(self, scope: Scope) -> str:
        """The address of the client: behind a proxy, the last of X-Forwarded-For, which the proxy has added."""
        forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"] if self._behind_proxy else []
        if forwarded:
            return str(forwarded[-1].decode("latin-1").rpartition(",")[2].strip()[:64])
        return str(scope["client"][0]) if scope.get("client") else ""
