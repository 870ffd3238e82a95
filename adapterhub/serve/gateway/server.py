"""The process of a gateway: the address that it may bind, its start and its end."""

from __future__ import annotations

import logging
from collections.abc import Callable

from adapterhub.http_server import binding, client_connections
from adapterhub.serve.engines import Engine, EngineDownError
from adapterhub_converters.errors import LocalIOError, RefusedError

from . import cross_origin
from .app import create_app
from .gateway import Gateway
from .gateway_settings import GatewaySettings

_log = logging.getLogger("adapterhub.serve")
_DRAIN = 30  # seconds for running requests when the gateway stops


def serve(settings: GatewaySettings, engine: Engine, *, ready: Callable[[str], object]) -> None:
    """Run a gateway until a signal stops it.

    Args:
        ready: Called with its address, once the engine answers.

    Raises:
        RefusedError: Other machines could reach it unencrypted or without a key; or the engine cannot be started.
        LocalIOError: The address cannot be bound, or a program cannot be started.
    """
    gateway = Gateway(settings, engine)
    encrypted = bool(settings.certificate) or settings.behind_proxy
    has_keys = bool(gateway.routes.keys)
    binding.check_exposure(settings.host, encrypted=encrypted, requires_login=has_keys, code="gateway-needs-keys")
    if cross_origin.ANY in settings.cors and not has_keys:
        problem = "any page that somebody visits on this machine could use the model"
        raise RefusedError(cross_origin.ANY, problem, "Name the sites, or give routes with keys", code="cors-needs-keys")
    sock = binding.open_listener(settings.host, settings.port)
    url = binding.url_of(sock, "https" if settings.certificate else "http")
    failure: list[BaseException] = []

    def record_failure(error: BaseException) -> None:
        """Stop the server, and keep the error."""
        failure.append(error)
        server.should_exit = True

    app = create_app(gateway, ready=lambda: ready(url), failed=record_failure)
    server = client_connections.make_server(app, certificate=settings.certificate, key=settings.key, drain=_DRAIN, log=_log)
    server.run(sockets=[sock])
    if failure and isinstance(failure[0], EngineDownError):
        raise LocalIOError(engine.name, f"does not answer ({failure[0]})") from failure[0]
    if failure:
        raise failure[0]
