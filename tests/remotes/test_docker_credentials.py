"""Credentials: checked before they are stored, stored where docker and oras look, never shown."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.remotes.oci import docker_credentials
from adapterhub.remotes.oci.docker_credentials import Credentials
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub_converters.errors import LocalIOError
from tests.cli.test_process import PATH
from tests.conftest import Run, Terminal, need_module, need_program
from tests.support import registry
from tests.support.programs import write_program

Login = Callable[..., subprocess.CompletedProcess[str]]
WRONG = "not-the-password"
# As `docker-credential-pass` and others, with a file for a store; it has nothing of a registry that it has no password of.
HELPER = """
import json, os, sys
path, verb, text = os.environ["TEST_HELPER"], sys.argv[1], sys.stdin.read()
known = json.load(open(path)) if os.path.exists(path) else {}
if verb == "store":
    known[json.loads(text)["ServerURL"]] = json.loads(text)
elif text.strip() not in known:
    sys.exit("credentials not found in native keychain")
elif verb == "get":
    print(json.dumps(known[text.strip()]))
else:
    del known[text.strip()]
json.dump(known, open(path, "w"))
"""
# A backend as the package's plug-ins are, with a file for a keyring.
BACKEND = """
import json, os
from keyring.backend import KeyringBackend
from keyring.errors import PasswordDeleteError

class Keyring(KeyringBackend):
    priority = 1
    def _all(self):
        path = os.environ["TEST_KEYRING"]
        if not os.path.exists(os.path.dirname(path)):
            raise RuntimeError("locked: " + path)
        return json.load(open(path)) if os.path.exists(path) else {}
    def _put(self, all):
        json.dump(all, open(os.environ["TEST_KEYRING"], "w"))
    def get_password(self, service, username):
        return self._all().get(f"{service}/{username}")
    def set_password(self, service, username, password):
        self._put({**self._all(), f"{service}/{username}": password})
    def delete_password(self, service, username):
        all = self._all()
        del all[f"{service}/{username}"]
        self._put(all)
"""


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[str]:
    """`host:port` of a registry that wants a password."""
    (tmp_path / "behind").mkdir()
    with registry.running(tmp_path / "behind", password=True) as server:
        yield server


@pytest.fixture
def login(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    """Log in with what comes through a pipe."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "docker/config.json"))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.fail.Keyring")

    def call(*words: str, text: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.environ.get("TEST_PATH", PATH)}
        command = [sys.executable, "-m", "adapterhub", "login", *words]
        result = subprocess.run(
            command, check=False, input=text, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == code, result.stderr
        assert not any(secret in result.stdout + result.stderr for secret in (registry.PASSWORD, WRONG))
        return result

    return call


def file(tmp_path: Path) -> Path:
    return tmp_path / "docker/config.json"


def config(tmp_path: Path, text: str) -> Path:
    file(tmp_path).parent.mkdir()
    file(tmp_path).write_text(text)
    return file(tmp_path)


def test_a_login_is_checked_and_stored_in_docker_s_config(run: Run, behind: str, login: Login, tmp_path: Path) -> None:
    assert "the login of user was refused" in login(behind, "-u", "user", "--password-stdin", text=WRONG, code=5).stderr
    assert not file(tmp_path).exists()
    result = login(behind, "-u", "user", "--password-stdin", text=f"{registry.PASSWORD}\n")
    assert result.stdout == f"{behind}: logged in as user; stored in {file(tmp_path)}\n"
    assert file(tmp_path).stat().st_mode & 0o777 == 0o600
    run("remote", "add", "team", f"oci://{behind}/x")
    assert "user (docker's config.json)" in run("remote", "test", "team").stdout
    assert run("logout", "team").stdout == f"{behind}: logged out\n"
    assert json.loads(file(tmp_path).read_text()) == {"auths": {}}
    assert f"error: {behind}: no login is stored for it" in run("logout", "team", code=3).stderr
    run("remote", "test", "team", code=5)


def peers(host: str, *, code: int, skopeo: bool = True) -> None:
    """What oras and skopeo answer for a registry that no repository is in yet: 404 once they are let in."""
    oras = subprocess.run(
        [need_program("oras"), "repo", "ls", "--plain-http", host], check=False, capture_output=True, text=True, timeout=60
    )
    assert (oras.returncode == 0) == (code == 0), oras.stderr
    if not skopeo:
        return
    words = [need_program("skopeo"), "list-tags", "--tls-verify=false", f"docker://{host}/team/sql"]
    result = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert ("authentication required" in result.stderr) == (code != 0), result.stderr


@pytest.mark.peer
def test_oras_and_skopeo_use_our_login_and_we_use_theirs(run: Run, behind: str, login: Login, tmp_path: Path) -> None:
    peers(behind, code=1)
    login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD)
    peers(behind, code=0)
    run("logout", behind)
    peers(behind, code=1)
    for words in (["oras", "login", "--plain-http"], ["skopeo", "login", "--tls-verify=false"]):
        command = [need_program(words[0]), *words[1:], "-u", "user", "--password-stdin", behind]
        subprocess.run(command, input=registry.PASSWORD, text=True, check=True, capture_output=True, timeout=60)
        assert "no-such" not in run("list", f"oci://{behind}/team/sql", code=3).stderr  # let in, and there is no such name
        run("logout", behind)
        assert registry.PASSWORD not in file(tmp_path).read_text()
        run("list", f"oci://{behind}/team/sql", code=5)


