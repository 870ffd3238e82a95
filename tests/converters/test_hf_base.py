"""A Hugging Face folder as a base: with or without its config, its index and all of its shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_output, safetensors_file
from adapterhub_converters.errors import NotFoundError
from tests.converters.test_base_reader import LLAMA, SHAPES, sharded


def test_a_folder_with_a_config_is_hugging_face_regardless_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    gguf_output.write(tmp_path / "m.gguf", {}, {})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_base(tmp_path).kind == "hf"


def test_a_tied_head_in_the_file_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    tables = {"model.embed_tokens.weight": np.ones((4, 2), np.float32), "lm_head.weight": np.ones((4, 2), np.float32)}
    prints = set()
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
        safetensors_file.write(folder / "model.safetensors", dict(list(tables.items())[:n]))
        prints.add(read_base(folder).fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize(
    "name",
    ["", "config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
)
def test_whichever_file_of_a_sharded_model_is_named_all_of_it_is_read(tmp_path: Path, name: str) -> None:
    whole, spec = read_base(sharded(tmp_path / "m")), read_base(tmp_path / "m" / name)
    assert {key: tensor.shape for key, tensor in spec.tensors.items()} == SHAPES
    assert (spec.fingerprint, spec.architecture, spec.notes) == (whole.fingerprint, "LlamaForCausalLM", ())
    assert spec.size == sum((tmp_path / "m" / f"model-0000{n}-of-00003.safetensors").stat().st_size for n in (1, 2, 3))


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors", "no-suffix"])
def test_one_safetensors_file_is_a_base_with_or_without_its_config(tmp_path: Path, name: str) -> None:
    safetensors_file.write(tmp_path / name, {key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()})
    alone = read_base(tmp_path / name)
    assert (alone.architecture, alone.config, alone.folder) == ("", {}, None)
    assert [note for note in alone.notes if "no config.json" in note]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    spec = read_base(tmp_path / name)
    assert (spec.architecture, spec.notes, spec.fingerprint) == ("LlamaForCausalLM", (), alone.fingerprint)
    assert spec.folder == (tmp_path if name == "model.safetensors" else None)


def test_an_index_alone_gives_names_without_shapes_and_a_note(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    for path in (tmp_path / "m").glob("*.safetensors"):
        path.unlink()
    for spec in (read_base(tmp_path / "m"), read_base(tmp_path / "m/model.safetensors.index.json")):
        assert (spec.tensors, spec.names, spec.fingerprint, spec.tied) == ({}, frozenset(SHAPES), None, False)
        assert spec.notes == ("all 3 files in the index are missing: names are known, shapes are not",)


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json", "model-00001-of-00003.safetensors"])
def test_a_shard_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    (sharded(tmp_path / "m") / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(NotFoundError, match="model-00002-of-00003.safetensors: no such file: 1 of 3 files are missing"):
        read_base(tmp_path / "m" / name)


def test_an_index_that_names_more_than_its_files_have_is_reported(tmp_path: Path) -> None:
    index = sharded(tmp_path / "m") / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "ghost.weight": "model-00001-of-00003.safetensors"}}))
    assert read_base(index).notes == ("the index lists 1 tensors that its files do not contain: ghost.weight",)
