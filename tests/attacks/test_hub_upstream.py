"""A name of a hub never comes from its upstream, no name or token of its clients goes there, and it leads the hub nowhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import urllib3
from starlette.routing import Route

from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import READERS, Namespace
from adapterhub.hub.hf import routes
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.hub.upstream import model_client, models
from tests.hub.conftest import Running, adapter, client
from tests.hub.sending import Sending
from tests.hub.upstream.conftest import hub_of
from tests.hub.upstream.faulty import NAME, PATH, Faulty, faulty_hub

__all__ = ["adapter"]
Make = Callable[..., Path]
MODES = ("redirect", "cache")
FILE = f"/{NAME}/resolve/main/{PATH}"
# What else is read under the name of a repository, and only of this hub.
_OF_MODELS = ("/{namespace}/{repo}", "/api/models/{namespace}/{repo}")
_OWN = ("auth-check", "/lfs/", "/info/refs", "/discussions", "/likers", "/user-access-request/")


def reading_paths() -> list[str]:
    """Every path of the hub at which clients of the Hugging Face Hub read a repository, for the model of the upstream."""
    paths = [route.path for route in routes.routes() if isinstance(route, Route) and "GET" in (route.methods or ())]
    paths = [path for path in paths if path.startswith(_OF_MODELS) and not any(word in path for word in _OWN)]
    values = {"{namespace}/{repo}": NAME, "{revision}": "main", "{path:path}": PATH}
    for key, value in values.items():
        paths = [path.replace(key, value) for path in paths]
    assert len(paths) >= 8
    assert not any("{" in path for path in paths)
    return paths


@pytest.fixture
def upstream() -> Iterator[Faulty]:
    """A hub with one model, which knows who asked it for what."""
    with faulty_hub(b"x" * 1000) as hub:
        yield hub


def statuses(hub: Running, token: str = "") -> set[tuple[int, str]]:
    """What a client gets of the name by every route that reads it, and by a preflight of its paths."""
    sending = Sending(hub.url, token)
    answers = [sending.ask("GET", path) for path in reading_paths()]
    answers += [sending.ask("HEAD", FILE), sending.ask("POST", f"/api/models/{NAME}/paths-info/main", {"paths": [PATH]})]
    return {(answer.status, answer.headers.get("x-error-code", "")) for answer in answers}


MISSING = {(404, "RepoNotFound")}


def make_account(hub: Running, _adapter: Make) -> None:
    hub.make_token("org", "read")


def make_member(hub: Running, _adapter: Make) -> None:
    database = open_database(hub.settings)
    accounts.set_member(database, "org", "alice", "write")
    database.close()


def hide_namespace(hub: Running, _adapter: Make) -> None:
    database = open_database(hub.settings)
    accounts.set_namespace(database, Namespace("org", READERS[2]))
    database.close()


def make_private(hub: Running, _adapter: Make) -> None:
    client(hub, hub.folder).create_repo(NAME, private=True)


def make_neighbor(hub: Running, _adapter: Make) -> None:
    client(hub, hub.folder).create_repo("org/other")


def remove_adapter(hub: Running, make: Make) -> None:
    assert Sending(hub.url, hub.token).push("org/gone", make(1)).status == 200
    client(hub, hub.folder).delete_repo("org/gone")


OWNERS = [make_account, make_member, hide_namespace, make_private, make_neighbor, remove_adapter]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make_own", OWNERS)
def test_a_namespace_of_this_hub_never_comes_from_the_upstream_and_is_not_told_there(
    tmp_path: Path, upstream: Faulty, adapter: Make, mode: str, make_own: Callable[[Running, Make], None]
) -> None:
    with hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        make_own(hub, adapter)
        assert statuses(hub) == MISSING
        assert upstream.requests == []


@pytest.mark.parametrize("mode", MODES)
def test_who_may_read_nothing_here_learns_nothing_of_the_upstream(tmp_path: Path, upstream: Faulty, mode: str) -> None:
    with hub_of(tmp_path, upstream.url, mode, settings={"require_login": True}) as hub:
        assert statuses(hub) == MISSING
        assert upstream.requests == []
        assert Sending(hub.url, hub.token).ask("GET", FILE).status in (200, 307)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["other/model", "gpt2", "org/..", "org/a--b", "org/%0d%0aX-Evil:1", "ORG%2Fmodel"])
def test_other_names_than_those_of_the_allowed_organizations_are_not_told_to_the_upstream(
    tmp_path: Path, upstream: Faulty, mode: str, name: str
) -> None:
    with hub_of(tmp_path, upstream.url, mode, organizations=frozenset({"org"})) as hub:
        sending = Sending(hub.url)
        assert sending.ask("GET", f"/{name}/resolve/main/x").status == 404
        assert sending.ask("GET", f"/api/models/{name}/revision/main").status == 404
        assert upstream.requests == []


def test_every_path_at_which_a_repository_is_read_is_redirected_or_answered_here(tmp_path: Path, upstream: Faulty) -> None:
    with hub_of(tmp_path, upstream.url, "redirect") as hub:
        answers = {path: Sending(hub.url).ask("GET", path) for path in reading_paths()}
        redirects = {path: answer for path, answer in answers.items() if answer.status == 307}
        # What comes in pages is not redirected: huggingface_hub sends its token along to the next page, wherever that is.
        assert {path for path in answers if "/tree/" in path or "/commits/" in path} == answers.keys() - redirects.keys()
        assert {answer.headers["location"].startswith(f"{upstream.url}/") for answer in redirects.values()} == {True}


@pytest.mark.parametrize("mode", MODES)
def test_no_token_of_a_client_reaches_the_upstream(tmp_path: Path, upstream: Faulty, mode: str) -> None:
    """huggingface_hub and requests follow the redirects by themselves."""
    import requests

    with hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        statuses(hub, hub.token)
        assert Path(client(hub, tmp_path).hf_hub_download(NAME, PATH, cache_dir=tmp_path / "cache")).read_bytes() == b"x" * 1000
        for path in reading_paths():
            requests.get(hub.url + path, headers={"Authorization": f"Bearer {hub.token}"}, timeout=10)
    assert upstream.requests
    assert [path for _, path, headers in upstream.requests if "authorization" in headers or hub.token in path] == []


def test_the_token_of_the_operator_goes_to_the_upstream_alone_and_into_no_log(
    tmp_path: Path, upstream: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with faulty_hub(upstream.listed) as storage:
        upstream.location = f"{storage.url}/resolve/{PATH}"
        with hub_of(tmp_path, upstream.url, token="hf_operator") as hub:
            assert Sending(hub.url).ask("GET", FILE).data == upstream.listed
            assert Sending(hub.url).ask("GET", "/api/models/org/none").status == 404
        assert {headers.get("authorization") for _, _, headers in upstream.requests} == {"Bearer hf_operator"}
        assert [headers for _, _, headers in storage.requests if "authorization" in headers] == []
    assert "hf_operator" not in caplog.text + repr(hub.settings)


@pytest.mark.parametrize("extra", [{"private": True}, {"disabled": True}])
def test_what_only_the_token_of_the_operator_may_read_is_not_handed_on(
    tmp_path: Path, upstream: Faulty, extra: dict[str, Any]
) -> None:
    upstream.extra = extra
    with hub_of(tmp_path, upstream.url, token="hf_operator") as hub:
        assert statuses(hub) == MISSING


@pytest.mark.parametrize("ranges", [True, False])
def test_bodies_that_drip_do_not_keep_the_threads_that_pass_files_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    """They did at 1 kB a second: a part of a file for days, and what an upstream without ranges has skipped for 36 hours."""
    monkeypatch.setattr(model_client, "RATE_SECONDS", 0.2)
    monkeypatch.setattr(models, "_THREADS", 2)
    with faulty_hub(b"x" * 1_000_000) as upstream, ThreadPoolExecutor(4) as pool:
        upstream.drips, upstream.ranges, upstream.other_files = True, ranges, {"fast.bin": b"fast" * 1000}
        with hub_of(tmp_path, upstream.url, max_bytes=1) as hub:
            slow = [pool.submit(body_until_cut, hub.url, FILE, "bytes=900000-") for _ in range(4)]
            assert all(len(answer.result()) < 100_000 for answer in slow)
            assert Sending(hub.url).ask("GET", f"/{NAME}/resolve/main/fast.bin").data == b"fast" * 1000
        assert upstream.ended == len(slow)


def body_until_cut(url: str, path: str, byte_range: str) -> bytes:
    """What a client gets of a part of a file until its connection is cut; nothing if it is refused."""
    answer = urllib3.PoolManager().request(
        "GET", url + path, headers={"range": byte_range}, preload_content=False, retries=False
    )
    data = bytearray()
    with suppress(urllib3.exceptions.HTTPError):
        for piece in answer.stream(1 << 14) if answer.status == 206 else ():
            data += piece
    return bytes(data)


@pytest.mark.parametrize(
    "location", ["http://169.254.169.254/latest", "http://metadata.google.internal/", "file:///etc/passwd"]
)
def test_the_upstream_leads_the_hub_to_no_address_that_only_the_hub_reaches(
    tmp_path: Path, upstream: Faulty, location: str
) -> None:
    upstream.location = location
    with hub_of(tmp_path, upstream.url) as hub:
        answer = Sending(hub.url).ask("GET", FILE)
        assert answer.status == 503
        assert location not in answer.data.decode()


@pytest.mark.parametrize("lfs", [True, False])
@pytest.mark.parametrize("lie", [-1, 1, 10**9])
def test_a_model_that_lists_a_file_with_a_wrong_size_denies_nobody_the_right_one(tmp_path: Path, lie: int, lfs: bool) -> None:
    """The digest was refused to all for a minute, as its bytes had been wrong."""
    data = b"y" * 1000
    digest = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    with faulty_hub(data) as liar, hub_of(tmp_path, liar.url) as hub:
        sending, sha256 = Sending(hub.url), hashlib.sha256(data).hexdigest()

        def entry(size: int) -> dict[str, Any]:
            lfs_fields = {"lfs": {"sha256": sha256, "size": size, "pointerSize": 1}} if lfs else {}
            return {"rfilename": PATH, "size": size, "blobId": digest, **lfs_fields}

        liar.extra = {"siblings": [entry(len(data) + lie)], "sha": "a" * 40}
        assert sending.ask("GET", f"/{NAME}/resolve/{'a' * 40}/{PATH}").status in (400, 503)
        liar.extra = {"siblings": [entry(len(data))], "sha": "b" * 40}
        answer = sending.ask("GET", f"/{NAME}/resolve/{'b' * 40}/{PATH}")
        assert (answer.status, answer.data) == (200, data)


HOSTILE = {
    "no commit": {"sha": 7},
    "a short commit": {"sha": "abc"},
    "no files": {"siblings": None},
    "a path that leads out": {"siblings": [{"rfilename": "../../x", "size": 1, "blobId": "0" * 40}]},
    "a negative size": {"siblings": [{"rfilename": PATH, "size": -1, "blobId": "0" * 40}]},
    "no digest": {"siblings": [{"rfilename": PATH, "size": 1}]},
    "a digest that is a path": {"siblings": [{"rfilename": PATH, "size": 1, "lfs": {"sha256": "../x", "size": 1}}]},
    "deep": {"cardData": [[]] * 3},
}


@pytest.mark.parametrize("extra", HOSTILE.values(), ids=HOSTILE)
def test_a_document_that_no_hub_would_send_is_refused_or_read_as_it_is(
    tmp_path: Path, upstream: Faulty, extra: dict[str, Any]
) -> None:
    upstream.extra = extra
    with hub_of(tmp_path, upstream.url) as hub:
        assert {status for status, _ in statuses(hub)} <= {200, 400, 404, 503}
        assert list((tmp_path / "upstream/files").iterdir()) == [] or extra == HOSTILE["deep"]
