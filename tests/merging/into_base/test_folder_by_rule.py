"""Folders of every architecture whose row has more than adapters, written as GGUF: llama.cpp's own conversion is the oracle.

The classes are those of the table, so that a new row is tested without a line here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import merge_into_base
from adapterhub.merging.into_base import merge_proof
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats.gguf_model.arrangement import rope_tensors
from adapterhub_converters.formats.gguf_model.model_config import complete_config
from tests.conftest import need_module
from tests.converters.test_architecture_lookup import TOKENS, deltas
from tests.converters.test_rule_named_models import SAME_MODULES, saved
from tests.merging.into_base.gguf_folders import assert_converted, changed, written
from tests.support import llama_cpp, tiny
from tests.support.llama_cpp_scripts import Converter

pytestmark = pytest.mark.peer
VARIANTS = {"exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2}}
"""Changes of config.json: llama.cpp has a window in Exaone 4 with 64 layers only."""
CLASSES = [
    (family.gguf, name)
    for family in architecture_lookup.ADAPTERS
    if family.folder
    for name in (*family.wrapped, *(() if family.whole else family.classes))
]


def model_folder(name: str, kind: str, folder: Path) -> Path:
    """A model as it is published."""
    saved(name, kind, folder)
    changed(folder, **VARIANTS.get(kind, {}))
    return folder


def logits_of(folder: Path, name: str) -> np.ndarray:
    """Logits by the class of a text, vision or audio model."""
    import torch
    import transformers

    model_class = getattr(transformers, SAME_MODULES.get(name, name))
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()
    return logits


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_the_file_is_llama_cpp_s_conversion_and_computes_what_transformers_does(
    tmp_path: Path, converted: Converter, kind: str, name: str
) -> None:
    need_module("llama_cpp_py_sync")
    folder = model_folder(name, kind, tmp_path / "hf")
    converted_files = [converted(folder, tmp_path / f"{kind}.gguf", kind) for kind in ("ALL_F32", "MOSTLY_Q8_0")]
    if name.startswith("Gemma3"):  # its conversion needs a vocabulary, to which it cuts the table of embeddings
        (folder / "tokenizer.json").unlink()
    ours = written(folder, tmp_path / "ours.gguf")
    assert_converted(ours, converted_files[0])
    assert_converted(written(folder, tmp_path / "small.gguf", requantize="q8_0"), converted_files[1])
    expected = logits_of(folder, name)
    off = np.abs(llama_cpp.logits(ours, TOKENS) - expected).max()
    print(f"{name}: logits off by {off:.2g} of {np.abs(expected).max():.2g}")
    assert off < 5e-3 * max(1, np.abs(expected).max())


YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "rope_theta": 5e5,
    "original_max_position_embeddings": 32,
    "attention_factor": 1.2079441541679836,
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "Olmo3ForCausalLM",
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}},
             "layer_types": ["sliding_attention", "full_attention"]},
        ),
        (
            "HunYuanDenseV1ForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4},
             "max_position_embeddings": 32768},
        ),
        ("Lfm2ForCausalLM", {"block_auto_adjust_ff_dim": True}),
        ("Glm4MoeForCausalLM", {"attention_bias": True, "use_qk_norm": False}),
        ("Exaone4ForCausalLM", {"num_hidden_layers": 64, "sliding_window": 64}),
        ("GraniteMoeForCausalLM", {"attention_multiplier": 0.25, "logits_scaling": 2.0, "tie_word_embeddings": True}),
    ],
)  # fmt: skip
def test_other_settings_are_llama_cpp_s_and_transformers_too(
    tmp_path: Path, converted: Converter, name: str, config: dict[str, Any]
) -> None:
    need_module("llama_cpp_py_sync")
    folder = tmp_path / "hf"
    tiny.model(name, **config).save_pretrained(folder)
    ours = written(folder, tmp_path / "ours.gguf")
    assert_converted(ours, converted(folder, tmp_path / "theirs.gguf"))
    expected = logits_of(folder, name)
    assert np.abs(llama_cpp.logits(ours, TOKENS) - expected).max() < 5e-3 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Exaone4ForCausalLM", {}, "a sliding_window, but llama.cpp's exaone4 has one with 64 layers only"),
        ("OlmoeForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("OlmoeForCausalLM", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, but llama.cpp's olmoe uses 1e-05"),
        ("PhiForCausalLM", {"qk_layernorm": True}, "corresponds to it"),
        ("PhiForCausalLM", {"intermediate_size": 128}, "intermediate_size is 128, but llama.cpp's phi2 uses 256"),
        ("MiniMaxM2ForCausalLM", {"scoring_func": None}, "scoring_func is None"),
        (
            "Ernie4_5_MoeForCausalLM",
            {"intermediate_size": 96},
            "llama.cpp's conversion takes to be 48 wide",
        ),
        ("Ernie4_5_MoeForCausalLM", {"use_bias": True}, "a bias blk.0.ffn_down.bias"),
        (
            "Qwen3VLForConditionalGeneration",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "no mrope_section",
        ),
        ("Gemma4ForCausalLM", {}, "only adapters of Gemma4ForCausalLM are converted, not whole models"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    tiny.model(name, **config).save_pretrained(tmp_path / "hf")
    with pytest.raises(RefusedError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_a_merge_is_llama_cpp_s_conversion_of_the_merged_folder_and_proves_to_be_it(
    tmp_path: Path, converted: Converter, kind: str, name: str
) -> None:
    folder = model_folder(name, kind, tmp_path / "hf")
    base = read_base(folder)
    adapter = Adapter(dict(deltas(base, base.llama_cpp_architecture())))
    merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged")
    expected = converted(tmp_path / "merged", tmp_path / "theirs.gguf")
    if name.startswith("Gemma3"):
        (folder / "tokenizer.json").unlink()
    report = merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged.gguf")
    assert_converted(tmp_path / "merged.gguf", expected)
    assert len(report.touched) == len(adapter.deltas)
    proof = merge_proof.prove([(adapter, 1.0)], folder, tmp_path / "merged.gguf")
    assert proof.good, [tensor for tensor in proof.tensors if not tensor.good]
    has_notes = bool(proof.notes)
    assert has_notes == name.endswith("ForConditionalGeneration")


def test_a_change_of_what_the_file_would_not_contain_is_refused(tmp_path: Path) -> None:
    folder = model_folder("Qwen3VLForConditionalGeneration", "qwen3vl", tmp_path / "hf")
    zeros = np.zeros((2, 64), np.float32)
    adapter = Adapter({"model.visual.blocks.0.attn.proj": LowRank(zeros, zeros.T.copy(), 2.0)})
    with pytest.raises(RefusedError, match="a GGUF of the text model does not contain it"):
        merge_into_base([(adapter, 1.0)], folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def theirs(theta: float, size: int, factor: float) -> Any:
    """The factors of Llama 3's rotary embedding as torch computes them (llama.cpp, conversion/llama.py)."""
    import torch

    frequencies = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    factors = []
    for frequency in frequencies:
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4.0:
            factors.append(1.0)
        elif wave > 8192 / 1.0:
            factors.append(factor)
        else:
            smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32).numpy()


@pytest.mark.parametrize(("theta", "size", "factor"), [(5e5, 64, 32.0), (5e5, 128, 8.0), (12e6, 128, 8.0), (2e6, 128, 16.0)])
def test_the_factors_of_published_models_are_those_of_torch(theta: float, size: int, factor: float) -> None:
    need_module("torch")
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    numbers = {"num_attention_heads": 4, "hidden_size": 4 * size, "head_dim": size}
    config = complete_config(
        {"model_type": "llama", **numbers, "rope_parameters": {**rope, "original_max_position_embeddings": 8192}}, "x"
    )
    (tensor,), _ = rope_tensors("llama", config)
    assert tensor.constant is not None
    assert np.array_equal(tensor.constant, theirs(theta, size, factor))
