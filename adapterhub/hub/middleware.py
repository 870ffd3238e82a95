"""Middleware around every request: limits of requests and of refusals, and rows of the audit log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub.http_server.rate_windows import Window, Windows
from adapterhub.http_server.request_bodies import client_network
from adapterhub.http_server.work_time import ClientWork, wait_message

from . import request_context
from .access_control import BadTokenError, token_in
from .accounts import audit_log, sessions
from .accounts.audit_log import Event
from .hub import Hub
from .settings import CLASSES

_API, _RESOLVERS, _PAGES = CLASSES
_REFUSED = "refused"
STRANGER_ROWS, ALL_STRANGER_ROWS = 10, 60
"""Rows of the audit log a minute for refusals of clients without an account: of one network, and of all."""
ACCOUNT_REFUSALS, ACCOUNT_CHANGES = 60, 1_200
"""Rows of the audit log a minute of one account: refusals that are recorded, and changes, after which it waits."""
REFUSALS = 600
"""Answers 4xx a minute, whatever for, to the clients without an account of one network."""
_UNLIMITED = ("/health", "/ready", "/metrics")
_READING = ("GET", "HEAD", "OPTIONS")
_CHANGING = ("web.signing_in.arrive",)  # handlers that change something although the method is GET
# Modules and handlers whose requests change nothing visible, or only prepare a change that is recorded later.
_QUIET_MODULES = ("hf.lfs", "oci.blobs", "oci.tokens", "xet.routes")
_QUIET = (
    "api.reading.find",
    "hf.writing.preupload",
    "hf.reading.paths_info",
    "hf.repositories.validate_yaml",
    "hf.accounts.nothing",
    "hf.likes.like",
    "adapter_forms.name_forms.set_star",
    "oauth.device.begin",
)
_RECORDED_AS = {"adapter_forms": "forms"}  # a package by the name that the audit log has for it


def hub_of(scope: Scope) -> Hub:
    """Return the hub that answers a request."""
    return cast(Hub, scope["app"].state.hub)


class RateLimitMiddleware:
    """Fixed windows for each class of requests, by token, or by network without one, reported in the headers that hf reads.

    The counts are this process's own: several processes allow several times as much.
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
            message = f"too many requests to the {kind}; try again in {window.seconds} seconds"
            await _too_many(message, window, headers)(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                raw = [(name.encode(), value.encode()) for name, value in headers.items()]
                message["headers"] = [*message.get("headers", ()), *raw]
            await send(message)

        await self._app(scope, receive, send_with_limits)

    def _key(self, scope: Scope) -> str:
        try:
            token = token_in(Request(scope).headers)
        except BadTokenError:
            token = None
        # An invalid token counts by network, or each guess would get a window of its own.
        identity = hub_of(scope).access.token_identity(token) if token else None
        return f"token {identity.token}" if identity else client_network(request_context.current().address)


class IdentityMiddleware:
    """Looks up in a thread whose token or session a request has, so that the event loop never waits for it.

    The secrets of strangers are remembered for their request alone: any number of them takes no memory.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        token, cookie = _secrets_of(scope) if scope["type"] == "http" else ("", "")
        if secret := token or cookie:
            hub = hub_of(scope)
            if not hub.access.is_remembered(secret):
                await hub.workers.look_up(partial(hub.access.look_up, secret, is_token=bool(token)))
        await self._app(scope, receive, send)


class RefusalLimitMiddleware:
    """Answers 429 to networks whose clients without an account were refused too often, before anything is read for them.

    A client with an account is never held up by others of its network, and its refusals are not counted.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._refusals = Windows(REFUSALS, 60)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in _UNLIMITED:
            await self._app(scope, receive, send)
            return
        call = request_context.current()
        network = client_network(call.address)
        if (window := self._refusals.count(network, 0)).over and not _account_of(scope):
            message = f"too many requests that were refused; try again in {window.seconds} seconds"
            await _too_many(message, window)(scope, receive, send)
            return

        async def send_after_counting(message: Message) -> None:
            if message["type"] == "http.response.start" and not call.account and _is_refused(scope, message["status"]):
                self._refusals.count(network)
            await send(message)

        await self._app(scope, receive, send_after_counting)


def _is_refused(scope: Scope, status: int) -> bool:
    """Return whether an answer to a client without an account refuses something: a form leads to the page to sign in at."""
    return 400 <= status < 500 or (status == 303 and scope["method"] not in _READING)


class WorkLimitMiddleware:
    """Answers 429 to a client that has had its share of the threads' work in a minute, before more is done for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._work = ClientWork()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in _UNLIMITED:
            await self._app(scope, receive, send)
            return
        call = request_context.current()
        network = client_network(call.address)
        call.work.exceeded = partial(self._work.exceeded, network, partial(_account_of, scope))
        # Counted as it is done: of a client that has gone, too.
        call.work.on_work = lambda seconds: self._work.count(network, call.account, seconds)
        if window := call.work.exceeded():
            await _too_many(wait_message(window), window)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _account_of(scope: Scope) -> str:
    """Return the account whose token or session a request has; empty without one."""
    access = hub_of(scope).access
    token, cookie = _secrets_of(scope)
    identity = access.token_identity(token) if token else access.session_identity(cookie) if cookie else None
    return identity.account if identity else ""


def _secrets_of(scope: Scope) -> tuple[str, str]:
    """Return the token of a request, or the cookie of its session if it has no header for a token; empty for none."""
    request = Request(scope)
    try:
        token = token_in(request.headers)
    except BadTokenError:
        return "", ""
    return ("", request.cookies.get(sessions.COOKIE, "")) if token is None else (token, "")


def class_of(path: str) -> str:
    """Return the class of a request, one of CLASSES; empty for one without limits."""
    if path in _UNLIMITED:
        return ""
    parts = path.split("/")
    if "/blobs/" in path if parts[1] == "v2" else parts[1] in ("lfs", "xet") or {"resolve", "raw"} & {*parts[2:4]}:
        return _RESOLVERS
    return _API if parts[1] in ("api", "v1", "v2", "oauth") or ".git" in path else _PAGES


def _headers(kind: str, windows: Windows, window: Window) -> dict[str, str]:
    return {
        "ratelimit": f'"{kind}";r={window.remaining};t={window.seconds}',
        "ratelimit-policy": f'"fixed window";"{kind}";q={windows.limit};w={windows.seconds}',
    }


def _too_many(message: str, window: Window, headers: Mapping[str, str] = MappingProxyType({})) -> JSONResponse:
    all_headers = {**headers, "retry-after": str(window.seconds), "x-error-message": message}
    return JSONResponse({"error": message, "errors": [{"code": "TOOMANYREQUESTS", "message": message}]}, 429, all_headers)


class AuditMiddleware:
    """Writes a row of the audit log for every change, before the client is told it was made, and for every refusal.

    Of refusals, only the first of a minute are recorded: of each account, of each network of clients without one, and of all of
    these. An account that makes more changes waits: the log keeps a number of rows, and nobody may drown those of others, or
    their own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._of_network, self._of_strangers = Windows(STRANGER_ROWS, 60), Windows(ALL_STRANGER_ROWS, 60)
        self._of_account, self._changes = Windows(ACCOUNT_REFUSALS, 60), Windows(ACCOUNT_CHANGES, 60)
        self._accounts_over_until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http" and scope["method"] not in _READING and (window := self._changes_over(scope)):
            message = f"too many changes in a minute; try again in {window.seconds} seconds"
            await _too_many(message, window)(scope, receive, send)
            return

        async def send_after_recording(message: Message) -> None:
            if (
                message["type"] == "http.response.start"
                and (action := _action(scope, message["status"]))
                and not (action == _REFUSED and self._is_one_of_many())
            ):
                hub = hub_of(scope)
                if action != _REFUSED:
                    self._count_change()
                # Before the response goes out: a change whose client was told must be in the log.
                await hub.workers.read(audit_log.record, hub.database, _event(scope, action))
            await send(message)

        await self._app(scope, receive, send_after_recording if scope["type"] == "http" else send)

    def _changes_over(self, scope: Scope) -> Window | None:
        """Return the window in which a client's account has made too many changes; None if it may go on."""
        if self._accounts_over_until < time.monotonic():
            return None  # nobody has: no account is looked up
        window = self._changes.count(_account_of(scope), 0)
        return window if window.over else None

    def _count_change(self) -> None:
        account = request_context.current().account
        if account and self._changes.count(account).remaining == 0:
            self._accounts_over_until = time.monotonic() + self._changes.seconds

    def _is_one_of_many(self) -> bool:
        """Count a refusal; return whether it is one of too many."""
        call = request_context.current()
        if call.account:
            return self._of_account.count(call.account).over
        return self._of_network.count(client_network(call.address)).over or self._of_strangers.count("").over


def _action(scope: Scope, status: int) -> str:
    """Return the action to record for a request; empty to record nothing."""
    sent_token = any(name == b"authorization" for name, _ in scope["headers"])
    if status == 403 or (status == 401 and sent_token):
        return _REFUSED
    call = request_context.current()
    # Nobody changes anything without an account: a form without a session leads to the page to sign in at.
    if status >= 400 or "endpoint" not in scope or call.is_rehearsal or not call.account:
        return ""
    module, name = handler_of(scope)
    if scope["method"] in _READING and f"{module}.{name}" not in _CHANGING:
        return ""
    if module in _QUIET_MODULES or f"{module}.{name}" in _QUIET:
        return ""
    package = module.partition(".")[0]
    return f"{_RECORDED_AS.get(package, package)}.{name}"


def handler_of(scope: Scope) -> Sequence[str]:
    """Return the module below `adapterhub.hub` and the name of the function that answers a request."""
    endpoint = scope["endpoint"]
    return endpoint.__module__.removeprefix(f"{__package__}."), endpoint.__name__


def _event(scope: Scope, action: str) -> Event:
    call, params = request_context.current(), scope.get("path_params", {})
    name = " ".join(call.names) or params.get("name") or "/".join(params[key] for key in ("namespace", "repo") if key in params)
    parts = [f"{key}={value}" for key, value in params.items() if key not in ("name", "namespace", "repo")]
    parts = [call.detail] if call.detail else parts
    detail = " ".join([*([f"{scope['method']} {scope['path']}"] if action == "refused" else parts)])
    return Event(action, str(name), detail, call.account, call.prefix, call.address)
