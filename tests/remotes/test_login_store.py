"""Logins: checked before they are kept, kept where only their owner looks, never seen anywhere."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.remotes.oci import credentials, login_store
from adapterhub.remotes.oci.address import Address
from adapterhub.remotes.oci.login_store import Credentials
from adapterhub_converters.errors import LocalIOError
from tests.cli.test_process import PATH
from tests.conftest import Run, need_module
from tests.support import registry

Login = Callable[..., subprocess.CompletedProcess[str]]
WRONG = "not-the-password"
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
    with registry.running(tmp_path / "behind", password=True) as found:
        yield found


@pytest.fixture
def login(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    """Log in with what comes through a pipe."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.fail.Keyring")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))

    def call(*words: str, text: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.environ.get("TEST_PATH", PATH)}
        command = [sys.executable, "-m", "adapterhub", "login", *words]
        done = subprocess.run(
            command, check=False, input=text, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stderr
        assert not any(secret in done.stdout + done.stderr for secret in (registry.PASSWORD, WRONG))
        return done

    return call


def file(tmp_path: Path) -> Path:
    return tmp_path / "xdg-config/adapterhub/logins.json"


def test_a_login_is_checked_and_kept_in_a_file_of_the_user_s_alone(run: Run, behind: str, login: Login, tmp_path: Path) -> None:
    assert "the login of user was refused" in login(behind, "-u", "user", "--password-stdin", text=WRONG, code=5).stderr
    assert not file(tmp_path).exists()
    done = login(behind, "-u", "user", "--password-stdin", text=f"{registry.PASSWORD}\n")
    assert done.stdout == f"{behind}: logged in as user; stored in {file(tmp_path)}\n"
    assert file(tmp_path).stat().st_mode & 0o777 == 0o600
    run("remote", "add", "team", f"oci://{behind}/x")
    assert "user (adapterhub login)" in run("remote", "test", "team").stdout
    # It comes before docker's, which is wrong here.
    wrong = {"DOCKER_CONFIG": str(registry.docker_config(tmp_path / "wrong", behind, WRONG).parent)}
    run("remote", "test", "team", env=wrong)
    assert run("logout", "team").stdout == f"{behind}: logged out\n"
    assert behind not in file(tmp_path).read_text()
    run("logout", "team", code=3)
    run("remote", "test", "team", code=5)
    right = {"DOCKER_CONFIG": str(registry.docker_config(tmp_path / "right", behind).parent)}
    run("remote", "test", "team", env=right)


def test_a_file_that_others_may_read_is_refused(run: Run, behind: str, login: Login, tmp_path: Path) -> None:
    login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD)
    file(tmp_path).chmod(0o644)
    done = run("list", f"oci://{behind}/x", code=8)
    assert f"others can read it, so it is not used. chmod 600 {file(tmp_path)}" in done.stderr
    assert registry.PASSWORD not in done.stderr
    login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD, code=8)


def test_with_a_keyring_no_secret_stands_in_a_file(
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
    done = login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD)
    assert "stored in the system's keyring" in done.stdout
    assert json.loads(file(tmp_path).read_text())["logins"] == {behind: {"user": "user", "keyring": True}}
    assert registry.PASSWORD in (tmp_path / "ring/keys").read_text()
    run("remote", "add", "team", f"oci://{behind}/x", env=env)
    assert "user (adapterhub login)" in run("remote", "test", "team", env=env).stdout
    gone = {**env, "TEST_KEYRING": str(tmp_path / "locked/keys")}
    assert "keyring, which cannot be asked here" in run("remote", "test", "team", env=gone, code=8).stderr
    run("logout", "team", env=env)
    assert (tmp_path / "ring/keys").read_text() == "{}"
    # One that cannot be written is as good as none.
    for key, value in gone.items():
        monkeypatch.setenv(key, value)
    assert "logins.json" in login(behind, "-u", "user", "--password-stdin", text=registry.PASSWORD).stdout


def test_a_password_is_asked_for_on_a_terminal_and_not_shown(behind: str, tmp_path: Path) -> None:
    environment = {
        **os.environ, "PYTHONPATH": PATH, "XDG_CONFIG_HOME": str(tmp_path / "xdg-config"),
        "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
    }  # fmt: skip
    child, here = pty.fork()
    if not child:
        os.execve(sys.executable, [sys.executable, "-m", "adapterhub", "login", behind], environment)
    seen, answers = "", {"Username": "user", "Password": registry.PASSWORD}
    while True:
        try:
            seen += os.read(here, 4096).decode()
        except OSError:
            break
        for question in [one for one in answers if one in seen]:
            os.write(here, answers.pop(question).encode() + b"\n")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, seen
    assert "logged in as user" in seen
    assert registry.PASSWORD not in seen
    assert registry.PASSWORD in file(tmp_path).read_text()


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


def test_a_registry_that_asks_nobody_gets_no_login(host: str, login: Login, tmp_path: Path) -> None:
    assert "asks nobody who it is" in login(host, "-u", "user", "--password-stdin", text="x", code=6).stderr
    assert not file(tmp_path).exists()


@pytest.mark.parametrize(("url", "words"), [("hf://team", "hf auth login"), ("s3://bucket", "AWS_ACCESS_KEY_ID")])
def test_where_others_keep_the_login_theirs_is_named(login: Login, url: str, words: str) -> None:
    assert words in login(url, "-u", "x", "--password-stdin", text="x", code=2).stderr


def test_the_names_of_docker_hub_are_one(tmp_path: Path) -> None:
    path = tmp_path / "logins.json"
    login_store.write(path, credentials.canonical("registry-1.docker.io"), Credentials("u", "p-1234"))
    for host in ("docker.io", "index.docker.io"):
        found = credentials.find(host, None, path)
        assert found
        assert (found.user, found.password, found.source) == ("u", "p-1234", "adapterhub login")
        assert "p-1234" not in repr(found)
    assert credentials.find("other", None, path) is None
    login_store.write(path, "other", Credentials(bearer="t-1234"))
    assert login_store.hosts(path) == ["docker.io", "other"]
    assert credentials.find("other", None, path) == Credentials(bearer="t-1234", source="adapterhub login")


def test_a_login_that_was_made_over_tls_is_not_said_without_it(tmp_path: Path) -> None:
    path = tmp_path / "logins.json"
    login_store.write(path, credentials.canonical("in.house:5000"), Credentials("u", "p-1234"))
    for text, there in (
        ("oci://in.house:5000/x", True), ("oci+http://in.house:5000/x", False), ("oci://127.0.0.1/x", False),
    ):  # fmt: skip
        address = Address.parse(text)
        assert bool(credentials.find(address.host, None, path, plain=address.plain)) == there
    for text in ("oci://localhost:5000/x", "oci+http://127.0.0.1/x", "oci://[::1]/x", "oci://[::1]:5000/x"):
        assert not Address.parse(text).plain


@pytest.mark.parametrize(
    "text", ['{"version": 1, "logins": {"h": "s3cr3t"}}', '{"s3cr3t', '{"version": 2, "logins": {}}', "[]", '{"logins": {}}']
)
def test_a_file_that_is_broken_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "logins.json"
    path.write_text(text)
    path.chmod(0o600)
    for act in (login_store.read, login_store.forget, lambda path, host: login_store.write(path, host, Credentials("u", "p"))):
        with pytest.raises(LocalIOError) as caught:
            act(path, "h")
        assert "s3cr3t" not in str(caught.value)
    path.write_text('{"version": 1, "logins": {"h": {"user": "u"}}}')
    with pytest.raises(LocalIOError, match="there is no password"):
        login_store.read(path, "h")
