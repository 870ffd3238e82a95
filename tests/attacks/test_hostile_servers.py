"""Servers that never end an answer, or lead elsewhere, against real commands: one line, the documented exit code, no hang."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run
from tests.support.adapters import Make
from tests.support.forward_proxy import ForwardProxy
from tests.support.hub_server import TOKEN, Hub
from tests.support.proxy import Exchange, Proxy
from tests.support.registry import certificate
from tests.support.web_server import Web

_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# What comes first, what comes after it forever, and what is said of it.
ENDLESS = {
    "informational answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "more than 8 informational answers"),
    "early hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", "more than 8 informational answers"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", "got more than 100 headers"),
    "a header": (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 999, "got more than 65536 bytes"),
    "headers of a hint": (b"HTTP/1.1 103 Early Hints\r\n", b"X: " + b"y" * 60_000 + b"\r\n", "headers are longer than 128 kB"),
    "trailers": (_CHUNKED + b"0\r\n", b"X: y\r\n", "trailers are longer than 64 kB"),
    "a trailer": (_CHUNKED + b"0\r\nX: ", b"y" * 999, "trailers are longer than 64 kB"),
    "chunk extensions": (_CHUNKED, b"1;" + b"y" * 999 + b"\r\nx\r\n", "extensions of its chunks are longer than 64 kB"),
    "a chunk extension": (_CHUNKED + b"1;", b"y" * 999, "begins with more than 4096 bytes"),
    "a negative chunk": (_CHUNKED + b"-1\r\n", b"y" * 999, "no valid size"),
    "a chunk longer than it says": (_CHUNKED + b"2\r\n", b"yyyy", "a chunk of it"),
    "a chunk of a size with a prefix": (_CHUNKED + b"0x5\r\n", b"y" * 999, "no valid size"),
}
_HEAD = 10  # bytes of a request that is one


@contextlib.contextmanager
def endless(first: bytes, forever: bytes) -> Iterator[str]:
    """A server that answers every request so; its host and port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if len(connection.recv(1 << 16)) >= _HEAD:
                connection.sendall(first)
                while True:
                    connection.sendall(forever)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line of error that has these words."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert all(word in errors[0] for word in words), errors[0]


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("document_kind", ["registry", "hub", "base"])
def test_an_answer_that_never_ends_is_ended(run: Run, make: Make, tmp_path: Path, document_kind: str, kind: str) -> None:
    first, forever, words = ENDLESS[kind]
    with endless(first, forever) as host:
        command = {
            "registry": ["pull", f"oci://{host}/team/sql", "-o", tmp_path / "out"],
            "hub": ["pull", f"hub+http://{host}/team/sql", "-o", tmp_path / "out"],
            "base": ["validate", make(), "--base", f"http://{host}/model"],
        }[document_kind]
        one_line(run(*command, code=5), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["headers", "a header", "trailers", "a negative chunk"])
def test_an_object_store_that_never_ends_an_answer_is_one_line(run: Run, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("obstore")
    with endless(*ENDLESS[kind][:2]) as host:
        env = {"AWS_ENDPOINT_URL": f"http://{host}", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        one_line(run("pull", "s3://bucket/adapters/team/sql", "-o", tmp_path / "out", env=env, code=5))


# ---- where a server may lead


@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest/meta-data", "http://[fd00:ec2::254]/x", "http://metadata.google.internal/x",
     "http://[fe80::1]/x", "http://[::ffff:169.254.169.254]/x", "http://100.100.100.200/x", "http://168.63.129.16/x",
     "http://2852039166/x", "http://0xa9fea9fe/x", "http://169.254.43518/x"],
)  # fmt: skip
def test_nothing_leads_to_a_metadata_service(run: Run, make: Make, web: Web, target: str) -> None:
    web.rules["/m/config.json"] = lambda to: to.send(302, Location=target)
    with ForwardProxy() as proxy:  # which would look the name up itself
        env = {"HTTP_PROXY": f"http://{proxy.address}", "http_proxy": f"http://{proxy.address}", "NO_PROXY": "", "no_proxy": ""}
        result = run("validate", make(), "--base", f"{web.url}/m", env=env, code=5)
    one_line(result, "the server leads to", "link-local or metadata address")
    assert proxy.requests == []


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:1/x", "http://localhost:1/x", "http://10.0.0.1/x", "http://[fd12::1]/x", "http://0.0.0.0/x"]
)
def test_a_public_server_leads_to_nothing_private(run: Run, make: Make, web: Web, target: str) -> None:
    web.rules["/m/config.json"] = lambda to: to.send(302, Location=target)
    with ForwardProxy() as proxy:
        env = {"HTTP_PROXY": f"http://{proxy.address}", "http_proxy": f"http://{proxy.address}", "NO_PROXY": "", "no_proxy": ""}
        url = f"http://models.example:{web.server_address[1]}/m"
        one_line(run("validate", make(), "--base", url, env=env, code=5), "the server leads to")
    assert [line for line in proxy.requests if "models.example" not in line] == []


def test_a_server_on_this_machine_may_lead_to_another_port_of_it(run: Run, make: Make, web: Web) -> None:
    with Web() as other_web:
        web.rules["/m/config.json"] = lambda to: to.send(302, Location=f"{other_web.url}/config.json")
        run("validate", make(), "--base", f"{web.url}/m", code=None)
        assert other_web.paths() == ["/config.json"]


