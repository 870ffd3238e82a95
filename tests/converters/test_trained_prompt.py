"""The chat template of an adapter is a file of its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.trained_prompt import FILE, TrainedPrompt


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("a key")
    return tmp_path / "secret"


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def test_a_template_that_is_a_link_out_of_the_folder_is_not_read(secret: Path, tmp_path: Path) -> None:
    link(tmp_path / "clone" / FILE, secret)
    with pytest.raises(RefusedError, match=f"{FILE}: a link that leads out of the adapter") as refused:
        TrainedPrompt.read(tmp_path / "clone")
    assert refused.value.code == "not-a-regular-file"
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    link(tmp_path / "clone" / "blob" / FILE, secret.rename(blobs / "secret"))
    with pytest.raises(RefusedError, match="a link that leads out of the adapter"):
        TrainedPrompt.read(tmp_path / "clone" / "blob")


def test_links_within_the_folder_and_to_the_blobs_of_a_cache_are_read(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "template").write_text("within")
    link(tmp_path / "adapter" / FILE, tmp_path / "adapter" / "template")
    assert TrainedPrompt.read(tmp_path / "adapter").template == "within"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "0").write_text("cached")
    for folder in ("1", "1/checkpoint-10"):
        link(tmp_path / "models--a--b" / "snapshots" / folder / FILE, tmp_path / "models--a--b" / "blobs" / "0")
        assert TrainedPrompt.read(tmp_path / "models--a--b" / "snapshots" / folder).template == "cached"
