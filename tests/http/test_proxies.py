"""Certificates and proxies: each is checked, asked in its own way, and told its own password alone."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.cli import environment
from adapterhub.http.client import Client
from adapterhub.http.urls import proxy_to
from adapterhub_converters.errors import RemoteError
from tests.http.test_client import get, streamed
from tests.support.forward_proxy import ForwardProxy
from tests.support.registry import certificate
from tests.support.web_server import Web

SECRET = "not-a-secret-9"
DATA = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Web, Path]]:
    """A server with TLS for registry.test and 127.0.0.1, and the certificate to trust."""
    folder = tmp_path_factory.mktemp("tls")
    path = certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, folder / "key.pem")
    server = Web()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with server:
        server.files["/x"] = DATA
        yield server, path


def test_a_certificate_is_checked_against_the_authorities_and_the_name(
    secure: tuple[Web, Path], web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, path = secure
    port = server.server_address[1]
    with pytest.raises(RemoteError, match="its certificate is not trusted .*set SSL_CERT_FILE"):
        get(Client(f"https://127.0.0.1:{port}", pauses=()), "/x")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    asking = Client(f"https://127.0.0.1:{port}", pauses=())
    assert get(asking, "/x") == streamed(asking, "/x") == DATA
    with pytest.raises(RemoteError, match="not trusted"):
        get(Client(f"https://localhost:{port}", pauses=()), "/x")
    with pytest.raises(RemoteError, match="it does not speak TLS"):
        get(Client(web.url.replace("http:", "https:"), pauses=()), "/x")


def test_TLS_goes_through_a_tunnel_and_only_the_proxy_gets_its_password(
    secure: tuple[Web, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, path = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    port = server.server_address[1]
    server.requests.clear()
    with ForwardProxy(f"user:{SECRET}") as company:
        asking = Client(f"https://registry.test:{port}", pauses=(), proxy=lambda *_: f"http://user:{SECRET}@{company.address}")
        assert get(asking, "/x") == streamed(asking, "/x") == DATA
        assert company.requests == [f"CONNECT registry.test:{port}"]
    assert all("proxy-authorization" not in headers for _, headers in server.requests)


def test_plain_http_is_asked_of_a_proxy_by_its_whole_address(web: Web) -> None:
    web.files["/x"] = DATA
    port = web.server_address[1]
    with ForwardProxy(f"user:{SECRET}") as company:
        lookups = list[tuple[str, str]]()

        def proxy(scheme: str, host: str) -> str:
            lookups.append((scheme, host))
            return f"user:{SECRET}@{company.address}"

        asking = Client(f"http://registry.test:{port}", pauses=(), proxy=proxy)
        assert get(asking, "/x?y=%2f").__len__() == len(DATA)
        assert company.requests[0].lower() == f"get http://registry.test:{port}/x?y=%2f"
        assert lookups == [("http", "registry.test")]
        get(Client(web.url, proxy=proxy), "/x")  # this machine
        assert len(company.requests) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_named_without_its_password(scheme: str) -> None:
    with ForwardProxy(f"user:{SECRET}") as company:
        asking = Client(f"{scheme}://registry.test:5", pauses=(), proxy=lambda *_: f"http://user:wrong@{company.address}")
        with pytest.raises(RemoteError, match="407") as caught:
            get(asking, "/x")
    if scheme == "https":
        assert f"the proxy {company.address} refused (407 Proxy Authentication Required)" in caught.value.what
        assert caught.value.hint.endswith("into the variable that names it, like http://USER:PASSWORD@HOST:PORT")
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://127.0.0.1:1", "the address of the proxy begins with socks5://; only http:// is supported"),
        ("https://127.0.0.1:1", "the address of the proxy begins with https://; only http:// is supported"),
        ("http://:3128", "the address of the proxy is invalid"),
        ("http://127.0.0.1:port", "the address of the proxy is invalid"),
        ("http://[::1", "the address of the proxy is invalid"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line(proxy: str, words: str) -> None:
    with pytest.raises(RemoteError) as error:
        proxy_to("https", "registry.test", lambda *_: proxy, "x")
    assert str(error.value) == f"x: {words}. Set HTTPS_PROXY to one like http://proxy.example:3128"


def test_only_the_command_line_reads_the_environment(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert environment.proxy("https", "registry.test") == ""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:2")
    monkeypatch.setenv("no_proxy", "other.test,.inside.test")
    hosts = ("registry.test", "other.test", "a.inside.test")
    assert [environment.proxy("https", host) for host in hosts] == ["http://127.0.0.1:1", "", ""]
    assert environment.proxy("http", "registry.test") == "http://127.0.0.1:2"
    with pytest.raises(RemoteError, match="no such host|looked up"):  # not the proxy's "connection refused"
        get(Client("http://registry.invalid", pauses=()), "/x")
