"""`verify-merge` on whole models of every build: good where the adapter is in, and never where it isn't."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base
from adapterhub.merging.adapter_checks import WeightedAdapters
from adapterhub.merging.into_base.merge_proof import Proofs, prove
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.bases import read_base
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.merging.into_base.test_write_folder import MOE, RESIZED, TIED, loaded, saved, stacked, tensors_of, tied_adapter
from tests.merging.into_base.test_write_gguf import stored_as
from tests.support import tiny

pytestmark = pytest.mark.peer


def good(adapters: WeightedAdapters, base: Path, merged: Path, *, least: int = 1) -> Proofs:
    proof = prove(adapters, base, merged)
    assert proof.good, [
        (tensor.name, tensor.verdict, tensor.strength, tensor.note) for tensor in proof.tensors if not tensor.good
    ]
    assert sum(tensor.verdict != "untouched" and tensor.strength is not None for tensor in proof.tensors) >= least or least == 0
    return proof


def bad(adapters: WeightedAdapters, base: Path, merged: Path) -> set[str]:
    """The verdicts with which a model fails."""
    proof = prove(adapters, base, merged)
    assert not proof.good
    return {tensor.verdict for tensor in proof.tensors if not tensor.good}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.parametrize("config", TIED.values(), ids=TIED)
def test_heads_that_a_merge_unties(torch: Any, tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    model = tiny.model(name, tie_word_embeddings=True)
    base = saved(model, tmp_path / "base")
    tied_adapter(torch, model, tmp_path / "adapter", config)
    adapters = [(peft.read(tmp_path / "adapter"), 1.0)]
    merge_into_base(adapters, base, tmp_path / "out")
    good(adapters, base, tmp_path / "out")
    assert bad(adapters, base, base) <= {"absent", "missing", "other"}


@pytest.mark.parametrize("tie", [False, True], ids=["two", "tied"])
@pytest.mark.parametrize("config", RESIZED.values(), ids=RESIZED)
def test_resized_vocabularies(torch: Any, tmp_path: Path, tie: bool, config: dict[str, Any]) -> None:
    if tie and "modules_to_save" not in config:
        pytest.skip("peft saves one of the two tables")
    model = tiny.model(tie_word_embeddings=tie)
    base = saved(model, tmp_path / "base")
    model.resize_token_embeddings(133)
    plain = saved(model, tmp_path / "resized")
    wrapped = tiny.adapter(model, tmp_path / "adapter", **config)
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    adapters = [(peft.read(tmp_path / "adapter"), 1.0)]
    merge_into_base(adapters, base, tmp_path / "out")
    good(adapters, base, tmp_path / "out")
    assert bad(adapters, base, base) & {"absent", "shape"}
    assert "absent" in bad(adapters, base, plain)


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("together", [False, True], ids=["listed", "stacked"])
def test_experts(torch: Any, tmp_path: Path, name: str, together: bool) -> None:
    model = tiny.model(name)
    base = saved(model, tmp_path / "base")
    if together:
        stacked(base)
    tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=MOE[name])
    adapters = [(peft.read(tmp_path / "adapter", base=read_base(base)), 1.0)]
    merge_into_base(adapters, base, tmp_path / "out")
    good(adapters, base, tmp_path / "out", least=6)
    assert bad(adapters, base, base) == {"absent"}
    loaded(tmp_path / "out").save_pretrained(tmp_path / "again")  # as transformers lays experts out now
    good(adapters, base, tmp_path / "again", least=6)


def test_one_skipped_expert_among_others(torch: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = saved(tiny.model("Qwen3MoeForCausalLM"), tmp_path / "base")
    listed = tensors_of(base)
    stacked(base)
    deltas = {}
    for expert in range(4):
        target = f"model.layers.1.mlp.experts.{expert}.down_proj"
        rows, columns = listed[f"{target}.weight"].shape
        factors = rng.normal(size=(3, columns)).astype(np.float32), rng.normal(size=(rows, 3)).astype(np.float32)
        deltas[target] = LowRank(*factors, 6)
    whole = [(Adapter(deltas), 1.0)]
    merge_into_base(whole, base, tmp_path / "out")
    good(whole, base, tmp_path / "out")
    merge_into_base([(Adapter(dict(list(deltas.items())[:3])), 1.0)], base, tmp_path / "three")
    assert bad(whole, base, tmp_path / "three")


@pytest.mark.parametrize("form", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_a_gguf_of_our_own_merge(torch: Any, tmp_path: Path, form: str) -> None:
    model = tiny.model(hidden_size=128, intermediate_size=256)
    base = saved(model, tmp_path / "base")
    tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    adapters = [(peft.read(tmp_path / "adapter"), 1.0)]
    plain = tiny.write_gguf(tiny.model(hidden_size=128, intermediate_size=256), tmp_path / "plain.gguf")
    gguf = stored_as(plain, tmp_path / "base.gguf", form)
    merge_into_base(adapters, gguf, tmp_path / "out.gguf", options=Options(force=True))
    proof = good(adapters, base, tmp_path / "out.gguf", least=12)
    assert proof.strengths()[0] == pytest.approx((1, 1, 1), abs=0.05)
    good(adapters, base, (tmp_path / "out.gguf").rename(tmp_path / "named otherwise"), least=12)
    assert bad(adapters, base, gguf) == {"absent"}
    merge_into_base([(adapters[0][0], 0.5)], gguf, tmp_path / "half.gguf", options=Options(force=True))
    assert bad(adapters, base, tmp_path / "half.gguf") == {"weaker"}


@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
def test_a_merged_gguf_that_was_quantized_afterwards(torch: Any, tmp_path: Path, form: str) -> None:
    model = tiny.model(hidden_size=128, intermediate_size=256)
    base = saved(model, tmp_path / "base")
    tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    adapters = [(peft.read(tmp_path / "adapter"), 1.0)]
    gguf = tiny.write_gguf(tiny.model(hidden_size=128, intermediate_size=256), tmp_path / "base.gguf")
    merge_into_base(adapters, gguf, tmp_path / "out.gguf")
    quantized = stored_as(tmp_path / "out.gguf", tmp_path / "out-q.gguf", form.upper())
    proof = good(adapters, base, quantized, least=4)
    assert Counter(tensor.verdict for tensor in proof.tensors if tensor.strength) == {"quantized": 4}
    assert bad(adapters, base, stored_as(gguf, tmp_path / "base-q.gguf", form.upper())) == {"absent"}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_bitsandbytes(torch: Any, tmp_path: Path, quantization: str) -> None:
    need_module("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = tiny.model(hidden_size=128, intermediate_size=256)
    base = saved(model, tmp_path / "base")
    tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    adapters = [(peft.read(tmp_path / "adapter"), 1.0)]
    merge_into_base(adapters, base, tmp_path / "out")
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    for folder in ("base", "out"):
        loaded(tmp_path / folder, quantization_config=config).save_pretrained(tmp_path / f"{folder}-{quantization}")
    good(adapters, base, tmp_path / f"out-{quantization}", least=4)
    assert bad(adapters, base, tmp_path / f"base-{quantization}") == {"absent"}
    merge_into_base(adapters, tmp_path / f"base-{quantization}", tmp_path / "floats", options=Options(dequantize=True))
    good(adapters, tmp_path / f"base-{quantization}", tmp_path / "floats", least=4)  # the quantized model is the base
    assert json.loads((tmp_path / "floats" / "config.json").read_text()).get("quantization_config") is None
