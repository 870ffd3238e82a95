"""The process of a hub: the address it may bind, its startup and its shutdown."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from adapterhub.http_server import binding, client_connections

from .accounts import oidc
from .app import create_app
from .settings import HubSettings
from .storage.from_settings import open_storage

_log = logging.getLogger("adapterhub.hub")
MAX_CONNECTIONS = 2048
"""Connections of one client, an address or a /64 with IPv6, at a time."""
_DRAIN_SECONDS = 20  # for requests still running at shutdown
# Options of glibc's mallopt (malloc.h) and their values: M_MMAP_THRESHOLD 2 MiB, M_TRIM_THRESHOLD 8 MiB, M_ARENA_MAX 1.
_MALLOC = ((-3, 2 << 20), (-1, 8 << 20), (-8, 1))


def check_binding(settings: HubSettings) -> None:
    """Refuse to serve other machines without TLS, or without requiring a login."""
    encrypted = bool(settings.certificate) or settings.behind_proxy
    binding.check_exposure(settings.host, encrypted=encrypted, requires_login=settings.require_login, code="hub-needs-login")


def serve(settings: HubSettings, *, ready: Callable[[str], object]) -> None:
    """Run a hub until a signal stops it; `ready` is called with its address."""
    check_binding(settings)
    if settings.provider:
        oidc.check(settings.provider)
    open_storage(settings).close()  # what is wrong with it is an error here; in the startup of the server it is a traceback
    _reuse_memory()
    sock = binding.open_listener(settings.host, settings.port)
    server = make_server(settings)
    ready(settings.url or binding.url_of(sock, "https" if settings.certificate else "http"))
    server.run(sockets=[sock])


def _reuse_memory() -> None:
    """Make glibc reuse freed memory for the pieces of bodies, rather than get cleared pages from the system for each of them.

    A GET of 8 MB takes 3.5 ms of CPU time with this, and 5 ms without.
    """
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC:
            mallopt(option, value)


def make_server(settings: HubSettings) -> uvicorn.Server:
    """Return the server, not started yet."""
    return client_connections.make_server(
        create_app(settings),
        certificate=settings.certificate,
        key=settings.key,
        drain=_DRAIN_SECONDS,
        log=_log,
        behind_proxy=settings.behind_proxy,
        most_of_network=MAX_CONNECTIONS,
    )
