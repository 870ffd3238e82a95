"""Logins of devices: the client's own `hf auth login`, approved on the page or by the operator; renewed once per token."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import urllib3

from adapterhub.hub.accounts import access_tokens, accounts, audit_log, device_logins
from adapterhub.hub.accounts.device_logins import DeviceError
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.oauth import device
from adapterhub.remotes.hub.hub_login import HubLogin
from adapterhub_converters.errors import NotFoundError, RemoteError
from tests.conftest import Run, _environment, missing
from tests.hub.conftest import Running, run_hf
from tests.hub.web.conftest import Visitor


@contextmanager
def database(hub: Running) -> Iterator[HubDatabase]:
    with closing(HubDatabase(hub.folder)) as opened:
        yield opened


def post(hub: Running, path: str, **fields: str) -> Any:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    return urllib3.request("POST", hub.url + path, body=urlencode(fields), headers=headers, retries=False)


def begin_login(hub: Running) -> dict[str, Any]:
    document: dict[str, Any] = post(hub, "/oauth/device", client_id="x").json()
    return document


def collected(hub: Running, login: dict[str, Any]) -> Any:
    return post(
        hub, "/oauth/token", grant_type="urn:ietf:params:oauth:grant-type:device_code", device_code=login["device_code"]
    ).json()


def test_hf_auth_login_gets_a_token_that_uploads(hub: Running, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("hf")
    if not program.exists():
        missing("hf", install="pip install huggingface_hub")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_COLOR": "1"}
    clean = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    login = subprocess.Popen(
        [str(program), "auth", "login"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**clean, **settings}
    )
    assert login.stdout
    output, code = "", None
    while not code and (line := login.stdout.readline()):
        output += line
        code = re.search(r"[B-Z]{4}-[B-Z]{4}", line)
    assert code, output
    with database(hub) as hub_database:
        accounts.add(hub_database, "ada")
        device_logins.approve_as(hub_database, code[0], "ada")
    remaining_output, _ = login.communicate(timeout=60)
    assert login.returncode == 0, output + remaining_output
    (tmp_path / "README.md").write_text("# Soon\n")
    hf_env: dict[str, Any] = {"HF_TOKEN": "", "HF_HOME": settings["HF_HOME"]}
    assert "ada" in run_hf(hub, tmp_path, "auth", "whoami", **hf_env)
    run_hf(hub, tmp_path, "upload", "ada/sql", str(tmp_path / "README.md"), "README.md", **hf_env)


def test_a_person_approves_on_the_page_with_their_token(hub: Running) -> None:
    login = begin_login(hub)
    page = urllib3.request("GET", login["verification_uri_complete"])
    assert login["user_code"].encode() in page.data
    assert b"127.0.0.1 asks to act for you" in page.data
    assert collected(hub, login) == {"error": "authorization_pending"}
    wrong = post(hub, "/device", code=login["user_code"], token="hf_no")
    assert (wrong.status, b"not a token of this hub" in wrong.data) == (403, True)
    response = post(hub, "/device", code=login["user_code"].lower(), token=hub.token, answer="approve")
    assert b"was approved for alice" in response.data
    token = collected(hub, login)["access_token"]
    with database(hub) as hub_database:
        identity = access_tokens.identify(hub_database, token)
    assert identity
    assert (identity.account, identity.role, identity.has_role("write", "team")) == ("alice", "write", True)
    assert collected(hub, login) == {"error": "expired_token"}  # once
    with database(hub) as hub_database:
        newest, approved = audit_log.events(hub_database, account="alice")
    assert (approved.action, newest.action, newest.token) == ("oauth.decide", "oauth.token", token[:8])


def test_who_is_signed_in_approves_without_typing_a_token(hub: Running) -> None:
    login, signed_in = begin_login(hub), Visitor(hub).signed_in(hub.token)
    page = f"/device?code={login['user_code']}"
    assert "Approve for alice" in signed_in.get(page).text
    assert "password" not in signed_in.get(page).html.values("input", "type")
    fields = {"code": login["user_code"], "answer": "approve"}
    assert signed_in.post("/device", fields).status == 403
    assert signed_in.post("/device", {**fields, "csrf": Visitor(hub).signed_in(hub.token).csrf()}).status == 403
    fields["csrf"] = signed_in.csrf(page)
    foreign = signed_in.post("/device", fields, Origin="https://example.org")
    assert foreign.status == 403
    assert "This form was sent by another site. Open the page on this hub, and retry." in foreign.text
    assert collected(hub, login) == {"error": "authorization_pending"}
    assert "was approved for alice" in signed_in.post("/device", fields).text
    assert collected(hub, login)["access_token"]


def test_who_is_not_signed_in_finds_the_way_there_and_back(hub: Running) -> None:
    login, visitor = begin_login(hub), Visitor(hub)
    page = f"/device?code={login['user_code']}"
    (link,) = [url for url in visitor.get(page).html.values("a", "href") if url.startswith("/-/sign-in?")]
    assert parse_qs(urlsplit(link).query) == {"next": [page]}
    assert visitor.post("/-/sign-in", {"token": hub.token, "next": page}).headers["location"] == page
    assert visitor.post("/device", {"code": login["user_code"], "answer": "approve"}).status == 403


def test_a_login_that_is_refused_gets_nothing(hub: Running) -> None:
    login = begin_login(hub)
    post(hub, "/device", code=login["user_code"], token=hub.token, answer="deny")
    assert collected(hub, login) == {"error": "access_denied"}
    waiting = HubLogin(hub.url, sleep=lambda _: None)
    mine = waiting.begin()
    post(hub, "/device", code=mine.code, token=hub.token, answer="deny")
    for pending_login, reason in (
        (mine, "the login was refused"),
        (dataclasses.replace(mine, end=0.0), "the code has expired"),
    ):
        with pytest.raises(RemoteError) as error:
            waiting.wait(pending_login)
        assert str(error.value) == f"{hub.url}: {reason}. Log in again"


def test_who_asks_too_often_is_told_to_slow_down(hub: Running) -> None:
    login = begin_login(hub)
    assert [collected(hub, login)["error"] for _ in range(2)] == ["authorization_pending", "slow_down"]


def test_logins_that_wait_are_bounded(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_logins, "_MAX_PENDING", 2)
    logins = [begin_login(hub) for _ in range(3)]
    assert [collected(hub, login)["error"] for login in logins] == ["expired_token", *["authorization_pending"] * 2]
    for login in logins[1:]:
        post(hub, "/device", code=login["user_code"], token=hub.token, answer="approve")
    refused = post(hub, "/oauth/device", client_id="x")
    assert (refused.status, "too many logins wait for their programs" in refused.data.decode()) == (400, True)
    large = post(hub, "/oauth/device", client_id="x" * (16 << 10))
    assert (large.status, "A body has at most 16,384 bytes here" in large.data.decode()) == (413, True), large.data


def test_codes_cannot_be_tried_one_after_the_other(hub: Running) -> None:
    status = [post(hub, "/device", code="BBBB-BBBB", token=hub.token).status for _ in range(30)]
    assert set(status) == {404, 429}


def test_a_token_is_renewed_once_and_a_second_use_ends_the_login(hub: Running) -> None:
    login = begin_login(hub)
    post(hub, "/device", code=login["user_code"], token=hub.token, answer="approve")
    first = collected(hub, login)
    second = post(hub, "/oauth/token", grant_type="refresh_token", refresh_token=first["refresh_token"]).json()
    with database(hub) as hub_database:
        assert access_tokens.identify(hub_database, first["access_token"]) is None
        assert access_tokens.identify(hub_database, second["access_token"])
        again = post(hub, "/oauth/token", grant_type="refresh_token", refresh_token=first["refresh_token"])
        assert (again.status, again.json()) == (400, {"error": "invalid_grant"})
        assert access_tokens.identify(hub_database, second["access_token"]) is None
        with pytest.raises(DeviceError, match="invalid_grant"):
            device_logins.renew(hub_database, second["refresh_token"])


def test_the_token_of_a_person_stays_one_of_a_person(hub: Running) -> None:
    with database(hub) as hub_database:
        accounts.add(hub_database, "ada")
        mine = access_tokens.create(hub_database, "ada", "write", kind=access_tokens.PERSONAL)
        login = begin_login(hub)
        post(hub, "/device", code=login["user_code"], token=mine, answer="approve")
        identity = access_tokens.identify(hub_database, collected(hub, login)["access_token"])
    assert identity
    assert (identity.role_in("ada"), identity.role_in("team")) == ("write", "")


def test_nobody_is_logged_in_as_an_account_that_is_not_there(hub: Running) -> None:
    login = begin_login(hub)
    with database(hub) as hub_database:
        with pytest.raises(NotFoundError, match="ada: no account with this name"):
            device_logins.approve_as(hub_database, login["user_code"], "ada")
        accounts.add(hub_database, "ada")
        with pytest.raises(NotFoundError, match="BBBB-BBBB: no login waits for this code. Check the code, or begin the login"):
            device_logins.approve_as(hub_database, "BBBB-BBBB", "ada")


def test_a_token_of_a_service_that_expires_approves_nothing(hub: Running) -> None:
    login, token = begin_login(hub), hub.make_token("ci", "write", lifetime=60)
    refused = post(hub, "/device", code=login["user_code"], token=token, answer="approve")
    words = "ci: this token of a service expires, and the login would go on without it. Approve it with a token of your account"
    assert (refused.status, words in refused.data.decode()) == (403, True), refused.data
    assert login["user_code"] in refused.data.decode()  # it waits on, for another token
    assert collected(hub, login) == {"error": "authorization_pending"}


@pytest.mark.parametrize("fields", [{}, {"grant_type": "password"}, {"grant_type": "refresh_token"}])
def test_other_grants_are_refused(hub: Running, fields: dict[str, str]) -> None:
    assert post(hub, "/oauth/token", **fields).status == 400


def test_adapterhub_logs_in_by_a_code_then_pushes_and_pulls(
    hub: Running, run: Run, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(device, "POLL_INTERVAL", 1)
    address = hub.url.replace("http://", "hub+http://")
    login = subprocess.Popen(
        [sys.executable, "-m", "adapterhub", "login", address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(tmp_path, None), cwd=tmp_path,
    )  # fmt: skip
    assert login.stderr
    line = login.stderr.readline()
    code = re.search(r"[B-Z]{4}-[B-Z]{4}", line)
    assert code, line
    with database(hub) as hub_database:
        accounts.add(hub_database, "ada")
    run("hub", "approve", code[0], "--as", "ada", "--registry", hub.folder)
    out, err = login.communicate(timeout=60)
    assert login.returncode == 0, out + err
    assert "logged in as ada" in out
    run("remote", "add", "team", address)
    assert "ada" in run("remote", "test", "team").stdout
    run("push", adapter(1), "ada/sql", "--remote", "team")
    run("pull", "ada/sql", "--remote", "team", "-o", tmp_path / "back")
    assert (tmp_path / "back" / "adapter_model.safetensors").is_file()
    run("logout", address)
    assert f"adapterhub login {address}" in run("push", adapter(2), "ada/sql", "--remote", "team", code=5).stderr


def test_a_token_is_taken_from_stdin_and_checked(hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    command = [sys.executable, "-m", "adapterhub", "login", hub.url.replace("http://", "hub+http://"), "--token-stdin"]

    def login_with(token: str) -> subprocess.CompletedProcess[str]:
        environment = _environment(tmp_path, None)
        return subprocess.run(command, check=False, input=token, capture_output=True, text=True, env=environment, cwd=tmp_path)

    refused = login_with("hf_no")
    assert (refused.returncode, refused.stderr.count("\n"), (tmp_path / "docker").exists()) == (5, 1, False)
    assert "the hub refuses the token. Check that it is complete" in refused.stderr
    assert "logged in as alice" in login_with(hub.token).stdout
