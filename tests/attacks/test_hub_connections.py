"""A passer-by holds neither memory nor connections of a hub: endless headers are cut, and so is who lets it wait."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from adapterhub.http_server import client_connections
from adapterhub.hub import server
from tests.hub.conftest import Running, hub, serving
from tests.support.hub_tenants import Tenant

__all__ = ["hub"]
MAX_SENT = 16 << 20
START = b"POST /api/validate-yaml HTTP/1.1\r\nHost: localhost\r\n"
ENDLESS = {
    "one header": (START + b"X-Long: ", b"a" * 65536),
    "many headers": (START, b"X-A: b\r\n" * 8192),
    "a path": (b"GET /", b"a" * 65536),
    "what follows a body": (START + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X-A: b\r\n" * 8192),
}


def connect(hub: Running, source: str = "127.0.0.1") -> socket.socket:
    parts = urlsplit(hub.url)
    return socket.create_connection((parts.hostname, parts.port), 30, (source, 0))


def bytes_accepted(sock: socket.socket, pieces: Iterable[bytes]) -> int:
    """The bytes that a server takes before it cuts the connection, up to MAX_SENT."""
    sent = 0
    try:
        for piece in pieces:
            sock.sendall(piece)
            sent += len(piece)
            if sent > MAX_SENT:
                break
    except OSError:
        pass
    return sent


@pytest.mark.parametrize("header_kind", ENDLESS)
def test_endless_headers_are_cut(hub: Running, header_kind: str) -> None:
    start, piece = ENDLESS[header_kind]
    with connect(hub) as sock:
        assert bytes_accepted(sock, itertools.chain([start], itertools.repeat(piece))) < MAX_SENT
    assert requests.get(f"{hub.url}/health", timeout=10).ok


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", START + b"Content-Length: 9\r\n\r\n"])
def test_a_client_that_lets_the_hub_wait_is_cut(hub: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    for name in ("HEAD_SECONDS", "SILENT_SECONDS", "CHECK_SECONDS"):
        monkeypatch.setattr(client_connections, name, 0.1)
    with connect(hub) as sock:
        sock.sendall(sent)
        assert cut(sock)


@pytest.mark.parametrize("behind_proxy", [False, True])
def test_a_client_cannot_take_the_connections_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind_proxy: bool
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with serving(tmp_path / "hub", behind_proxy=behind_proxy) as hub, ExitStack() as stack:
        socks = [stack.enter_context(connect(hub)) for _ in range(5)]
        assert [health(sock) for sock in socks] == [True] * 3 + [behind_proxy] * 2
        assert health(stack.enter_context(connect(hub, "127.0.0.2")))
        socks[0].close()
        while not behind_proxy and client_connections.Connection.counts.by_network["127.0.0.1"] == 3:
            time.sleep(0.01)
        assert health(stack.enter_context(connect(hub)))
    assert not client_connections.Connection.counts.by_network


def health(sock: socket.socket) -> bool:
    """Whether a hub answers on a connection, which stays open."""
    try:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return sock.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def test_a_client_that_does_not_read_is_cut(hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red = Tenant(hub, "red")
    red.create("open")
    assert red.commit("open", {"large.txt": b"x" * (7 << 20)}).ok
    for name in ("SILENT_SECONDS", "CHECK_SECONDS"):
        monkeypatch.setattr(client_connections, name, 1.0)
    with connect(hub) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"GET /red/open/resolve/main/large.txt HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4)
        while not reading(hub):
            time.sleep(0.01)
        while reading(hub):
            time.sleep(0.01)
    assert requests.get(f"{hub.url}/health", timeout=10).ok


def reading(hub: Running) -> bool:
    """Whether the hub has a blob open."""
    blobs = str(hub.folder / ".adapterhub" / "blobs")
    return any(os.path.realpath(f"/proc/self/fd/{entry}").startswith(blobs) for entry in os.listdir("/proc/self/fd"))


def cut(sock: socket.socket) -> bool:
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True
