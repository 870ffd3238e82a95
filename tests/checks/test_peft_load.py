"""What peft builds, loads and skips of an adapter, and what a check says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub_converters.bases import BaseSpec, BaseTensor
from tests.conftest import need_module
from tests.support import peft_draws
from tests.support.folders import Shapes, adapter, base, pairs

Q, OUT = (pairs(2, module=f"model.layers.{{}}.self_attn.{name}_proj") for name in "qo")
TABLE = "model.embed_tokens"
ROWS = {f"{TABLE}.token_adapter.trainable_tokens_delta": (2, 8)}


@pytest.mark.peer
def test_peft_does_with_drawn_adapters_what_is_said_of_them(tmp_path: Path) -> None:
    """tests/peers has more of them, on more bases."""
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    names = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForConditionalGeneration")
    assert peft_draws.disagreements(1, 60, tmp_path, names) == []


@pytest.mark.peer
def test_transformers_does_with_drawn_adapters_what_is_said_of_it(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    names = ("LlamaForCausalLM", "Qwen2MoeForCausalLM", "Gemma3ForConditionalGeneration")
    assert peft_draws.disagreements(2, 30, tmp_path, names, "transformers") == []


def of_type(folder: Path, model_type: str) -> BaseSpec:
    spec = base(folder, tied=False)
    outputs = {f"model.layers.{layer}.self_attn.o_proj.weight": BaseTensor((8, 8), "F32") for layer in (0, 1)}
    return dataclasses.replace(spec, model_type=model_type, tensors={**spec.tensors, **outputs})


@pytest.mark.parametrize(
    ("shapes", "config", "verdict", "code"),
    [
        (
            {**Q, **OUT},
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
            "ignored",
            "not-targeted",
        ),
        ({**Q, **OUT}, {"exclude_modules": ["o_proj"]}, "ignored", "not-targeted"),
        ({**Q, **OUT}, {"exclude_modules": r".*layers\.1\..*"}, "ignored", "not-targeted"),
        (Q, {"modules_to_save": ["lm_head"]}, "refused", "missing-tensor"),
        (Q, {"modules_to_save": ["embed_tokens"]}, "refused", "missing-tensor"),
        (Q, {"trainable_token_indices": [1, 2]}, "refused", "missing-tensor"),
        ({**Q, **ROWS}, {"trainable_token_indices": [1, 2]}, "applied", ""),
        (Q, {"layers_pattern": ["layers"]}, "refused", "peft-refuses"),
        (Q, {"layers_to_transform": [0]}, "ignored", "not-targeted"),
        (Q, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, "applied", ""),
        (Q, {"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, "ignored", "not-targeted"),
        (Q, {"rank_pattern": {r"layers\.1\..*": 5}}, "refused", "rank-config"),
        ({**Q, "model.layers.0.self_attn.q_proj.lora_Q": (2, 2)}, {}, "ignored", "unknown-tensor"),
    ],
)
def test_a_config_that_peft_reads_otherwise_than_it_was_trained_is_an_error(
    tmp_path: Path, shapes: Shapes, config: dict[str, Any], verdict: str, code: str
) -> None:
    report = checks.check(adapter(tmp_path / "a", shapes, **config))
    assert report.verdicts["peft"].verdict == verdict
    assert report.ok == (not code)
    assert not code or code in report.counted()


def test_a_module_that_only_the_base_shows_to_be_missing_is_a_missing_tensor(tmp_path: Path) -> None:
    folder, spec = adapter(tmp_path / "a", Q, modules_to_save=["norm"]), base(tmp_path / "b")
    assert checks.check(folder).ok
    with_norm = dataclasses.replace(spec, tensors={**spec.tensors, "model.norm.weight": BaseTensor((8,), "F32")})
    report = checks.check(folder, base=with_norm)
    assert (report.ok, report.verdicts["peft"].reasons) == (False, ("KeyError 'base_model.model.model.norm.weight'",))


@pytest.mark.parametrize(("missing", "init", "verdict"), [("A", True, "wrong"), ("B", True, "ignored"), ("B", False, "wrong")])
def test_a_pair_that_peft_leaves_random_is_wrong(tmp_path: Path, missing: str, init: bool, verdict: str) -> None:
    shapes = {name: shape for name, shape in Q.items() if f"layers.1.self_attn.q_proj.lora_{missing}" not in name}
    folder = adapter(tmp_path / "a", shapes, target_modules=["q_proj"], init_lora_weights=init)
    assert checks.check(folder, base=of_type(tmp_path / "b", "llama")).verdicts["peft"].verdict == verdict
