"""What a stranger puts into an error: neither a page of names, nor the credential that he was given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.cli import errors
from adapterhub_converters.errors import FormatError, RefusedError
from tests.attacks.test_credentials import BASIC, PASSWORD, docker
from tests.attacks.test_hostile_servers import one_line
from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.hub_server import TOKEN
from tests.support.web_server import Handler, Web


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


# ---- long


def test_a_line_of_an_error_has_a_limit(run: Run, tmp_path: Path) -> None:
    result = run("show", "team/" + "x" * 50_000, code=8)
    (line,) = result.stderr.splitlines()
    assert len(line) < 5000


def test_the_hint_of_a_long_error_is_whole() -> None:
    names = ", ".join(f"tensor.{number}" for number in range(10_000))
    (line,) = errors.error_lines(RefusedError("a.safetensors", f"has {names}", "Remove them"))
    assert line.endswith("characters more. Remove them")
    assert len(line) < 2100
    assert errors.error_lines(FormatError("a", "is short", "Do this")) == ["a: is short. Do this"]


def test_the_lines_of_an_error_have_a_limit() -> None:
    error = FormatError("a", "x")
    error.problems = tuple(f"problem {number}" for number in range(1000))
    assert len(errors.error_lines(error)) == 51
    assert errors.error_lines(error)[-1] == "950 more problems"


# ---- secret


@pytest.mark.parametrize("secret_kind", ["password", "upper case", "token of a service"])
def test_no_error_names_a_host_that_was_made_of_a_credential(run: Run, tmp_path: Path, web: Web, secret_kind: str) -> None:
    host = f"127.0.0.1:{web.server_address[1]}"
    secret = {"password": PASSWORD, "upper case": PASSWORD.upper(), "token of a service": "abcdef0123456789"}[secret_kind]
    challenge = f'Bearer realm="{web.url}/token",service="x"' if secret_kind == "token of a service" else 'Basic realm="x"'
    web.rules["/token"] = lambda to: to.send(200, b'{"token": "abcdef0123456789"}')

    def manifest(to: Handler) -> None:
        if "authorization" not in {name.lower() for name in to.headers}:
            to.send(401, **{"WWW-Authenticate": challenge})
        else:
            to.send(307, Location=f"http://{secret}.evil.example/x")

    web.rules["/v2/team/sql/manifests/latest"] = manifest
    result = run(
        "pull", f"oci://{host}/team/sql", "-o", "out", env=docker(tmp_path, {"auths": {host: {"auth": BASIC}}}), code=5
    )
    one_line(result, "a host whose name contains a password or token")
    assert secret.lower() not in result.stderr.lower()


@pytest.mark.parametrize("command", ["pull", "validate"])
def test_no_error_names_a_host_that_was_made_of_the_hub_s_token(
    run: Run, tmp_path: Path, make: Make, web: Web, command: str
) -> None:
    def answer(to: Handler) -> None:
        to.send(307, Location=f"http://{TOKEN}.evil.example/x")

    for path in ("/api/models/org/sql/revision/main", "/org/sql/resolve/main/config.json", "/api/models/org/sql"):
        web.rules[path] = answer
    words = {"pull": ["hf://org/sql", "-o", tmp_path / "out"], "validate": [make(), "--base", "hf://org/sql"]}[command]
    result = run(command, *words, env={"HF_ENDPOINT": web.url, "HF_TOKEN": TOKEN}, code=None)
    assert TOKEN not in result.stderr.lower() + result.stdout.lower()
    assert result.returncode == 5, result.stderr
    one_line(result, "a host whose name contains a password or token")
