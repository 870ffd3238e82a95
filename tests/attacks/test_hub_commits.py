"""A commit of the hub takes bounded memory, and leaves nothing that a gc cannot read."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.hub import commits
from adapterhub.hub.hf import commit_requests, reading
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.lru_cache import memory_of
from adapterhub.hub.workers import Worker
from adapterhub.maintenance import gc
from adapterhub.registry import repository_documents
from adapterhub.registry.repository_documents import MAIN
from adapterhub.registry.repository_records import Repositories
from tests.hub.conftest import Running, adapter, hub
from tests.support.hub_tenants import Tenant

__all__ = ["adapter", "hub"]


@pytest.fixture
def red(hub: Running) -> Tenant:
    tenant = Tenant(hub, "red")
    tenant.create("open")
    return tenant


def line(kind: str, **value: object) -> bytes:
    return json.dumps({"key": kind, "value": value}).encode() + b"\n"


@pytest.mark.parametrize("kind", ["deletedFile", "deletedFolder"])
def test_endless_paths_are_refused(red: Tenant, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(commit_requests, "MAX_FILES", 100)
    assert red.send("open", b"".join(line(kind, path=f"f{n}") for n in range(100))).status_code == 200
    answer = red.send("open", b"".join(line(kind, path=f"f{n}") for n in range(5000)))
    assert (answer.status_code, answer.json()["error"]) == (400, "red/open: more than 100 files")


def test_a_path_of_megabytes_is_refused(red: Tenant) -> None:
    assert red.send("open", line("deletedFile", path="f" * (1 << 20))).status_code == 400


def test_a_commit_too_large_to_be_read_again_is_refused(red: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository_documents, "MAX_DOCUMENT", 20_000)
    answer = red.commit("open", {f"{n:03}{'d' * 200}.txt": b"" for n in range(100)})
    assert answer.status_code == 400
    assert "use shorter names" in answer.json()["error"].lower()
    assert red.commit("open", {"README.md": b"# short"}).status_code == 200
    with red.hub.registry() as registry:
        gc.gc(registry, grace=0)


def test_a_file_that_is_left_out_is_told_in_one_line(red: Tenant) -> None:
    answer = red.commit("open", {"README.md": b"# r", ".git/x\r\nX-Evil: 1": b"x"})
    assert answer.status_code == 200
    assert "X-Evil" not in answer.headers
    answer = red.commit("open", {"README.md": b"# s", ".git/\u20ac\ud800": b"x"})
    assert answer.status_code in (200, 400)


def test_what_lies_below_a_removed_folder_goes_and_nothing_else(red: Tenant) -> None:
    assert red.commit("open", dict.fromkeys(("a/b/c.txt", "ab/c.txt", "a.txt", "d/e.txt"), b"x")).ok
    assert red.send("open", b"".join(line("deletedFolder", path=path) for path in ("a", "d/e", "b"))).ok
    listed = {
        entry["path"] for entry in red.get("/api/models/red/open/tree/main?recursive=true").json() if entry["type"] == "file"
    }
    assert listed == {"ab/c.txt", "a.txt", "d/e.txt"}


def test_commits_that_take_minutes_to_be_listed_are_refused_until_they_are_squashed(
    red: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand commits of 10,000 files each, made one file at a time, took a reader of their list 42 s and 3 GB."""
    monkeypatch.setattr(commit_requests, "_MAX_HISTORY", 100_000)
    assert red.commit("open", {f"{n}.txt": b"" for n in range(100)}).ok
    answers = [red.commit("open", {"README.md": str(n).encode()}) for n in range(20)]
    assert {answer.status_code for answer in answers} == {200, 400}
    assert "are more than can be listed. Squash the branch" in answers[-1].json()["error"]
    assert red.post("/api/models/red/open/super-squash/main", json={}).ok
    assert red.commit("open", {"README.md": b"# Again"}).ok
    assert len(red.get("/api/models/red/open/commits/main").json()) == 2


def test_a_page_of_commits_reads_those_of_the_page(red: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page read every commit of the repository: 3.4 s for 34,000, without a token."""
    monkeypatch.setattr(reading, "_PAGE_EXPANDED", 3)
    for number in range(8):
        assert red.commit("open", {"README.md": str(number).encode()}).ok
    pages = [red.get("/api/models/red/open/commits/main")]
    while link := pages[-1].links.get("next"):
        pages.append(red.get(link["url"].removeprefix(red.hub.url)))
    assert [len(answer.json()) for answer in pages] == [3, 3, 2]
    assert len({commit["id"] for answer in pages for commit in answer.json()}) == 8
    read: list[str] = []
    commit = Repositories.commit
    monkeypatch.setattr(Repositories, "commit", lambda *arguments: read.append(arguments[-1]) or commit(*arguments))
    assert red.get(pages[0].links["next"]["url"].removeprefix(red.hub.url)).json() == pages[1].json()
    assert len(read) <= 12
    assert red.get("/api/models/red/open/commits/main?p=1").status_code == 400


def test_a_commit_of_endless_lines_is_refused(red: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_requests, "_MAX_LINES", 20)
    answer = red.send("open", line("header", summary="x") * 30)
    assert answer.status_code == 400
    assert answer.json()["error"] == "commit: more than 20 lines. Make several commits"


def test_paths_are_looked_up_and_not_searched_for(red: Tenant) -> None:
    """10,000 paths in 50 kB took 7 s with a tree of 10,000 files, without a token."""
    assert red.commit("open", dict.fromkeys(("a/b/c.txt", "ab/c.txt"), b"x")).ok
    expected = ["a", "a/b", "a/b/c.txt", "b", "", "ab", "a/b/c.txt/d", *["a"] * 200_000]
    answer = red.post("/api/models/red/open/paths-info/main", json={"paths": expected})
    assert [entry["path"] for entry in answer.json()] == ["a", "a/b", "a/b/c.txt", "ab"]


def test_trees_of_thousands_of_files_are_not_held_in_memory(red: Tenant, adapter: Callable[..., Path]) -> None:
    """2,000 versions of 10,000 files, each made by a commit of one file, were 10 GB once somebody had looked at them."""
    large = {f"{n}.txt": b"" for n in range(200)}
    assert red.commit("open", large | {"README.md": b"#"}).ok
    red.create("whole")
    assert red.upload("whole", adapter(1)).ok
    assert red.commit("whole", large).ok
    with red.hub.registry() as registry, closing(HubDatabase(red.hub.folder)) as database:
        worker = Worker(registry, Repositories(registry), database)
        measured = worker.caches.commits, worker.caches.manifests
        for cache in measured:
            cache.max_size = 100_000
        for name in ("red/open", "red/whole"):
            view = commits.find_view(worker, name)
            assert view
            for revision in (MAIN, commits.HEAD, f"refs/heads/{MAIN}"):
                assert len(commits.find(worker, view, revision).files) > 200
            assert max(memory_of(cache._values) for cache in measured) < 2 * 100_000
