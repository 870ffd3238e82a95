"""The socket that a server listens on, and whether others than this machine can reach it."""

from __future__ import annotations

import ipaddress
import socket

from adapterhub_converters.errors import LocalIOError, RefusedError

_BACKLOG = 2048


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, *, encrypted: bool, asks_who: bool, code: str) -> None:
    """Refuse to serve others than this machine in the clear, or without asking who they are.

    Args:
        encrypted: There is a certificate, or a proxy with TLS in front.
        asks_who: Nobody reads anything without a login or a key; `code` is that of the error if they could.
    """
    if is_loopback(host):
        return
    if not encrypted:
        hint = "Bind 127.0.0.1, give a certificate, or put a proxy with TLS in front"
        raise RefusedError(host, "tokens would cross the network in clear text", hint, code="public-needs-tls")
    if not asks_who:
        raise RefusedError(host, "anyone on the network could use this server", "Require a login", code=code)


def listening(host: str, port: int) -> socket.socket:
    """The socket of an address, port 0 for a free one; LocalIOError for an address that cannot be bound."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise LocalIOError(
            f"{host}:{port}", (error.strerror or str(error)).partition(" (while")[0], "Choose another port"
        ) from error
    found.set_inheritable(True)
    return found


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """The address of a listening socket as clients write it."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def free_port() -> int:
    """A port of this machine that nobody uses just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
