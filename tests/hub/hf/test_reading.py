"""Reading by the clients of the Hugging Face Hub, unmodified."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3

from adapterhub.hub import commits
from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import commit_id
from tests.hub.conftest import Running, run_hf


@pytest.fixture
def pushed(hub: Running, adapter: Callable[..., Path]) -> list[str]:
    """Two versions of team/sql; their digests."""
    with hub.registry() as registry:
        return [registry.push(adapter(seed), Ref("team/sql", tag=tag)).digest for seed, tag in ((1, "dev"), (2, "prod"))]


def test_a_version_is_downloaded_with_every_byte_under_its_digest_as_revision(
    hub: Running, hf: Any, pushed: list[str], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for digest, seed in zip(pushed, (1, 2), strict=True):
        out = Path(hf.snapshot_download("team/sql", revision=commit_id(digest), cache_dir=tmp_path / "cache"))
        assert out.name == commit_id(digest)
        for path in adapter(seed).iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()
        assert (out / "adapter.json").is_file()


def test_branch_tag_number_and_commit_name_the_same_versions_as_in_the_registry(hf: Any, pushed: list[str]) -> None:
    first, second = map(commit_id, pushed)
    for revision, commit in {"main": second, "dev": first, "v1": first, "prod": second, first: first}.items():
        assert hf.model_info("team/sql", revision=revision).sha == commit
    refs = hf.list_repo_refs("team/sql")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"dev": first, "v1": first, "prod": second, "v2": second}
    assert [commit.commit_id for commit in hf.list_repo_commits("team/sql")] == [second, first]


def test_what_is_missing_is_named_as_what_it_is(hf: Any, pushed: list[str], tmp_path: Path) -> None:
    from huggingface_hub import errors

    with pytest.raises(errors.RepositoryNotFoundError):
        hf.model_info("team/nothing")
    with pytest.raises(errors.RevisionNotFoundError):
        hf.model_info("team/sql", revision="v9")
    with pytest.raises(errors.EntryNotFoundError):
        hf.hf_hub_download("team/sql", "nothing.txt", cache_dir=tmp_path)
    with pytest.raises(errors.EntryNotFoundError):
        list(hf.list_repo_tree("team/sql", "additional_chat_templates"))


def test_trees_and_paths_have_what_git_would_say_of_each_file(hf: Any, pushed: list[str]) -> None:
    tree = {file.path: file for file in hf.list_repo_tree("team/sql", expand=True)}
    weights = tree["adapter_model.safetensors"]
    assert weights.lfs
    assert (weights.lfs.size, len(weights.lfs.sha256)) == (weights.size, 64)
    # `git hash-object` of "# A test\n".
    assert tree["README.md"].blob_id == "fde1886bab6d5f8c0a33bb631236f8bea7d4dcfc"
    assert tree["README.md"].lfs is None
    assert [info.path for info in hf.get_paths_info("team/sql", ["README.md", "nothing"])] == ["README.md"]


def test_models_are_found_by_words_author_and_base(hf: Any, pushed: list[str]) -> None:
    for query in (
        {"search": "sql"},
        {"author": "team"},
        {"filter": "base_model:adapter:org/base"},
        {"filter": "base_model:org/base"},
    ):
        assert [model.id for model in hf.list_models(**query)] == ["team/sql"]
    assert not list(hf.list_models(search="french"))
    assert not list(hf.list_models(author="other"))
    assert not list(hf.list_models(filter="base_model:org/other"))


def test_a_private_repository_does_not_exist_for_others(hub: Running, hf: Any, adapter: Callable[..., Path]) -> None:
    from huggingface_hub import HfApi, errors

    hf.create_repo("alice/secret", private=True)
    hf.upload_folder(folder_path=adapter(1), repo_id="alice/secret")
    for other_api in (
        HfApi(endpoint=hub.url, token=False),
        HfApi(endpoint=hub.url, token=hub.make_token("eve", "read", namespaces=["eve"])),
    ):
        with pytest.raises(errors.RepositoryNotFoundError):
            other_api.model_info("alice/secret")
        assert not list(other_api.list_models(author="alice"))
    assert hf.model_info("alice/secret").private


def test_the_command_line_of_the_hub_downloads_and_resumes(hub: Running, pushed: list[str], tmp_path: Path) -> None:
    assert "alice" in run_hf(hub, tmp_path, "auth", "whoami")
    run_hf(hub, tmp_path, "download", "team/sql", "--local-dir", str(tmp_path / "out"), "--revision", "prod")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_bad_token_is_told_from_a_missing_repository(hub: Running, pushed: list[str], tmp_path: Path) -> None:
    answer = run_hf(hub, tmp_path, "download", "team/sql", code=1, HF_TOKEN="hf_wrong")
    assert "Invalid credentials in Authorization header" in answer


@pytest.mark.parametrize("name", ["%01/x", "a" * 5000 + "/b", "a/" + "b" * 300, "%2e%2e/x", "con/nul"])
def test_what_cannot_be_a_name_is_a_repository_that_does_not_exist(hub: Running, name: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{hub.url}/api/models/{name}", timeout=30)
    assert (error.value.code, error.value.headers["x-error-code"]) == (404, "RepoNotFound")


def test_an_answer_that_is_remembered_is_that_of_now_and_only_for_those_who_may_see_it(
    hub: Running, hf: Any, adapter: Callable[..., Path]
) -> None:
    def get(path: str, token: str = "") -> Any:
        return urllib3.request("GET", f"{hub.url}{path}", headers={"authorization": f"Bearer {token}"} if token else {})

    hf.create_repo("team/sql")
    with hub.registry() as registry:
        for seed in (1, 2):  # by another process
            version = registry.push(adapter(seed), Ref("team/sql"))
            for _ in range(2):
                assert f"sha256:{get('/api/models/team/sql').json()['sha']}" == version.digest[:47]
                oids = {
                    entry["path"]: entry.get("lfs", {}).get("oid") for entry in get("/api/models/team/sql/tree/main").json()
                }
                files = {file.path: file.digest.removeprefix("sha256:") for file in registry.files(version)}
                assert oids["adapter_model.safetensors"] == files["adapter_model.safetensors"]
        sibling = get("/api/models/team/sql?blobs=true").json()["siblings"][0]
        assert sibling["size"] == next(file.size for file in registry.files(version) if file.path == sibling["rfilename"])
        assert get("/api/models/team/sql.v1").json()["sha"] != get("/api/models/team/sql.v2").json()["sha"]
    hf.update_repo_settings("team/sql", private=True)
    for path in ("/api/models/team/sql", "/api/models/team/sql/tree/main", "/api/models/team/sql.v1"):
        assert get(path).status == 404
        assert get(path, hub.token).status == 200
    assert get("/api/models/team/sql", hub.token).json()["private"]


def test_refs_of_thousands_of_versions_are_bounded_and_each_can_be_looked_up(
    hf: Any, pushed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    monkeypatch.setattr(commits, "MAX_TAGS", 1)
    assert [ref.name for ref in hf.list_repo_refs("team/sql").tags] == ["dev", "v2"]
    assert hf.model_info("team/sql", revision="v1").sha == commit_id(pushed[0])
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        hf.create_branch("team/sql", branch="v1")