@pytest.mark.peer
@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
def test_a_helper_that_docker_s_config_names_gets_the_secret(
    run: Run, behind: str, login: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    program = tmp_path / "bin/docker-credential-ours"
    program.parent.mkdir()
    write_program(program, "-c", HELPER)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TEST_HELPER", str(tmp_path / "store"))
    config(tmp_path, json.dumps({key: "ours" if key == "credsStore" else {behind: "ours"}}))
    result = login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD)
    assert "stored in docker-credential-ours" in result.stdout
    assert json.loads(file(tmp_path).read_text())["auths"] == {behind: {}}
    assert json.loads((tmp_path / "store").read_text())[behind]["Secret"] == registry.PASSWORD
    run("remote", "add", "team", f"oci://{behind}/x")
    assert "user (docker-credential-ours)" in run("remote", "test", "team").stdout
    peers(behind, code=0, skopeo=key == "credHelpers")  # skopeo does not know credsStore
    # A bearer token, for which helpers have no place, replaces what the helper has.
    docker_credentials.store_credentials(behind, file(tmp_path), Credentials(bearer="t-1234"))
    credentials = docker_credentials.find_credentials(behind, file(tmp_path))
    assert credentials
    assert (credentials.bearer, (tmp_path / "store").read_text()) == ("t-1234", "{}")
    login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD)
    run("logout", "team")
    assert ((tmp_path / "store").read_text(), json.loads(file(tmp_path).read_text())["auths"]) == ("{}", {})
    run("logout", "team", code=3)


@pytest.mark.skipif(sys.platform == "win32", reason="a helper is a script here")
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo nonsense", "its answer is not a login"),
        ('echo \'{"Username": "ada"}\'', "its answer is not a login"),
        ("sleep 60", "did not answer within 0.01 seconds"),
        ("", "could not be run: Permission denied"),
    ],
)
def test_a_helper_that_fails_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    monkeypatch.setenv("PATH", f"{helper(tmp_path, script)}:{os.environ['PATH']}")
    monkeypatch.setattr(docker_credentials, "_HELPER_TIMEOUT", 0.01 if script.startswith("sleep") else 60)
    with pytest.raises(LocalIOError) as error:
        docker_credentials.find_credentials("host", config(tmp_path, '{"credsStore": "ours"}'))
    hint = "Repair it, or remove it from docker's config.json"
    assert str(error.value) == f"docker-credential-ours: {words}. {hint}"


def helper(tmp_path: Path, script: str) -> Path:
    """A folder with a credential helper, which cannot be run without a script."""
    program = tmp_path / "bin/docker-credential-ours"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755 if script else 0o644)
    return program.parent


def test_a_helper_that_stores_nothing_is_named_and_no_secret_is_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{helper(tmp_path, 'exit 1')}:{os.environ['PATH']}")
    path = config(tmp_path, '{"credsStore": "ours"}')
    with pytest.raises(LocalIOError) as error:
        docker_credentials.store_credentials("host", path, Credentials("ada", "s3cr3t"))
    hint = f"Unlock it, or remove it from {path}"
    assert str(error.value) == f"docker-credential-ours: could not store the login at host. {hint}"
    assert path.read_text() == '{"credsStore": "ours"}'


def test_with_a_keyring_no_secret_is_in_a_file(
    run: Run, behind: str, login: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_module("keyring")
    (tmp_path / "plug").mkdir()
    (tmp_path / "plug/our_keyring.py").write_text(BACKEND)
    (tmp_path / "ring").mkdir()
    path = os.pathsep.join([str(tmp_path / "plug"), PATH])
    env = {
        "PYTHON_KEYRING_BACKEND": "our_keyring.Keyring", "TEST_KEYRING": str(tmp_path / "ring/keys"), "TEST_PATH": path,
        "PYTHONPATH": path,
    }  # fmt: skip
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    result = login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD)
    assert "stored in the system's keyring" in result.stdout
    assert json.loads(file(tmp_path).read_text()) == {"auths": {behind: {}}}
    assert behind in (tmp_path / "ring/keys").read_text()
    run("remote", "add", "team", f"oci://{behind}/x", env=env)
    assert "user (the system's keyring)" in run("remote", "test", "team", env=env).stdout
    locked_env = {**env, "TEST_KEYRING": str(tmp_path / "locked/keys")}
    assert "keyring, which cannot be used" in run("remote", "test", "team", env=locked_env, code=8).stderr
    run("logout", "team", env=locked_env, code=8)
    run("logout", "team", env=env)
    assert (tmp_path / "ring/keys").read_text() == "{}"
    # One that cannot be written is as good as none.
    for key, value in locked_env.items():
        monkeypatch.setenv(key, value)
    assert "config.json" in login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD).stdout


