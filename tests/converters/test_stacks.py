"""Experts that a file has one by one, written for the peft of today, which loads them and computes with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import bases
from adapterhub_converters.adapter import Adapter, LowRank, Meta
from adapterhub_converters.bases import BaseSpec, names_in_memory
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft as format_peft
from adapterhub_converters.formats.peft import stacks
from tests.conftest import need_module

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
LOCAL = {"num_local_experts": 4}
# The class of a model, its sizes, and the module with the experts.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": (LOCAL, "block_sparse_moe"),
    "Qwen2Moe": ({"shared_expert_intermediate_size": 8, "decoder_sparse_step": 1}, "mlp"),
    "Qwen3Moe": ({"decoder_sparse_step": 1}, "mlp"),
    "Olmoe": ({}, "mlp"),
    "Glm4Moe": (
        {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8},
        "mlp",
    ),
    "DeepseekV3": (
        {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
         "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        "mlp",
    ),
    "Ernie4_5_Moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1}, "mlp"),
    "Qwen3Next": (
        {"layer_types": ["full_attention", "full_attention"], "shared_expert_intermediate_size": 8, "head_dim": 8}, "mlp",
    ),
    "Jamba": ({"attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False}, "feed_forward"),
    "GraniteMoe": (LOCAL, "block_sparse_moe"),
    "Phimoe": (LOCAL, "mlp"),
    "Lfm2Moe": ({"num_dense_layers": 1, "layer_types": ["full_attention", "full_attention"]}, "feed_forward"),
    "MiniMax": ({**LOCAL, "head_dim": 8, "layer_types": ["full_attention", "full_attention"]}, "block_sparse_moe"),
}  # fmt: skip
DENSE = ("q_proj", "gate_proj", "up_proj", "down_proj")


def model(name: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name][0])
    return getattr(transformers, f"{name}ForCausalLM")(config)


def pair(rng: np.random.Generator, shape: tuple[int, ...], r: int = 2) -> LowRank:
    return LowRank(
        rng.normal(size=(r, shape[1])).astype(np.float32), rng.normal(size=(shape[0], r)).astype(np.float32), 2.0 * r
    )


def adapter_and_weights(name: str, weights: dict[str, np.ndarray]) -> tuple[Adapter, dict[str, np.ndarray]]:
    """Pairs on attention, dense layers, shared experts, routers and single experts, and the weights with their sums."""
    rng, deltas = np.random.default_rng(0), dict[str, LowRank]()
    expected = {key: array.copy() for key, array in weights.items()}
    for key, array in weights.items():
        module, _, last = key.rpartition(".")
        if key.endswith("experts.gate_up_proj"):
            place = module.rpartition(".")[0].rpartition(".")[0] + f".{MODELS[name][1]}.experts"
            inner = array.shape[1] // 2
            for expert in (0, 1, 3):  # one has none
                for side, part in enumerate(("gate_proj", "up_proj")):
                    low = pair(rng, (inner, array.shape[2]), r=2 + side)
                    deltas[f"{place}.{expert}.{part}"] = low
                    expected[key][expert, side * inner : (side + 1) * inner] += low.scaling * low.lora_B @ low.lora_A
                down = weights[f"{module}.down_proj"].shape[1:]
                low = pair(rng, down)
                deltas[f"{place}.{expert}.down_proj"] = low
                expected[f"{module}.down_proj"][expert] += low.scaling * low.lora_B @ low.lora_A
        elif array.ndim == 2 and last == "weight" and module.rpartition(".")[2] in (*DENSE, "gate", "router"):
            deltas[module] = pair(rng, array.shape)
            expected[key] += deltas[module].scaling * deltas[module].lora_B @ deltas[module].lora_A
    return Adapter(dict(deltas), meta=Meta(task_type="CAUSAL_LM")), expected


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_with_every_pair(name: str, tmp_path: Path) -> None:
    need_module("peft")
    import peft

    fresh = model(name)
    fresh.save_pretrained(tmp_path / "base")
    weights = {key: tensor.numpy() for key, tensor in fresh.state_dict().items()}
    adapter, expected = adapter_and_weights(name, weights)
    assert any(".experts." in target for target in adapter.deltas)
    (tmp_path / "a").mkdir()
    format_peft.write(adapter, tmp_path / "a", base=bases.read_hf(tmp_path / "base"))
    merged = peft.PeftModel.from_pretrained(model(name), str(tmp_path / "a")).merge_and_unload().state_dict()
    for key, array in expected.items():
        np.testing.assert_allclose(merged[key].numpy(), array, rtol=0, atol=1e-5, err_msg=key)
    again = format_peft.read(tmp_path / "a")
    assert again.deltas.keys() == {names_in_memory.renaming("")(t) for t in again.deltas}
    assert {delta.scaling for delta in again.deltas.values()} == {2.0}


def test_halves_that_share_a_factor_stay_of_one_rank_and_other_scales_go_into_the_other() -> None:
    rng = np.random.default_rng(0)
    gate, up = pair(rng, (4, 8)), pair(rng, (4, 8))
    up = LowRank(gate.lora_A, up.lora_B, gate.alpha)
    base = BaseSpec("a base", "hf", "Qwen3MoeForCausalLM", "qwen3_moe", {"num_experts": 1})
    layer = "model.layers.0.mlp.experts.0"
    deltas = stacks.stack_experts(Adapter({f"{layer}.gate_proj": gate, f"{layer}.up_proj": up}), base).deltas
    ((target, delta),) = deltas.items()
    assert (target, delta.r) == ("model.layers.0.mlp.experts.gate_up_proj", 2)
    up = LowRank(up.lora_A, up.lora_B, 8 * gate.alpha)
    (delta,) = stacks.stack_experts(Adapter({f"{layer}.gate_proj": gate, f"{layer}.up_proj": up}), base).deltas.values()
    dense = delta.scaling * delta.lora_B[0] @ delta.lora_A[0]  # type: ignore[union-attr]
    np.testing.assert_allclose(dense[4:], up.scaling * up.lora_B @ up.lora_A, rtol=1e-5)
    assert stacks.unstacked_notes(Adapter({f"{layer}.up_proj": up}), None)
    with pytest.raises(RefusedError, match="expert 4 of 1"):
        stacks.stack_experts(Adapter({"model.layers.0.mlp.experts.4.up_proj": up}), base)


def test_the_list_of_models_is_that_of_transformers() -> None:
    need_module("transformers")
    import transformers

    models = Path(transformers.__file__).parent / "models"
    for name in stacks.STACKING:
        folder = next(folder_name for folder_name in (name, name.removesuffix("_text")) if (models / folder_name).is_dir())
        text = (models / folder / f"modeling_{folder}.py").read_text()
        assert "self.gate_up_proj = nn.Parameter" in text, name
