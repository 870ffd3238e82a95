"""Adapters in one file, as diffusers and the trainers of image models write them, become versions; other files stay drafts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd

from adapterhub_converters.containers import safetensors_file
from tests.hub.conftest import Running
from tests.support.images import FLUX, kohya_file

KOHYA = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in FLUX.items()}
SAVED = "pytorch_lora_weights.safetensors"


def diffusers_file(path: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    """A file as `pipe.save_lora_weights` writes it: peft's factors, below the name of the model."""
    tensors = {}
    for name, (out, into) in shapes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = np.ones((2, into), np.float32)
        tensors[f"transformer.{name}.lora_B.weight"] = np.ones((out, 2), np.float32)
    safetensors_file.write(path, tensors, {"format": "pt"})
    return path


@pytest.mark.parametrize(("name", "format_name"), [(SAVED, "diffusers"), ("my-style.safetensors", "kohya")])
def test_an_adapter_in_one_file_becomes_a_version(hub: Running, hf: Any, tmp_path: Path, name: str, format_name: str) -> None:
    hf.create_repo("team/style")
    hf.upload_file(path_or_fileobj=b"# A style\n", path_in_repo="README.md", repo_id="team/style")
    file = diffusers_file(tmp_path / name, FLUX) if format_name == "diffusers" else kohya_file(tmp_path / name, KOHYA)
    hf.upload_file(path_or_fileobj=file, path_in_repo=name, repo_id="team/style")
    with hub.registry() as registry:
        (row,) = registry.list("team/style")
    assert (row.number, row.format) == (1, format_name)
    (model,) = hf.list_models(filter="diffusers")
    assert (model.id, model.library_name) == ("team/style", "diffusers")
    assert Path(hf.hf_hub_download("team/style", name)).read_bytes() == file.read_bytes()


def test_other_single_files_are_no_version(hub: Running, hf: Any, tmp_path: Path, adapter: Callable[..., Path]) -> None:
    hf.create_repo("team/model")
    model = tmp_path / "model.safetensors"
    safetensors_file.write(model, {"model.embed_tokens.weight": np.ones((4, 4), np.float32)}, {"format": "pt"})
    hf.upload_file(path_or_fileobj=model, path_in_repo="model.safetensors", repo_id="team/model")
    hf.create_repo("team/part")
    weights = adapter(1) / "adapter_model.safetensors"
    for name in ("adapter_model.safetensors", "other.safetensors"):
        hf.upload_file(path_or_fileobj=weights, path_in_repo=name, repo_id="team/part")
        hf.delete_file(name, "team/part")
    hf.create_repo("team/two")
    for name in ("one.safetensors", "two.safetensors"):
        kohya_file(tmp_path / name, KOHYA)
    hf.create_commit(
        "team/two",
        [CommitOperationAdd(name, tmp_path / name) for name in ("one.safetensors", "two.safetensors")],
        commit_message="Two",
    )
    assert not [*hf.list_models()]
