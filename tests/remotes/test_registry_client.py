"""Who asks: told to the registry and to its token service, and to nobody else."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from adapterhub.http.http_errors import DeniedError
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.oci import docker_credentials
from adapterhub.remotes.oci.docker_credentials import Credentials
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.oci.registry_client import Authenticator
from adapterhub_converters.errors import NotFoundError, RemoteError
from tests.support.proxy import Exchange, Proxy

PASSWORD = "not-a-secret-7"
BASIC = "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
BLOB = Descriptor("x", "sha256:" + "0" * 64, 3)


@pytest.fixture
def servers() -> Iterator[tuple[Proxy, Proxy, Proxy]]:
    """A registry, its token service, and its storage: three origins."""
    with Proxy() as registry, Proxy() as tokens, Proxy() as storage:
        yield registry, tokens, storage


class World:
    """A registry that wants a token, sends for blobs to its storage, and a service that gives tokens for a password."""

    def __init__(self, servers: tuple[Proxy, Proxy, Proxy]) -> None:
        self.registry, self.tokens, self.storage = servers
        self.valid = "token-1"
        self.registry.before, self.tokens.before, self.storage.before = self._registry, self._token, self._blob

    def _registry(self, exchange: Exchange) -> None:
        if exchange.headers.get("authorization") != f"Bearer {self.valid}":
            realm = f'Bearer realm="http://{self.tokens.address}/token",service="reg,istry",scope="repository:team/sql:pull"'
            exchange.status, exchange.answer = 401, {"www-authenticate": realm}
        else:
            exchange.status, exchange.answer = 307, {"location": f"http://{self.storage.address}/somewhere?signature=s3cr3t"}

    def _token(self, exchange: Exchange) -> None:
        form = parse_qs(exchange.body.decode())
        right = exchange.headers.get("authorization") == BASIC or form.get("refresh_token") == ["identity-1"]
        exchange.status, exchange.data = (200, json.dumps({"token": self.valid}).encode()) if right else (401, b"")

    def _blob(self, exchange: Exchange) -> None:
        exchange.status, exchange.data = 200, b"abc"

    def open(self, config: Path | None) -> OciRepository:
        return OciRepository(OciAddress.parse(f"oci://{self.registry.address}/team/sql"), config, pauses=())


def config(folder: Path, host: str, **entry: str) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"auths": {host: entry or {"auth": BASIC.removeprefix("Basic ")}}}))
    return path


def read(source: OciRepository) -> bytes:
    with source.open_blob(BLOB) as reader:
        buffer = bytearray(10)
        return bytes(buffer[: reader.readinto(memoryview(buffer))])


def test_a_token_is_fetched_with_the_password_and_goes_to_the_registry_alone(
    servers: tuple[Proxy, Proxy, Proxy], tmp_path: Path
) -> None:
    world = World(servers)
    with world.open(config(tmp_path, world.registry.address)) as source:
        assert read(source) == b"abc"
        assert read(source) == b"abc"
    assert [exchange.path for exchange in world.tokens.exchanges] == [
        "/token?service=reg%2Cistry&scope=repository%3Ateam%2Fsql%3Apull"
    ]
    assert [exchange.headers.get("authorization") for exchange in world.registry.exchanges] == [None, *["Bearer token-1"] * 2]
    assert [exchange.headers.get("authorization") for exchange in world.storage.exchanges] == [None, None]


def test_an_expired_token_is_fetched_again(servers: tuple[Proxy, Proxy, Proxy], tmp_path: Path) -> None:
    world = World(servers)
    with world.open(config(tmp_path, world.registry.address)) as source:
        read(source)
        world.valid = "token-2"
        assert read(source) == b"abc"
    assert len(world.tokens.exchanges) == 2


def test_an_identity_token_is_exchanged(servers: tuple[Proxy, Proxy, Proxy], tmp_path: Path) -> None:
    world = World(servers)
    with world.open(config(tmp_path, world.registry.address, identitytoken="identity-1")) as source:
        assert read(source) == b"abc"
    form = parse_qs(world.tokens.exchanges[0].body.decode())
    assert (form["grant_type"], form["scope"]) == (["refresh_token"], ["repository:team/sql:pull"])


def test_storage_that_asks_for_a_password_receives_none(servers: tuple[Proxy, Proxy, Proxy], tmp_path: Path) -> None:
    world = World(servers)

    def wants(exchange: Exchange) -> None:
        exchange.status, exchange.answer = 401, {"www-authenticate": 'Basic realm="give"'}

    world.storage.before = wants
    with world.open(config(tmp_path, world.registry.address)) as source, pytest.raises(DeniedError) as caught:
        read(source)
    assert "s3cr3t" not in str(caught.value)
    assert [exchange.headers.get("authorization") for exchange in world.storage.exchanges] == [None]


def test_a_token_service_that_redirects_does_not_take_the_password_along(
    servers: tuple[Proxy, Proxy, Proxy], tmp_path: Path
) -> None:
    world = World(servers)

    def away(exchange: Exchange) -> None:
        exchange.status, exchange.answer = 302, {"location": f"http://{world.storage.address}/token"}

    world.tokens.before = away
    with world.open(config(tmp_path, world.registry.address)) as source, pytest.raises(RemoteError, match="HTTP 302"):
        read(source)
    assert world.storage.exchanges == []


def test_no_error_repeats_a_secret_from_a_server(servers: tuple[Proxy, Proxy, Proxy], tmp_path: Path) -> None:
    world = World(servers)
    ask = world.registry.before

    def echo(exchange: Exchange) -> None:
        ask(exchange)
        if exchange.status == 307:
            message = f"{exchange.headers['authorization']} {PASSWORD}"
            exchange.status, exchange.data = 400, json.dumps({"errors": [{"code": "NO", "message": message}]}).encode()

    world.registry.before = echo
    with world.open(config(tmp_path, world.registry.address)) as source, pytest.raises(RemoteError) as caught:
        read(source)
    assert str(caught.value).endswith("HTTP 400")
    assert PASSWORD not in repr(docker_credentials.find_credentials(world.registry.address, tmp_path / "config.json"))


@pytest.mark.parametrize("body", [b"", b"[]", b'{"token": 3}', b'{"token": "a\\nb"}', b"{" * 100_000])
def test_a_malformed_token_is_one_line(servers: tuple[Proxy, Proxy, Proxy], tmp_path: Path, body: bytes) -> None:
    world = World(servers)

    def nonsense(exchange: Exchange) -> None:
        exchange.status, exchange.data = 200, body

    world.tokens.before = nonsense
    with world.open(config(tmp_path, world.registry.address)) as source, pytest.raises(RemoteError) as error:
        read(source)
    assert error.value.what == "its token service does not answer with a token"
    assert error.value.hint == "Try again later"


@pytest.mark.parametrize("challenge", ["", "Negotiate", 'Basic realm="x"', "Bearer", 'Bearer realm="ftp://x"', '=,="'])
def test_without_a_password_every_challenge_ends_in_one_line(challenge: str) -> None:
    login = Authenticator("oci://here/x", OciAddress.parse("oci://127.0.0.1:1/x"), "Log in", lambda: None)
    with pytest.raises(RemoteError):
        login([challenge] if challenge else [], "")


def test_no_password_goes_to_a_token_service_elsewhere_over_plain_http() -> None:
    for text in ("oci://here/x", "oci://127.0.0.1:1/x", "oci+http://here/x"):
        login = Authenticator(text, OciAddress.parse(text), "Log in", lambda: Credentials("user", PASSWORD))
        with pytest.raises(RemoteError, match="it asks for the password over plain HTTP") as error:
            login(['Bearer realm="http://evil.example/token"'], "")
        assert error.value.code == "no-tls"


def test_404_is_reported_as_not_found(servers: tuple[Proxy, Proxy, Proxy]) -> None:
    registry = servers[0]
    registry.before = lambda exchange: setattr(exchange, "status", 404)
    with OciRepository(OciAddress.parse(f"oci://{registry.address}/team/sql")) as source:
        for call in (lambda: source.manifest("latest"), source.tags, lambda: read(source)):
            with pytest.raises(NotFoundError):
                call()
