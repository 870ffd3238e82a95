"""Each architecture of which adapters alone are converted, and each vision or audio model, against llama.cpp itself.

As in `test_architecture_lookup`: with f its conversion of models, f(W + s·BA) − f(W) is what our file adds, on every tensor;
where llama.cpp computes what transformers computes of such a small model, the logits agree as well.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding, StackedLowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.architectures.architecture_lookup import Architecture
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_types import MetadataValue
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import gguf as gguf_lora
from tests.conftest import need_module
from tests.converters.test_architecture_lookup import TOKENS, assert_linear, deltas, merged, read_back
from tests.support import llama_cpp, tiny
from tests.support.llama_cpp_scripts import Converter

pytestmark = pytest.mark.peer
GRANITE4 = "GraniteMoeHybridForCausalLM"
CLASSES = [
    (family.gguf, name)
    for family in architecture_lookup.ADAPTERS
    for name in (*family.wrapped, *(() if family.whole or family.marks else family.classes))
    if name != GRANITE4
] + [("gemma4-moe", "Gemma4ForCausalLM")]
CLASSES += [(kind, GRANITE4) for kind in ("granitehybrid-moe", "granitehybrid-dense", "granite-dense", "granite-moe")]
_DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
VARIANTS: dict[str, dict[str, Any]] = {
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
    "nemotron_h_moe": {
        "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
    },
    "qwen3vlmoe": {"moe_intermediate_size": 24},  # transformers takes a square matrix for one that is not transposed
    "granitehybrid-dense": _DENSE,
    "granite-dense": {**_DENSE, "layer_types": ["attention", "attention"]},
    "granite-moe": {"layer_types": ["attention", "attention"]},
    "deepseek2-ocr": {"num_key_value_heads": 4, "use_qk_norm": False, "head_dim": 16},
    "gemma4-moe": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
}  # fmt: skip
NOT_RUN = {"nemotron_h": "the conversion takes every Nemotron-H for one with experts under transformers 5"}
# Classes whose code is not in transformers, to one with modules of the same names.
SAME_MODULES = {
    "LightOnOCRForConditionalGeneration": "LightOnOcrForConditionalGeneration",
    "Gemma3nForConditionalGeneration": "Gemma3nForCausalLM",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen2_5OmniModel": "Qwen2_5OmniThinkerForConditionalGeneration",
    "InternLM3ForCausalLM": "LlamaForCausalLM",
    "IQuestCoderForCausalLM": "LlamaForCausalLM",
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "VLlama3ForCausalLM": "LlamaForCausalLM",
    "Ernie4_5_ForCausalLM": "Ernie4_5ForCausalLM",
    "StableLMEpochForCausalLM": "StableLmForCausalLM",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
    "DotsOCRForCausalLM": "Qwen2ForCausalLM",
    "DeepseekOCRForCausalLM": "Glm4MoeForCausalLM",
    "KORMoForCausalLM": "Qwen2ForCausalLM",
}
# The class of the text model, by which llama.cpp's conversion takes models whose own class it does not know.
TEXT_CLASSES = {
    "SmolVLMForConditionalGeneration": "VLlama3ForCausalLM",
    "Idefics3ForConditionalGeneration": "VLlama3ForCausalLM",
    "Lfm2VlForConditionalGeneration": "Lfm2ForCausalLM",
    "LightOnOcrForConditionalGeneration": "Qwen3ForCausalLM",
    "LightOnOCRForConditionalGeneration": "Qwen3ForCausalLM",
}


def saved(name: str, gguf: str, folder: Path) -> Path:
    """A model as it is published, where transformers saves it otherwise."""
    tiny.model(SAME_MODULES.get(name, name), **VARIANTS.get(gguf, {})).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [name]}
    if gguf == "nemotron_h":
        config = {key: value for key, value in config.items() if key not in ("num_experts_per_tok", "layers_block_type")}
        config |= {"hybrid_override_pattern": "M*-"}
    if name in TEXT_CLASSES:
        config["text_config"]["architectures"] = [TEXT_CLASSES[name]]
    if name == GRANITE4:
        published = {"linear_attention": "mamba", "full_attention": "attention"}
        config["layer_types"] = [published.get(kind, kind) for kind in config["layer_types"]]
    if name == "GPTNeoXForCausalLM":  # transformers 5 takes the number away from what it knows
        config |= {"rotary_pct": config["rope_parameters"]["partial_rotary_factor"], "model_type": "published"}
    if name == "DeepseekOCRForCausalLM":
        sizes = {"kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
        config |= {"model_type": "deepseek_vl_v2", "language_config": {**config, **sizes}, "use_mla": False, **sizes}
    if "Omni" in name:
        config = {"architectures": [name], "model_type": "omni", "thinker_config": config}
        _rename(folder, "", "thinker.")
    if name == "Gemma3nForConditionalGeneration":
        config = {"architectures": [name], "model_type": "gemma3n", "text_config": config, "tie_word_embeddings": True}
        del config["text_config"]["architectures"]
        _rename(folder, "model.", "model.language_model.")
    (folder / "config.json").write_text(json.dumps(config))
    if name.startswith("Qwen3VLMoe"):  # experts are (experts, in, out) there
        with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
            weights = {name: file.tensor(name) for name in file.tensors}
        turned = {name: array.swapaxes(1, 2).copy() for name, array in weights.items() if ".experts." in name}
        safetensors_file.write(folder / "model.safetensors", weights | turned)
    if "Gemma" in name:  # its conversion cuts the table of embeddings to as many rows as there are tokens
        vocabulary = {str(number): number for number in range(tiny.CONFIG["vocab_size"])}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def _rename(folder: Path, prefix: str, replacement: str) -> None:
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        weights = {f"{replacement}{name.removeprefix(prefix)}": file.tensor(name) for name in file.tensors}
    safetensors_file.write(folder / "model.safetensors", weights)


def _is_known(architecture: Architecture, parameter: str) -> bool:
    return bool(architecture.stem(parameter) or architecture.stem(parameter.removesuffix(".weight")))


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_our_file_adds_what_llama_cpp_s_conversion_makes_of_the_weights(
    tmp_path: Path, converted: Converter, kind: str, name: str
) -> None:
    need_module("llama_cpp_py_sync")
    folder = saved(name, kind, tmp_path / "hf")
    gguf = converted(folder, tmp_path / "base.gguf")
    base = read_base(folder)
    architecture = base.llama_cpp_architecture()
    files = {base.renaming(file): file for file in base.tensors if not _is_known(architecture, file)}
    tensors = {next((path for path in files if files[path] == file), file): tensor for file, tensor in base.tensors.items()}
    adapter = Adapter(dict(deltas(dataclasses.replace(base, tensors=tensors), architecture)))
    assert len(adapter.deltas) >= 7
    gguf_lora.write(adapter, tmp_path / "a.gguf", base=base)
    changed = converted(merged(folder, adapter, tmp_path / "merged", files), tmp_path / "merged.gguf")
    error = assert_linear(gguf, changed, tmp_path / "a.gguf")
    print(f"{name}: {len(adapter.deltas)} modules, linear to {error:.1g}")
    if not any(isinstance(delta, StackedLowRank) for delta in adapter.deltas.values()):
        read_back(tmp_path / "a.gguf", adapter)
    if kind in NOT_RUN:
        return
    expected = llama_cpp.logits(changed, TOKENS)
    effect = np.abs(expected - llama_cpp.logits(gguf, TOKENS)).max()
    off = np.abs(llama_cpp.logits(gguf, TOKENS, tmp_path / "a.gguf") - expected).max()
    print(f"{name}: logits off by {off:.2g}, effect {effect:.2g}")
    assert effect > 1
    assert off < 1e-3 * max(1, effect)


def _foreign(path: Path, dst: Path) -> Path:
    """The file as another program writes it: without the source's config."""
    with GGUFFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = {
            key: MetadataValue(file.header.kinds[key], value)
            for key, value in file.header.metadata.items()
            if not key.startswith("adapterhub.")
        }
    gguf_output.write(dst, metadata, tensors)
    return dst


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3_5ForCausalLM", "Qwen3VLForConditionalGeneration", "Gemma4ForConditionalGeneration", "Qwen3NextForCausalLM",
        "BambaForCausalLM", "GlmOcrForConditionalGeneration",
    ],
)  # fmt: skip
def test_a_file_of_another_program_has_the_names_of_its_base(tmp_path: Path, name: str) -> None:
    base = read_base(saved(name, "", tmp_path / "hf"))
    adapter = Adapter(dict(deltas(base, base.llama_cpp_architecture())))
    gguf_lora.write(adapter, tmp_path / "a.gguf", base=base)
    again = gguf_lora.read(_foreign(tmp_path / "a.gguf", tmp_path / "b.gguf"), base=base)
    assert set(again.deltas) == set(adapter.deltas)
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LowRank | LowRankEmbedding)
        read_delta = again.deltas[target]
        assert isinstance(read_delta, LowRank | LowRankEmbedding)
        products = [delta.scaling * delta.lora_B.astype(float) @ delta.lora_A for delta in (delta, read_delta)]
        assert np.allclose(*products, atol=1e-6), target


