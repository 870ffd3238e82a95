"""The process of a hub: the address that it may bind, its start and its end."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from adapterhub.http_server import binding, connections

from .app import create_app
from .people import oidc
from .settings import HubSettings

_DRAIN = 20  # seconds for the requests that are running when the hub ends
# Options of glibc (malloc.h) and their values: blocks below 2 MiB are of memory that the process has, which keeps 8 MiB of it
# after their use, in one arena for all threads.
_MALLOC = ((-3, 2 << 20), (-1, 8 << 20), (-8, 1))


def check_binding(settings: HubSettings) -> None:
    """Refuse to serve others than this machine in the clear, or without asking who they are."""
    encrypted = bool(settings.certificate) or settings.behind_proxy
    binding.check_exposure(settings.host, encrypted=encrypted, asks_who=settings.require_login, code="hub-needs-login")


def serve(settings: HubSettings, *, ready: Callable[[str], object]) -> None:
    """Run a hub until it is told to stop by a signal; `ready` is called with its address."""
    check_binding(settings)
    if settings.provider:
        oidc.check(settings.provider)
    _reuse_memory()
    sock = binding.listening(settings.host, settings.port)
    server = make_server(settings)
    ready(settings.url or binding.url_of(sock, "https" if settings.certificate else "http"))
    server.run(sockets=[sock])


def _reuse_memory() -> None:
    """Have the pieces of bodies be where those before were: the system would have to clear other memory for each of them.

    A GET of 8 MB takes 3.5 ms of CPU time, and 5 without.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC:
            mallopt(option, value)


def make_server(settings: HubSettings) -> uvicorn.Server:
    """The server, not started."""
    return connections.make_server(create_app(settings), certificate=settings.certificate, key=settings.key, drain=_DRAIN)
