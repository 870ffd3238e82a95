"""The ASGI application of a hub: the routes of every protocol over one `Hub`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub.http_server import binding
from adapterhub.http_server.request_bodies import BodyBudget, BodyError, BodyGuard, BodyLimits, client_address
from adapterhub_converters.display import printable
from adapterhub_converters.errors import IntegrityError, LocalIOError, RefusedError, RemoteError, UsageError

from . import error_responses, openapi, request_context, request_texts
from .adapter_forms import routes as adapter_forms
from .api import routes as api
from .cross_origin import CrossOriginMiddleware
from .hf import routes as hf
from .hub import Hub
from .middleware import AuditMiddleware, IdentityMiddleware, RateLimitMiddleware, RefusalLimitMiddleware, WorkLimitMiddleware
from .oauth import routes as oauth
from .oci import routes as oci
from .operations import routes as operations
from .operations.health import Readiness
from .operations.prometheus import Metrics, MetricsMiddleware
from .operations.runtime_metrics import RuntimeCollector
from .settings import HubSettings
from .web import routes as web
from .web.site import Site
from .xet import routes as xet

_log = logging.getLogger("adapterhub.hub")
BODY_LIMITS = BodyLimits(process=512 << 20, address=256 << 20, account=256 << 20, stranger=16 << 20)
"""Bytes of bodies in memory."""


def create_app(settings: HubSettings) -> ASGIApp:
    """Create the application. Its `Hub` is opened when the server starts and closed when it stops."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        hub = app.state.hub = Hub(settings)
        app.state.site = Site(hub)
        app.state.readiness = Readiness()
        metrics.sums.register(RuntimeCollector(hub))
        delivery_task = asyncio.create_task(hub.webhooks.run())
        canceled_tasks = [asyncio.create_task(run) for run in (hub.maintain(), hub.replicator.run(), hub.collect_garbage())]
        try:
            yield
        finally:
            # Stop the background tasks first: all use the database that `close` takes away.
            hub.webhooks.stop()
            hub.replicator.stop()
            for task in canceled_tasks:
                task.cancel()
            await asyncio.wait([delivery_task, *canceled_tasks])
            app.state.site.close()
            hub.close()

    routes = [*api_routes(), *page_routes()]
    metrics = Metrics(routes)
    is_local = binding.is_loopback(settings.host) and not settings.behind_proxy and not settings.url
    errors = (LocalIOError, RemoteError, IntegrityError, RefusedError, UsageError, BodyError, ClientDisconnect)
    handlers = dict.fromkeys(errors, error_responses.error_response)
    middleware = [
        Middleware(CrossOriginMiddleware, is_local=is_local),
        Middleware(MetricsMiddleware, metrics=metrics),
        # The application handles errors of its handlers alone; the middleware that follows reads the database, too.
        Middleware(ExceptionMiddleware, handlers=handlers),
        Middleware(IdentityMiddleware),
        Middleware(RateLimitMiddleware, limits=dict(settings.limits)),
        Middleware(RefusalLimitMiddleware),
        Middleware(WorkLimitMiddleware),
        Middleware(AuditMiddleware),
        Middleware(BodyGuard, budget=BodyBudget(BODY_LIMITS), behind_proxy=settings.behind_proxy),
    ]
    app = Starlette(lifespan=lifespan, middleware=middleware, exception_handlers=handlers)
    app.router.default = PrefixRouter(routes)
    app.state.metrics = metrics
    return RequestGuard(app, behind_proxy=settings.behind_proxy, is_local=is_local)


def api_routes() -> list[BaseRoute]:
    """Return the routes for programs: all but those of the pages."""
    return [*openapi.routes(), *operations.routes(), *oauth.routes(), *oci.routes(), *xet.routes(), *api.routes(), *hf.routes()]


def page_routes() -> list[BaseRoute]:
    """Return the routes of the pages, of which the last matches everything."""
    return [*adapter_forms.routes(), *web.routes()]


