"""Connections of a server: no more than leave files for its work, and large bodies whole in both directions."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapterhub.http_server import binding, client_connections
from adapterhub.http_server import certificate as certificates
from adapterhub_converters.errors import RefusedError
from tests.support.certificates import write_certificate


@pytest.mark.parametrize(
    ("encrypted", "asks_who", "error"),
    [
        (
            False,
            True,
            "public-needs-tls 0.0.0.0: tokens would cross the network in clear text. Bind 127.0.0.1, give a certificate,",
        ),
        (True, False, "hub-needs-login 0.0.0.0: anyone on the network could use this server. Require a login"),
    ],
)
def test_a_public_address_needs_encryption_and_a_login(encrypted: bool, asks_who: bool, error: str) -> None:
    with pytest.raises(RefusedError) as caught:
        binding.check_exposure("0.0.0.0", encrypted=encrypted, requires_login=asks_who, code="hub-needs-login")
    assert f"{caught.value.code} {caught.value}".startswith(error)
    binding.check_exposure("0.0.0.0", encrypted=True, requires_login=True, code="hub-needs-login")
    for host in ("127.0.0.1", "localhost", "::1"):
        binding.check_exposure(host, encrypted=False, requires_login=False, code="hub-needs-login")


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


@contextmanager
def _serving(
    app: Any, certificate: Path | None = None, key: Path | None = None, **options: Any
) -> Iterator[tuple[tuple[str, int], Any]]:
    """The address of a server of an application, and the server."""
    sock = binding.open_listener("127.0.0.1", 0)
    server = client_connections.make_server(app, certificate=certificate, key=key, drain=1, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname(), server
    finally:
        server.should_exit = True
        thread.join()


def test_one_connection_too_many_is_closed_and_those_before_it_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    with _serving(_app) as (address, server):
        monkeypatch.setattr(client_connections.Connection.counts, "most", 3)
        clients = [socket.create_connection(address) for _ in range(5)]
        assert [_answer(client) for client in clients] == [b"HTTP/1.1 204"] * 3 + [b""] * 2
        for client in clients:
            client.close()
        while server.server_state.connections:
            time.sleep(0.01)
        with socket.create_connection(address) as client:
            assert _answer(client) == b"HTTP/1.1 204"


@pytest.mark.parametrize(("limit", "name"), [(3, "most"), (3, "most_of_network")])
def test_connections_count_from_before_the_handshake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, name: str
) -> None:
    """Those that sent nothing of a handshake counted nowhere: one address could take all."""
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write_certificate(pem, days=1, secret=key)
    with _serving(_app, pem, key) as (address, _), ExitStack() as stack:
        monkeypatch.setattr(client_connections.Connection.counts, name, limit)
        clients = [stack.enter_context(socket.create_connection(address, 30)) for _ in range(5)]
        assert [_is_cut(client) for client in clients[3:]] == [True, True]
        clients[0].close()
        while sum(client_connections.Connection.counts.by_network.values()) == 3:
            time.sleep(0.01)
        assert _certificate_at(address, None)
    assert not client_connections.Connection.counts.by_network


def test_a_handshake_has_the_time_of_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connections, "HEAD_SECONDS", 0.1)
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write_certificate(pem, days=1, secret=key)
    with _serving(_app, pem, key) as (address, _), socket.create_connection(address, 30) as client:
        client.sendall(b"\x16\x03\x01")
        assert _is_cut(client)


def _is_cut(client: socket.socket) -> bool:
    """Whether a server ends a connection without an answer."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


# ---- certificates


