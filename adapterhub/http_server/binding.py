"""The socket a server listens on, and whether other machines can reach it."""

from __future__ import annotations

import ipaddress
import socket

from adapterhub_converters.errors import LocalIOError, RefusedError

BACKLOG = 2048
Socket = socket.socket


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_local_site(host: str) -> bool:
    """Return whether a Host header names this machine itself.

    The page of a site whose name was made to lead here (DNS rebinding) sends that name: a server that only this machine can
    reach must not answer it.
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.lower().removesuffix(".")
    # No name server answers for `localhost` or what ends in it (RFC 6761, 6.3).
    return is_loopback(name) or name.endswith(".localhost")


def check_exposure(host: str, *, encrypted: bool, requires_login: bool, code: str) -> None:
    """Refuse to serve other machines without TLS, or without requiring a login.

    Args:
        encrypted: Whether there is a certificate, or a TLS proxy in front.
        requires_login: Whether nothing can be read without a login or a key; `code` is the error's code if something could.
    """
    if is_loopback(host):
        return
    if not encrypted:
        hint = "Bind 127.0.0.1, give a certificate, or put a proxy with TLS in front"
        raise RefusedError(host, "tokens would cross the network in clear text", hint, code="public-needs-tls")
    if not requires_login:
        raise RefusedError(host, "anyone on the network could use this server", "Require a login", code=code)


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 picks a free one.

    Raises:
        LocalIOError: The address cannot be bound.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise LocalIOError(
            f"{host}:{port}", (error.strerror or str(error)).partition(" (while")[0], "Choose another port"
        ) from error
    # As uvicorn does with sockets it binds itself.
    sock.set_inheritable(True)
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """Return the URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def free_port() -> int:
    """Return a port of this machine that is free at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
