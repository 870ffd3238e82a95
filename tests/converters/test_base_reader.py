"""Base models: a Hugging Face folder and the GGUF file of the same model are the same base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RefusedError
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
        made = LlamaForCausalLM(LlamaConfig(**spec.config))
    parameters = {name: tuple(parameter.shape) for name, parameter in made.named_parameters() if name != "lm_head.weight"}
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


def test_a_folder_with_a_config_is_hugging_face_regardless_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    gguf_output.write(tmp_path / "m.gguf", {}, {})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_base(tmp_path).kind == "hf"


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


def split(folder: Path, count: int = 3, **changes: dict[str, gguf_types.MetadataValue]) -> list[Path]:
    """A tiny llama in `count` parts, with the keys that llama-gguf-split writes; `changes` for single parts, `p0`, `p1`, …"""
    folder.mkdir(exist_ok=True)
    tensors = {
        "token_embd.weight": (12, 8), "output.weight": (12, 8), "output_norm.weight": (8,), "blk.0.attn_q.weight": (8, 8),
        "blk.1.attn_q.weight": (8, 8),
    }  # fmt: skip
    model = {"general.architecture": gguf_types.string_value("llama"), "llama.attention.head_count": gguf_types.u32_value(2)}
    paths = [folder / f"m-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    for n, path in enumerate(paths):
        own = {
            "split.no": gguf_types.MetadataValue("UINT16", n), "split.count": gguf_types.MetadataValue("UINT16", count),
            "split.tensors.count": gguf_types.MetadataValue("INT32", len(tensors)),
        }  # fmt: skip
        part = {name: np.zeros(shape, np.float32) for i, (name, shape) in enumerate(tensors.items()) if i % count == n}
        gguf_output.write(path, {**(model if n == 0 else {}), **own, **changes.get(f"p{n}", {})}, part)
    return paths


@pytest.mark.parametrize("part", [0, 1, 2])
def test_any_part_of_a_split_gguf_is_the_whole_model(tmp_path: Path, part: int) -> None:
    spec = read_base(split(tmp_path)[part])
    assert {name: tensor.shape for name, tensor in spec.tensors.items()} == SHAPES
    assert (spec.architecture, spec.tied, spec.config["num_attention_heads"]) == ("LlamaForCausalLM", False, 2)
    assert spec.fingerprint == read_base(sharded(tmp_path / "hf")).fingerprint


def test_a_split_gguf_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].rename(tmp_path / "away.gguf")
    with pytest.raises(
        NotFoundError, match=r"m-00002-of-00003.gguf: no such file: one of 3 parts of a model\. Download it"
    ) as caught:
        read_base(paths[0])
    assert caught.value.code == "no-such-file"
    with pytest.raises(RefusedError, match=r"part 1 \(from 0\) of 3 of a model, and its name has no part number"):
        read_base(tmp_path / "away.gguf")
    paths[0].rename(paths[1])
    with pytest.raises(NotFoundError, match="m-00001-of-00003.gguf"):
        read_base(paths[2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"p1": {"split.no": gguf_types.MetadataValue("UINT16", 2)}}, "part 2 (from 0) of 3, its name another"),
        ({"p2": {"split.count": gguf_types.MetadataValue("UINT16", 4)}}, "part 2 (from 0) of 4, its name another"),
        ({"p0": {"split.count": gguf_types.string_value("3")}}, "split.count is a STRING, not a number"),
        ({"p0": {"split.no": gguf_types.MetadataValue("[UINT32]", [0, 1])}}, "split.no is a [UINT32], not a number"),
        (
            {"p0": {"split.tensors.count": gguf_types.MetadataValue("[INT32]", [5, 5])}},
            "split.tensors.count is a [INT32], not a number",
        ),
        ({"p0": {"split.tensors.count": gguf_types.MetadataValue("INT32", 6)}}, "counts 6 tensors in all, the parts have 5"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_base(split(tmp_path, **changes)[0])
    assert says in str(caught.value)


def test_a_tensor_that_two_parts_have_is_refused(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path)
    own = {f"split.{key}": gguf_types.MetadataValue("UINT16", value) for key, value in (("no", 1), ("count", 3))}
    gguf_output.write(second, own, {"token_embd.weight": np.zeros((12, 8), np.float32)})
    with pytest.raises(FormatError) as caught:
        read_base(first)
    assert str(caught.value) == (
        f"{second}: tensor 'token_embd.weight' is also in an earlier part, so that the parts are not those of one model. "
        "Download all of them again"
    )


@pytest.mark.peer
def test_what_gguf_py_splits_is_read_whole(tmp_path: Path) -> None:
    need_module("gguf")
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_head_count(2)
    for name, shape in (("token_embd.weight", (12, 8)), ("output.weight", (12, 8)), ("blk.0.attn_q.weight", (8, 8))):
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    spec = read_base(tmp_path / "m-00002-of-00002.gguf")
    assert sorted(spec.tensors) == ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
