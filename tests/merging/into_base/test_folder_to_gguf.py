"""A folder written as GGUF, with llama.cpp's own conversion as the oracle: every key and every byte of every tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base
from adapterhub.merging.into_base import merge_proof
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats.gguf_model import byte_level
from tests.conftest import Run, need_module
from tests.converters.test_architecture_lookup import CLASSES, TOKENS, deltas, logits_of
from tests.merging.into_base.gguf_folders import assert_converted, changed, contents, of_bytes, theirs, written
from tests.support import llama_cpp, tiny
from tests.support.llama_cpp_scripts import Converter

DIMENSIONS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "model_type", "architectures", "n_embd", "n_head", "n_layer", "n_positions",
}  # fmt: skip


def silent(folder: Path) -> None:
    """Take out of config.json what transformers fills in when it isn't there."""
    import transformers

    config = json_file.read_object(folder / "config.json")
    usual = getattr(transformers, config["architectures"][0]).config_class().to_dict()
    shown_config = {key: value for key, value in config.items() if key in DIMENSIONS or usual.get(key, "absent") != value}
    (folder / "config.json").write_text(json.dumps(shown_config))


@pytest.mark.peer
@pytest.mark.parametrize("name", CLASSES)
def test_the_result_is_llama_cpp_s_conversion_of_the_merged_folder(tmp_path: Path, converted: Converter, name: str) -> None:
    folder = tmp_path / "hf"
    tiny.model(name).save_pretrained(folder)
    silent(folder)
    adapter = Adapter(dict(deltas(read_base(folder), architecture_lookup.by_class(name, "test"))))
    merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged")
    report = merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged.gguf")
    assert_converted(tmp_path / "merged.gguf", theirs(converted, tmp_path / "merged", tmp_path / "theirs.gguf"))
    assert merge_proof.prove([(adapter, 1.0)], folder, tmp_path / "merged.gguf").good
    assert any("no tokenizer" in note for note in report.notes)
    assert all(change.retained and change.retained > 0.999 for change in report.touched.values())


@pytest.mark.peer
@pytest.mark.parametrize(
    ("flag", "options", "merged"),
    [
        ("MOSTLY_BF16", {}, {}),
        ("MOSTLY_F16", {"dtype": "f16"}, {"dtype": "f32"}),
        ("ALL_F32", {"dtype": "f32"}, {"dtype": "f32"}),
        ("MOSTLY_Q8_0", {"requantize": "q8_0"}, {"dtype": "f32"}),
    ],
)
def test_the_type_is_the_base_s_or_the_one_asked_for(
    tmp_path: Path, converted: Converter, bf16_llama: Any, flag: str, options: dict[str, Any], merged: dict[str, Any]
) -> None:
    folder, adapter = bf16_llama
    merge_into_base([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(**options))
    merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged", options=Options(**merged))
    assert_converted(tmp_path / "out.gguf", theirs(converted, tmp_path / "merged", tmp_path / "theirs.gguf", flag))


@pytest.mark.peer
def test_llama_cpp_computes_what_transformers_computes_with_the_merged_folder(tmp_path: Path, bf16_llama: Any) -> None:
    need_module("llama_cpp_py_sync")
    folder, adapter = bf16_llama
    merge_into_base([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(dtype="f32"))
    merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged", options=Options(dtype="f32"))
    expected = logits_of(tmp_path / "merged")
    assert np.abs(expected - logits_of(folder)).max() > 1
    assert np.abs(llama_cpp.logits(tmp_path / "out.gguf", TOKENS) - expected).max() < 1e-3


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ("MixtralForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM", "GPT2LMHeadModel")]
    + [("FalconForCausalLM", {"dtype": "f16"}), ("Gemma2ForCausalLM", {}), ("LlamaForCausalLM", {"requantize": "q8_0"})],
)
def test_the_result_proves_to_have_the_adapter_in_it(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    adapter = Adapter(dict(deltas(read_base(tmp_path / "hf"), architecture_lookup.by_class(name, "test"))))
    merge_into_base([(adapter, 1.0)], tmp_path / "hf", tmp_path / "out.gguf", options=Options(**options))
    proof = merge_proof.prove([(adapter, 1.0)], tmp_path / "hf", tmp_path / "out.gguf")
    assert proof.good, [tensor for tensor in proof.tensors if not tensor.good]
    weaker = merge_proof.prove([(adapter, 2.0)], tmp_path / "hf", tmp_path / "out.gguf")
    assert {tensor.verdict for tensor in weaker.tensors if tensor.name.removesuffix(".weight") in adapter.deltas} == {"weaker"}


@pytest.mark.peer
def test_dora_on_weights_that_are_stored_turned_is_in_it(tmp_path: Path, converted: Converter) -> None:
    tiny.model("GPT2LMHeadModel").save_pretrained(tmp_path / "hf")
    target = "transformer.h.1.mlp.c_fc"
    plain = dict(deltas(read_base(tmp_path / "hf"), architecture_lookup.by_class("GPT2LMHeadModel", "test")))[target]
    assert isinstance(plain, LowRank)
    magnitude = np.linspace(0.5, 2, plain.shape[0], dtype=np.float32)
    adapter = Adapter({target: dataclasses.replace(plain, magnitude=magnitude)})
    merge_into_base([(adapter, 1.0)], tmp_path / "hf", tmp_path / "out.gguf")
    merge_into_base([(adapter, 1.0)], tmp_path / "hf", tmp_path / "merged")
    assert_converted(tmp_path / "out.gguf", converted(tmp_path / "merged", tmp_path / "theirs.gguf"))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "NemotronForCausalLM"])
