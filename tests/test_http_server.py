"""Connections of a server: no more than leave files for its work."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from adapterhub.http_server import binding, connections


async def _app(scope: Any, _receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


def _answer(client: socket.socket) -> bytes:
    try:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        return client.recv(1000)[:12]
    except OSError:
        return b""


def test_one_connection_too_many_is_closed_and_those_before_it_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    sock = binding.listening("127.0.0.1", 0)
    server = connections.make_server(_app, certificate=None, key=None, drain=1)
    monkeypatch.setattr(connections.Connection, "most", 3)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        clients = [socket.create_connection(sock.getsockname()) for _ in range(5)]
        assert [_answer(client) for client in clients] == [b"HTTP/1.1 204"] * 3 + [b""] * 2
        for client in clients:
            client.close()
        while server.server_state.connections:
            time.sleep(0.01)
        with socket.create_connection(sock.getsockname()) as client:
            assert _answer(client) == b"HTTP/1.1 204"
    finally:
        server.should_exit = True
        thread.join()


def test_files_are_left_for_the_work_itself() -> None:
    resource = pytest.importorskip("resource")
    most = connections.most_connections()
    assert 256 <= most <= max(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 256)
