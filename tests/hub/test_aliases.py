"""Names that stand for a version or a form of another repository, in both dialects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.bases import registered_bases
from adapterhub.hub import aliases
from adapterhub.hub.aliases import Alias
from adapterhub.manifest.oci_manifest import TITLE
from adapterhub.ref import Ref
from adapterhub.registry import conversion_cache
from adapterhub.registry.adapter_recipe import Conversion
from adapterhub.registry.repository_documents import commit_id
from adapterhub_converters.bases import BaseTensor
from adapterhub_converters.formats import convert, peft
from tests.converters import trained
from tests.hub.conftest import Running
from tests.hub.oci.conftest import Registry


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("team/sql", None),
        ("team/sql.v", None),
        ("team/sql.v0", None),
        ("team/sql.v03", None),
        ("team/sql.gguf2", None),
        ("team/v3", None),
        ("team/sql.v3", Alias("team/sql", 3)),
        ("team/sql.gguf", Alias("team/sql", 0, "gguf")),
        ("team/sql.v12.mlx", Alias("team/sql", 12, "mlx")),
        ("team/sql.v1.v2", Alias("team/sql.v1", 2)),
    ],
)
def test_a_name_stands_for_another_by_its_ending(name: str, alias: Alias | None) -> None:
    assert aliases.parse(name) == alias


@pytest.fixture
def versions(hub: Running, adapter: Callable[..., Path]) -> list[str]:
    """Two versions of team/sql; their digests."""
    with hub.registry() as registry:
        return [registry.push(adapter(seed), Ref("team/sql", tag="prod")).digest for seed in (1, 2)]


def test_a_frozen_name_is_one_version_for_ever(
    hub: Running, hf: Any, versions: list[str], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for number, digest in enumerate(versions, 1):
        name, commit = f"team/sql.v{number}", commit_id(digest)
        assert hf.model_info(name).sha == commit
        assert hf.model_info(name).id == name
        refs = hf.list_repo_refs(name)
        assert [(ref.name, ref.target_commit) for ref in (*refs.branches, *refs.tags)] == [
            ("main", commit),
            (f"v{number}", commit),
        ]
        assert [listed_commit.commit_id for listed_commit in hf.list_repo_commits(name)] == [commit]
        for revision in ("main", f"v{number}", commit):
            out = Path(hf.snapshot_download(name, revision=revision, cache_dir=tmp_path / "cache"))
            assert (out / "adapter_model.safetensors").read_bytes() == (
                adapter(number) / "adapter_model.safetensors"
            ).read_bytes()
        registry = Registry(hub.url, None, name)
        assert registry.ask("GET", "tags/list").json["tags"] == ["latest", f"v{number}"]
        for reference in ("latest", f"v{number}", digest):
            answer = registry.ask("GET", f"manifests/{reference}")
            assert answer.headers["docker-content-digest"] == digest
        for layer in answer.json["layers"]:
            assert registry.ask("GET", f"blobs/{layer['digest']}").status == 200
        assert registry.ask("GET", f"blobs/{answer.json['config']['digest']}").status == 200


def test_a_frozen_name_has_nothing_of_the_other_versions(hub: Running, hf: Any, versions: list[str]) -> None:
    from huggingface_hub import errors

    for revision in ("prod", "v2", commit_id(versions[1]), "^1"):
        with pytest.raises(errors.RevisionNotFoundError):
            hf.model_info("team/sql.v1", revision=revision)
    registry = Registry(hub.url, hub.token, "team/sql.v1")
    weights = Registry(hub.url, None, "team/sql").ask("GET", "manifests/v2").json["layers"][-1]["digest"]
    for path in ("manifests/prod", "manifests/v2", f"manifests/{versions[1]}", f"blobs/{weights}"):
        assert registry.ask("GET", path).status == 404
    for name in ("team/sql.v3", "team/none.v1", "team/sql.v1.v1"):
        with pytest.raises(errors.RepositoryNotFoundError):
            hf.model_info(name)


def test_a_frozen_name_is_read_only(hub: Running, hf: Any, versions: list[str], adapter: Callable[..., Path]) -> None:
    from huggingface_hub import errors

    words = "is an alias for a version or a format of another repository"
    for write in (
        lambda: hf.create_repo("team/sql.v1"),
        lambda: hf.create_repo("team/sql.v9"),
        lambda: hf.upload_folder(folder_path=adapter(3), repo_id="team/sql.v1"),
        lambda: hf.create_tag("team/sql.v1", tag="x"),
        lambda: hf.create_branch("team/sql.v1", branch="x"),
        lambda: hf.delete_repo("team/sql.v1"),
        lambda: hf.move_repo("team/sql", "team/sql.v7"),
        lambda: hf.update_repo_settings("team/sql.v1", private=True),
    ):
        with pytest.raises(errors.HfHubHTTPError, match=words):
            write()
    registry = Registry(hub.url, hub.token, "team/sql.v1")
    for method, path in (("POST", "blobs/uploads/"), ("PUT", "manifests/x"), ("DELETE", "manifests/v1")):
        assert words in registry.ask(method, path, b"{}").words


def test_a_frozen_name_is_as_private_as_what_it_stands_for(hub: Running, hf: Any, versions: list[str]) -> None:
    from huggingface_hub import HfApi, errors

    hf.update_repo_settings("team/sql", private=True)
    with pytest.raises(errors.RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).model_info("team/sql.v1")
    assert Registry(hub.url, None, "team/sql.v1").ask("GET", "manifests/latest").status == 401
    assert hf.model_info("team/sql.v1").private


# ---- forms


def llama(tmp_path: Path, name: str, seed: int = 0) -> Path:
    """An adapter of a Llama that its config names."""
    folder = trained.folder(trained.full("q_proj", "v_proj", seed=seed), tmp_path / name)
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "team/base"}))
    return folder


def test_a_form_is_made_once_and_has_a_digest_in_both_dialects(
    hub: Running, hf: Any, versions: list[str], tmp_path: Path
) -> None:
    with hub.registry() as opened:
        conversion_cache.pull(opened, Ref("team/sql", number=1), tmp_path / "mlx", Conversion("mlx"))
    for name in ("team/sql.v1.mlx", "team/sql.mlx"):
        info = hf.model_info(name)
        assert [sibling.rfilename for sibling in info.siblings] == [
            "adapter.json",
            "adapter_config.json",
            "adapters.safetensors",
        ]
        out = Path(hf.snapshot_download(name, cache_dir=tmp_path / "cache"))
        registry = Registry(hub.url, None, name)
        assert commit_id(registry.ask("HEAD", "manifests/latest").headers["docker-content-digest"]) == info.sha == out.name
        for layer in registry.ask("GET", "manifests/latest").json["layers"]:
            path = out / layer["annotations"][TITLE]
            assert registry.ask("GET", f"blobs/{layer['digest']}").body == path.read_bytes()
            if name == "team/sql.v1.mlx":
                assert path.read_bytes() == (tmp_path / "mlx" / path.name).read_bytes()
        assert hf.model_info(name).sha == info.sha
    assert hf.model_info("team/sql.mlx").sha != hf.model_info("team/sql.v1.mlx").sha


def test_a_form_comes_back_after_a_gc(hub: Running, hf: Any, versions: list[str]) -> None:
    sha = hf.model_info("team/sql.v1.mlx").sha
    with hub.registry() as opened:
        for path in list(opened.store.blobs()):
            if path.name.startswith(sha):
                path.unlink()
    assert hf.model_info("team/sql.v1.mlx").sha == sha


def test_a_form_that_depends_on_the_base_needs_it_in_the_registry(hub: Running, hf: Any, tmp_path: Path) -> None:
    from huggingface_hub import errors

    with hub.registry() as opened:
        opened.push(llama(tmp_path, "one"), Ref("team/one"))
        opened.push(llama(tmp_path, "two", seed=1), Ref("team/two"))
    with pytest.raises(errors.HfHubHTTPError, match="depends on the base model, team/base, and the hub does not have it"):
        hf.model_info("team/one.gguf")
    assert "depends on the base model" in Registry(hub.url, None, "team/one.gguf").ask("GET", "manifests/latest").words
    tensors = {f"{name}.weight": BaseTensor(shape, "F32") for name, shape in trained.TARGETS.items()}
    with hub.registry() as opened:
        registered_bases.add(opened, "llama", dataclasses.replace(trained.LLAMA, tensors=tensors), source="x")
    assert hf.list_repo_files("team/two.gguf") == ["adapter.json", "two.gguf"]
    path = hf.hf_hub_download("team/two.gguf", "two.gguf", cache_dir=tmp_path / "cache")
    assert convert.sniff(Path(path)) == "gguf"


def test_a_form_is_made_for_nobody_who_may_not_see_it(hub: Running, hf: Any, versions: list[str]) -> None:
    hf.update_repo_settings("team/sql", private=True)
    assert Registry(hub.url, None, "team/sql.mlx").ask("GET", "manifests/latest").status == 401
    with hub.registry() as opened:
        assert opened.store.conversions() == []
    assert Registry(hub.url, hub.token, "team/sql.mlx").ask("GET", "manifests/latest").status == 200
    for name in ("team/none.mlx", "team/sql.v9.mlx", "team/sql.v1.v1.mlx", "team/sql.mlx.mlx"):
        assert Registry(hub.url, hub.token, name).ask("GET", "manifests/latest").status == 404


def test_an_address_without_a_token_has_twenty_forms_made(hub: Running, adapter: Callable[..., Path]) -> None:
    with hub.registry() as opened:
        for seed in range(21):
            opened.push(adapter(seed), Ref("team/sql"))

    def status(number: int, token: str | None = None) -> int:
        return Registry(hub.url, token, f"team/sql.v{number}.mlx").ask("GET", "manifests/latest").status

    assert [status(number) for number in range(1, 22)] == [200] * 20 + [429]
    assert status(1) == 200
    assert [status(21, hub.token), status(21)] == [200, 200]