@pytest.mark.parametrize(
    "name",
    ["Qwen3NextForCausalLM", GRANITE4, "GlmOcrForConditionalGeneration", "Lfm2MoeForCausalLM", "NemotronHForCausalLM"],
)
def test_a_base_in_gguf_gives_the_file_that_its_folder_gives(tmp_path: Path, converted: Converter, name: str) -> None:
    kinds = {GRANITE4: "granitehybrid-dense", "NemotronHForCausalLM": "nemotron_h"}
    folder = saved(name, kinds.get(name, ""), tmp_path / "hf")
    base = read_base(folder)
    adapter = Adapter(dict(deltas(base, base.llama_cpp_architecture())))
    files = []
    for number, spec in enumerate((base, read_base(converted(folder, tmp_path / "base.gguf")))):
        gguf_lora.write(adapter, tmp_path / f"{number}.gguf", base=spec)
        with GGUFFile(tmp_path / f"{number}.gguf") as file:
            files.append({tensor: file.tensor(tensor).tobytes() for tensor in file.tensors})
    assert files[0] == files[1]
    read_back(tmp_path / "1.gguf", adapter)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (MetadataValue("[INT32]", [0, 2]), 2),
        (MetadataValue("[INT32]", [1, 2]), 0),
        (MetadataValue("[INT32]", [0, 0]), 0),
        (MetadataValue("[STRING]", ["2", "x"]), 0),
        (MetadataValue("[FLOAT32]", [2.0, float("inf")]), 0),
    ],
)
def test_heads_that_differ_between_layers_have_no_number(tmp_path: Path, counts: MetadataValue, expected: int) -> None:
    metadata = {
        "general.architecture": gguf_types.string_value("granitehybrid"),
        "granitehybrid.attention.head_count": gguf_types.u32_value(4),
        "granitehybrid.attention.head_count_kv": counts,
    }
    gguf_output.write(tmp_path / "x.gguf", metadata, {"token_embd.weight": np.zeros((8, 8), np.float32)})
    assert read_base(tmp_path / "x.gguf").config["num_key_value_heads"] == expected


