"""The order of commits: of those that come in different ways, in long histories, and by writers of several processes."""

from __future__ import annotations

import base64
import datetime
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapterhub.hub.hf import reading
from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import CommitRecord, commit_id
from tests.hub.conftest import Running, serving
from tests.hub.sending import Sending


@pytest.fixture
def repo(hf: Any) -> str:
    """An empty repository."""
    hf.create_repo("team/sql")
    return "team/sql"


def test_versions_pushed_in_another_way_and_drafts_are_in_the_history(
    hub: Running, hf: Any, repo: str, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = datetime.datetime.now(datetime.UTC)
    times = (start + datetime.timedelta(seconds=number) for number in itertools.count())
    clock = SimpleNamespace(UTC=datetime.UTC, datetime=SimpleNamespace(now=lambda _: next(times)))
    monkeypatch.setattr("adapterhub.registry.moves.datetime", clock)
    ids = [hf.upload_file(path_or_fileobj=b"# Draft\n", path_in_repo="README.md", repo_id=repo).oid]
    with hub.registry() as registry:
        ids += [commit_id(registry.push(adapter(seed), Ref(repo)).digest) for seed in (1, 2)]
    ids.append(hf.upload_folder(folder_path=adapter(1), repo_id=repo).oid)
    with hub.registry() as registry:
        ids.append(commit_id(registry.push(adapter(3), Ref(repo)).digest))
    assert len({*ids}) == 5
    assert [commit.commit_id for commit in hf.list_repo_commits(repo)] == [*reversed(ids)]


def test_a_long_history_has_pages_that_read_what_they_show(
    hub: Running, hf: Any, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [hf.upload_file(path_or_fileobj=b"%d" % n, path_in_repo="n.json", repo_id=repo).oid for n in range(7)]
    monkeypatch.setattr(reading, "_PAGE_EXPANDED", 3)
    documents: list[str] = []
    parse = CommitRecord.parse
    monkeypatch.setattr(CommitRecord, "parse", lambda raw, digest: (documents.append(digest), parse(raw, digest))[1])
    link, listed, costs = f"/api/models/{repo}/commits/main", [], []
    while link:
        answer = Sending(hub.url, hub.token).ask("GET", link)
        listed += [commit["id"] for commit in answer.json()]
        costs.append(len(documents))
        documents.clear()
        link = answer.headers.get("link", "").partition(">")[0].lstrip("<")
    assert listed == [*reversed(ids)] == [commit.commit_id for commit in hf.list_repo_commits(repo)]
    assert len(costs) == 3
    assert max(costs) <= 2 * 3 + 3


@pytest.mark.parametrize("named", [False, True])
def test_writers_of_two_processes_queue_unless_they_name_a_parent(
    hub: Running, hf: Any, repo: str, adapter: Callable[..., Path], named: bool
) -> None:
    """Two servers over one folder know of each other what two processes do: nothing. Each commit is on the one before."""
    hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    parent = hf.model_info(repo).sha

    def write(sending: Sending, writer: int) -> list[int]:
        statuses = []
        for number in range(commits):
            content = base64.b64encode(f"[{writer}, {number}]".encode()).decode()
            header = {"summary": f"{writer} {number}", **({"parentCommit": parent} if named else {})}
            file = {"path": f"n{writer}.json", "content": content, "encoding": "base64"}
            body = "\n".join(json.dumps({"key": key, "value": value}) for key, value in (("header", header), ("file", file)))
            statuses.append(sending.ask("POST", f"/api/models/{repo}/commit/main", body).status)
        return statuses

    writers, commits = (4, 3) if named else (8, 10)
    with serving(hub.folder) as other_hub, ThreadPoolExecutor(writers) as pool:
        sent = [pool.submit(write, Sending((hub, other_hub)[n % 2].url, hub.token), n) for n in range(writers)]
        statuses = [status for future in sent for status in future.result()]
    listed = hf.list_repo_commits(repo)
    if named:
        assert (statuses.count(200), {*statuses}) == (1, {200, 412})
        assert len(listed) == 2
    else:
        assert statuses == [200] * 80
        titles = {f"{writer} {number}" for writer in range(writers) for number in range(commits)}
        assert {commit.title for commit in listed[:-1]} == titles
        assert {f"n{writer}.json" for writer in range(writers)} <= {*hf.list_repo_files(repo)}
