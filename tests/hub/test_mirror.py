"""A mirror: what its upstream has is fetched once, whole and verified, and served from then on, with or without it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.bases.hub_address import Hub as HuggingFace
from adapterhub.hub import hub as hub_module
from adapterhub.hub import mirror, mirror_origin
from adapterhub.hub.accounts import accounts, publishers
from adapterhub.hub.accounts.accounts import READERS, Namespace
from adapterhub.hub.settings import HubSettings, Upstream
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry.registry import Version
from adapterhub.registry.repository_documents import commit_id
from adapterhub.remotes.hub import hub_versions
from adapterhub.remotes.hub.hub_client import Bounds
from adapterhub_converters.bases import BaseTensor
from adapterhub_converters.containers import gguf_output, gguf_types
from adapterhub_converters.errors import UsageError
from adapterhub_converters.formats import convert
from tests.conftest import Run, _environment
from tests.converters import trained
from tests.hub.conftest import Running, client, serving
from tests.hub.sending import WEIGHTS, Answer, Sending
from tests.support.hub_models import publish
from tests.support.hub_server import TOKEN, Hub

FRESH = 0.0  # `main` is looked at with each request
NAME = "org/sql"
Make = Callable[..., Path]


@contextmanager
def mirroring(folder: Path, url: str, *, age: float = 3600.0, **settings: Any) -> Iterator[tuple[Running, Sending]]:
    """A mirror of the hub at a URL, and a client of it without a token."""
    of = Upstream(f"hub+{url}/", url, age)
    with serving(folder, mirror=of, **settings) as running:
        yield running, Sending(running.url)


@pytest.fixture
def upstream() -> Iterator[Hub]:
    """A small Hugging Face Hub."""
    with Hub() as hub:
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(upstream: Hub, folder: Path, name: str = NAME) -> str:
    """The commit of an adapter without an adapter.json, as peft pushes it."""
    return publish(upstream, name, {".gitattributes": b"*.safetensors filter=lfs\n", **files_of(folder)})


def sha(sending: Sending, revision: str = "main", name: str = NAME) -> str:
    answer = sending.ask("GET", f"/api/models/{name}/revision/{revision}")
    assert answer.status == 200, answer.data
    return str(answer.json()["sha"])


def weights(sending: Sending, revision: str = "main") -> bytes:
    answer = sending.ask("GET", f"/{NAME}/resolve/{revision}/{WEIGHTS}")
    assert answer.status == 200, answer.data
    return answer.data


def versions(hub: Running, name: str = NAME) -> list[Version]:
    with hub.registry() as registry:
        return [registry.resolve(row.ref) for row in registry.list(name) if row.name == name]


def refused(answer: Answer) -> str:
    """The words of an answer of a repository that is not there."""
    assert (answer.status, answer.headers["x-error-code"]) == (404, "RepoNotFound")
    return str(answer.json()["error"])


def asked(upstream: Hub) -> int:
    return len(upstream.requests)


# ---- fetched, kept, served


def test_what_another_hub_has_is_fetched_under_its_digest_and_outlives_it(tmp_path: Path, adapter: Make) -> None:
    with serving(tmp_path / "upstream") as origin:
        with origin.registry() as registry:
            made = registry.push(adapter(1), Ref(NAME))
        with mirroring(tmp_path / "mirror", origin.url, age=FRESH) as (hub, sending):
            out = Path(client(hub, tmp_path).snapshot_download(NAME, cache_dir=tmp_path / "cache"))
            assert out.name == commit_id(made.digest)
            assert {name: (out / name).read_bytes() for name in files_of(adapter(1))} == files_of(adapter(1))
            (version,) = versions(hub)
            assert (version.digest, version.number) == (made.digest, 1)
            with hub.registry() as registry:
                (entry,) = registry.log(Ref(NAME))
            assert entry.author == "mirror"
            assert entry.message == f"mirrored from {f'hub+{origin.url}'}/{NAME}@{commit_id(made.digest)}"
    with mirroring(tmp_path / "mirror", origin.url) as (_, sending):  # the upstream has ended
        answer = sending.ask("GET", f"/{NAME}/resolve/main/{WEIGHTS}")
        assert answer.data == (adapter(1) / WEIGHTS).read_bytes()
        assert answer.headers["x-hf-warning"].startswith("mirror; the upstream of this mirror does not answer")
        assert refused(sending.ask("GET", "/api/models/org/other")) == "org/other: no such repository"


def test_an_adapter_that_peft_pushed_is_a_version_and_its_commit_a_pin(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    first = put(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        assert weights(sending) == (adapter(1) / WEIGHTS).read_bytes()
        second = put(upstream, adapter(2))
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
    put(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        answer = sending.ask("GET", f"/v2/{NAME}/manifests/latest")
        assert answer.headers["docker-content-digest"] == versions(hub)[0].digest
        layers = answer.json()["layers"]
        read = [sending.ask("GET", f"/v2/{NAME}/blobs/{layer['digest']}").status for layer in layers]
        assert read == [200] * len(layers)


def test_a_version_by_its_name_alone_is_that_of_the_mirrored_name(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    put(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (_, sending):
        assert sha(sending, name=f"{NAME}.v1") == sha(sending)


def test_main_is_looked_at_again_after_its_age_or_for_a_commit_that_is_not_here(
    tmp_path: Path, adapter: Make, upstream: Hub
) -> None:
    put(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (_, sending):
        first = sha(sending)
        second = put(upstream, adapter(2))
        count = asked(upstream)
        assert (sha(sending), asked(upstream)) == (first, count)
        assert sha(sending, second) == second
        count = asked(upstream)
        for _ in range(3):
            assert sending.ask("GET", f"/api/models/{NAME}/revision/{'f' * 40}").status == 404
        assert asked(upstream) == count + 1


def test_two_clients_at_once_fetch_once(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    put(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (hub, _), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: weights(Sending(hub.url)), range(8)))
        assert set(found) == {(adapter(1) / WEIGHTS).read_bytes()}
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
    commit = put(upstream, adapter(1))
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
    put(upstream, adapter(1))
    monkeypatch.setattr(mirror, "_PATIENCE", 0.1)
    with mirroring(tmp_path, upstream.url) as (_, sending):
        first = sha(sending)
    with mirroring(tmp_path, upstream.url, age=FRESH) as (_, sending):
        second = put(upstream, adapter(2))
        with upstream.lock:  # it takes requests, and answers none
            answers = [sending.ask("GET", f"/api/models/{NAME}") for _ in range(3)]
        assert {answer.json()["sha"] for answer in answers} == {first}
        assert {"takes long" in answer.headers["x-hf-warning"] for answer in answers} == {True}
        monkeypatch.setattr(mirror, "_PATIENCE", 60)
        assert sha(sending, second) == second


# ---- whose a name is


def test_what_was_pushed_or_removed_here_is_never_asked_for_there(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    put(upstream, adapter(2))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        with hub.registry() as registry:
            mine = registry.push(adapter(1), Ref(NAME))
        client(hub, tmp_path).create_repo("org/empty")
        assert sha(sending) == commit_id(mine.digest)
        assert sending.ask("GET", "/api/models/org/empty").status == 200
        with hub.registry() as registry:
            registry.rm(Ref(NAME))
        refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert asked(upstream) == 0


def _push(hub: Running, sending: Sending, folder: Path) -> None:
    with hub.registry() as registry:
        registry.push(folder, Ref("org/own"))


def _remove(hub: Running, sending: Sending, folder: Path) -> None:
    _push(hub, sending, folder)
    with hub.registry() as registry:
        registry.rm(Ref("org/own"))


def _create(hub: Running, sending: Sending, folder: Path) -> None:
    named = {"organization": "org", "name": "own", "private": True}
    assert sending.ask("POST", "/api/repos/create", named, token=hub.token).status == 200


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
    put(upstream, adapter(2))
    put(upstream, adapter(2), "other/sql")
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        take(hub, sending, adapter(1))
        for path in (f"/api/models/{NAME}", f"/{NAME}/resolve/main/{WEIGHTS}", f"/api/models/{NAME}/revision/{'f' * 40}"):
            refused(sending.ask("GET", path, token=hub.token))
        assert sending.ask("GET", f"/v2/{NAME}/manifests/latest", token=hub.token).status == 404
        assert asked(upstream) == 0
        assert sending.ask("GET", "/api/models/other/sql").status == 200


def test_a_mirrored_namespace_that_somebody_has_here_later_is_served_and_followed_no_longer(
    tmp_path: Path, adapter: Make, upstream: Hub
) -> None:
    put(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        first = sha(sending)
        _create(hub, sending, adapter(1))
        put(upstream, adapter(2))
        count = asked(upstream)
        assert (sha(sending), asked(upstream)) == (first, count)


def test_a_hub_that_was_killed_while_it_made_a_version_does_not_take_the_namespace_for_its_own(
    tmp_path: Path, adapter: Make, upstream: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(upstream, adapter(1))
    put(upstream, adapter(2), "org/other")
    with monkeypatch.context() as patch, mirroring(tmp_path, upstream.url) as (hub, sending):
        patch.setattr(mirror_origin, "add", lambda *_: None)  # what a kill leaves undone
        sha(sending)
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        assert (sha(sending, name="org/other"), len(versions(hub))) == (commit_id(versions(hub, "org/other")[0].digest), 1)


def test_a_name_that_somebody_pushes_to_here_is_followed_no_longer(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    put(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url, age=FRESH) as (hub, sending):
        sha(sending)
        with hub.registry() as registry:
            mine = registry.push(adapter(3), Ref(NAME))
        put(upstream, adapter(2))
        assert sha(sending) == commit_id(mine.digest)


def test_only_who_may_read_a_namespace_has_something_fetched_into_it(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    put(upstream, adapter(1))
    with mirroring(tmp_path, upstream.url) as (hub, sending):
        with closing(open_database(hub.settings)) as database:
            accounts.set_namespace(database, Namespace("org", readers=READERS[1]))
        refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert asked(upstream) == 0
        assert sending.ask("GET", f"/api/models/{NAME}", token=hub.token).status == 200
        refused(sending.ask("GET", f"/api/models/{NAME}"))


def test_no_token_is_sent_so_that_what_is_private_there_stays_there(tmp_path: Path, adapter: Make) -> None:
    with Hub(token="hf_secret") as upstream:
        put(upstream, adapter(1))
        upstream.repos[NAME].private = True
        with mirroring(tmp_path, upstream.url) as (hub, sending):
            refused(sending.ask("GET", f"/api/models/{NAME}", token=hub.token))
            put(upstream, adapter(1), "org/gated")
            upstream.repos["org/gated"].gated = True
            assert "gated" in refused(sending.ask("GET", "/api/models/org/gated", token=hub.token))
        assert not any("authorization" in headers for _, _, headers in upstream.requests)


# ---- what is not mirrored


def test_what_is_not_there_is_asked_for_once_in_a_while(tmp_path: Path, upstream: Hub) -> None:
    with mirroring(tmp_path, upstream.url) as (_, sending):
        for _ in range(3):
            assert refused(sending.ask("GET", f"/api/models/{NAME}")) == f"{NAME}: no such repository"
        assert asked(upstream) == 1
        for name in ("Org/SQL", "org/a--b", "org/sub/sql"):
            assert sending.ask("GET", f"/api/models/{name}").status in (404, 501)
            assert sending.ask("GET", f"/v2/{name}/manifests/latest").status in (401, 404)
        assert asked(upstream) == 1


def test_an_address_that_asks_for_too_many_names_has_to_wait(tmp_path: Path, upstream: Hub, monkeypatch: Any) -> None:
    monkeypatch.setattr(mirror, "_MAX_ATTEMPTS", 3)
    with mirroring(tmp_path, upstream.url) as (_, sending):
        statuses = [sending.ask("GET", f"/api/models/org/name{n}").status for n in range(5)]
        assert statuses == [404, 404, 404, 429, 429]
        answer = sending.ask("GET", "/v2/org/name9/manifests/latest")
        assert (answer.status, answer.json()["errors"][0]["code"]) == (429, "TOOMANYREQUESTS")
        assert asked(upstream) == 3


def test_strangers_have_a_bounded_number_of_bytes_fetched_in_a_day(
    tmp_path: Path, upstream: Hub, adapter: Make, monkeypatch: Any
) -> None:
    """Each address could have 100 names of up to 20 GB each fetched in five minutes."""
    monkeypatch.setattr(mirror, "_MAX_FOR_STRANGERS", 1)
    for name in (NAME, "org/more", "org/most"):
        put(upstream, adapter(len(name)), name)
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
        said = refused(sending.ask("GET", f"/api/models/{NAME}"))
        assert said.startswith(f"{NAME} is not mirrored: hub+{upstream.url}/{NAME}"), said
        count = asked(upstream)
        assert refused(sending.ask("GET", f"/api/models/{NAME}")) == said
        answer = sending.ask("GET", f"/v2/{NAME}/manifests/latest")
        assert (answer.status, answer.json()["errors"][0]["code"]) == (404, "NAME_UNKNOWN")
        assert asked(upstream) == count
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
        assert asked(upstream) < 40


def test_a_file_over_the_limit_and_an_adapter_against_the_policy_are_refused(
    tmp_path: Path, adapter: Make, upstream: Hub
) -> None:
    put(upstream, adapter(1))
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
    of = replace(Upstream(f"hub+{upstream.url}/", upstream.url), max_bytes=size - 1)
    said: list[tuple[str, object, str, object]] = [
        (f"has {size:,} bytes, and a repository may have at most {size - 1:,} here", mirror, "_ABSENT_TTL", 300.0),
        (f"{len(files)} files are over the limit of 3", hub_versions, "MAX_FILES", 3),
        ("larger than the limit of", mirror, "_BOUNDS", Bounds(plain=1000)),
        ("larger than the limit of 200 bytes", mirror, "_BOUNDS", Bounds(listing=200)),
    ]
    for number, (words, module, name, value) in enumerate(said):
        with monkeypatch.context() as patch, serving(tmp_path / str(number), mirror=of) as hub:
            patch.setattr(module, name, value)
            assert words in refused(Sending(hub.url).ask("GET", f"/api/models/{NAME}"))
            assert not versions(hub)
    assert not [path for _, path, _ in upstream.requests if path.endswith(WEIGHTS)]


def test_other_bytes_than_the_upstream_listed_are_refused_and_not_kept(tmp_path: Path, adapter: Make, upstream: Hub) -> None:
    put(upstream, adapter(1))
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
    put(upstream, adapter(1))
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


# ---- the upstream by its URL


def test_an_upstream_is_a_whole_hub() -> None:
    found = mirror.upstream("hf://", 60, lambda: HuggingFace("https://hub.example"))
    assert (found.prefix, found.endpoint, found.age) == ("hf://", "https://hub.example", 60)
    for url in ("hub+https://hub.example", "hub+https://hub.example/"):
        found = mirror.upstream(url, 60, HuggingFace)
        assert (found.prefix, found.endpoint) == ("hub+https://hub.example/", "https://hub.example")
    for url in ("hf://org", "https://hub.example", "oci://registry.example", "hub+https://me:secret@hub.example", ""):
        with pytest.raises(UsageError) as error:
            mirror.upstream(url, 60, HuggingFace)
        assert "secret" not in str(error.value)
