"""A path that may hold an adapter: each file is opened once, whatever is asked of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.containers import gguf_output, safetensors_file
from adapterhub_converters.containers.gguf_types import string_value
from adapterhub_converters.formats.candidate import Candidate
from tests.support.adapters import write_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_a_folder_has_a_config_a_record_and_files(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")
    (folder / "adapter.json").write_text('{"name": "sql"}')
    candidate = Candidate(folder)
    assert "peft_type" in json.loads(candidate.config)
    weights = candidate.file("adapter_model.safetensors")
    assert candidate.file("adapter_model.safetensors") is weights
    assert (candidate.record, weights.record) == ({"name": "sql"}, {"name": "sql"})
    assert weights.tensors
    assert (candidate.header, candidate.head, candidate.is_gguf) == (None, b"", False)
    assert Candidate.of(candidate) is candidate


def test_an_open_file_is_hashed_and_read_without_opening_it_again(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "sql") / "adapter_model.safetensors"
    content = path.read_bytes()
    candidate = Candidate(path)
    assert candidate.head == content[: len(candidate.head)] != b""
    candidate.hash_open_files()
    assert candidate.digests() == {path: f"sha256:{hashlib.sha256(content).hexdigest()}"}
    path.unlink()  # whoever opens it now fails
    with candidate.open_safetensors() as file:
        assert [*file.tensors] == [*candidate.tensors]


@pytest.mark.parametrize(
    ("names", "is_whole"),
    [
        (["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"], True),
        (["model.norm.weight", Q], False),
        (["layers.0.something"], False),
    ],
)
def test_a_shard_of_a_model_is_told_from_an_adapter(tmp_path: Path, names: list[str], is_whole: bool) -> None:
    safetensors_file.write(tmp_path / "a.safetensors", {name: np.ones((2, 2), np.float32) for name in names}, {})
    assert Candidate(tmp_path / "a.safetensors").is_whole_model is is_whole


@pytest.mark.parametrize(("kind", "is_whole"), [("model", True), ("adapter", False)])
def test_a_gguf_says_what_it_is(tmp_path: Path, kind: str, is_whole: bool) -> None:
    metadata = {"general.type": string_value(kind), "general.architecture": string_value("llama")}
    gguf_output.write(tmp_path / "a.gguf", metadata, {"a": np.ones(2, np.float32)})
    candidate = Candidate(tmp_path / "a.gguf")
    assert (candidate.is_gguf, candidate.is_whole_model, candidate.tensors) == (True, is_whole, ())


@pytest.mark.parametrize("content", [b"", b"GGUF", b"version https://git-lfs.github.com/spec/v1\n", bytes(100)])
def test_what_cannot_be_read_has_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    candidate = Candidate(tmp_path / "a.safetensors")
    assert (candidate.header, candidate.gguf, candidate.tensors) == (None, None, ())
    assert candidate.is_gguf == content.startswith(b"GGUF")