def test_a_password_is_asked_for_on_a_terminal_and_not_shown(behind: str, tmp_path: Path) -> None:
    environment = {
        **os.environ, "PYTHONPATH": PATH, "DOCKER_CONFIG": str(tmp_path / "docker"),
        "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
    }  # fmt: skip
    child, terminal_fd = pty.fork()
    if not child:
        os.execve(sys.executable, [sys.executable, "-m", "adapterhub", "login", behind], environment)
    screen, answers = "", {"Username": "user", "Password": registry.PASSWORD}
    while True:
        try:
            screen += os.read(terminal_fd, 4096).decode()
        except OSError:
            break
        for question in [answer for answer in answers if answer in screen]:
            os.write(terminal_fd, answers.pop(question).encode() + b"\n")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, screen
    assert "logged in as user" in screen
    assert registry.PASSWORD not in screen
    credentials = docker_credentials.find_credentials(behind, file(tmp_path))
    assert credentials
    assert credentials.password == registry.PASSWORD


@pytest.mark.parametrize(
    ("words", "text", "expected", "code"),
    [
        (["-u", "user"], "x", "there is no terminal to ask on", 2),
        (["--password-stdin"], "x", "--username: is missing", 2),
        (["-u", "user", "--password-stdin"], "", "--password-stdin: is empty", 2),
        (["-u", "user", "--password-stdin"], "two\nlines", "is not one printable line", 2),
        (["-u", "us:er", "--password-stdin"], "x", "is not a user name", 2),
        (["-u", "user", "--token-stdin"], "x", "is not used with a bearer token", 2),
        (["--password-stdin", "--token-stdin"], "x", "Leave one out", 2),
        (["--password=not-the-password"], "", "No such option", 2),
        (["--token-stdin"], WRONG, "was refused", 5),
    ],
)
def test_what_is_no_login_is_one_line(behind: str, login: Login, words: list[str], text: str, expected: str, code: int) -> None:
    assert expected in login(behind, *words, text=text, code=code).stderr


def test_a_registry_that_requires_no_login_receives_no_credentials(host: str, login: Login, tmp_path: Path) -> None:
    assert "requires no login" in login(host, "-u", "user", "--password-stdin", text="x", code=6).stderr
    assert not file(tmp_path).exists()


def test_nobody_is_asked_for_a_login_that_no_registry_requires(host: str, terminal: Terminal) -> None:
    for address, reason in (("127.0.0.1:1", "connection refused"), (host, "this registry requires no login")):
        screen = terminal("login", address, columns=200)
        assert reason in screen
        assert "Username" not in screen


@pytest.mark.parametrize(("url", "words"), [("hf://team", "hf auth login"), ("s3://bucket", "AWS_ACCESS_KEY_ID")])
def test_where_others_keep_the_login_theirs_is_named(login: Login, url: str, words: str) -> None:
    assert words in login(url, "-u", "x", "--password-stdin", text="x", code=2).stderr


@pytest.mark.parametrize("name", ["registry-1.docker.io", "docker.io", "index.docker.io"])
def test_the_names_of_docker_hub_are_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    docker_credentials.store_credentials(name, path, Credentials("u", "p-1234"))
    assert docker_credentials.configured_hosts(path) == ["https://index.docker.io/v1/"]
    for host in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        credentials = docker_credentials.find_credentials(host, path)
        assert credentials
        assert (credentials.user, credentials.password) == ("u", "p-1234")
        assert "p-1234" not in repr(credentials)
    assert docker_credentials.find_credentials("other", path) is None
    docker_credentials.store_credentials("other", path, Credentials(bearer="t-1234"))
    assert docker_credentials.find_credentials("other", path) == Credentials(bearer="t-1234", source="docker's config.json")
    assert docker_credentials.forget_credentials("docker.io", path)
    assert not docker_credentials.forget_credentials("docker.io", path)
    assert docker_credentials.configured_hosts(path) == ["other"]


