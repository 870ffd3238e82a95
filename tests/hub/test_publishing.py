"""The ways into a hub: each refuses a broken adapter and one that the hub's policy forbids, and no version comes of it."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from tests.hub.conftest import Running, client, serving
from tests.hub.oci.conftest import Registry
from tests.hub.oci.test_adapters import sent, whole
from tests.registry.test_not_understood import peft as not_understood
from tests.registry.test_packaging import break_it

NAME = "team/bad"
REASONS = {
    "broken": ("non-finite",),
    # What `oras push` sends has no facts to compare with a policy.
    "forbidden": ("rank 2 is over 1", "no adapter.json to compare with the project's policy"),
}


def by_commit(hub: Running, folder: Path) -> str:
    """Upload a folder as `hf upload` does."""
    from huggingface_hub.errors import HfHubHTTPError

    hf = client(hub, folder.parent)
    hf.create_repo(NAME)
    with pytest.raises(HfHubHTTPError) as caught:
        hf.upload_folder(folder_path=folder, repo_id=NAME)
    assert caught.value.response.status_code == 400
    return str(caught.value)


def by_commits(hub: Running, folder: Path) -> str:
    """Upload one file after the other: the last one makes it a whole adapter."""
    from huggingface_hub.errors import HfHubHTTPError

    hf = client(hub, folder.parent)
    hf.create_repo(NAME)
    *earlier_files, last = sorted(folder.iterdir())
    for path in earlier_files:
        hf.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=NAME)
    with pytest.raises(HfHubHTTPError) as caught:
        hf.upload_file(path_or_fileobj=last, path_in_repo=last.name, repo_id=NAME)
    assert caught.value.response.status_code == 400
    return str(caught.value)


def by_branch(hub: Running, folder: Path) -> str:
    """Upload a folder to a branch that is not main."""
    from huggingface_hub.errors import HfHubHTTPError

    hf = client(hub, folder.parent)
    hf.create_repo(NAME)
    hf.create_branch(NAME, branch="try")
    with pytest.raises(HfHubHTTPError) as caught:
        hf.upload_folder(folder_path=folder, repo_id=NAME, revision="try")
    return str(caught.value)


def by_oras(hub: Running, folder: Path) -> str:
    """Put a manifest of the files as `oras push` makes it."""
    return _put_manifest(hub, lambda registry: sent(registry, folder))


def by_push(hub: Running, folder: Path) -> str:
    """Put the manifest that `adapterhub push` makes."""
    return _put_manifest(hub, lambda registry: whole(registry, folder).raw)


def _put_manifest(hub: Running, make_manifest: Callable[[Registry], Any]) -> str:
    registry = Registry(hub.url, hub.token, NAME)
    answer = registry.put(make_manifest(registry), "prod")
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID"), answer.body
    return answer.words


@pytest.mark.parametrize("kind", ["broken", "forbidden"])
@pytest.mark.parametrize("way", [by_commit, by_commits, by_branch, by_oras, by_push])
def test_every_way_into_a_hub_refuses_what_a_push_refuses(
    way: Callable[[Running, Path], str], kind: str, tmp_path: Path, adapter: Callable[..., Path]
) -> None:
    folder = break_it(adapter(1)) if kind == "broken" else adapter(1)
    with serving(tmp_path / "hub", policy=None if kind == "broken" else Policy("the hub", max_rank=1)) as hub:
        words = way(hub, folder)
        assert any(reason in words for reason in REASONS[kind]), words
        with hub.registry() as registry:
            assert [str(row.ref) for row in registry.list()] == []


@pytest.mark.parametrize("kind", ["broken", "forbidden"])
def test_no_form_is_made_of_what_a_push_refuses(kind: str, tmp_path: Path, adapter: Callable[..., Path]) -> None:
    folder = break_it(adapter(1)) if kind == "broken" else adapter(1)
    with serving(tmp_path / "hub", policy=None if kind == "broken" else Policy("the hub", max_rank=1)) as hub:
        with hub.registry() as registry:
            registry.push(folder, Ref(NAME), force=True)
        answer = Registry(hub.url, hub.token, f"{NAME}.mlx").ask("GET", "manifests/latest")
        assert answer.status == 400, answer.body
        assert REASONS[kind][0] in answer.words
        with hub.registry() as registry:
            assert registry.store.conversions() == []


def test_a_repository_is_not_moved_to_a_name_that_the_policy_forbids(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    with serving(tmp_path / "hub", policy=Policy("the hub", allow=("team/*",))) as hub:
        hf = client(hub, tmp_path)
        hf.create_repo("team/sql")
        hf.upload_folder(folder_path=adapter(1), repo_id="team/sql")
        with pytest.raises(HfHubHTTPError, match="not a name that the hub allows"):
            hf.move_repo("team/sql", "other/sql")
        hf.move_repo("team/sql", "team/text2sql")


@pytest.mark.parametrize("way", ["commit", "oras", "push"])
def test_an_adapter_of_a_kind_that_is_not_known_is_kept_and_shown(way: str, tmp_path: Path) -> None:
    folder = not_understood(tmp_path / "a")
    with serving(tmp_path / "hub") as hub:
        registry = Registry(hub.url, hub.token, "team/next")
        if way == "commit":
            hf = client(hub, tmp_path)
            hf.create_repo("team/next")
            hf.upload_folder(folder_path=folder, repo_id="team/next")
        else:
            pushed = registry.put(sent(registry, folder) if way == "oras" else whole(registry, folder).raw, "prod")
            assert pushed.status == 201, pushed.body
        for page in ("", "/v1", "/versions", "/v1/tensors", "/v1/norms", "/v1/lineage"):
            request = urllib.request.Request(f"{hub.url}/team/next{page}", headers={"Accept": "text/html"})
            with urllib.request.urlopen(request) as answer:
                text = answer.read().decode()
                assert page or way == "oras" or "peft_type &#39;NEXT&#39; is not supported" in text
        with hub.registry() as stored:
            assert [str(row.ref) for row in stored.list()] == ["team/next:v1"]


def test_what_the_policy_forbids_by_now_is_given_to_writers_only(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    with serving(tmp_path / "hub") as hub:
        hf = client(hub, tmp_path)
        hf.create_repo(NAME)
        hf.upload_folder(folder_path=adapter(1), repo_id=NAME)
    (tmp_path / "hub" / "adapterhub.toml").write_text("[policy]\nmax_rank = 1\n")
    with serving(tmp_path / "hub") as hub:
        for name, reference in ((NAME, "latest"), (NAME, "v1"), (f"{NAME}.v1", "latest")):
            answer = Registry(hub.url, "", name).ask("GET", f"manifests/{reference}")
            assert (answer.status, "max_rank: rank 2 is over 1" in answer.words) == (400, True), answer.body
            assert Registry(hub.url, hub.token, name).ask("GET", f"manifests/{reference}").status == 200
        address = f"{hub.url}/{NAME}/resolve/main/adapter_config.json"
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(address)
        with urllib.request.urlopen(urllib.request.Request(address, headers={"authorization": f"Bearer {hub.token}"})) as file:
            assert file.status == 200
    (tmp_path / "hub" / "adapterhub.toml").write_text("[policy]\nmax_rank = 2\n")
    with serving(tmp_path / "hub") as hub:
        assert Registry(hub.url, "", NAME).ask("GET", "manifests/latest").status == 200
        urllib.request.urlopen(f"{hub.url}/{NAME}/resolve/main/adapter_config.json").close()