_REBINDING = """
    import http.server, socket, sys, threading
    from adapterhub.http import client
    from adapterhub_converters.errors import RemoteError
    seen = []
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Host"])
            self.send_response(302 if self.path == "/x" else 200)
            self.send_header("Location", f"http://{TARGET}:{PORT}/y")
            self.send_header("Content-Length", "0")
            self.end_headers()
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("", 0), Handler)
    PORT = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for home, TARGET, allowed in (
        ("public.example", "8.8.4.4", True),
        ("public.example", "inner.example", False),
        ("public.example", "here.example", False),
        ("inner.example", "inner2.example", True),
        ("inner.example", "public.example", True),
        ("inner.example", "here.example", False),
    ):
        asking, before = client.Client(f"http://{home}:{PORT}", pauses=()), len(seen)
        try:
            asking.request("GET", f"http://{home}:{PORT}/x", "x", good=(200,))
        except RemoteError as error:
            assert not allowed and "the server leads to" in str(error), (home, TARGET, error)
        else:
            assert allowed, (home, TARGET)
        assert len(seen) - before == 1 + allowed
    asking = client.Client(f"http://public.example:{PORT}", pauses=())
    asking.request("GET", f"http://public.example:{PORT}/y", "x", good=(200,))
    asking.close()
    text = open("/etc/hosts").read()
    open("/etc/hosts", "w").write(text.replace("8.8.8.8 public.example", "127.0.0.1 public.example"))
    try:
        asking.request("GET", f"http://public.example:{PORT}/y", "x", good=(200,))
    except RemoteError as error:
        assert "was a public address and is now 127.0.0.1" in str(error), error
    else:
        raise AssertionError
    print("held")
"""


def test_a_name_is_held_against_the_address_that_was_connected_to(tmp_path: Path) -> None:
    """In a network of its own, in which this machine has public and private addresses."""
    words = ["unshare", "--map-root-user", "--net", "--mount"]
    if not all(map(shutil.which, ("unshare", "ip"))) or subprocess.run([*words, "true"], check=False).returncode:
        pytest.skip("no network namespaces here")
    (tmp_path / "hosts").write_text(
        "8.8.8.8 public.example\n10.1.1.1 inner.example\n10.1.1.2 inner2.example\n127.0.0.1 here.example localhost\n"
    )
    (tmp_path / "it.py").write_text(textwrap.dedent(_REBINDING))
    addresses = "; ".join(f"ip addr add {address}/32 dev lo" for address in ("8.8.8.8", "8.8.4.4", "10.1.1.1", "10.1.1.2"))
    program = shlex.join([sys.executable, f"{tmp_path}/it.py"])
    script = f"ip link set lo up; {addresses}; mount --bind {tmp_path}/hosts /etc/hosts; exec {program}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "converters", ROOT / "schemas")))}
    result = subprocess.run([*words, "sh", "-ec", script], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "held\n", result.stderr


# ---- TLS


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder)
    return folder


def secured(server: Hub | Web, keys: Path) -> None:
    """Have a server that does not run yet speak TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "cert.pem", keys / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)


@pytest.mark.parametrize("storage", [True, False], ids=["elsewhere", "its own"])
def test_a_hub_with_tls_that_names_places_without_it_gets_no_weights(run: Run, make: Make, keys: Path, storage: bool) -> None:
    """This hub has TLS and all that it names is `http://`: where to send large files, and where to verify them."""
    hub = Hub(token=TOKEN, storage=storage)
    secured(hub, keys)
    with hub:
        env = {"SSL_CERT_FILE": str(keys / "cert.pem"), "HF_TOKEN": TOKEN, "HF_ENDPOINT": f"https://{hub.host}"}
        one_line(run("push", make(), "hf://org/sql", env=env, code=5), "the server leads from https to http")
        assert not hub.large
        if hub.storage:
            assert hub.storage.requests == []


def test_a_page_of_a_hub_with_tls_does_not_lead_to_one_without(run: Run, keys: Path, web: Web) -> None:
    hub = Web()
    secured(hub, keys)
    hub.rules["/api/models/org/sql/revision/main"] = lambda to: to.send(302, Location=f"{web.url}/x")
    with hub:
        env = {"SSL_CERT_FILE": str(keys / "cert.pem"), "HF_TOKEN": TOKEN}
        address = f"hub+https://127.0.0.1:{hub.server_address[1]}/org/sql"
        one_line(run("pull", address, "-o", "out", env=env, code=5), "from https to http")
    assert web.requests == []


def test_a_registry_may_not_have_an_upload_sent_to_a_metadata_service(run: Run, host: str, make: Make) -> None:
    with Proxy(host) as server:

        def elsewhere(request: Exchange) -> None:
            if request.method == "POST":
                request.status, request.answer = 202, {"location": "http://169.254.169.254/upload"}

        server.before = elsewhere
        result = run("push", make(), f"oci://{server.address}/attacks/upload", code=5)
    one_line(result, "the server leads to 169.254.169.254")


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Error-Message"])
def test_a_header_cannot_put_a_token_into_an_error(run: Run, web: Web, header: str, tmp_path: Path) -> None:
    token, commit = "hf_secret_secret", "a" * 40
    page = f'{{"sha": "{commit}", "siblings": [{{"rfilename": "adapter.json"}}]}}'.encode()
    web.rules["/api/models/team/sql/revision/main"] = lambda to: to.send(200, page)
    status = 200 if header == "X-Repo-Commit" else 418
    web.rules[f"/team/sql/resolve/{commit}/adapter.json"] = lambda to: to.send(status, b"{}", **{header: token})
    result = run("pull", "hf://team/sql", "-o", tmp_path / "out", env={"HF_ENDPOINT": web.url, "HF_TOKEN": token}, code=None)
    one_line(result)
    assert token not in result.stdout + result.stderr
