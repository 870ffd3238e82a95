"""Every feature of an adapter into a folder, with transformers and peft as the oracle: the logits of the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base, prepare_merge
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.bases import read_base, weight_files
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from tests.support import tiny
from tests.support.torch_order import assert_same_merge

pytestmark = pytest.mark.peer
TOKENS = [3, 17, 99, 5, 64, 23, 101, 7]


def logits(model: Any, tokens: list[int] = TOKENS) -> np.ndarray:
    import torch

    with torch.no_grad():
        values: np.ndarray = model.eval()(torch.tensor([tokens])).logits[0].float().numpy()
    return values


def loaded(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in weight_files(folder):
        with SafetensorsFile(path) as file:
            tensors |= {name: file.tensor(name) for name in file.tensors}
    return tensors


def close(actual: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
    assert np.abs(expected - plain).max() > 0.01 * np.abs(expected).max(), "the adapter does nothing"
    assert np.abs(actual - expected).max() < 2e-4 * np.abs(expected).max()


TIED = {
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 99]},
}
"""What an adapter may do to tables that are one."""
RESIZED = {
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "low-rank": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


def tied_adapter(torch: Any, model: Any, folder: Path, config: dict[str, Any]) -> Any:
    """An adapter of peft's in `folder`, on a model whose tables are one, as if what it replaces had been trained."""
    wrapped = tiny.adapter(model, folder, **config)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "modules_to_save" in key or "trainable_tokens_delta" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return wrapped


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.parametrize("config", TIED.values(), ids=TIED)
def test_a_tied_table_acts_where_it_did_in_training(torch: Any, tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    model = tiny.model(name, tie_word_embeddings=True)
    base, plain = saved(model, tmp_path / "base"), logits(model)
    wrapped = tied_adapter(torch, model, tmp_path / "adapter", config)
    expected = logits(wrapped)
    merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], base, tmp_path / "out")
    rows = "trainable_token_indices" in config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is rows
    close(logits(loaded(tmp_path / "out")), expected, plain)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("config", RESIZED.values(), ids=RESIZED)
def test_a_resized_vocabulary_comes_along(torch: Any, tmp_path: Path, tie: bool, config: dict[str, Any]) -> None:
    if tie and "modules_to_save" not in config:
        pytest.skip("peft saves one of the two tables")
    model = tiny.model(tie_word_embeddings=tie)
    base = saved(model, tmp_path / "base")
    model.resize_token_embeddings(133)
    wrapped = tiny.adapter(model, tmp_path / "adapter", **config)
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    expected = logits(wrapped, [3, 130, 132, 5])
    report = merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 133
    assert any("133 rows as in training" in note for note in report.notes)
    our_logits = logits(loaded(tmp_path / "out"), [3, 130, 132, 5])
    assert np.abs(our_logits - expected).max() < 2e-4 * np.abs(expected).max()


MOE = {
    "Qwen3MoeForCausalLM": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "MixtralForCausalLM": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "GptOssForCausalLM": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def stacked(folder: Path) -> None:
    """The same weights with a tensor for all experts of a layer, as transformers has them in memory."""
    tensors = {name: parameter.detach().numpy() for name, parameter in loaded(folder).named_parameters()}
    for path in weight_files(folder):
        path.unlink()
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("together", [False, True])
def test_experts_in_every_layout(torch: Any, tmp_path: Path, name: str, together: bool) -> None:
    model = tiny.model(name)
    base, plain = saved(model, tmp_path / "base"), logits(model)
    if together:
        stacked(base)
    wrapped = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=MOE[name])
    expected = logits(wrapped)
    adapter = peft.read(tmp_path / "adapter", base=read_base(base))
    merge_into_base([(adapter, 1.0)], base, tmp_path / "out")
    close(logits(loaded(tmp_path / "out")), expected, plain)


