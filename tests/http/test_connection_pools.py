"""Connections are kept for the next request of a thread, and one that the server has closed is no failure."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapterhub.http.client import Client
from adapterhub.http.http_errors import RetriesExhaustedError
from adapterhub_converters.errors import NotFoundError, RemoteError
from tests.http.test_client import client, get, raw, streamed
from tests.support.web_server import Web

DATA = bytes(range(256)) * 1000


def counted(web: Web) -> list[object]:
    """The connections that a server has got, from now on."""
    accepted: list[object] = []
    accept = web.get_request

    def counting() -> tuple[socket.socket, object]:
        accepted.append(pair := accept())
        return pair

    web.get_request = counting  # type: ignore[method-assign]
    return accepted


def test_a_connection_is_reused_by_the_next_request(web: Web, other_web: Web) -> None:
    connections, elsewhere = counted(web), counted(other_web)
    web.files["/x"] = DATA
    other_web.files["/y"] = b"y"
    web.rules["/there"] = lambda to: to.send(302, Location=f"{other_web.url}/y")
    web.rules["/no"] = lambda to: to.send(404, b"no")
    asking = client(web)
    for _ in range(3):
        assert get(asking, "/x") == streamed(asking, "/x") == DATA
        assert get(asking, "/there") == b"y"
        assert asking.request("HEAD", f"{web.url}/x", "x", good=(200,)).number("content-length") == len(DATA)
        with pytest.raises(NotFoundError):
            get(asking, "/no")
    assert (len(connections), len(elsewhere)) == (1, 1)
    asking.close()
    assert get(asking, "/x") == DATA
    assert len(connections) == 2


def test_threads_have_a_connection_each(web: Web) -> None:
    connections = counted(web)
    web.files["/x"] = DATA
    asking = client(web)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda n: (get, streamed)[n % 2](asking, "/x"), range(100))) == {DATA}
    assert 1 <= len(connections) <= 4


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
def test_a_kept_connection_that_the_server_has_closed_is_no_failure(method: str) -> None:
    """Of a PATCH some may have arrived, so that only its caller knows how to continue."""
    keep_alive_answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    again = threading.Event()

    def once(connection: socket.socket) -> None:
        connection.sendall(keep_alive_answer)
        connection.recv(1 << 16)  # the next request, which is not answered
        again.set()

    with raw(once, keep_alive_answer) as (url, requests):
        asking = Client(url, pauses=())
        asking.request("GET", url, "x", good=(200,))
        if method == "PATCH":
            with pytest.raises(RemoteError, match="closed|reset"):
                asking.request(method, url, "x", good=(200,), body=b"abc")
        else:
            assert asking.request(method, url, "x", good=(200,)).status == 200
        assert again.is_set()
        assert len(requests) == (1 if method == "PATCH" else 2)


def test_a_server_that_closes_at_once_is_a_failure() -> None:
    with raw(b"", b"") as (url, requests), pytest.raises(RetriesExhaustedError, match=r"closed|reset"):
        Client(url, pauses=(0.0,)).request("GET", url, "x", good=(200,))
    assert len(requests) == 2
