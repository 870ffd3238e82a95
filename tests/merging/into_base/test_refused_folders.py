"""Folders that llama.cpp cannot load as GGUF, or would compute differently, are refused by what is wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base, prepare_merge
from adapterhub.merging.into_base import merge_proof
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.containers import gguf_output, safetensors_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_types import MetadataValue
from adapterhub_converters.errors import AdapterhubError, RefusedError
from tests.conftest import need_module
from tests.merging.into_base.gguf_folders import changed, written
from tests.support import tiny

LONG = {"long_factor": [1.0 + 0.1 * n for n in range(8)], "short_factor": [1.0] * 8}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu, but llama.cpp's llama computes swish"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "a rotary embedding of the type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "a rotary embedding of the type 'longrope'"),
        ({"model_type": "llama9"}, "model_type 'llama9' has no verified conversion"),
        ({"architectures": ["RWKV7ForCausalLM"]}, "RWKV7ForCausalLM has no verified mapping"),
        ({"vocab_size": 127}, "vocab_size is 127, and there are 128 rows of embeddings"),
        (
            {"num_hidden_layers": 1},
            "model.layers.1.input_layernorm.weight (64,): no known tensor of llama.cpp's llama corresponds to it",
        ),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is many, but a GGUF needs a number there"),
        ({"rope_parameters": {"rope_type": "linear", "factor": []}}, "factor is [], but a GGUF needs a number there"),
        ({"scoring_func": ["sigmoid"]}, "scoring_func \"['sigmoid']\" is not supported by llama.cpp"),
        ({"rope_scaling": 3}, "rope_scaling is not an object"),
        ({"max_position_embeddings": 1 << 32}, "max_position_embeddings is 4294967296, but a GGUF needs a number there"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps is 1e+300, but a GGUF needs a number there"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -1}},
            "original_max_position_embeddings is -1, but a GGUF needs a number there",
        ),
        ({"num_hidden_layers": None}, "num_hidden_layers is None, but a GGUF needs a number there"),
    ],
)
def test_a_config_that_llama_cpp_would_pass_over_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    need_module("transformers")
    tiny.model().save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", **config)
    with pytest.raises(AdapterhubError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


PERIODIC = ["full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "Qwen3MoeForCausalLM",
            {"norm_topk_prob": False},
            "norm_topk_prob is False, but llama.cpp's code for qwen3_moe uses True",
        ),
        ("Qwen2MoeForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("DeepseekV2ForCausalLM", {"n_group": 2, "topk_group": 1}, "groups of experts are chosen by their best one"),
        ("DeepseekV3ForCausalLM", {"rope_interleave": False}, "rope_interleave is False"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func is softmax"),
        ("DeepseekV3ForCausalLM", {"n_group": 2, "topk_group": 2}, "all 2 groups of experts are chosen"),
        ("DeepseekV3ForCausalLM", {"rope_parameters": {**YARN, "rope_type": "linear"}}, "the rotary embedding is linear"),
        ("NemotronForCausalLM", {"rope_parameters": YARN}, "the rotary embedding is yarn"),
        ("Qwen2ForCausalLM", {"head_dim": 32}, "head_dim is 32, but llama.cpp's code for qwen2 uses 16"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, ".bias, but llama.cpp's qwen3 has none"),
        ("SeedOssForCausalLM", {"mlp_bias": True}, ".bias, but llama.cpp's seed_oss has none"),
        ("Starcoder2ForCausalLM", {"use_bias": False}, "llama.cpp's starcoder2 needs one"),
        ("Olmo2ForCausalLM", {"tie_word_embeddings": True}, "no tensor for llama.cpp's output.weight"),
        ("CohereForCausalLM", {"use_qk_norm": True}, "norms of queries and keys from 64 layers on"),
        ("GptOssForCausalLM", {"swiglu_limit": 1.0}, "swiglu_limit is 1.0"),
        ("GptOssForCausalLM", {"layer_types": PERIODIC}, "other layers attend to the whole text"),
        ("Gemma2ForCausalLM", {"layer_types": PERIODIC}, "the last of every 2 layers for that"),
        ("Gemma3ForCausalLM", {"layer_types": PERIODIC}, "the last of every 6 layers for that"),
        ("Cohere2ForCausalLM", {"layer_types": PERIODIC}, "the last of every 4 layers for that"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar is 32"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [0, 1]}, "other layers are without a rotary embedding"),
        ("GraniteForCausalLM", {"residual_multiplier": 0.0}, "residual_multiplier is 0"),
        ("LlamaForCausalLM", {"rope_parameters": {**YARN, "beta_slow": 2.0}}, "beta_slow of the rotary embedding is 2.0"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {**YARN, "attention_factor": 2.0}},
            "attention_factor of the rotary embedding is 2",
        ),
        ("LlamaForCausalLM", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale and mscale_all_dim"),
        ("DeepseekV2ForCausalLM", {"rope_parameters": YARN}, "mscale and mscale_all_dim are (None, None)"),
        (
            "Phi3ForCausalLM",
            {
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG, "attention_factor": 3.0},
                "original_max_position_embeddings": 64,
            },
            "attention_factor of the rotary embedding is 3",
        ),
        ("CohereForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "type 'linear'"),
    ],
)
def test_a_model_of_another_function_than_llama_cpp_s_code_is_refused(
    tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    need_module("transformers")
    tiny.model(name, **config).save_pretrained(tmp_path / "hf")
    with pytest.raises(RefusedError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("name", "config", "note_text"),
    [
        ("MistralForCausalLM", {"sliding_window": 8}, "not to the last 8 tokens"),
        ("MistralForCausalLM", {"sliding_window": 256}, None),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "last 8 tokens"),
        ("Qwen3ForCausalLM", {"use_sliding_window": False, "sliding_window": 8}, None),
        ("Phi3ForCausalLM", {"sliding_window": 8}, "last 8 tokens"),
        ("Gemma2ForCausalLM", {"sliding_window": 8}, None),
        ("GptOssForCausalLM", {"rope_parameters": {**YARN, "truncate": False}}, "rounds the bounds"),
    ],
)
def test_what_long_texts_lose_is_reported(tmp_path: Path, name: str, config: dict[str, Any], note_text: str | None) -> None:
    need_module("transformers")
    tiny.model(name, **config).save_pretrained(tmp_path / "hf")
    notes = prepare_merge([], tmp_path / "hf", Options(), gguf=True).write(tmp_path / "out.gguf").notes
    assert [note for note in notes if "no tokenizer" not in note] == [note for note in notes if note_text and note_text in note]
    assert bool(note_text) == (len(notes) == 2)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.norm.weight", None, "no tensor for llama.cpp's output_norm.weight"),
        ("lm_head.weight", None, "no tensor for llama.cpp's output.weight"),
        ("lm_head.weight", (120, 64), r"an output layer \(120, 64\) that contradict"),
        ("model.layers.1.mlp.up_proj.weight", None, r"layer 1 has no tensor for ffn_up.weight, but others have \(96, 64\)"),
        ("model.layers.1.mlp.up_proj.weight", (94, 64), r"layer 1 has \(94, 64\) for ffn_up.weight"),
        ("model.layers.0.mlp.up_proj.bias", (96,), r"layer 1 has no tensor for ffn_up.bias"),
        ("model.layers.1.", None, "num_hidden_layers is 2, but there are 1"),
    ],
)
def test_a_folder_that_lacks_a_tensor_is_refused(
    tmp_path: Path, bf16_llama: Any, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    folder = shutil.copytree(bf16_llama[0], tmp_path / "hf")
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        tensors = {tensor: np.array(file.tensor(tensor)) for tensor in file.tensors if not tensor.startswith(name)}
    extra_tensors = {name: np.zeros(shape, np.float32)} if shape else {}
    safetensors_file.write(folder / "model.safetensors", {**tensors, **extra_tensors}, {})
    with pytest.raises(RefusedError, match=message):
        written(folder, tmp_path / "out.gguf")


def test_what_a_gguf_of_a_folder_cannot_be_is_refused(tmp_path: Path, bf16_llama: Any) -> None:
    folder, adapter = bf16_llama
    table = np.zeros((130, 64), np.float32)
    resized = Adapter({}, copies={"model.embed_tokens.weight": table, "lm_head.weight": table})
    with pytest.raises(RefusedError, match="the adapter resizes the vocabulary, and a GGUF contains the tokenizer") as caught:
        merge_into_base([(resized, 1.0)], folder, tmp_path / "out.gguf")
    assert caught.value.hint == "Merge into a folder, add the tokenizer there, and convert that"
    with pytest.raises(RefusedError, match="nf4: is a type of Hugging Face folders"):
        merge_into_base([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(requantize="nf4"))
    with pytest.raises(RefusedError, match="matrices become q8_0 already"):
        merge_into_base([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(requantize="q8_0", dtype="f16"))
    with pytest.raises(RefusedError, match="becomes one GGUF file"):
        merge_into_base([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(shard_size=1000))
    assert not list(tmp_path.iterdir())


def test_integers_in_the_place_of_a_matrix_are_not_compared(tmp_path: Path, bf16_llama: Any) -> None:
    folder, adapter = bf16_llama
    merge_into_base([(adapter, 1.0)], folder, tmp_path / "out.gguf")
    with GGUFFile(tmp_path / "out.gguf") as file:
        kinds, values = file.header.kinds, file.header.metadata
        tensors = {name: np.array(file.tensor(name)) for name in file.tensors}
    tensors["blk.0.attn_q.weight"] = np.ones(tensors["blk.0.attn_q.weight"].shape, np.int32)
    metadata = {key: MetadataValue(kinds[key], np.array(values[key]).tolist()) for key in values}
    gguf_output.write(tmp_path / "out.gguf", metadata, tensors)
    with pytest.raises(RefusedError, match=r"blk.0.attn_q.weight: is I32, a type without weights to compare"):
        merge_proof.prove([(adapter, 1.0)], folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Lfm2ForCausalLM", {"layer_types": None}, "layer_types does not have one entry for each of 2 layers"),
        ("Qwen3_5ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types does not have one entry for each of 2 layers"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 17}, "query_pre_attn_scalar is 17, but llama.cpp's gemma2 uses 16"),
        (
            "Phi3ForCausalLM",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG, "short_factor": [1.0]}},
            "long_factor and short_factor of the rotary embedding do not have 8 numbers each",
        ),
        ("LlamaForCausalLM", {"num_hidden_layers": 1 << 31}, "num_hidden_layers is 2147483648, not a number from 1 to 10,000"),
        ("LlamaForCausalLM", {"num_attention_heads": 0}, "num_attention_heads is 0, not a number from 1 to 1,048,576"),
        ("ApertusForCausalLM", {"head_dim": 1 << 31}, "head_dim is 2147483648, not a number from 1 to 1,048,576"),
        (
            "Cohere2ForCausalLM",
            {"rotary_pct": -1},
            "rope.dimension_count of the GGUF would be -16, which does not fit into UINT32",
        ),
        (
            "Lfm2ForCausalLM",
            {"num_key_value_heads": 1 << 31},
            r"attention.head_count_kv of the GGUF would be \[.*, which does not fit into \[INT32\]",
        ),
    ],
)
def test_a_config_of_numbers_that_no_model_of_its_family_has_is_refused(
    tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", **config)
    with pytest.raises(RefusedError, match=f"config.json: {message}"):
        written(tmp_path / "hf", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "message"),
    [
        (
            "Qwen2MoeForCausalLM", "model.layers.1.mlp.experts.0.up_proj.weight", None,
            "the tensor of expert 0 for llama.cpp's blk.1.ffn_up_exps is missing, and others up to 3 are there",
        ),
        (
            "Qwen2MoeForCausalLM", "model.layers.1.mlp.experts.2.up_proj.weight", (4, 4),
            "model.layers.1.mlp.experts.2.up_proj.weight (4, 4): other experts have",
        ),
        (
            "ApertusForCausalLM", "model.layers.1.mlp.act_fn.beta", None,
            "layer 1 has no tensor of one number for llama.cpp's xielu.beta",
        ),
    ],
)  # fmt: skip
def test_a_part_of_a_layer_that_is_missing_is_named(
    tmp_path: Path, name: str, tensor: str, shape: tuple[int, ...] | None, message: str
) -> None:
    need_module("transformers")
    folder = tmp_path / "hf"
    tiny.model(name).save_pretrained(folder)
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        tensors = {tensor_name: np.array(file.tensor(tensor_name)) for tensor_name in file.tensors}
    del tensors[tensor]
    if shape:
        tensors[tensor] = np.zeros(shape, np.float32)
    safetensors_file.write(folder / "model.safetensors", tensors, {})
    with pytest.raises(RefusedError) as caught:
        written(folder, tmp_path / "out.gguf")
    assert message in str(caught.value)