def test_a_replaced_norm_is_the_same_into_the_folder_and_into_its_gguf(tmp_path: Path, name: str) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    norm = np.linspace(-1, 1, 64, dtype=np.float32)
    adapter = Adapter({}, replaced={"model.layers.0.input_layernorm.weight": norm})
    merge_into_base([(adapter, 1.0)], written(tmp_path / "hf", tmp_path / "base.gguf"), tmp_path / "one.gguf")
    merge_into_base([(adapter, 1.0)], tmp_path / "hf", tmp_path / "two.gguf")
    assert contents(tmp_path / "one.gguf")[1] == contents(tmp_path / "two.gguf")[1]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"long_factor": [1.0 + 0.1 * n for n in range(8)], "short_factor": [1.0] * 8}


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "rope", "config_fields"),
    [
        ("LlamaForCausalLM", {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}, {}),
        ("SmolLM3ForCausalLM", {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}, {}),
        ("LlamaForCausalLM", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, {}),
        (
            "Qwen3ForCausalLM",
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 64, "beta_fast": 32.0},
            {},
        ),
        ("Phi3ForCausalLM", {"rope_type": "longrope", "rope_theta": 1e4, **LONG}, {"original_max_position_embeddings": 64}),
    ],
)
def test_a_scaled_rotary_embedding_is_llama_cpp_s(
    tmp_path: Path, converted: Converter, name: str, rope: dict[str, Any], config_fields: dict[str, Any]
) -> None:
    tiny.model(name, rope_parameters=rope, **config_fields).save_pretrained(tmp_path / "hf")
    ours = written(tmp_path / "hf", tmp_path / "out.gguf")
    assert_converted(ours, converted(tmp_path / "hf", tmp_path / "theirs.gguf"))


def test_a_config_of_older_transformers_means_the_same(tmp_path: Path, converted: Converter) -> None:
    rope = {**LLAMA3, "original_max_position_embeddings": 64}
    tiny.model(rope_parameters={**rope, "rope_theta": 5e5}).save_pretrained(tmp_path / "hf")
    config = json_file.read_object(tmp_path / "hf/config.json")
    del config["rope_parameters"], config["head_dim"]
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "rope_scaling": rope, "rope_theta": 5e5}))
    ours = written(tmp_path / "hf", tmp_path / "out.gguf")
    assert_converted(ours, converted(tmp_path / "hf", tmp_path / "theirs.gguf"))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama of 400 tokens with a tokenizer of one's own."""
    need_module("tokenizers")
    root = tmp_path_factory.mktemp("bytes") / "hf"
    tiny.model(vocab_size=400).save_pretrained(root)

    def make(folder: Path, document: Mapping[str, Any], **config: Any) -> Path:
        shutil.copytree(root, folder)
        (folder / "tokenizer.json").write_text(json.dumps(document))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("pattern", [2, 6, None])
def test_an_old_config_gives_the_layers_with_a_window_by_a_period(tmp_path: Path, pattern: int | None) -> None:
    need_module("transformers")
    tiny.model("Gemma3ForCausalLM").save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", layer_types=None, sliding_window_pattern=pattern)
    with pytest.raises(RefusedError, match="the last of every 6 layers") if pattern == 2 else contextlib.nullcontext():
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").exists() == (pattern != 2)