@pytest.mark.parametrize("missing", ["attn_gate", "attn_qkv"])
def test_a_file_with_some_rows_of_a_module_is_refused(tmp_path: Path, missing: str) -> None:
    base = read_base(saved("Qwen3NextForCausalLM", "", tmp_path / "hf"))
    target = "model.layers.0.linear_attn.in_proj_qkvz"
    delta = dict(deltas(base, base.llama_cpp_architecture()))[target]
    gguf_lora.write(Adapter({target: delta}), tmp_path / "a.gguf", base=base)
    with GGUFFile(tmp_path / "a.gguf") as file:
        tensors = {name: file.tensor(name) for name in file.tensors if f".{missing}." not in name}
        keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
        metadata = {key: MetadataValue(file.header.kinds[key], file.header.metadata[key]) for key in keys}
    gguf_output.write(tmp_path / "b.gguf", metadata, tensors)
    with pytest.raises(RefusedError, match=f"in_proj_qkvz: blk.0.{missing} is missing, which has some of its rows"):
        gguf_lora.read(tmp_path / "b.gguf", base=base)


def test_an_adapter_of_a_model_without_a_head_has_the_tensors_of_one_with(tmp_path: Path) -> None:
    base = read_base(saved("Qwen3ForCausalLM", "", tmp_path / "hf"))
    whole = Adapter({name: delta for name, delta in deltas(base, base.llama_cpp_architecture()) if ".layers." in name})
    bare = Adapter({name.removeprefix("model."): delta for name, delta in whole.deltas.items()})
    tensor_bytes = []
    for number, adapter in enumerate((whole, bare)):
        gguf_lora.write(adapter, tmp_path / f"{number}.gguf", base=base)
        with GGUFFile(tmp_path / f"{number}.gguf") as file:
            tensor_bytes.append({name: file.tensor(name).tobytes() for name in file.tensors})
    assert tensor_bytes[0] == tensor_bytes[1]
    assert set(gguf_lora.read(tmp_path / "1.gguf").deltas) == set(bare.deltas)


def test_a_text_model_of_another_family_and_a_vision_module_are_refused(tmp_path: Path) -> None:
    base = read_base(saved("LlavaForConditionalGeneration", "", tmp_path / "hf"))
    adapter = Adapter(dict(deltas(base, base.llama_cpp_architecture())))
    with pytest.raises(RefusedError, match="the text model of .* is qwen2, and not llama"):
        gguf_lora.write(adapter, tmp_path / "a.gguf", base=dataclasses.replace(base, text_type="qwen2"))
    delta = next(iter(adapter.deltas.values()))
    vision = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    with pytest.raises(RefusedError, match="llama.cpp's 'llama' has no tensor for this module"):
        gguf_lora.write(Adapter({vision: delta}), tmp_path / "a.gguf", base=base)
