"""A mirror fetches no more than it may, tells its upstream none of its own names, and keeps only what was listed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import hub as hub_module
from adapterhub.hub import mirror
from adapterhub.hub.accounts import accounts, publishers
from adapterhub.hub.accounts.accounts import READERS, Namespace
from adapterhub.hub.settings import HubSettings, Upstream
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.remotes.hub import hub_versions
from adapterhub.remotes.hub.hub_client import Bounds
from adapterhub_converters.containers import gguf_output, gguf_types
from tests.hub.conftest import Running, serving
from tests.hub.mirrors import NAME, _create, files_of, mirroring, push_upstream, refused, request_count, sha, versions
from tests.hub.sending import WEIGHTS, Sending
from tests.support.hub_models import publish
from tests.support.hub_server import Hub

FRESH = 0.0  # `main` is looked at with each request
Make = Callable[..., Path]


@pytest.fixture
def upstream() -> Iterator[Hub]:
    """A small Hugging Face Hub."""
    with Hub() as hub:
        yield hub


def _push(hub: Running, sending: Sending, folder: Path) -> None:
    with hub.registry() as registry:
        registry.push(folder, Ref("org/own"))


def _remove(hub: Running, sending: Sending, folder: Path) -> None:
    _push(hub, sending, folder)
    with hub.registry() as registry:
        registry.rm(Ref("org/own"))


def _account(hub: Running, sending: Sending, folder: Path) -> None:
    hub.make_token("org", "write")


def _token(hub: Running, sending: Sending, folder: Path) -> None:
    hub.make_token("eve", "read", namespaces=["eve", "org"])


def _member(hub: Running, sending: Sending, folder: Path) -> None:
    with closing(open_database(hub.settings)) as database:
        accounts.set_member(database, "org", "alice", "read")


def _publisher(hub: Running, sending: Sending, folder: Path) -> None:
    with closing(open_database(hub.settings)) as database:
        publishers.add(database, "org/own", "https://ci.example", {"sub": "x"}, "alice")


def _members_only(hub: Running, sending: Sending, folder: Path) -> None:
    with closing(open_database(hub.settings)) as database:
        accounts.set_namespace(database, Namespace("org", readers=READERS[2]))


@pytest.mark.parametrize("take", [_push, _remove, _create, _account, _token, _member, _publisher, _members_only])
def test_no_name_of_a_namespace_of_this_hub_is_told_to_the_upstream(
    tmp_path: Path, adapter: Make, upstream: Hub, take: Callable[[Running, Sending, Path], None]
) -> None:
    push_upstream(upstream, adapter(2))
    push_upstream(upstream, adapter(2), "other/sql")
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        take(hub, sending, adapter(1))
        for path in (f"/api/models/{NAME}", f"/{NAME}/resolve/main/{WEIGHTS}", f"/api/models/{NAME}/revision/{'f' * 40}"):
            refused(sending.ask("GET", path, token=hub.token))
        assert sending.ask("GET", f"/v2/{NAME}/manifests/latest", token=hub.token).status == 404
        assert request_count(upstream) == 0
        assert sending.ask("GET", "/api/models/other/sql").status == 200


def test_only_who_may_read_a_namespace_has_something_fetched_into_it(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        with closing(open_database(hub.settings)) as database:
            accounts.set_namespace(database, Namespace("org", readers=READERS[1]))
        refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert request_count(upstream) == 0
        assert sending.ask("GET", f"/api/models/{NAME}", token=hub.token).status == 200
        refused(sending.ask("GET", f"/api/models/{NAME}"))


def test_no_token_is_sent_so_that_what_is_private_there_stays_there(tmp_path: Path, adapter: Make) -> None:
    with Hub(token="hf_secret") as upstream:
        push_upstream(upstream, adapter(1))
        upstream.repos[NAME].private = True
        with mirroring(tmp_path, upstream.url) as (hub, sending):
            refused(sending.ask("GET", f"/api/models/{NAME}", token=hub.token))
            push_upstream(upstream, adapter(1), "org/gated")
            upstream.repos["org/gated"].gated = True
            assert "gated" in refused(sending.ask("GET", "/api/models/org/gated", token=hub.token))
        assert not any("authorization" in headers for _, _, headers in upstream.requests)


def test_what_is_not_there_is_asked_for_once_in_a_while(tmp_path: Path, upstream: Hub) -> None:
    with mirroring(tmp_path, upstream.url) as (_, sending):
        for _ in range(3):
            assert refused(sending.ask("GET", f"/api/models/{NAME}")) == f"{NAME}: no such repository"
        assert request_count(upstream) == 1
        for name in ("Org/SQL", "org/a--b", "org/sub/sql"):
            assert sending.ask("GET", f"/api/models/{name}").status in (404, 501)
            assert sending.ask("GET", f"/v2/{name}/manifests/latest").status in (401, 404)
        assert request_count(upstream) == 1


def test_an_address_that_asks_for_too_many_names_has_to_wait(tmp_path: Path, upstream: Hub, monkeypatch: Any) -> None:
    monkeypatch.setattr(mirror, "_MAX_ATTEMPTS", 3)
    with mirroring(tmp_path, upstream.url) as (_, sending):
        statuses = [sending.ask("GET", f"/api/models/org/name{n}").status for n in range(5)]
        assert statuses == [404, 404, 404, 429, 429]
        answer = sending.ask("GET", "/v2/org/name9/manifests/latest")
        assert (answer.status, answer.json()["errors"][0]["code"]) == (429, "TOOMANYREQUESTS")
        assert request_count(upstream) == 3


def test_strangers_have_a_bounded_number_of_bytes_fetched_in_a_day(
    tmp_path: Path, upstream: Hub, adapter: Make, monkeypatch: Any
) -> None:
    """Each address could have 100 names of up to 20 GB each fetched in five minutes."""
    monkeypatch.setattr(mirror, "_MAX_FOR_STRANGERS", 1)
    for name in (NAME, "org/more", "org/most"):
        push_upstream(upstream, adapter(len(name)), name)
    with mirroring(tmp_path, upstream.url) as (running, sending):
        assert sha(sending)
        answer = sending.ask("GET", "/api/models/org/more")
        assert answer.status == 429
        assert sha(sending)
        assert sha(Sending(running.url, running.token), name="org/more")
        assert sha(sending, name="org/more")
        assert sending.ask("GET", "/v2/org/most/manifests/latest").status == 429


MODEL = gguf_output.header_bytes(
    {"general.architecture": gguf_types.string_value("llama"), "general.type": gguf_types.string_value("model")}, ()
)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}", "model.safetensors": bytes(1000)},
        {"model-Q4_K_M.gguf": MODEL},
        {"model-Q4_K_M.gguf": bytes(1000)},
        {"adapter_config.json": b"{}", "README.md": b"# No weights\n"},
        {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04\x95"},
    ],
)
def test_a_whole_model_is_refused_by_name_before_its_weights_move(
    tmp_path: Path, upstream: Hub, files: dict[str, bytes]
) -> None:
    publish(upstream, NAME, files)
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        message = refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert message.startswith(f"{NAME} is not mirrored: hub+{upstream.url}/{NAME}"), message
        count = request_count(upstream)
        assert refused(sending.ask("GET", f"/api/models/{NAME}")) == message
        answer = sending.ask("GET", f"/v2/{NAME}/manifests/latest")
        assert (answer.status, answer.json()["errors"][0]["code"]) == (404, "NAME_UNKNOWN")
        assert request_count(upstream) == count
        assert not versions(hub)
        assert not [path for _, path, _ in upstream.requests if path.endswith("safetensors")]


def test_a_repository_that_is_not_mirrored_has_an_error_of_its_own(tmp_path: Path, upstream: Hub) -> None:
    publish(upstream, NAME, {"model.gguf": MODEL})
    settings = HubSettings(registry=tmp_path, mirror=Upstream(f"hub+{upstream.url}/", upstream.url, FRESH))
    with closing(hub_module.Hub(settings)) as hub:
        assert hub.mirror
        with pytest.raises(mirror.NotMirroredError, match="is a whole model") as caught:
            asyncio.run(hub.mirror.refresh(None, NAME))
    assert caught.value.code == "not-mirrored"


def test_not_every_header_of_a_repository_of_models_is_fetched(tmp_path: Path, upstream: Hub) -> None:
    """10,000 of them had one of the four threads that fetch for everybody ask for a quarter of an hour."""
    publish(upstream, NAME, {f"{n:02}.gguf": MODEL + bytes([n]) for n in range(50)})
    with mirroring(tmp_path, upstream.url) as (_, sending):
        assert "is a whole model" in refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert request_count(upstream) < 40


def test_a_file_over_the_limit_and_an_adapter_against_the_policy_are_refused(
    tmp_path: Path, adapter: Make, upstream: Hub
) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path / "small", upstream.url, max_file=1000) as (hub, sending):
        assert "a file may have at most 1,000 bytes here" in refused(sending.ask("GET", f"/api/models/{NAME}"))
    with mirroring(tmp_path / "full", upstream.url) as (hub, sending):
        with closing(open_database(hub.settings)) as database:
            accounts.set_namespace(database, Namespace("org", max_bytes=1000))
        assert "may hold 1,000 bytes" in refused(sending.ask("GET", f"/api/models/{NAME}"))
    with mirroring(tmp_path / "strict", upstream.url, policy=Policy(licenses=("mit",))) as (hub, sending):
        assert "license" in refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert not versions(hub)


def test_a_repository_is_bounded_as_a_whole_before_its_files_move(
    tmp_path: Path, adapter: Make, upstream: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**files_of(adapter(1)), "notes.txt": b"x" * 600, "more.txt": b"x" * 601}
    size = sum(map(len, files.values()))
    publish(upstream, NAME, files)
    bounded_upstream = replace(Upstream(f"hub+{upstream.url}/", upstream.url), max_bytes=size - 1)
    bounds: list[tuple[str, object, str, object]] = [
        (f"has {size:,} bytes, and a repository may have at most {size - 1:,} here", mirror, "_ABSENT_TTL", 300.0),
        (f"{len(files)} files are over the limit of 3", hub_versions, "MAX_FILES", 3),
        ("larger than the limit of", mirror, "_BOUNDS", Bounds(plain=1000)),
        ("larger than the limit of 200 bytes", mirror, "_BOUNDS", Bounds(listing=200)),
    ]
    for number, (words, module, name, value) in enumerate(bounds):
        with monkeypatch.context() as patch, serving(tmp_path / str(number), mirror=bounded_upstream) as hub:
            patch.setattr(module, name, value)
            assert words in refused(Sending(hub.url).ask("GET", f"/api/models/{NAME}"))
            assert not versions(hub)
    assert not [path for _, path, _ in upstream.requests if path.endswith(WEIGHTS)]


def test_other_bytes_than_the_upstream_listed_are_refused_and_not_kept(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    push_upstream(upstream, adapter(1))
    true = adapter(1) / WEIGHTS
    lie = true.read_bytes()[:-1] + b"\xff"
    (digest,) = [digest for digest, data in upstream.large.items() if data == true.read_bytes()]
    upstream.large[digest] = lie
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        assert "instead of" in refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert not versions(hub)
        assert not [path for path in hub.folder.rglob("*") if path.is_file() and path.read_bytes() == lie]


def test_no_file_of_others_is_read_by_having_the_upstream_name_its_digest(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    secret, bait = b"# The secret\n", b"# A new bait\n"
    folder = adapter(1)
    (folder / "NOTES.md").write_bytes(secret)
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        with hub.registry() as registry:
            registry.push(folder, Ref("team/private"))
            registry.pull(Ref("team/private"), tmp_path / "pulled")
        files = files_of(tmp_path / "pulled")
        publish(upstream, NAME, {**files, "NOTES.md": bait})  # adapter.json has the digest of the secret
        assert "instead of" in refused(sending.ask("GET", f"/api/models/{NAME}"))
        publish(upstream, "org/true", files)  # who has the bytes may have them here too
        assert sending.ask("GET", "/org/true/resolve/main/NOTES.md").data == secret


def test_a_bad_commit_there_leaves_what_is_here_with_a_warning(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (_, sending):
        first = sha(sending)
        publish(upstream, NAME, {"adapter_config.json": json.dumps({"r": "x"}).encode(), WEIGHTS: bytes(100)})
        answer = sending.ask("GET", f"/api/models/{NAME}")
        assert (answer.status, answer.json()["sha"]) == (200, first)
        assert answer.headers["x-hf-warning"].startswith("mirror; ")
        del upstream.repos[NAME]
    with mirroring(tmp_path, upstream.url, age=FRESH) as (_, sending):
        answer = sending.ask("GET", f"/api/models/{NAME}")
        assert (answer.status, answer.json()["sha"]) == (200, first)
        assert "is not there any more" in answer.headers["x-hf-warning"]
