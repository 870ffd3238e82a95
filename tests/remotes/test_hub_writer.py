"""huggingface_hub under our rules: late, silent, bounded, and without the token for anybody but the hub."""

from __future__ import annotations

import configparser
import http.client
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.hub.hub_client import HubAddress
from adapterhub.remotes.hub.hub_repository import HubRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.errors import FormatError, IntegrityError, RefusedError, RemoteError
from tests.cli.test_process import loaded
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.hub_server import TOKEN, Hub, Repo, route
from tests.support.proxy import Exchange, Proxy


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sql")


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Hub(storage=False, token=TOKEN) as hub, Proxy(hub.host) as server:
        yield server


def push(url: str, folder: Path) -> HubRepository:
    with HubRepository(HubAddress.parse("hf://org/sql"), url, TOKEN, pauses=()) as to:
        copy_version(AdapterFolder(folder), "latest", to, "main")
    return to


def test_reading_a_hub_does_not_import_the_library(started: Run, hub: Hub, adapter: Path, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": "hf"}
    started("push", adapter, "hf://org/sql", env=env)

    def go(*args: object, code: int | None = 0, first: str = "") -> Any:
        return started(*args, env=env, code=code, first=first)

    for words in (["pull", "hf://org/sql", "-o", "out"], ["list", "hf://org/sql"], ["validate", "hf://org/sql"]):
        assert not loaded(go, tmp_path, *words) & {"huggingface_hub", "httpx", "httpx2"}


def test_a_push_sends_what_it_needs_and_writes_nothing(started: Run, hub: Hub, adapter: Path, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "AI_AGENT": "some-agent"}
    result = started("push", adapter, "hf://org/sql", env=env)
    commit = hub.repos["org/sql"].branches["main"].oid
    created = "created the repository hf://org/sql, with the hub's default visibility"
    assert sorted(result.stderr.splitlines()) == [f"commit {commit}", created]
    assert not (tmp_path / "hf").exists()
    assert {headers["user-agent"] for _, _, headers in hub.requests} == {"adapterhub"}
    assert not [path for _, path, _ in hub.requests if "harness" in path or "xet" in path or "telemetry" in path]


def test_the_library_keeps_its_own_session_for_others(hub: Hub, adapter: Path) -> None:
    from huggingface_hub import HfApi

    push(hub.url, adapter)
    hub.requests.clear()
    assert HfApi(endpoint=hub.url, token="hf_theirs").model_info("org/sql").id == "org/sql"
    ((_, _, headers),) = hub.requests
    assert "hf_hub/" in headers["user-agent"]
    assert headers["authorization"] == "Bearer hf_theirs"


@pytest.mark.parametrize("part", [0, 300])
def test_the_token_is_not_sent_where_an_upload_leads(proxy: Proxy, adapter: Path, part: int) -> None:
    with Hub(storage=False, part=part) as elsewhere:
        elsewhere.repos["org/sql"] = Repo()

        def before(exchange: Exchange) -> None:
            if "/batch" in exchange.path:
                connection = http.client.HTTPConnection(elsewhere.host)
                connection.request("POST", exchange.path, exchange.body)
                response = connection.getresponse()
                exchange.status, exchange.data = response.status, response.read()

        proxy.before = before
        with pytest.raises(RemoteError, match="does not exist"):  # on the hub itself, at the commit
            push(f"http://{proxy.address}", adapter)
        sent = {path.rpartition("/")[2] for _, path, _ in elsewhere.requests}
        assert sent >= {"batch", "verify", *(["complete"] if part else [])}
        assert all("authorization" not in headers for _, path, headers in elsewhere.requests)


@pytest.mark.parametrize("part", ["/batch", "/preupload/", "/commit/", "/create"])
def test_an_endless_answer_is_cut_off(proxy: Proxy, adapter: Path, part: str) -> None:
    def after(exchange: Exchange) -> None:
        if part in exchange.path:
            exchange.endless, exchange.data = True, b" " * (1 << 16)
            exchange.answer.pop("content-length", None)

    proxy.after = after
    with pytest.raises(FormatError, match="larger than the limit"):
        push(f"http://{proxy.address}", adapter)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b"[" * 100_000, b'{"commitUrl": 7}', b'{"commitUrl": "x", "commitOid": "y"}']
)
def test_an_answer_that_makes_no_sense_is_one_line(proxy: Proxy, adapter: Path, data: bytes) -> None:
    def after(exchange: Exchange) -> None:
        if "/commit/" in exchange.path:
            exchange.data = data
            exchange.answer["content-length"] = str(len(data))

    proxy.after = after
    with pytest.raises(RemoteError) as caught:
        push(f"http://{proxy.address}", adapter)
    assert len(str(caught.value).splitlines()) == 1


def test_a_card_that_the_hub_refuses_is_named(run: Run, hub: Hub, adapter: Path) -> None:
    env = {"HF_ENDPOINT": hub.url}
    (adapter / "README.md").write_text("---\nlicense: [mit\n---\n# A test\n")
    result = run("push", adapter, "hf://org/sql", env=env, code=5)
    assert result.stderr.splitlines()[-1].startswith("error: hf://org/sql: README.md: HTTP 400: while parsing a flow sequence")
    (adapter / "README.md").write_bytes("# Ein größerer Test\n".encode("latin-1"))
    with pytest.raises(RefusedError, match=r"README\.md: a model card on a hub must be UTF-8"):
        push(hub.url, adapter)
    assert list(hub.repos["org/sql"].branches["main"].files) == [".gitattributes"]


@route("POST", r"/oauth/token")
def oauth(handler: Any, body: bytes, _query: dict[str, Any]) -> None:
    renewed = b"refresh_token=hf_renew" in body
    handler.send(
        200 if renewed else 400, {"access_token": TOKEN, "expires_in": 3600} if renewed else {"error": "invalid_grant"}
    )


def test_a_login_in_the_browser_is_renewed(started: Run, adapter: Path, tmp_path: Path) -> None:
    home = tmp_path / "hf"
    home.mkdir()
    (home / "token").write_text("hf_expired")
    stored = configparser.ConfigParser()
    stored["ada"] = {"hf_token": "hf_expired", "refresh_token": "hf_renew", "expires_at": str(int(time.time()) + 60)}
    with (home / "stored_tokens").open("w") as file:
        stored.write(file)
    with Hub(token=TOKEN) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
        started("push", adapter, "hf://org/sql", "--private", env=env)
        started("pull", "hf://org/sql", "-o", "out", env=env)
    assert (home / "token").read_text() == TOKEN


def test_weights_that_change_while_they_are_sent_are_no_version(hub: Hub, adapter: Path) -> None:
    source = AdapterFolder(adapter)
    manifest = source.manifest("latest")
    weights = next(layer for layer in manifest.layers if layer.path.endswith(".safetensors"))
    (adapter / weights.path).write_bytes(bytes(weights.size))
    with HubRepository(HubAddress.parse("hf://org/sql"), hub.url, pauses=()) as to, pytest.raises(IntegrityError) as error:
        to.put_blob(weights, source)
    assert error.value.where.endswith(weights.path)
    assert error.value.what == f"other bytes were read than the {weights.size} of {weights.digest}"
    assert (error.value.code, error.value.hint) == ("source-damaged", "Nothing was stored")
    assert not hub.large
