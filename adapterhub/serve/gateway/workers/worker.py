"""The process of a worker: it answers on the socket that all workers share."""

from __future__ import annotations

import logging
from pathlib import Path

from adapterhub.http_server import client_connections
from adapterhub.http_server.binding import Socket
from adapterhub.serve.engines import Engine
from adapterhub.serve.gateway.app import create_app
from adapterhub.serve.gateway.gateway_settings import GatewaySettings

from .channel import ChannelLostError
from .worker_gateway import WorkerGateway

log = logging.getLogger("adapterhub.serve.workers")


def run_worker(
    settings: GatewaySettings,
    engine: Engine,
    stop_end: int,
    is_replacement: bool,
    *,
    sock: Socket,
    path: Path,
    drain: int,
) -> None:
    """Answer requests until a pipe is closed.

    Args:
        stop_end: The end of that pipe.
        is_replacement: Whether others answer already, so that it accepts nothing before it can answer too.
        sock: The listening socket.
        path: The socket of the host.
        drain: Seconds for running requests at the end.
    """

    def stop() -> None:
        server.should_exit = True

    def end(error: BaseException) -> None:
        if not isinstance(error, ChannelLostError):
            log.error("a worker cannot start: %s", error)
        stop()

    gateway = WorkerGateway(settings, engine, path, stop)

    app = create_app(gateway, failed=end, local_routes=gateway.local_routes(), starts_first=is_replacement)
    options = {"certificate": settings.certificate, "key": settings.key, "drain": drain, "log": log}
    server = client_connections.make_server(app, **options, stop_end=stop_end, behind_proxy=settings.behind_proxy)  # type: ignore[arg-type]
    try:
        server.run(sockets=[sock])
    finally:
        if settings.tracing is not None:
            settings.tracing.close()
