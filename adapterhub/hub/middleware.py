"""What is around every request: limits of rates, and rows of the audit log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub.http_server.limits import Window, Windows

from . import asking
from .access import BadTokenError, token_in
from .hub import Hub
from .people import audit
from .people.audit import Event
from .settings import CLASSES

_API, _RESOLVERS, _PAGES = CLASSES
_UNLIMITED = ("/health", "/ready", "/metrics")
_READING = ("GET", "HEAD", "OPTIONS")
_CHANGING = ("web.signing_in.arrive",)  # handlers that change something though they are asked by GET
# Requests that change nothing anybody can see, or that precede one that does, by module and by handler.
_QUIET_MODULES = ("hf.lfs", "oci.blobs", "oci.tokens", "xet.routes")
_QUIET = (
    "hf.writing.preupload",
    "hf.reading.paths_info",
    "hf.repositories.validate_yaml",
    "hf.accounts.nothing",
    "oauth.device.begin",
)


def hub_of(scope: Scope) -> Hub:
    """The hub of a request."""
    return cast(Hub, scope["app"].state.hub)


class RateLimits:
    """Fixed windows per class of requests, of a token, or of an address without one, in the headers that hf reads.

    They are those of this process: several processes allow several times as much.
    """

    def __init__(self, app: ASGIApp, limits: dict[str, tuple[int, int]]) -> None:
        self._app = app
        self._windows = {kind: Windows(most, seconds) for kind, (most, seconds) in limits.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        kind = class_of(scope["path"]) if scope["type"] == "http" else ""
        windows = self._windows.get(kind)
        if windows is None:
            await self._app(scope, receive, send)
            return
        window = windows.count(self._key(scope))
        headers = _headers(kind, windows, window)
        if window.over:
            await _too_many(kind, window, headers)(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                raw = [(name.encode(), value.encode()) for name, value in headers.items()]
                message["headers"] = [*message.get("headers", ()), *raw]
            await send(message)

        await self._app(scope, receive, sending)

    def _key(self, scope: Scope) -> str:
        try:
            token = token_in(Request(scope).headers)
        except BadTokenError:
            token = None
        found = hub_of(scope).access.known(token) if token else None
        return f"token {found.token}" if found else asking.now().address


def class_of(path: str) -> str:
    """The class of a request, one of CLASSES; empty for one without limits."""
    if path in _UNLIMITED:
        return ""
    parts = path.split("/")
    if "/blobs/" in path if parts[1] == "v2" else parts[1] in ("lfs", "xet") or parts[3:4] == ["resolve"]:
        return _RESOLVERS
    return _API if parts[1] in ("api", "v1", "v2", "oauth") or ".git" in path else _PAGES


def _headers(kind: str, windows: Windows, window: Window) -> dict[str, str]:
    return {
        "ratelimit": f'"{kind}";r={window.left};t={window.seconds}',
        "ratelimit-policy": f'"fixed window";"{kind}";q={windows.most};w={windows.seconds}',
    }


def _too_many(kind: str, window: Window, headers: dict[str, str]) -> JSONResponse:
    words = f"too many requests to the {kind}; try again in {window.seconds} seconds"
    more = {**headers, "retry-after": str(window.seconds), "x-error-message": words}
    return JSONResponse({"error": words, "errors": [{"code": "TOOMANYREQUESTS", "message": words}]}, 429, more)


class Audit:
    """A row of the audit log for every change, before its client is told that it was made, and for every refusal."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and (action := _action(scope, message["status"])):
                hub = hub_of(scope)
                await hub.workers.read(audit.record, hub.database, _event(scope, action))
            await send(message)

        await self._app(scope, receive, sending if scope["type"] == "http" else send)


def _action(scope: Scope, status: int) -> str:
    """What is recorded of a request; empty for nothing."""
    tried = any(name == b"authorization" for name, _ in scope["headers"])
    if status == 403 or (status == 401 and tried):
        return "refused"
    if status >= 400 or "endpoint" not in scope:
        return ""
    module, name = handler_of(scope)
    if scope["method"] in _READING and f"{module}.{name}" not in _CHANGING:
        return ""
    return "" if module in _QUIET_MODULES or f"{module}.{name}" in _QUIET else f"{module.partition('.')[0]}.{name}"


def handler_of(scope: Scope) -> Sequence[str]:
    """The module below `adapterhub.hub`, and the name of the function that answers a request."""
    endpoint = scope["endpoint"]
    return endpoint.__module__.removeprefix(f"{__package__}."), endpoint.__name__


def _event(scope: Scope, action: str) -> Event:
    call, params = asking.now(), scope.get("path_params", {})
    name = " ".join(call.names) or params.get("name") or "/".join(params[key] for key in ("namespace", "repo") if key in params)
    parts = [f"{key}={value}" for key, value in params.items() if key not in ("name", "namespace", "repo")]
    detail = " ".join([*([f"{scope['method']} {scope['path']}"] if action == "refused" else parts)])
    return Event(action, str(name), detail, call.account, call.prefix, call.address)
