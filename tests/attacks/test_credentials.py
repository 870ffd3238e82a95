"""Credentials that others keep for us: over TLS or to this machine, else not at all, and the error says so.

`registry.example` and `hub.example` are servers of the tests behind a proxy, which sees all that would be seen on the way.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.test_hostile_servers import one_line
from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.forward_proxy import ForwardProxy
from tests.support.hub_server import TOKEN
from tests.support.programs import write_program
from tests.support.web_server import Web

PASSWORD = "not-a-secret-5"
BASIC = base64.b64encode(f"ada:{PASSWORD}".encode()).decode()


@pytest.fixture
def web() -> Iterator[Web]:
    """A registry, or a hub, that asks for a password everywhere."""
    with Web() as server:
        server.rules["/v2/team/sql/manifests/latest"] = lambda to: to.send(401, **{"WWW-Authenticate": 'Basic realm="x"'})
        server.rules["/v2/"] = server.rules["/v2/team/sql/manifests/latest"]
        yield server


@pytest.fixture
def way() -> Iterator[dict[str, str]]:
    """The environment in which every name is this machine, by way of a proxy."""
    with ForwardProxy() as proxy:
        url = f"http://{proxy.address}"
        yield {"HTTP_PROXY": url, "http_proxy": url, "NO_PROXY": "", "no_proxy": ""}


def helper(tmp_path: Path, name: str = "generous") -> Path:
    """A credential helper that gives everybody the password, and notes that it was asked; its folder."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    program = folder / f"docker-credential-{name}"
    answer = json.dumps({"Username": "ada", "Secret": PASSWORD})
    lines = ["import sys", f"open({str(folder / 'asked')!r}, 'a').write(sys.stdin.read() + chr(10))", f"print({answer!r})"]
    write_program(program, "-c", "\n".join(lines))
    return folder


def docker(tmp_path: Path, document: object) -> dict[str, str]:
    folder = tmp_path / "docker"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    return {"DOCKER_CONFIG": str(folder), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}


def credentials_sent(web: Web) -> set[str | None]:
    return {headers.get("authorization") for _, headers in web.requests}


@pytest.mark.parametrize("stored_in", ["auths", "helper", "store"])
def test_docker_s_password_is_not_sent_without_tls(
    run: Run, tmp_path: Path, web: Web, way: dict[str, str], stored_in: str
) -> None:
    host = f"registry.example:{web.server_address[1]}"
    folder = helper(tmp_path)
    document = {
        "auths": {"auths": {host: {"auth": BASIC}, f"https://{host}/v1/": {"auth": BASIC}}},
        "helper": {"auths": {host: {}}, "credHelpers": {host: "generous"}},
        "store": {"credsStore": "generous"},
    }[stored_in]
    env = {**way, **docker(tmp_path, document)}
    result = run("pull", f"oci+http://{host}/team/sql", "-o", "out", env=env, code=5)
    one_line(result, "a login that was made with TLS is not sent without it", f"adapterhub login oci+http://{host}")
    assert credentials_sent(web) == {None}
    assert not (folder / "asked").exists()


def test_a_login_that_was_made_without_tls_is_sent_without(run: Run, tmp_path: Path, web: Web, way: dict[str, str]) -> None:
    host = f"registry.example:{web.server_address[1]}"
    env = {**way, **docker(tmp_path, {"auths": {f"http://{host}": {"auth": BASIC}}})}
    run("pull", f"oci+http://{host}/team/sql", "-o", "out", env=env, code=5)
    assert f"Basic {BASIC}" in credentials_sent(web)


def test_this_machine_gets_a_password_without_tls(run: Run, tmp_path: Path, web: Web) -> None:
    host = f"127.0.0.1:{web.server_address[1]}"
    run("pull", f"oci://{host}/team/sql", "-o", "out", env=docker(tmp_path, {"auths": {host: {"auth": BASIC}}}), code=5)
    assert f"Basic {BASIC}" in credentials_sent(web)


@pytest.mark.parametrize("realm", ["http://tokens.example:{port}/token", "http://169.254.169.254/token"])
def test_no_password_goes_to_a_token_service_that_a_registry_may_not_name(
    run: Run, tmp_path: Path, web: Web, way: dict[str, str], realm: str
) -> None:
    host, port = f"127.0.0.1:{web.server_address[1]}", web.server_address[1]
    challenge = f'Bearer realm="{realm.format(port=port)}",service="x"'
    web.rules["/v2/team/sql/manifests/latest"] = lambda to: to.send(401, **{"WWW-Authenticate": challenge})
    env = {**way, **docker(tmp_path, {"auths": {host: {"auth": BASIC}}})}
    one_line(run("pull", f"oci://{host}/team/sql", "-o", "out", env=env, code=5))
    assert credentials_sent(web) == {None}


@pytest.mark.parametrize("command", ["pull", "push", "validate"])
def test_a_hub_s_token_is_not_sent_without_tls(
    run: Run, make: Make, web: Web, way: dict[str, str], tmp_path: Path, command: str
) -> None:
    endpoint = f"http://hub.example:{web.server_address[1]}"
    words = {
        "pull": ["hf://org/sql", "-o", tmp_path / "out"],
        "push": [make(), "hf://org/sql"],
        "validate": [make(), "--base", "hf://org/sql"],
    }[command]
    result = run(command, *words, env={**way, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}, code=5)
    one_line(result, endpoint, "a token is not sent to another machine without TLS", "unset HF_TOKEN")
    assert web.requests == []


def test_a_netrc_is_not_read(run: Run, tmp_path: Path, web: Web, make: Make) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.netrc").write_text(f"machine 127.0.0.1 login ada password {PASSWORD}\n")
    (tmp_path / "home/.netrc").chmod(0o600)
    env = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home/.netrc")}
    run("validate", make(), "--base", f"{web.url}/m", env=env, code=None)
    run("pull", f"oci://127.0.0.1:{web.server_address[1]}/team/sql", "-o", "out", env=env, code=5)
    assert credentials_sent(web) == {None}
