"""Writing by the clients of the Hugging Face Hub, unmodified: commits become versions, or are refused in readable words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from adapterhub.hub import commits
from adapterhub.hub.hf import writing
from adapterhub.hub.hf.hf_errors import ResponseError
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.hub.workers import Worker
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import CommitRecord, Repository, commit_id
from adapterhub.registry.repository_records import Repositories
from adapterhub.store.store_files import MAX_DOCUMENT
from tests.hub.conftest import Running


@pytest.fixture
def repo(hf: Any) -> str:
    """An empty repository."""
    hf.create_repo("team/sql")
    return "team/sql"


def test_an_uploaded_folder_is_the_version_that_a_push_of_it_would_be(
    hub: Running, hf: Any, repo: str, adapter: Callable[..., Path]
) -> None:
    commit = hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    digest = oci_manifest.build(adapter(1)).digest
    assert commit.oid == commit_id(digest)
    with hub.registry() as registry:
        version = registry.resolve(Ref(repo))
        assert (version.digest, version.number) == (digest, 1)


def test_a_readme_alone_is_a_commit_without_a_number(hub: Running, hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    first = hf.upload_file(path_or_fileobj=b"# Soon\n", path_in_repo="README.md", repo_id=repo)
    assert hf.list_repo_refs(repo).tags == []
    assert [ref.target_commit for ref in hf.list_repo_refs(repo).branches] == [first.oid]
    hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    assert [tag.name for tag in hf.list_repo_refs(repo).tags] == ["v1"]
    assert [commit.commit_id for commit in hf.list_repo_commits(repo)][1] == first.oid


def test_the_same_commit_again_is_the_one_that_was_made(hub: Running, hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    from huggingface_hub import CommitOperationAdd

    first = hf.upload_folder(folder_path=adapter(1), repo_id=repo)

    def commit(parent: str, text: bytes) -> Any:
        operation = CommitOperationAdd("README.md", text)
        return hf.create_commit(repo, [operation], commit_message="New card", parent_commit=parent)

    commit_info = commit(first.oid, b"# New\n")
    # Its answer was lost: the client sends it again, on the same parent.
    assert commit(first.oid, b"# New\n").oid == commit_info.oid
    assert len(hf.list_repo_commits(repo)) == 2


def test_a_commit_on_another_parent_is_refused(hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    first = hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    hf.upload_file(path_or_fileobj=b"# One\n", path_in_repo="README.md", repo_id=repo)
    late = [CommitOperationAdd("README.md", b"# Two\n")]
    with pytest.raises(HfHubHTTPError, match="has moved to") as error:
        hf.create_commit(repo, late, commit_message="x", parent_commit=first.oid)
    assert error.value.response.status_code == 412


def test_a_branch_that_another_process_moved_meanwhile_is_not_moved_back(hub: Running, hf: Any, repo: str) -> None:
    with hub.registry() as registry, closing(open_database(hub.settings)) as database:
        worker = Worker(registry, Repositories(registry), database)
        view = commits.find_view(worker, repo)
        assert view is not None
        commit_info = hf.upload_file(path_or_fileobj=b"# One\n", path_in_repo="README.md", repo_id=repo)
        with pytest.raises(ResponseError, match="team/sql@main has moved meanwhile: commit again"):
            writing._record_commit(worker, view, "main", CommitRecord({}))
    assert hf.model_info(repo).sha == commit_info.oid


@pytest.mark.parametrize(
    ("path", "data", "words"),
    [
        ("adapter_model.bin", b"\x80\x04\x95", "a pickle can run code when it is loaded"),
        ("notes.json", b"\x80\x04\x95", "a pickle or an archive under another name"),
        ("adapter_config.json", b"{}", "not an adapter of a known format"),
        ("../up.json", b"{}", "cannot be written safely everywhere"),
    ],
)
def test_what_no_push_would_take_is_refused_in_the_same_words(
    hf: Any, repo: str, adapter: Callable[..., Path], path: str, data: bytes, words: str
) -> None:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import BadRequestError

    hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    operation = CommitOperationAdd("placeholder.json", data)
    operation.path_in_repo = path  # past the client's own check
    with pytest.raises(BadRequestError) as error:
        hf.create_commit(repo, [operation], commit_message="x")
    assert words in str(error.value)
    assert len(hf.list_repo_commits(repo)) == 1


def test_new_weights_get_a_manifest_of_their_own(hub: Running, hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    weights = (adapter(2) / "adapter_model.safetensors").read_bytes()
    hf.upload_file(path_or_fileobj=weights, path_in_repo="adapter_model.safetensors", repo_id=repo)
    with hub.registry() as registry:
        assert registry.resolve(Ref(repo)).digest == oci_manifest.build(adapter(2)).digest


def test_a_trainer_s_leftovers_are_left_out(hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    folder = adapter(1)
    (folder / "training_args.bin").write_bytes(b"\x80\x04\x95")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"\x80\x04\x95")
    hf.upload_folder(folder_path=folder, repo_id=repo)
    assert hf.list_repo_files(repo) == ["README.md", "adapter.json", "adapter_config.json", "adapter_model.safetensors"]


def test_branches_and_tags_are_made_and_removed(hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    first = hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    hf.create_tag(repo, tag="stable")
    hf.create_branch(repo, branch="try")
    with pytest.raises(HfHubHTTPError, match="exists already"):
        hf.create_tag(repo, tag="stable")
    tried = hf.upload_file(path_or_fileobj=b"# Try\n", path_in_repo="README.md", repo_id=repo, revision="try")
    refs = hf.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first.oid, "try": tried.oid}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"stable": first.oid, "v1": first.oid, "v2": tried.oid}
    hf.delete_tag(repo, tag="stable")
    hf.delete_branch(repo, branch="try")
    assert {ref.name for ref in hf.list_repo_refs(repo).branches} == {"main"}
    with pytest.raises(HfHubHTTPError, match="try: no such branch"):
        hf.delete_branch(repo, branch="try")


def test_going_back_to_earlier_content_moves_main_back(hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    first = hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    second = hf.upload_file(path_or_fileobj=b"# New\n", path_in_repo="README.md", repo_id=repo)
    again = hf.upload_file(path_or_fileobj=b"# A test\n", path_in_repo="README.md", repo_id=repo)
    info = hf.model_info(repo)
    assert (info.sha, info.adapterhub["number"]) == (again.oid, 1)
    assert {ref.name: ref.target_commit for ref in hf.list_repo_refs(repo).tags} == {"v1": first.oid, "v2": second.oid}
    assert hf.model_info(repo, revision="v1").sha == hf.model_info(repo, revision=first.oid).sha == first.oid


def test_history_is_never_rewritten(hub: Running, repo: str, adapter: Callable[..., Path]) -> None:
    """Also where the third commit has the content of the first, and the fourth that of the second, by others."""
    oids, folder = [], adapter(1)
    for name, text in (("ann", b"# One\n"), ("bob", b"# Two\n"), ("cat", b"# One\n"), ("dan", b"# Two\n")):
        api = HfApi(hub.url, token=hub.make_token(name, "write"))
        (folder / "README.md").write_bytes(text)
        oids.append(api.upload_folder(folder_path=folder, repo_id=repo, commit_message=f"By {name}").oid)
    commits = [(commit.commit_id, commit.title, commit.authors) for commit in api.list_repo_commits(repo)]
    names = ("dan", "cat", "bob", "ann")
    assert commits == [(oid, f"By {name}", [name]) for oid, name in zip(reversed(oids), names, strict=True)]
    assert len({*oids}) == 4
    assert [commit.commit_id for commit in api.list_repo_commits(repo, revision=oids[1])] == [oids[1], oids[0]]
    assert [api.model_info(repo, revision=oid).adapterhub["number"] for oid in oids] == [1, 2, 1, 2]
    with hub.registry() as registry:
        assert [row.number for row in registry.list(repo)] == [2, 1]


def test_a_squashed_branch_has_one_commit_and_the_versions_stay(
    hub: Running, hf: Any, repo: str, adapter: Callable[..., Path]
) -> None:
    from huggingface_hub import errors

    first, _ = (hf.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id=repo) for text in (b"# A\n", b"# B\n"))
    hf.create_branch(repo, branch="draft")
    notes = [hf.upload_file(path_or_fileobj=f"[{n}]".encode(), path_in_repo="n.json", repo_id=repo) for n in range(3)]
    hf.super_squash_history(repo, commit_message="One")
    assert hf.list_repo_commits(repo)[0].title == "One"
    assert sorted(hf.list_repo_files(repo)) == ["README.md", "n.json"]
    for note in notes:
        with pytest.raises(errors.RevisionNotFoundError):
            hf.model_info(repo, revision=note.oid)
    assert hf.model_info(repo, revision=first.oid).sha == first.oid  # the draft came from it
    hf.super_squash_history(repo, branch="draft")
    with pytest.raises(errors.RevisionNotFoundError):
        hf.model_info(repo, revision=first.oid)

    versions = [hf.upload_folder(folder_path=adapter(seed), repo_id=repo) for seed in (1, 2)]
    hf.super_squash_history(repo, commit_message="All")
    assert [commit.title for commit in hf.list_repo_commits(repo)] == ["All"]
    assert hf.model_info(repo).adapterhub["number"] == 2
    for number, version in enumerate(versions, 1):
        assert hf.model_info(repo, revision=f"v{number}").sha == version.oid


def test_what_cannot_be_squashed_is_refused(hub: Running, hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    from huggingface_hub import HfApi, errors

    hf.super_squash_history(repo)  # of nothing
    hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    with pytest.raises(errors.RevisionNotFoundError):
        hf.super_squash_history(repo, branch="none")
    with pytest.raises(errors.BadRequestError, match="is not a branch"):
        hf.super_squash_history(repo, branch="v1")
    with pytest.raises(errors.HfHubHTTPError) as error:
        HfApi(endpoint=hub.url, token=hub.make_token("bob", "read")).super_squash_history(repo)
    assert error.value.response.status_code == 403


def test_a_name_with_too_many_commits_goes_on_after_a_squash(hub: Running, hf: Any, repo: str) -> None:
    from huggingface_hub import errors

    hf.upload_file(path_or_fileobj=b"# A\n", path_in_repo="README.md", repo_id=repo)
    with hub.registry() as registry:
        repositories = Repositories(registry)
        state = repositories.get(repo)
        assert state
        (digest,) = state.commits.values()
        entry = len(f'"{"0" * 40}":"{digest}",')

        def full(count: int) -> Repository:
            return replace(state, commits={**{f"{number:040x}": digest for number in range(count)}, **state.commits})

        def size(count: int) -> int:
            raw, divided, _ = full(count).dump(None)
            return len(raw) + divided.pages_size

        entry_count = MAX_DOCUMENT // entry
        while (excess := size(entry_count) - MAX_DOCUMENT) > 0:
            entry_count -= excess // entry + 1
        repositories.change(repo, lambda _: full(entry_count))

    def upload() -> None:
        for number in range(3):
            hf.upload_file(path_or_fileobj=f"[{number}]".encode(), path_in_repo="n.json", repo_id=repo)

    with pytest.raises(errors.BadRequestError, match="Squash its commits"):
        upload()
    hf.super_squash_history(repo)
    hf.upload_file(path_or_fileobj=b"[9]", path_in_repo="n.json", repo_id=repo)
    assert len(hf.list_repo_commits(repo)) == 2


def test_a_moved_repository_is_found_under_its_old_name(hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    commit = hf.upload_folder(folder_path=adapter(1), repo_id=repo)
    hf.move_repo(repo, "team/text2sql")
    assert hf.model_info(repo).id == "team/text2sql"
    assert hf.model_info("team/text2sql").sha == commit.oid


def test_a_token_may_write_only_where_it_may(hub: Running, hf: Any, repo: str, adapter: Callable[..., Path]) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for token in (hub.make_token("bob", "read"), hub.make_token("ann", "write", namespaces=["ann"])):
        other_api, folder = HfApi(endpoint=hub.url, token=token), adapter(1)
        with pytest.raises(HfHubHTTPError) as error:
            other_api.upload_folder(folder_path=folder, repo_id=repo)
        assert error.value.response.status_code == 403
    assert not hf.list_repo_files(repo)
