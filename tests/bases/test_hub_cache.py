"""Base models by name: found in huggingface_hub's cache without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.bases import hub_cache
from adapterhub.bases.hub_address import Hub as Address
from adapterhub.bases.hub_address import HubPath
from adapterhub.operations import base_sources
from adapterhub.operations.workspace import Workspace
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import RemoteError
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs
from tests.support.hub_models import COMMIT, cached
from tests.support.hub_server import Hub


def named(cache: Path, hub: Hub | None = None) -> Workspace:
    def closed() -> Address:
        raise RemoteError("HF_HUB_OFFLINE", "is set", code="offline")

    return Workspace(models=cache, hub=(lambda: Address(hub.url)) if hub else closed, policy=None)


# ---- by name


def test_a_model_in_the_cache_is_found_by_its_name_and_known_by_its_commit(tmp_path: Path) -> None:
    spec = base(tmp_path / "made")
    snapshot = cached(tmp_path / "hub", "org/tiny", tmp_path / "made")
    cached_base = ah.read_base("org/tiny", workspace=named(tmp_path / "hub"))
    assert (cached_base.repo, cached_base.revision, cached_base.fingerprint) == ("org/tiny", COMMIT, spec.fingerprint)
    assert base_sources.weights("org/tiny", named(tmp_path / "hub")) == snapshot
    assert base_sources.weights(f"org/tiny@{COMMIT}", named(tmp_path / "hub")) == snapshot


def test_a_snapshot_that_is_named_by_its_path_is_known_by_name_too(tmp_path: Path) -> None:
    base(tmp_path / "made")
    snapshot = cached(tmp_path / "hub", "org/tiny", tmp_path / "made")
    assert (read_base(snapshot).repo, read_base(snapshot).revision) == ("org/tiny", COMMIT)


def test_offline_an_address_is_read_from_the_cache(tmp_path: Path) -> None:
    base(tmp_path / "made")
    snapshot = cached(tmp_path / "hub", "org/tiny", tmp_path / "made")
    assert ah.read_base("hf://org/tiny", workspace=named(tmp_path / "hub")).revision == COMMIT
    assert base_sources.weights("hf://org/tiny", named(tmp_path / "hub")) == snapshot
    with pytest.raises(RemoteError, match="HF_HUB_OFFLINE"):
        ah.read_base("hf://org/other", workspace=named(tmp_path / "hub"))


def test_a_path_comes_before_the_cache(tmp_path: Path, monkeypatch: Any) -> None:
    base(tmp_path / "made")
    cached(tmp_path / "hub", "org/tiny", tmp_path / "made")
    (tmp_path / "org").mkdir()
    base(tmp_path / "org" / "tiny", layers=3)
    monkeypatch.chdir(tmp_path)
    assert ah.read_base("org/tiny", workspace=named(tmp_path / "hub")).source == "org/tiny"


def test_a_registered_base_has_its_weights_in_the_cache(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "made")
    snapshot = cached(tmp_path / "hub", "org/tiny", tmp_path / "made")
    adapter(tmp_path / "sql", pairs(2))
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run("init", env=env)
    run("base", "add", "tiny", snapshot, env=env)
    run("merge", "sql", "--into", "tiny", "-o", "merged", env=env)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("content", [b"", b"../../../elsewhere", b"main", COMMIT.upper().encode(), b"\xff" * 40])
def test_a_ref_that_names_no_commit_is_no_model(tmp_path: Path, content: bytes) -> None:
    base(tmp_path / "made")
    cached(tmp_path / "hub", "org/tiny", tmp_path / "made")
    (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_bytes(content)
    assert hub_cache.find(HubPath("org/tiny"), tmp_path / "hub") is None


def test_a_revision_does_not_lead_out_of_the_refs(tmp_path: Path) -> None:
    base(tmp_path / "made")
    cached(tmp_path / "hub", "org/tiny", tmp_path / "made")
    (tmp_path / "hub" / "models--org--tiny" / "commit").write_text(COMMIT)
    assert hub_cache.find(HubPath("org/tiny", "../commit"), tmp_path / "hub") is None


def test_every_command_takes_the_name_offline_and_the_hint_names_the_address(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "made")
    cached(tmp_path / "home" / "hub", "org/tiny", tmp_path / "made")
    adapter(tmp_path / "sql", pairs(2))
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": "", "HF_HUB_OFFLINE": "1"}
    run("validate", "sql", "--base", "org/tiny", env=env)
    run("convert", "sql", "sql.gguf", "--to", "gguf", "--base", "org/tiny", env=env)
    run("merge", "sql", "--into", "org/tiny", "-o", "merged", env=env)
    assert "org/tiny" in (tmp_path / "merged" / "README.md").read_text()
    for args in (("validate", "sql", "--base", "org/none"), ("merge", "sql", "--into", "org/none", "-o", "x")):
        assert "Write hf://org/none for one on the Hub" in run(*args, env=env, code=3).stderr


# ---- downloads