def test_a_login_for_tls_is_not_sent_without_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    docker_credentials.store_credentials("in.house:5000", path, Credentials("u", "p-1234"))
    for text, has_credentials in (
        ("oci://in.house:5000/x", True), ("oci+http://in.house:5000/x", False), ("oci://127.0.0.1/x", False),
    ):  # fmt: skip
        address = OciAddress.parse(text)
        assert bool(docker_credentials.find_credentials(address.host, path, plain=address.is_plaintext)) == has_credentials
    docker_credentials.store_credentials("in.house:5000", path, Credentials("v", "q-1234"), plain=True)
    assert docker_credentials.configured_hosts(path) == ["http://in.house:5000", "in.house:5000"]
    for plain, password in ((False, "p-1234"), (True, "q-1234")):
        credentials = docker_credentials.find_credentials("in.house:5000", path, plain=plain)
        assert credentials
        assert credentials.password == password
    docker_credentials.forget_credentials("in.house:5000", path)
    assert docker_credentials.configured_hosts(path) == ["http://in.house:5000"]
    for text in ("oci://localhost:5000/x", "oci+http://127.0.0.1/x", "oci://[::1]/x", "oci://[::1]:5000/x"):
        assert not OciAddress.parse(text).is_plaintext


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("{}", '{"auths": {"h": X}}'),
        ('{\n\t"x": [1.50, "\\u003c"]\n}\n', '{\n\t"auths": {"h": X},\n\t"x": [1.50, "\\u003c"]\n}\n'),
        ('{\n  "auths": {\n    "a": {}\n  },\n  "x": {}\n}', '{\n  "auths": {\n    "h": X,\n    "a": {}\n  },\n  "x": {}\n}'),
        ('{ "auths": {}, "x": 1 }', '{ "auths": {"h": X}, "x": 1 }'),
        ('{"auths": null}', '{"auths": {"h": X}}'),
        ('{"auths":{"a":{},"h":{"auth":"old"},"b":{}}}', '{"auths":{"a":{},"h":X,"b":{}}}'),
    ],
)
def test_all_else_in_docker_s_config_stays_byte_for_byte(tmp_path: Path, text: str, stored: str) -> None:
    path = config(tmp_path, text)
    path.chmod(0o644)
    assert docker_credentials.store_credentials("h", path, Credentials("u", "p")) == str(path)
    assert path.read_text() == stored.replace("X", '{"auth": "dTpw"}')
    assert path.stat().st_mode & 0o777 == 0o600  # with a secret, it is for its owner alone
    assert docker_credentials.forget_credentials("h", path)
    document = json.loads(text)
    assert json.loads(path.read_text()) == {
        **document, "auths": {key: value for key, value in (document.get("auths") or {}).items() if key != "h"},
    }  # fmt: skip


@pytest.mark.parametrize("text", ['{"s3cr3t', "[]", '{"auths": {"h": s3cr3t}}', '{"auths": {}, "auths": {"s3cr3t": 1}}'])
def test_a_file_that_is_broken_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    path = config(tmp_path, text)
    for act in (docker_credentials.find_credentials, docker_credentials.forget_credentials):
        with pytest.raises(LocalIOError) as caught:
            act("h", path)
        assert "s3cr3t" not in str(caught.value)
    with pytest.raises(LocalIOError):
        docker_credentials.store_credentials("h", path, Credentials("u", "p"))
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, None),
        ({"auths": {}}, None),
        ({"auths": {"other": {"auth": "dTpw"}}}, None),
        ({"auths": {"here:1": {}}}, None),
        ({"auths": {"here:1": {"auth": "dTpw"}}}, ("u", "p")),
        ({"auths": {"https://here:1": {"auth": "dTpwOnE="}}}, ("u", "p:q")),
        ({"auths": {"https://here:1/v1/": {"username": "u", "password": "p"}}}, ("u", "p")),
        ({"auths": [], "credHelpers": 3, "credsStore": None}, None),
    ],
)  # fmt: skip
def test_docker_s_config_is_read_as_docker_reads_it(tmp_path: Path, document: object, expected: tuple[str, str] | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document))
    credentials = docker_credentials.find_credentials("here:1", tmp_path / "config.json")
    assert (credentials and (credentials.user, credentials.password)) == expected


def test_a_config_that_is_broken_is_named_and_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert docker_credentials.find_credentials("here", path) is None
    for text in ('{"auths": "s3cr3t', '{"auths": {"here": {"auth": "s3cr3t!"}}}', '{"credsStore": "../s3cr3t"}', "[]"):
        path.write_text(text)
        with pytest.raises(LocalIOError) as caught:
            docker_credentials.find_credentials("here", path)
        assert "!" not in str(caught.value)
    path.write_text('{"credsStore": "is-not-there"}')
    with pytest.raises(LocalIOError, match="isn't installed"):
        docker_credentials.find_credentials("here", path)
