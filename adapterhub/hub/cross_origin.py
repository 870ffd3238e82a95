"""Pages of other sites may read what a hub serves to programs (Fetch standard, "CORS protocol"); none may change anything.

Cookies are not sent along: such a page reads as nobody, or with a token that it has. A hub that only its own machine reaches
answers pages of that machine only, or any site could read it through the browser of whoever visits it.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub.http_server import binding

_EXPOSED = (
    "ETag, Link, Content-Length, Content-Range, Accept-Ranges, X-Repo-Commit, X-Linked-Size, X-Linked-ETag, X-Error-Code,"
    " X-Error-Message, X-Request-Id, Docker-Content-Digest, RateLimit, Retry-After"
)
_PREFLIGHT_SECONDS = "86400"  # for which a browser may remember the answer to a preflight
_BY_FILE = ("resolve", "raw")


class CrossOriginMiddleware:
    """Adds the headers that let pages of other origins read responses, and answers browsers that ask beforehand."""

    def __init__(self, app: ASGIApp, *, is_local: bool) -> None:
        self._app, self._is_local = app, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin", "")
        if not origin or not self._is_allowed(origin) or not (methods := readable_methods(scope["path"])):
            await self._app(scope, receive, send)
            return
        allowed = {"access-control-allow-origin": origin if self._is_local else "*", "vary": "Origin"}
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            allowed["access-control-allow-methods"] = ", ".join(methods)
            allowed["access-control-allow-headers"] = headers.get("access-control-request-headers", "")[:1000]
            allowed["access-control-max-age"] = _PREFLIGHT_SECONDS
            await Response(status_code=204, headers=allowed)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["method"] in methods:
                added = {**allowed, "access-control-expose-headers": _EXPOSED}
                raw = [(name.encode(), value.encode("latin-1")) for name, value in added.items()]
                message["headers"] = [*message.get("headers", ()), *raw]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _is_allowed(self, origin: str) -> bool:
        if not self._is_local:
            return True
        try:
            return binding.is_local_site(urlsplit(origin).netloc)
        except ValueError:
            return False


def readable_methods(path: str) -> tuple[str, ...]:
    """Return the methods that read an address for programs; none for pages, and for addresses that log somebody in."""
    parts = path.split("/")
    if parts[1] in ("api", "v2") or (parts[3:4] and parts[3] in _BY_FILE) or (parts[2:3] and parts[2] in _BY_FILE):
        return ("GET", "HEAD", "POST") if "/paths-info/" in path else ("GET", "HEAD")
    return ()
