"""Adapters of models that GGUF has no names for: the refusal names the way that works, and it does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.containers import safetensors_file
from tests.conftest import Run
from tests.support.folders import adapter

HIDDEN, INNER, WORDS = 16, 24, 32
RNG = np.random.default_rng(0)
# Names of the modules of a layer, with their shapes, and of the modules outside; as published.
MODELS: dict[str, tuple[str, dict[str, tuple[int, int]], dict[str, tuple[int, int]]]] = {
    "FalconH1ForCausalLM": (
        "falcon_h1",
        {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (8, HIDDEN), "mamba.in_proj": (52, HIDDEN),
            "feed_forward.gate_proj": (INNER, HIDDEN), "feed_forward.down_proj": (HIDDEN, INNER),
        },
        {"model.embed_tokens": (WORDS, HIDDEN), "lm_head": (WORDS, HIDDEN)},
    ),
    "InternLM2ForCausalLM": (
        "internlm2",
        {
            "attention.wqkv": (2 * HIDDEN, HIDDEN), "attention.wo": (HIDDEN, HIDDEN), "feed_forward.w1": (INNER, HIDDEN),
            "feed_forward.w3": (INNER, HIDDEN), "feed_forward.w2": (HIDDEN, INNER),
        },
        {"model.tok_embeddings": (WORDS, HIDDEN), "output": (WORDS, HIDDEN)},
    ),
    "DbrxForCausalLM": (
        "dbrx",
        {"norm_attn_norm.attn.Wqkv": (2 * HIDDEN, HIDDEN), "norm_attn_norm.attn.out_proj": (HIDDEN, HIDDEN)},
        {"transformer.wte": (WORDS, HIDDEN), "lm_head": (WORDS, HIDDEN)},
    ),
}  # fmt: skip


def _numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_that_gguf_refuses_by_name_is_merged_exactly_by_the_way_that_is_named(
    run: Run, tmp_path: Path, name: str
) -> None:
    model_type, inside, outside = MODELS[name]
    layers = "transformer.blocks" if name.startswith("Dbrx") else "model.layers"
    modules = {f"{layers}.{number}.{module}": shape for number in range(2) for module, shape in inside.items()}
    weights = {f"{module}.weight": _numbers(*shape) for module, shape in (modules | outside).items()}
    (tmp_path / "base").mkdir()
    safetensors_file.write(tmp_path / "base/model.safetensors", weights, {"format": "pt"})
    config = {
        "architectures": [name], "model_type": model_type, "num_hidden_layers": 2, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": WORDS,
    }  # fmt: skip
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    shapes = {f"{module}.lora_A.weight": (2, columns) for module, (_, columns) in modules.items()}
    shapes |= {f"{module}.lora_B.weight": (rows, 2) for module, (rows, _) in modules.items()}
    adapter(tmp_path / "a", shapes, lora_alpha=4, target_modules=[module.rpartition(".")[2] for module in inside])

    refusal = run("convert", "a", "a.gguf", "--base", "base", code=6, cwd=tmp_path).stderr
    assert refusal.count("\n") == 1
    assert f"{name} has no verified mapping to llama.cpp. `adapterhub merge " in refusal
    assert refusal.rstrip().endswith("[no-gguf-architecture]")
    run("merge", "a", "--into", "base", "-o", "merged", "--dtype", "f32", cwd=tmp_path)
    with (
        safetensors_file.SafetensorsFile(tmp_path / "a/adapter_model.safetensors") as pairs,
        safetensors_file.SafetensorsFile(tmp_path / "merged/model.safetensors") as merged,
    ):
        assert set(merged.tensors) == set(weights)
        for weight, before in weights.items():
            expected = before.astype(np.float64)
            if (module := weight.removesuffix(".weight")) in modules:
                lora_A, lora_B = (pairs.tensor(f"base_model.model.{module}.lora_{half}.weight") for half in "AB")
                expected = expected + 2 * lora_B.astype(np.float64) @ lora_A
            assert np.allclose(merged.tensor(weight), expected, rtol=1e-6, atol=1e-6), weight
