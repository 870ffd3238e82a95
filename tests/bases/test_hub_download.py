"""Base models by address: downloaded with the bytes that the hub names into the usual cache, or refused in one line."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from adapterhub.bases import hub_download
from adapterhub.bases.hub_address import Hub as Address
from adapterhub.bases.hub_address import HubPath
from adapterhub.operations import base_sources
from adapterhub_converters.errors import IntegrityError, NotFoundError, RefusedError, RemoteError, UsageError
from tests.bases.test_hub_cache import named
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs
from tests.support.hub_models import publish
from tests.support.hub_server import Hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_download_brings_what_the_model_needs_and_nothing_that_runs(hub: Hub, tmp_path: Path) -> None:
    base(tmp_path / "made")
    extra_files = {
        "pytorch_model.bin": b"\x80", "modeling.py": b"import os", "tokenizer.json": b"{}", "chat_template.jinja": b"x",
        "consolidated.safetensors": b"more", "onnx/model.onnx": b"x", "README.md": b"# tiny",
    }  # fmt: skip
    commit = publish(hub, "org/tiny", files_of(tmp_path / "made") | extra_files)
    reports: list[tuple[int, int]] = []
    workspace = named(tmp_path / "hub", hub).with_progress(lambda bytes_done, total: reports.append((bytes_done, total)))
    weights = base_sources.weights("hf://org/tiny", workspace)
    expected = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert {file.name for file in weights.iterdir()} == expected
    assert weights.name == commit
    assert reports[-1][0] == reports[-1][1] > 0
    assert base_sources.weights("org/tiny", named(tmp_path / "hub")) == weights


def test_a_model_that_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    base(tmp_path / "made")
    publish(hub, "org/tiny", files_of(tmp_path / "made"))
    weights = base_sources.weights("hf://org/tiny", named(tmp_path / "hub", hub))
    hub.requests.clear()
    assert base_sources.weights("hf://org/tiny", named(tmp_path / "hub", hub)) == weights
    assert [path for _, path, _ in hub.requests] == ["/api/models/org/tiny/revision/main?blobs=true"]


def test_bytes_that_are_not_those_that_the_hub_names_are_refused(hub: Hub, tmp_path: Path) -> None:
    base(tmp_path / "made")
    files = files_of(tmp_path / "made")
    publish(hub, "org/tiny", files)
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    hub.large[digest] = bytes(len(files["model.safetensors"]))
    reason = f"its bytes do not match sha256:{digest}, the digest that the hub lists. Delete it, and try again"
    with pytest.raises(IntegrityError, match=reason):
        base_sources.weights("hf://org/tiny", named(tmp_path / "hub", hub))
    hub.large[digest] = files["model.safetensors"]
    shutil.rmtree(tmp_path / "hub")
    weights = base_sources.weights("hf://org/tiny", named(tmp_path / "hub", hub)) / "model.safetensors"
    weights.resolve().write_bytes(b"cut")
    with pytest.raises(IntegrityError) as error:
        base_sources.weights("hf://org/tiny", named(tmp_path / "hub", hub))
    assert error.value.what == f"has 3 bytes, not the {len(files['model.safetensors'])} that the hub lists"
    assert error.value.hint == "Delete it, and try again"


def test_a_download_that_fails_is_one_line_with_the_reason(hub: Hub, tmp_path: Path) -> None:
    base(tmp_path / "made")
    files = files_of(tmp_path / "made")
    publish(hub, "org/tiny", files)
    del hub.large[hashlib.sha256(files["model.safetensors"]).hexdigest()]
    with pytest.raises(RemoteError) as error:
        base_sources.weights("hf://org/tiny", named(tmp_path / "hub", hub))
    hint = "Files that have arrived are kept. Try again"
    assert str(error.value) == f"hf://org/tiny: the download failed (HTTP 404). {hint}"
    assert "signature" not in repr(error.value)


@pytest.mark.parametrize(
    ("token", "hint"), [(None, "Ask for access on its page and set HF_TOKEN"), ("x", "Ask for access on its page")]
)
def test_a_gated_model_whose_files_alone_are_withheld_is_called_one(
    hub: Hub, tmp_path: Path, token: str | None, hint: str
) -> None:
    base(tmp_path / "made")
    publish(hub, "org/tiny", files_of(tmp_path / "made"))
    hub.repos["org/tiny"].gated_files = True
    with pytest.raises(RemoteError) as error:
        hub_download.download(HubPath("org/tiny"), Address(hub.url, token), tmp_path / "hub")
    assert (error.value.code, str(error.value)) == ("gated-model", f"hf://org/tiny: a gated model. {hint}")


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"\x80"}, RefusedError, "pickle"),
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, UsageError, "Name one, such as hf://org/tiny/a.gguf"),
        ({"config.json": b"{}"}, NotFoundError, "no safetensors and no GGUF"),
    ],
)
def test_a_model_without_weights_to_choose_is_refused(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], error: type[Exception], says: str
) -> None:
    publish(hub, "org/tiny", files)
    with pytest.raises(error, match=says):
        hub_download.download(HubPath("org/tiny"), Address(hub.url), tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_one_gguf_file_of_several_is_downloaded_alone(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "org/tiny", {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"})
    path = hub_download.download(HubPath.parse("hf://org/tiny/b.gguf"), Address(hub.url), tmp_path / "hub")
    assert path.read_bytes() == b"GGUF b"
    assert [file.name for file in path.parent.iterdir()] == ["b.gguf"]


def test_a_merge_downloads_the_base_that_its_address_names(run: Run, hub: Hub, tmp_path: Path) -> None:
    base(tmp_path / "made")
    publish(hub, "org/tiny", files_of(tmp_path / "made"))
    adapter(tmp_path / "sql", pairs(2))
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    env |= {"HF_TOKEN": "", "HF_TOKEN_PATH": "/none"}
    run("merge", "sql", "--into", "hf://org/tiny", "-o", "merged", env=env)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    result = run("merge", "sql", "--into", "hf://org/none", "-o", "other", env=env, code=3)
    assert "no such model" in result.stderr