def _certificate_at(address: tuple[str, int], name: str | None) -> bytes:
    """The certificate that a new connection gets, to a server by its name or by none."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(address) as plain, context.wrap_socket(plain, server_hostname=name) as client:
        assert _answer(client) == b"HTTP/1.1 204"
        return client.getpeercert(binary_form=True) or b""


def _der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


@pytest.mark.parametrize("name", ["hub.example", None])
def test_a_renewed_certificate_is_for_new_connections_and_a_broken_one_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    monkeypatch.setattr(certificates, "LOOK_SECONDS", 0.01)
    caplog.set_level("INFO", "adapterhub.http_server")
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    first, second = (_der(write_certificate(pem, days=days, secret=key)) for days in (1, 2))

    def until(text: str) -> None:
        while text not in caplog.text:
            time.sleep(0.01)

    with _serving(_app, pem, key) as (address, _):
        assert _certificate_at(address, name) == second != first
        # The key of another certificate, a text, and nothing at all.
        broken: list[Callable[[], object]] = [
            lambda: write_certificate(tmp_path / "other.pem", days=3, secret=key),
            lambda: pem.write_text("-----BEGIN CERTIFICATE-----"),
            pem.unlink,
        ]
        for breaks in broken:
            caplog.clear()
            breaks()
            until(f"the certificate stays as it was: {pem}: ")
            assert _certificate_at(address, name) == second
        # As Kubernetes renews a secret: another folder behind the same link.
        (tmp_path / "new").mkdir()
        third = _der(write_certificate(tmp_path / "new/cert.pem", days=4, secret=tmp_path / "new/key.pem"))
        for path in (pem, key):
            path.unlink(missing_ok=True)
            path.symlink_to(tmp_path / "new" / path.name)
        until("has changed; new connections get it")
        assert _certificate_at(address, name) == third


# ---- files that the system sends

SIZE = (3 << 20) + 7


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of SIZE random bytes, open."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    with open(path, "rb") as opened:
        yield opened.fileno()


def _app_sending(file: int, announced: int = SIZE) -> Callable[..., Any]:
    """An application that answers with the whole of a file after a piece in memory."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert client_connections.ZERO_COPY in scope["extensions"]
            headers = [(b"content-length", str(5 + announced).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            await send({"type": client_connections.ZERO_COPY, "file": file, "offset": 0, "count": announced})

    return app


def test_a_file_follows_what_was_sent_before_it_also_in_several_answers_on_one_connection(file: int) -> None:
    with _serving(_app_sending(file)) as (address, _):
        expected = b"first" + os.pread(file, SIZE, 0)
        with socket.create_connection(address) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3)  # pipelined
            stream = client.makefile("rb")
            for _ in range(3):
                while stream.readline() != b"\r\n":
                    pass
                assert stream.read(len(expected)) == expected


def test_a_file_that_is_shorter_than_announced_ends_the_connection(file: int) -> None:
    with _serving(_app_sending(file, SIZE + 1)) as (address, _):
        client = http.client.HTTPConnection(*address, timeout=60)
        client.request("GET", "/")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            client.getresponse().read()


def test_a_client_that_leaves_in_the_middle_of_a_file_leaves_nothing_open(file: int) -> None:
    def leave() -> int:
        """Ask for the file and leave, and return the number of files that are open once the server has noticed."""
        with socket.create_connection(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            client.recv(1000)
        while server.server_state.connections or server.server_state.tasks:
            time.sleep(0.01)
        return len(os.listdir("/proc/self/fd"))

    with _serving(_app_sending(file)) as (address, server):
        first = leave()  # what the server has opened once, it keeps
        assert max(leave() for _ in range(5)) < first + 5


# ---- bodies


async def _hashed(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the SHA-256 of the body, and the number of its pieces."""
    if scope["type"] != "http":
        return
    state, count, has_more = hashlib.sha256(), 0, True
    while has_more:
        message = await receive()
        assert type(message["body"]) is bytes
        state.update(message["body"])
        count, has_more = count + 1, message["more_body"]
    body = f"{state.hexdigest()} {count}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 65536, SIZE])
def test_a_body_arrives_as_it_was_sent(size: int, chunked: bool) -> None:
    data = os.urandom(size)
    with _serving(_hashed) as (address, _):
        client = http.client.HTTPConnection(*address, timeout=60)
        for _ in range(2):  # on one connection
            body = iter([data[: size // 3], data[size // 3 :]]) if chunked else data
            client.request("POST", "/", body, encode_chunked=chunked)
            digest, count = client.getresponse().read().split()
            assert digest.decode() == hashlib.sha256(data).hexdigest()
            assert int(count) < 100


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_offers_another_protocol_keeps_its_body(chunked: bool) -> None:
    """Java's client offers HTTP/2 with each request."""
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 5"
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
    body = b"5\r\nhello\r\n0\r\n\r\n" if chunked else b"hello"
    with _serving(_hashed) as (address, _), socket.create_connection(address, timeout=60) as client:
        answers = client.makefile("rb")
        for _ in range(2):  # on one connection
            client.sendall(f"POST / HTTP/1.1\r\nHost: x\r\n{offer}{length}\r\n\r\n".encode() + body)
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            while answers.readline() != b"\r\n":
                pass
            assert answers.read(66).split()[0].decode() == hashlib.sha256(b"hello").hexdigest()


def test_servers_of_two_threads_do_not_read_into_one_buffer() -> None:
    """Two hubs in a process sometimes answered 400, "Invalid HTTP request": one had read what came for the other."""
    with ThreadPoolExecutor(1) as thread:
        buffer_there = thread.submit(lambda: client_connections._BUFFER.memory).result()
    assert buffer_there.obj is not client_connections._BUFFER.memory.obj


def test_files_are_left_for_the_work_itself() -> None:
    resource = pytest.importorskip("resource")
    limit = client_connections.max_connections()
    assert 256 <= limit <= max(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 256)
