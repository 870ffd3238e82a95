"""Base models: a Hugging Face folder and the GGUF file of the same model are the same base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError
from tests.conftest import need_module, need_smollm2
from tests.support import tiny


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "tied"),
    [("LlamaForCausalLM", False), ("LlamaForCausalLM", True), ("Qwen2ForCausalLM", True), ("Gemma3ForCausalLM", True)],
)
def test_both_forms_of_a_model_are_one_base(tmp_path: Path, name: str, tied: bool) -> None:
    need_module("transformers")
    model = tiny.model(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "hf")
    hf, gguf = read_base(tmp_path / "hf"), read_base(tiny.write_gguf(model, tmp_path / "m.gguf"))
    assert hf.fingerprint == gguf.fingerprint
    assert hf.fingerprint is not None
    assert (hf.architecture, hf.model_type, hf.tied) == (gguf.architecture, gguf.model_type, gguf.tied) == (
        name, model.config.model_type, tied,
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
        quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", quantization_config=config, device_map="cpu")
        quantized.save_pretrained(tmp_path / f"nf4{double}")
        spec = read_base(tmp_path / f"nf4{double}")
        assert spec.fingerprint == read_base(tmp_path / "hf").fingerprint
        assert spec.quantization == "nf4"
        assert spec.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "NF4"


@pytest.mark.peer
def test_the_real_smollm2_is_the_model_transformers_would_build(tmp_path: Path) -> None:
    need_module("transformers")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = read_base(need_smollm2())
    assert (spec.quantization, spec.tied, spec.config["rms_norm_eps"]) == ("q4_1", True, 1e-05)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**spec.config))
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name != "lm_head.weight"}
    assert {name: tensor.shape for name, tensor in spec.tensors.items()} == parameters


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"shape": [4, 4]}, None),
        ({"shape": [4, 8]}, "8 bytes are not [4, 8] in four bits"),
        ({"shape": [-4, -4]}, "has no valid shape"),
        ({}, "has no valid shape"),
        ([], "not a JSON object"),
    ],
)
def test_a_quantization_state_is_not_trusted(tmp_path: Path, state: object, says: str | None) -> None:
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
    tensors: dict[str, np.ndarray] = {"a.qweight": np.zeros(packed, np.int32), "a.scales": np.zeros((1, 24), np.float16)}
    safetensors_file.write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, "bits": 4}}))
    assert {name: tensor.shape for name, tensor in read_base(tmp_path).tensors.items()} == {"a.weight": (24, 16)}


def _gguf(path: Path, **metadata: str) -> None:
    gguf_output.write(path, {key.replace("_", "."): gguf_types.string_value(value) for key, value in metadata.items()}, {})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing", None, "no such file or folder"),
        ("x.gguf", b"hello", "not a GGUF file"),
        ("x", {"m.gguf": b""}, "there is no config.json. Name the file itself, m.gguf"),
        (
            "x",
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
            "is an adapter, not a base model. Name the folder",
        ),
        ("x", {"config.json": b"[]"}, "not a JSON object"),
        ("x", {"config.json": b"{}", "model.safetensors": b"123"}, "not a safetensors file"),
        (
            "x",
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'},
            "is not a plain file name",
        ),
        ("x.gguf", {"general_type": "adapter", "general_architecture": "llama"}, "its general.type is 'adapter'"),
        ("x.gguf", {"general_architecture": "rwkv7"}, "'rwkv7' has no verified mapping"),
        ("x.gguf", {"other": "deepseek2"}, "'' has no verified mapping"),
        (
            "x",
            {
                "config.json": b"{}",
                "model.safetensors.index.json": json.dumps({"weight_map": {f"{n}": f"{n}" for n in range(10_001)}}).encode(),
            },
            "weight_map names 10,001 files, and no model is read from more than 10,000",
        ),
        (
            "x",
            {"model_index.json": b"{}"},
            "the pipeline has none of the models that adapters change: unet, transformer, transformer_2, text_encoder, ",
        ),
        ("x", {"model_index.json": b"{}"}, "connectors. Download their folders, each with its config.json"),
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


SHAPES = {
    "model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,), "lm_head.weight": (12, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.1.self_attn.q_proj.weight": (8, 8),
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 2, "rope_theta": 1e4}


def sharded(folder: Path, *, index: bool = True, config: bool = True) -> Path:
    """SHAPES in three shards, as save_pretrained lays them out."""
    folder.mkdir()
    parts = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    weight_map = {name: parts[i % 3] for i, name in enumerate(SHAPES)}
    for part in parts:
        arrays = {name: np.zeros(SHAPES[name], np.float32) for name in SHAPES if weight_map[name] == part}
        safetensors_file.write(folder / part, arrays)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config:
        (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def test_one_tensor_with_two_shapes_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m") / "model-00003-of-00003.safetensors"
    safetensors_file.write(path, {"model.norm.weight": np.zeros(4, np.float32)})
    with pytest.raises(FormatError, match=r"tensor 'model.norm.weight' is F32 \(4,\), in another file F32 \(8,\)"):
        read_base(tmp_path / "m")


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "a.safetensors", {"base_model.model.q.lora_A.weight": np.zeros((2, 8), np.float32)})
    with pytest.raises(FormatError, match="not a base model: it contains an adapter's tensors") as caught:
        read_base(tmp_path / "a.safetensors")
    assert caught.value.code == "not-a-base"
