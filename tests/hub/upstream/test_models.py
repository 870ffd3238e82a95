"""Models that are not here: those of the upstream, by redirects or kept here, for unchanged clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.hub.hf import reading
from adapterhub.hub.settings import Upstream
from adapterhub.maintenance.gc import gc
from adapterhub.ref import Ref
from tests.hub.conftest import Running, client
from tests.hub.killing import assert_sound
from tests.hub.upstream.conftest import FILES, NAME, anonymous, hub_of, upload
from tests.support.hub_models import publish
from tests.support.hub_server import Hub, Repo

Make = Callable[..., Path]
MODES = ("redirect", "cache")


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".")}


@pytest.mark.parametrize("mode", MODES)
def test_huggingface_hub_gets_a_model_of_the_upstream(tmp_path: Path, upstream: Running, mode: str) -> None:
    with hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        api = client(hub, tmp_path)
        folder = Path(api.snapshot_download(NAME, cache_dir=tmp_path / "cache"))
        assert contents(folder) == FILES
        info = api.model_info(NAME, files_metadata=True)
        assert folder.name == info.sha == client(upstream, tmp_path).model_info(NAME).sha
        assert {file.rfilename: file.size for file in info.siblings} == {path: len(data) for path, data in FILES.items()}
        assert [ref.name for ref in api.list_repo_refs(NAME).branches] == ["main"]
        assert {file.path for file in api.get_paths_info(NAME, ["config.json", "sub"])} == {"config.json", "sub"}
        assert len(api.list_repo_commits(NAME)) == len(client(upstream, tmp_path).list_repo_commits(NAME))
        assert api.file_exists(NAME, "config.json")
        assert not api.file_exists(NAME, "other.json")
        assert not api.revision_exists(NAME, "v9")
        assert not api.repo_exists("org/none")


@pytest.mark.parametrize("mode", MODES)
def test_every_page_of_the_history_of_a_model_comes(
    tmp_path: Path, upstream: Running, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PAGE_EXPANDED", 2)
    for number in range(5):
        client(upstream, tmp_path).upload_file(repo_id=NAME, path_or_fileobj=b"%d" % number, path_in_repo="note.txt")
    with hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        history = [commit.commit_id for commit in client(hub, tmp_path).list_repo_commits(NAME)]
        assert history == [commit.commit_id for commit in client(upstream, tmp_path).list_repo_commits(NAME)]
        assert len({*history}) == len(history) > 5


def test_ranges_and_headers_are_those_of_the_upstream(tmp_path: Path, upstream: Running) -> None:
    with hub_of(tmp_path / "hub", upstream.url) as hub:
        data = FILES["model.safetensors"]
        path = f"/{NAME}/resolve/main/model.safetensors"
        theirs = anonymous(upstream).ask("HEAD", path).headers
        for method in ("HEAD", "GET", "GET"):
            ours = anonymous(hub).ask(method, path).headers
            names = ("etag", "x-repo-commit", "x-linked-etag", "x-linked-size", "content-length", "accept-ranges")
            assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
            assert not [name for name in ours if "xet" in name.lower()]
        for text, expected in {"bytes=5-9": data[5:10], "bytes=-4": data[-4:], f"bytes={len(data) - 2}-": data[-2:]}.items():
            answer = anonymous(hub).ask("GET", path, range=text)
            assert (answer.status, answer.data) == (206, expected)
        assert anonymous(hub).ask("GET", path, range=f"bytes={len(data)}-").status == 416


def test_a_redirect_of_a_file_leads_to_the_commit_that_its_headers_name(tmp_path: Path, upstream: Running) -> None:
    with hub_of(tmp_path / "hub", upstream.url, "redirect") as hub:
        path = f"/{NAME}/resolve/main/config.json"
        commit = anonymous(hub).ask("HEAD", path).headers["x-repo-commit"]
        upload(upstream, tmp_path, files={"config.json": b"{}"})
        answer = anonymous(hub).ask("GET", path)
        assert (answer.status, answer.headers["location"]) == (307, f"{upstream.url}/{NAME}/resolve/{commit}/config.json")
        assert list((tmp_path / "hub/upstream/files").iterdir()) == []


def test_a_model_without_a_namespace_is_one_of_the_upstream(tmp_path: Path) -> None:
    with Hub() as upstream:
        upstream.repos["gpt2"] = Repo()
        publish(upstream, "gpt2", FILES)
        with hub_of(tmp_path / "hub", upstream.url, "redirect") as hub:
            info = anonymous(hub).ask("GET", "/api/models/gpt2/revision/main")
            assert info.headers["location"] == f"{upstream.url}/api/models/gpt2/revision/main"


def test_the_mirror_comes_first_and_what_it_refuses_is_a_model_of_the_upstream(
    tmp_path: Path, upstream: Running, adapter: Make
) -> None:
    with upstream.registry() as registry:
        registry.push(adapter(1), Ref("org/sql"))
    mirror = Upstream(f"hub+{upstream.url}/", upstream.url)
    with hub_of(tmp_path / "hub", upstream.url, settings={"mirror": mirror}) as hub:
        assert anonymous(hub).ask("GET", "/api/models/org/sql").json()["adapterhub"]["number"] == 1
        assert anonymous(hub).ask("GET", f"/{NAME}/resolve/main/config.json").data == FILES["config.json"]
        assert anonymous(hub).ask("GET", "/api/models/org/none").status == 404


def test_what_is_not_the_upstreams_keeps_the_words_of_this_hub(tmp_path: Path, upstream: Running) -> None:
    with hub_of(tmp_path / "hub", upstream.url) as hub:
        answer = anonymous(hub).ask("GET", "/api/models/org/none")
        assert (answer.status, answer.headers["x-error-code"]) == (404, "RepoNotFound")
        assert answer.json() == {"error": "org/none: no such repository"}
        answer = anonymous(hub).ask("GET", f"/api/models/{NAME}/revision/none")
        assert (answer.status, answer.headers["x-error-code"]) == (404, "RevisionNotFound")
        assert anonymous(hub).ask("PUT", f"/api/models/{NAME}/settings", {}).status == 404


def test_a_gated_model_needs_a_token_of_the_operator_who_may_read_it(tmp_path: Path) -> None:
    with Hub() as upstream:
        publish(upstream, NAME, FILES)
        upstream.repos[NAME].gated = True
        with hub_of(tmp_path / "hub", upstream.url) as hub:
            answer = anonymous(hub).ask("GET", f"/api/models/{NAME}")
            assert (answer.status, answer.headers["x-error-code"]) == (403, "GatedRepo")
            assert "this hub has no access to it" in answer.json()["error"]


def test_what_is_kept_of_the_upstream_is_no_part_of_the_registry(tmp_path: Path, upstream: Running) -> None:
    with hub_of(tmp_path / "hub", upstream.url) as hub:
        path = f"/{NAME}/resolve/main/model.safetensors"
        assert anonymous(hub).ask("GET", path).data == FILES["model.safetensors"]
        assert_sound(hub.folder)
        with hub.registry() as registry:
            assert gc(registry, grace=0).blobs == 0
            assert registry.list() == []
        assert anonymous(hub).ask("GET", "/api/models").json() == []
    with hub_of(tmp_path / "hub", "http://127.0.0.1:9") as hub:
        assert anonymous(hub).ask("GET", path).data == FILES["model.safetensors"]