@pytest.mark.parametrize("together", [False, True])
def test_single_experts_in_every_layout(torch: Any, tmp_path: Path, together: bool) -> None:
    rng = np.random.default_rng(0)
    base = saved(tiny.model("Qwen3MoeForCausalLM"), tmp_path / "base")
    listed = tensors_of(base)
    if together:
        stacked(base)
    stem = "model.layers.1.mlp.experts.2"
    deltas, expected_tensors = {}, dict(listed)
    for module in ("gate_proj", "up_proj", "down_proj"):
        weight = listed[f"{stem}.{module}.weight"]
        delta = LowRank(
            rng.normal(size=(3, weight.shape[1])).astype(np.float32),
            rng.normal(size=(weight.shape[0], 3)).astype(np.float32),
            6,
        )
        deltas[f"{stem}.{module}"] = delta
        expected_tensors[f"{stem}.{module}.weight"] = weight + 2 * delta.lora_B @ delta.lora_A
    merge_into_base([(Adapter(deltas), 1.0)], base, tmp_path / "out")
    (tmp_path / "wanted").mkdir()
    (tmp_path / "wanted" / "config.json").write_text((base / "config.json").read_text())
    safetensors_file.write(tmp_path / "wanted" / "model.safetensors", expected_tensors, {"format": "pt"})
    close(logits(loaded(tmp_path / "out")), logits(loaded(tmp_path / "wanted")), logits(loaded(base)))


@pytest.mark.parametrize("shape", [(), (16,), (4, 16)])
def test_a_malformed_stack_of_experts_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}')
    name = "model.layers.0.mlp.experts"
    safetensors_file.write(tmp_path / "model.safetensors", {f"{name}.down_proj": np.zeros(shape, np.float32)}, {"format": "pt"})
    delta = LowRank(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), 2)
    with pytest.raises(AdapterhubError, match=r"changes a weight of shape \(8, 8\), the base's .*down_proj is"):
        prepare_merge([(Adapter({f"{name}.1.down_proj": delta}), 1.0)], tmp_path)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LlamaForCausalLM", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        ("GPT2LMHeadModel", {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
        ("Qwen2ForCausalLM", {"target_modules": ["q_proj"], "bias": "all"}),
        ("Starcoder2ForCausalLM", {"target_modules": ["c_fc"], "bias": "lora_only", "modules_to_save": ["norm"]}),
    ],
)
def test_what_is_more_than_factors(torch: Any, tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    model = tiny.model(name)
    base, plain = saved(model, tmp_path / "base"), logits(model)
    wrapped = tiny.adapter(model, tmp_path / "adapter", **config)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_A" not in key and "lora_B" not in key:
                parameter.mul_(1.1)
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], base, tmp_path / "out")
    close(logits(loaded(tmp_path / "out")), logits(wrapped), plain)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_another_type_is_what_peft_merges_in_it(torch: Any, llama: Any, trained: Any, tmp_path: Path, dtype: str) -> None:
    from peft import PeftModel

    base = llama("bfloat16", shard_size="200KB")
    adapter = trained(base, r=8, target_modules=["q_proj", "up_proj"])
    kind = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    merge_into_base([(peft.read(adapter), 1.0)], base, tmp_path / "out", options=Options(dtype=dtype))
    expected = PeftModel.from_pretrained(loaded(base, dtype=kind), adapter).merge_and_unload()
    loaded_model = loaded(tmp_path / "out", dtype="auto")
    assert loaded_model.dtype == kind
    assert_same_merge(expected.state_dict(), loaded_model.state_dict())


def test_shards_of_a_size_with_their_index(torch: Any, llama: Any, trained: Any, tmp_path: Path) -> None:
    base = llama("bfloat16")
    adapter = peft.read(trained(base, r=8, target_modules=["q_proj", "up_proj"]))
    merge_into_base([(adapter, 1.0)], base, tmp_path / "one")
    merge_into_base([(adapter, 1.0)], base, tmp_path / "many", options=Options(shard_size=100_000))
    assert not (tmp_path / "many" / "model.safetensors").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    tensors, sharded = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert {name: array.tobytes() for name, array in tensors.items()} == {
        name: array.tobytes() for name, array in sharded.items()
    }
    assert np.array_equal(logits(loaded(tmp_path / "one")), logits(loaded(tmp_path / "many")))
    merge_into_base([(adapter, 1.0)], tmp_path / "many", tmp_path / "single", options=Options(shard_size=10**9))
    assert [path.name for path in sorted((tmp_path / "single").glob("model*"))] == ["model.safetensors"]


def test_what_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 40}))
    name = "model.layers.0.self_attn.q_proj"
    weights = {f"{name}.weight": np.ones((8, 8)), "model.norm.weight": np.full(8, 1e5)}
    arrays = {key: array.astype(dtypes.BF16) for key, array in weights.items()}
    safetensors_file.write(tmp_path / "base" / "model.safetensors", arrays)
    adapter = Adapter({name: LowRank(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), 1)})
    with pytest.raises(AdapterhubError, match=r"model.norm.weight: .* over 65504") as caught:
        merge_into_base([(adapter, 1.0)], tmp_path / "base", tmp_path / "out", options=Options(dtype="f16"))
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()
