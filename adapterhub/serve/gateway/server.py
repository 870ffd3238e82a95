"""The process of a gateway: the address that it may bind, its start and its end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.http_server import binding, client_connections
from adapterhub.http_server.binding import Socket
from adapterhub.serve.engines import Engine, EngineDownError
from adapterhub_converters.errors import LocalIOError, RefusedError

from . import cross_origin, route_file
from .app import create_app
from .gateway import Gateway
from .gateway_settings import GatewaySettings
from .workers import host

_log = logging.getLogger("adapterhub.serve")
_DRAIN = 30  # seconds for running requests when the gateway stops


def serve(settings: GatewaySettings, engine: Engine, *, ready: Callable[[str], object], workers: int = 1) -> None:
    """Run a gateway until a signal stops it.

    Args:
        ready: Called with its address, once the engine answers.
        workers: The number of processes that answer clients.

    Raises:
        RefusedError: Other machines could reach it unencrypted or without a key; or the engine cannot be started.
        LocalIOError: The address cannot be bound, or a program cannot be started.
    """
    encrypted = bool(settings.certificate) or settings.behind_proxy
    has_keys = settings.routes is not None and bool(route_file.read(settings.routes).keys)
    binding.check_exposure(settings.host, encrypted=encrypted, requires_login=has_keys, code="gateway-needs-keys")
    if cross_origin.ANY in settings.cors and not has_keys:
        problem = "any page that somebody visits on this machine could use the model"
        raise RefusedError(cross_origin.ANY, problem, "Name the sites, or give routes with keys", code="cors-needs-keys")
    if workers > 1 and not hasattr(os, "fork"):
        problem = "this system has no fork, which several workers need"
        raise RefusedError("workers", problem, "Start one process, or use Linux or macOS", code="workers-need-fork")
    sock = binding.open_listener(settings.host, settings.port)
    url = binding.url_of(sock, "https" if settings.certificate else "http")
    try:
        if workers > 1:
            _make_server(settings, _answer_nothing)  # so that a bad certificate is told before any process is started
            host.run(settings, engine, sock, count=workers, drain=_DRAIN, ready=lambda: ready(url))
        else:
            _serve_alone(Gateway(settings, engine), sock, ready=lambda: ready(url))
    except EngineDownError as error:
        raise LocalIOError(engine.name, f"does not answer ({error})") from error


def _serve_alone(gateway: Gateway, sock: Socket, *, ready: Callable[[], object]) -> None:
    """Run a gateway in this process alone."""
    failure: list[BaseException] = []

    def record_failure(error: BaseException) -> None:
        """Stop the server, and keep the error."""
        failure.append(error)
        server.should_exit = True

    server = _make_server(gateway.settings, create_app(gateway, ready=ready, failed=record_failure))
    server.run(sockets=[sock])
    if failure:
        raise failure[0]


def _make_server(settings: GatewaySettings, app: ASGIApp) -> uvicorn.Server:
    certificate, key, proxied = settings.certificate, settings.key, settings.behind_proxy
    return client_connections.make_server(app, certificate=certificate, key=key, drain=_DRAIN, log=_log, behind_proxy=proxied)


async def _answer_nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Be an application that is never called."""
