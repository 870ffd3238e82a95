"""A mirror: what its upstream has is fetched once, whole and verified, and served from then on, with or without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.bases.hub_address import Hub as HuggingFace
from adapterhub.hub import mirror, mirror_origin
from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import commit_id
from adapterhub_converters.bases import BaseTensor
from adapterhub_converters.errors import UsageError
from adapterhub_converters.formats import convert
from tests.conftest import Run, _environment
from tests.converters import trained
from tests.hub.conftest import client, serving
from tests.hub.mirrors import NAME, _create, files_of, mirroring, push_upstream, refused, request_count, sha, versions
from tests.hub.sending import WEIGHTS, Sending
from tests.support.hub_models import publish
from tests.support.hub_server import TOKEN, Hub

FRESH = 0.0  # `main` is looked at with each request
Make = Callable[..., Path]


@pytest.fixture
def upstream() -> Iterator[Hub]:
    """A small Hugging Face Hub."""
    with Hub() as hub:
        yield hub


def weights(sending: Sending, revision: str = "main") -> bytes:
    answer = sending.ask("GET", f"/{NAME}/resolve/{revision}/{WEIGHTS}")
    assert answer.status == 200, answer.data
    return answer.data


# ---- fetched, kept, served


def test_what_another_hub_has_is_fetched_under_its_digest_and_outlives_it(tmp_path: Path, adapter: Make) -> None:
    with serving(tmp_path / "upstream") as origin:
        with origin.registry() as registry:
            pushed = registry.push(adapter(1), Ref(NAME))
        with mirroring(tmp_path / "mirror", origin.url, age=FRESH) as (hub, sending):
            out = Path(client(hub, tmp_path).snapshot_download(NAME, cache_dir=tmp_path / "cache"))
            assert out.name == commit_id(pushed.digest)
            assert {name: (out / name).read_bytes() for name in files_of(adapter(1))} == files_of(adapter(1))
            (version,) = versions(hub)
            assert (version.digest, version.number) == (pushed.digest, 1)
            with hub.registry() as registry:
                (entry,) = registry.log(Ref(NAME))
            assert entry.author == "mirror"
            assert entry.message == f"mirrored from {f'hub+{origin.url}'}/{NAME}@{commit_id(pushed.digest)}"
    with mirroring(tmp_path / "mirror", origin.url) as (_, sending):  # the upstream has ended
        answer = sending.ask("GET", f"/{NAME}/resolve/main/{WEIGHTS}")
        assert answer.data == (adapter(1) / WEIGHTS).read_bytes()
        assert answer.headers["x-hf-warning"].startswith("mirror; the upstream of this mirror does not answer")
        assert refused(sending.ask("GET", "/api/models/org/other")) == "org/other: no such repository"


def test_an_adapter_that_peft_pushed_is_a_version_and_its_commit_a_pin(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    first = push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        assert weights(sending) == (adapter(1) / WEIGHTS).read_bytes()
        second = push_upstream(upstream, adapter(2))
        assert weights(sending) == (adapter(2) / WEIGHTS).read_bytes()
        assert [version.number for version in versions(hub)] == [2, 1]
        for commit, seed in ((first, 1), (second, 2)):
            assert sha(sending, commit) == commit
            assert weights(sending, commit) == (adapter(seed) / WEIGHTS).read_bytes()
        log = sending.ask("GET", f"/api/models/{NAME}/commits/{second}").json()
        assert len(log) == 2
        assert log[0]["id"] == second
        assert sending.ask("GET", f"/api/models/{NAME}/revision/{'f' * 40}").headers["x-error-code"] == "RevisionNotFound"
        upstream.repos[NAME].branches["main"] = upstream.repos[NAME].commits[first]
        assert weights(sending) == (adapter(1) / WEIGHTS).read_bytes()  # main went back, and nothing is removed
        assert len(versions(hub)) == 2


def test_an_image_client_reads_it_too(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        answer = sending.ask("GET", f"/v2/{NAME}/manifests/latest")
        assert answer.headers["docker-content-digest"] == versions(hub)[0].digest
        layers = answer.json()["layers"]
        read = [sending.ask("GET", f"/v2/{NAME}/blobs/{layer['digest']}").status for layer in layers]
        assert read == [200] * len(layers)


def test_a_version_by_its_name_alone_is_that_of_the_mirrored_name(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (_, sending):
        assert sha(sending, name=f"{NAME}.v1") == sha(sending)


def test_main_is_looked_at_again_after_its_age_or_for_a_commit_that_is_not_here(
    tmp_path: Path, adapter: Make, upstream: Hub
) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (_, sending):
        first = sha(sending)
        second = push_upstream(upstream, adapter(2))
        count = request_count(upstream)
        assert (sha(sending), request_count(upstream)) == (first, count)
        assert sha(sending, second) == second
        count = request_count(upstream)
        for _ in range(3):
            assert sending.ask("GET", f"/api/models/{NAME}/revision/{'f' * 40}").status == 404
        assert request_count(upstream) == count + 1


def test_two_clients_at_once_fetch_once(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (hub, _), ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda _: weights(Sending(hub.url)), range(8)))
        assert set(bodies) == {(adapter(1) / WEIGHTS).read_bytes()}
        assert len([path for _, path, _ in upstream.requests if path.endswith(WEIGHTS)]) == 1
        assert len(versions(hub)) == 1


def test_a_gguf_adapter_is_one_by_its_header(tmp_path: Path, upstream: Hub) -> None:
    folder = trained.folder(trained.full("q_proj", "v_proj"), tmp_path / "peft")
    tensors = {f"{name}.weight": BaseTensor(shape, "F32") for name, shape in trained.TARGETS.items()}
    convert.convert(folder, tmp_path / "sql.gguf", to="gguf", base=replace(trained.LLAMA, tensors=tensors))
    publish(upstream, NAME, {"sql.gguf": (tmp_path / "sql.gguf").read_bytes()})
    with mirroring(tmp_path / "hub", upstream.url) as (_, sending):
        answer = sending.ask("GET", f"/{NAME}/resolve/main/sql.gguf")
        assert (answer.status, answer.data) == (200, (tmp_path / "sql.gguf").read_bytes())


def test_a_hub_that_is_started_mirrors_the_hub_of_its_environment(
    run: Run, tmp_path: Path, adapter: Make, upstream: Hub
) -> None:
    commit = push_upstream(upstream, adapter(1))
    words = ("--registry", str(tmp_path / "hub"), "--json", "hub", "start", "--port", "0", "--mirror", "hf://")
    environment = _environment(tmp_path, {"HF_ENDPOINT": upstream.url, "HF_TOKEN": TOKEN})
    command = [sys.executable, "-m", "adapterhub", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stdout
        text = ""
        while "}" not in text:
            text += process.stdout.readline()
        address = f"hub+{json.loads(text)['url']}/{NAME}@{commit}"
        run("pull", address, "-o", tmp_path / "out")
        process.terminate()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter(1) / WEIGHTS).read_bytes()
    assert not any("authorization" in headers for _, _, headers in upstream.requests)
    assert "Write hf:// or hub+https://HOST" in run("hub", "start", "--mirror", "hf://org", code=2).stderr


def test_an_upstream_that_takes_long_holds_up_nobody_who_can_have_what_is_here(
    tmp_path: Path, adapter: Make, upstream: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_upstream(upstream, adapter(1))
    monkeypatch.setattr(mirror, "_PATIENCE", 0.1)
    with mirroring(tmp_path, upstream.url) as (_, sending):
        first = sha(sending)
    with mirroring(tmp_path, upstream.url, age=FRESH) as (_, sending):
        second = push_upstream(upstream, adapter(2))
        with upstream.lock:  # it takes requests, and answers none
            answers = [sending.ask("GET", f"/api/models/{NAME}") for _ in range(3)]
        assert {answer.json()["sha"] for answer in answers} == {first}
        assert {"takes long" in answer.headers["x-hf-warning"] for answer in answers} == {True}
        monkeypatch.setattr(mirror, "_PATIENCE", 60)
        assert sha(sending, second) == second


# ---- whose a name is


def test_what_was_pushed_or_removed_here_is_never_asked_for_there(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    push_upstream(upstream, adapter(2))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        with hub.registry() as registry:
            mine = registry.push(adapter(1), Ref(NAME))
        client(hub, tmp_path).create_repo("org/empty")
        assert sha(sending) == commit_id(mine.digest)
        assert sending.ask("GET", "/api/models/org/empty").status == 200
        with hub.registry() as registry:
            registry.rm(Ref(NAME))
        refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert request_count(upstream) == 0


def test_a_mirrored_namespace_that_somebody_has_here_later_is_served_and_followed_no_longer(
    tmp_path: Path, adapter: Make, upstream: Hub
) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        first = sha(sending)
        _create(hub, sending, adapter(1))
        push_upstream(upstream, adapter(2))
        count = request_count(upstream)
        assert (sha(sending), request_count(upstream)) == (first, count)


def test_a_hub_that_was_killed_while_it_made_a_version_does_not_take_the_namespace_for_its_own(
    tmp_path: Path, adapter: Make, upstream: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_upstream(upstream, adapter(1))
    push_upstream(upstream, adapter(2), "org/other")
    with monkeypatch.context() as patch, mirroring(tmp_path, upstream.url) as (hub, sending):
        patch.setattr(mirror_origin, "add", lambda *_: None)  # what a kill leaves undone
        sha(sending)
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        assert (sha(sending, name="org/other"), len(versions(hub))) == (commit_id(versions(hub, "org/other")[0].digest), 1)


def test_a_name_that_somebody_pushes_to_here_is_followed_no_longer(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    push_upstream(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        sha(sending)
        with hub.registry() as registry:
            mine = registry.push(adapter(3), Ref(NAME))
        push_upstream(upstream, adapter(2))
        assert sha(sending) == commit_id(mine.digest)


# ---- what is not mirrored


# ---- the upstream by its URL


def test_an_upstream_is_a_whole_hub() -> None:
    upstream = mirror.upstream("hf://", 60, lambda: HuggingFace("https://hub.example"))
    assert (upstream.prefix, upstream.endpoint, upstream.age) == ("hf://", "https://hub.example", 60)
    for url in ("hub+https://hub.example", "hub+https://hub.example/"):
        upstream = mirror.upstream(url, 60, HuggingFace)
        assert (upstream.prefix, upstream.endpoint) == ("hub+https://hub.example/", "https://hub.example")
    for url in ("hf://org", "https://hub.example", "oci://registry.example", "hub+https://me:secret@hub.example", ""):
        with pytest.raises(UsageError) as error:
            mirror.upstream(url, 60, HuggingFace)
        assert "secret" not in str(error.value)