def test_numbers_that_no_gguf_holds_are_left_out_of_what_is_optional(tmp_path: Path, bf16_llama: Any, folder_of: Any) -> None:
    folder = folder_of(tmp_path / "hf", of_bytes(byte_level.SPLITS[0]))
    changed(folder, bos_token_id=1 << 40)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1 << 40, "top_p": 0.5}))
    keys, _ = contents(written(folder, tmp_path / "out.gguf"))
    assert {"general.sampling.top_k", "tokenizer.ggml.bos_token_id"}.isdisjoint(keys)
    assert keys["general.sampling.top_p"][1] == 0.5


def test_kinds_of_layers_by_an_interval_are_those_of_a_list(tmp_path: Path) -> None:
    need_module("transformers")
    tiny.model("Qwen3_5ForCausalLM").save_pretrained(tmp_path / "hf")
    listed = contents(written(tmp_path / "hf", tmp_path / "listed.gguf"))
    changed(tmp_path / "hf", layer_types=None, full_attention_interval=2)
    keys, tensors = contents(written(tmp_path / "hf", tmp_path / "interval.gguf"))
    assert keys.pop("qwen35.full_attention_interval")[1] == 2
    assert listed[0].pop("qwen35.full_attention_interval")[1] == 4
    assert (keys, tensors) == listed


def test_the_commands_report_what_they_do(tmp_path: Path, run: Run, bf16_llama: Any) -> None:
    from adapterhub_converters.formats import peft

    folder, adapter = bf16_llama
    (tmp_path / "adapter").mkdir()
    peft.write(adapter, tmp_path / "adapter")
    command = ("merge", tmp_path / "adapter", "--into", folder, "-o", "x.gguf", "--dtype", "f16", "--json")
    planned = json.loads(run(*command, "--dry-run").stdout)
    assert not (tmp_path / "x.gguf").exists()
    assert {**planned, "output": "x.gguf"} == json.loads(run(*command).stdout)
    assert (len(planned["touched"]), planned["tensors"]) == (15, 21)
    proven = run("verify-merge", "x.gguf", "--base", folder, "--adapter", tmp_path / "adapter")
    assert "21 tensors: 15 exact, 6 untouched" in proven.stdout


def test_a_whole_model_is_converted(tmp_path: Path, run: Run, bf16_llama: Any) -> None:
    stdout = run("convert", bf16_llama[0], "whole.gguf", "--to", "gguf", "--dtype", "q8_0").stdout
    assert "21 tensors" in stdout
    assert "changed" not in stdout
    assert "a GGUF base model is needed. Name the .gguf file" in run("convert", bf16_llama[0], "x", "--to", "hf", code=2).stderr
    assert "--rank" in run("convert", bf16_llama[0], "other.gguf", "--to", "gguf", "--rank", "2", code=2).stderr
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["whole.gguf"]


def test_rows_in_another_order_come_in_any_tiles(tmp_path: Path) -> None:
    from adapterhub.merging.into_base.folder_to_gguf import LaidOut, Piece
    from adapterhub.merging.into_base.tensor_files import OpenFiles, StoredRows
    from adapterhub.merging.into_base.tensor_types import kind
    from adapterhub_converters.formats.gguf_model.arrangement import SourcePart

    whole = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    safetensors_file.write(tmp_path / "w.safetensors", {"w": whole}, {})
    with safetensors_file.SafetensorsFile(tmp_path / "w.safetensors") as file:
        offset = file.tensors["w"].offset
    form = kind("F32")
    assert form
    stored = StoredRows(tmp_path / "w.safetensors", offset, 96, 5, form)
    picks = architecture_lookup.permute_rows(np.arange(96), 4)
    laid = LaidOut((Piece(SourcePart("w", 0, 96, picks=picks), stored), Piece(SourcePart("w", 10, 20), stored)), 116, 5, 1.0)
    expected = np.concatenate([whole[picks], whole[10:30]]) + 1
    with OpenFiles() as opened:
        for start in range(0, 116, 7):
            out = np.empty((min(7, 116 - start), 5), np.float32)
            laid.read(opened, start, start + len(out), out, lambda _use, size: np.empty(size, np.uint8))
            assert np.array_equal(out, expected[start : start + 7])
