"""Pages of other sites that may use the API (the Fetch standard's CORS): none but those that are named.

Any page that somebody visits can send requests to this machine, so `*` needs keys: the page has to bring one, since a browser
adds none by itself. A named site needs none. What is not allowed gets no header, and without keys it is refused as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub.evidence.version_names import VERSION_HEADER
from adapterhub.serve.engines.api_paths import ALL_PATHS
from adapterhub_converters.errors import UsageError

from .trace_context import REQUEST_ID

ANY = "*"
_PREFIXES = ("/v1/", "/api/")
_EXPOSED = ", ".join((REQUEST_ID, VERSION_HEADER, "retry-after"))
_SECONDS = "600"  # that a browser may remember what is allowed


def parse_origins(values: Iterable[str]) -> frozenset[str]:
    """Return the origins as browsers send them; UsageError for anything else."""
    return frozenset(value if value == ANY else _origin(value) for value in values)


def _origin(value: str) -> str:
    try:
        parts = urlsplit(value.lower())
        is_origin = f"{parts.scheme}://{parts.netloc}" == value.lower() and bool(parts.hostname) and parts.username is None
        is_origin = is_origin and parts.scheme in ("http", "https") and parts.port != {"http": 80, "https": 443}[parts.scheme]
    except ValueError:
        is_origin = False
    if not is_origin or not value.isascii() or not value.isprintable():
        raise UsageError(value[:80], "is not an origin", "Write it like https://app.example, or http://localhost:3000")
    return value.lower()


def is_allowed(origin: str, origins: frozenset[str]) -> bool:
    """Return whether pages of an origin may use the API."""
    return bool(origin) and (origin in origins or ANY in origins)


class CrossOrigin:
    """An application that answers browsers which ask for a page of an allowed origin."""

    def __init__(self, app: ASGIApp, origins: frozenset[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; a preflight here, everything else with the headers that let the page read the answer."""
        origin = Headers(scope=scope).get("origin", "") if scope["type"] == "http" and _is_api(scope["path"]) else ""
        if not is_allowed(origin, self._origins):
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope):
            await _preflight(Headers(scope=scope), origin)(scope, receive, send)
        else:
            await self._app(scope, receive, _with_origin(send, origin))


def _is_api(path: str) -> bool:
    """Return whether a path is one of the API, rather than the page for people or the metrics."""
    return path.startswith(_PREFIXES) or path in ALL_PATHS


def _preflight(headers: Headers, origin: str) -> Response:
    """Return the answer to a browser that asks whether a page may send a request."""
    allowed = {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST",
        # Whatever it asks for: clients send headers of their own, and none of them gives a page more than its key does.
        "access-control-allow-headers": headers.get("access-control-request-headers", ""),
        "access-control-max-age": _SECONDS,
        "vary": "origin, access-control-request-headers",
    }
    if headers.get("access-control-request-private-network") == "true":
        allowed["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=allowed)


def _with_origin(send: Send, origin: str) -> Send:
    """Return a `send` that adds the headers for the page."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = _EXPOSED
            headers.add_vary_header("origin")
        await send(message)

    return send_with_headers
