"""The way to a registry from the command line: proxies, certificates, IPv6."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support import registry
from tests.support.forward_proxy import ForwardProxy

Make = Callable[..., Path]
pytestmark = pytest.mark.peer
SECRET = "user:not-a-secret-8"


@pytest.fixture(autouse=True)
def _without_other_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`host:port` of a registry with TLS, and the certificate that has to be trusted."""
    folder = tmp_path_factory.mktemp("secure")
    certificate = registry.certificate(folder)
    with registry.running(folder, tls=True) as host:
        yield host, certificate


@pytest.fixture
def company() -> Iterator[ForwardProxy]:
    with ForwardProxy(SECRET) as forward_proxy:
        yield forward_proxy


def there_and_back(run: Run, source: Path, address: str, env: dict[str, str]) -> None:
    run("push", source, address, env=env)
    run("pull", address, "-o", "out", env=env)


def test_a_certificate_of_one_s_own_authority_is_trusted_when_it_is_named(
    run: Run, make: Make, secure: tuple[str, Path]
) -> None:
    host, certificate = secure
    address = f"oci+https://{host}/net/sql"
    result = run("push", make(), address, code=5)
    assert "its certificate is not trusted" in result.stderr
    assert "SSL_CERT_FILE" in result.stderr
    there_and_back(run, make(), address, {"SSL_CERT_FILE": str(certificate)})


def test_a_certificate_for_another_name_is_not_trusted(run: Run, make: Make, secure: tuple[str, Path]) -> None:
    host, certificate = secure
    port = host.rpartition(":")[2]
    result = run("push", make(), f"oci+https://localhost:{port}/net/sql", env={"SSL_CERT_FILE": str(certificate)}, code=5)
    assert "its certificate is not trusted" in result.stderr


def test_plain_http_where_TLS_is_meant_and_the_other_way_round_are_one_line(
    run: Run, make: Make, host: str, secure: tuple[str, Path]
) -> None:
    assert "Use oci+http://" in run("push", make(), f"oci+https://{host}/net/sql", code=5).stderr
    assert len(run("push", make(), f"oci+http://{secure[0]}/net/sql", code=5).stderr.splitlines()) == 1


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_TLS_goes_through_a_proxy_s_tunnel(
    run: Run, make: Make, secure: tuple[str, Path], company: ForwardProxy, variable: str
) -> None:
    port = secure[0].rpartition(":")[2]
    env = {"SSL_CERT_FILE": str(secure[1]), variable: f"http://{SECRET}@{company.address}"}
    there_and_back(run, make(), f"oci://registry.test:{port}/net/{variable.lower()}", env)
    assert set(company.requests) == {f"CONNECT registry.test:{port}"}


def test_plain_http_is_asked_of_a_proxy(run: Run, make: Make, host: str, company: ForwardProxy) -> None:
    port = host.rpartition(":")[2]
    there_and_back(run, make(), f"oci+http://registry.test:{port}/net/plain", {"http_proxy": f"{SECRET}@{company.address}"})
    assert f"GET http://registry.test:{port}/v2/net/plain/manifests/latest" in company.requests


def test_hosts_that_need_no_proxy_and_this_machine_get_none(run: Run, make: Make, host: str, company: ForwardProxy) -> None:
    env = {"http_proxy": f"http://{SECRET}@{company.address}"}
    there_and_back(run, make(), f"oci://{host}/net/here", env)
    env["no_proxy"] = "other.test,registry.test"
    run("push", make(), "oci+http://registry.test:1/net/sql", env=env, code=5)
    assert company.requests == []


@pytest.mark.parametrize("scheme", ["oci", "oci+http"])
def test_a_proxy_that_refuses_is_named_and_its_password_is_not(
    run: Run, make: Make, secure: tuple[str, Path], company: ForwardProxy, scheme: str
) -> None:
    proxy = f"http://user:wrong-password@{company.address}"
    env = {"https_proxy": proxy, "http_proxy": proxy}
    result = run("push", make(), f"{scheme}://registry.test:5/net/sql", env=env, code=5)
    assert "407" in result.stderr
    assert "wrong-password" not in result.stderr + result.stdout


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://127.0.0.1:port", "http://[::1", "https://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_one_line(run: Run, make: Make, proxy: str) -> None:
    result = run("push", make(), "oci://registry.test/net/sql", env={"https_proxy": proxy}, code=5)
    assert "Set HTTPS_PROXY to one like" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_IPv6_is_spoken(run: Run, make: Make, tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    (tmp_path / "six").mkdir()
    with registry.running(tmp_path / "six", ipv6=True) as host:
        there_and_back(run, make(), f"oci://{host}/net/six", {})