class PrefixRouter:
    """A router that only tries the routes whose first two path segments are the request's, or parameters.

    Trying the routes of all protocols in turn would cost more than many of the handlers.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        by_prefix = [(_prefix(route), route) for route in routes]
        prefixes = {prefix for prefix, _ in by_prefix} | {(first, "") for (first, _), _ in by_prefix} | {("", "")}
        self._routers = {
            (first, second): Router(
                [route for prefix, route in by_prefix if prefix[0] in (first, "") and prefix[1] in (second, "")]
            )
            for first, second in prefixes
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self.router_for(scope["path"])(scope, receive, send)

    def router_for(self, path: str) -> Router:
        """Return the router for a path."""
        first, second = _first_segments(path)
        return self._routers.get((first, second)) or self._routers.get((first, "")) or self._routers["", ""]


def _prefix(route: BaseRoute) -> tuple[str, str]:
    """Return the two first segments of the paths of a route, up to a parameter, which may have slashes."""
    first, second = _first_segments(route.path) if isinstance(route, Route) else ("", "")
    return ("", "") if "{" in first else (first, "" if "{" in second else second)


def _first_segments(path: str) -> tuple[str, str]:
    first, _, rest = path[1:].partition("/")
    return first, rest.partition("/")[0]


class RequestGuard:
    """The outermost layer: raw request paths, one log line per request, and no traceback in a response."""

    def __init__(self, app: ASGIApp, *, behind_proxy: bool = False, is_local: bool = False) -> None:
        self._app = app
        self._behind_proxy, self._is_local = behind_proxy, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # An escaped slash, as in refs%2Fpr%2F1, must not split its path segment: keep it escaped, and let
        # `hf.reading.path_part`
        # decode it.
        raw = scope.get("raw_path") or scope["path"].encode()
        quoted_path = raw.decode("latin-1").replace("%2f", "%252F").replace("%2F", "%252F")
        quoted_path = quoted_path if quoted_path.startswith("/") else f"/{quoted_path}"  # OPTIONS * has no path
        # No route matches a line break. Replace it, so that each protocol rejects the name in its own error format.
        scope = {**scope, "path": unquote(quoted_path).replace("\n", "\ufffd")}
        printable_path = printable(scope["path"])
        started, status = time.monotonic(), 0
        call = request_context.begin(client_address(scope, behind_proxy=self._behind_proxy))

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra_headers = [(b"x-request-id", call.id.encode())]
                if call.warning:
                    extra_headers.append(
                        (b"x-hf-warning", f"mirror; {printable(call.warning)[:500]}".encode("latin-1", "replace"))
                    )
                message["headers"] = [*message.get("headers", ()), *extra_headers]
            await send(message)

        try:
            request_texts.check_scope(scope)
            host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
            if self._is_local and host and not binding.is_local_site(host):
                words = f"this hub answers requests to localhost only, not to {printable(host[:80])!r}; start it with its URL"
                await JSONResponse({"error": words}, 403)(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except UsageError as error:
            await error_responses.usage_response(error)(scope, receive, send_with_headers)
        except Exception:
            _log.exception("%s %s failed (%s)", scope["method"], printable_path, call.id)
            # The status line is already sent: all that is left is to cut the connection.
            if status:
                raise
            error_response = JSONResponse({"error": f"internal error; the hub's log has it as {call.id}"}, 500)
            await error_response(scope, receive, send_with_headers)
        finally:
            elapsed_ms = round((time.monotonic() - started) * 1000, 1)
            fields = {"id": call.id, "method": scope["method"], "path": printable_path, "status": status, "ms": elapsed_ms}
            fields |= {"account": call.account, "token": call.prefix, "address": call.address}
            account = call.account or "-"
            line = "%s %s %d %.1f ms %s %s (%s)"
            _log.info(
                line,
                scope["method"],
                printable_path,
                status,
                elapsed_ms,
                account,
                call.address,
                call.id,
                extra={"fields": fields},
            )
