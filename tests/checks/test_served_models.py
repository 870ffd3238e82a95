"""vLLM and SGLang apply what their own lists of models and modules say, and what is in no list is unknown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub_converters import runtime_models
from adapterhub_converters.containers import safetensors_file
from tests.conftest import Run, need_module
from tests.support import tiny
from tests.support.folders import adapter, base, pairs


def verdict(folder: Path, architecture: str, runtime: str, *modules: str) -> tuple[str, str]:
    """Return the verdict and its first reason for pairs on some modules of a model, of which only the name is known."""
    folder.mkdir(exist_ok=True)
    names = modules or ("model.layers.0.self_attn.o_proj",)
    shapes = {f"{name}.{part}": shape for name in names for part, shape in PAIR.items()}
    spec = dataclasses.replace(base(folder / "base"), architecture=architecture, tensors={})
    runtime_verdict = checks.check(adapter(folder / "a", shapes), base=spec).verdicts[runtime]
    return runtime_verdict.verdict, next(iter(runtime_verdict.reasons), "")


PAIR = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", ("applied", "")),
        ("BertModel", ("applied", "")),
        ("GPT2LMHeadModel", ("refused", "GPT2LMHeadModel does not support LoRA yet.")),
        ("ArcticForCausalLM", ("refused", "ArcticForCausalLM was last in vLLM 0.28.0")),
        *(
            (name, ("unknown", f"{name} is not among its models; transformers may run it there"))
            for name in ("T5ForConditionalGeneration", "M2M100ForConditionalGeneration", "MBartForConditionalGeneration")
        ),
    ],
)
def test_vllm_applies_adapters_of_the_models_that_it_serves_with_lora(
    tmp_path: Path, architecture: str, expected: tuple[str, str]
) -> None:
    assert verdict(tmp_path, architecture, "vllm") == expected


def test_a_required_runtime_that_may_not_have_the_model_fails_the_check_in_one_line(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "base")
    config = tmp_path / "base/config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "T5ForConditionalGeneration"))
    adapter(tmp_path / "a", pairs(2))
    printed = run("validate", "a", "--base", "base", "--for", "vllm", code=1, cwd=tmp_path).stdout
    assert "vllm: unknown: T5ForConditionalGeneration is not among its models" in printed


TOWERS = [
    ("Qwen3_5ForConditionalGeneration", "model.visual.blocks.0.attn.qkv"),
    ("Qwen2_5_VLForConditionalGeneration", "visual.blocks.0.attn.qkv"),
    ("Gemma3ForConditionalGeneration", "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"),
    ("LlavaForConditionalGeneration", "model.multi_modal_projector.linear_1"),
    ("Gemma4ForConditionalGeneration", "model.embed_vision.embedding_projection"),
    ("Idefics3ForConditionalGeneration", "model.vision_model.encoder.layers.0.self_attn.q_proj"),
]


@pytest.mark.parametrize(("architecture", "module"), TOWERS)
def test_vllm_leaves_towers_out(tmp_path: Path, architecture: str, module: str) -> None:
    option = " unless enable_tower_connector_lora is set"
    text = "model.language_model.layers.0.self_attn.q_proj"
    assert verdict(tmp_path, architecture, "vllm", text, module) == (
        "ignored",
        f"{module}: towers and connectors are left out{option}",
    )


@pytest.mark.parametrize("module", ["model.language_model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"])
def test_vllm_applies_the_language_model_of_a_vision_model(tmp_path: Path, module: str) -> None:
    for architecture in ("Qwen3_5ForConditionalGeneration", "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"):
        assert verdict(tmp_path / architecture, architecture, "vllm", module)[0] == "applied"


def test_vllm_refuses_an_output_layer_where_the_model_has_no_lora_on_it(tmp_path: Path) -> None:
    assert verdict(tmp_path / "llama", "LlamaForCausalLM", "vllm", "lm_head")[0] == "applied"
    assert verdict(tmp_path / "qwen", "Qwen2ForCausalLM", "vllm", "lm_head") == (
        "refused",
        "expected target modules in …, but received lm_head: no LoRA on it",
    )


@pytest.mark.parametrize(
    ("architecture", "module", "expected"),
    [
        (
            "Glm4ForCausalLM",
            "model.layers.0.mlp.gate_up_proj",
            ("refused", "expected target modules in …, but received model.layers.0.mlp.gate_up_proj"),
        ),
        ("Phi3ForCausalLM", "model.layers.0.mlp.gate_up_proj", ("applied", "")),
        (
            "GraniteMoeSharedForCausalLM",
            "model.layers.0.shared_mlp.input_linear",
            ("ignored", "model.layers.0.shared_mlp.input_linear could not be wrapped by any LoRA layer: left out"),
        ),
        (
            "AudioFlamingo3ForConditionalGeneration",
            "model.language_model.layers.0.self_attn.q_proj",
            ("ignored", "model.language_model.layers.0.self_attn.q_proj has another name in vLLM, which drops it"),
        ),
        (
            "LagunaForCausalLM",
            "model.layers.1.mlp.shared_experts.up_proj",
            ("ignored", "model.layers.1.mlp.shared_experts.up_proj has another name in vLLM, which drops it"),
        ),
        (
            "MixtralForCausalLM",
            "model.layers.0.mlp.gate",
            ("ignored", "model.layers.0.mlp.gate has another name in vLLM, which drops it"),
        ),
        ("MixtralForCausalLM", "model.layers.0.block_sparse_moe.gate", ("applied", "")),
        (
            "GPTBigCodeForCausalLM",
            "transformer.h.0.attn.c_attn",
            ("ignored", "transformer.h.0.attn.c_attn could not be wrapped by any LoRA layer: left out"),
        ),
        ("GPTBigCodeForCausalLM", "transformer.h.0.attn.c_proj", ("applied", "")),
    ],
)
def test_vllm_has_fused_layers_and_components_under_its_own_names(
    tmp_path: Path, architecture: str, module: str, expected: tuple[str, str]
) -> None:
    assert verdict(tmp_path, architecture, "vllm", module) == expected


@pytest.mark.parametrize(
    ("options", "expected"), [({}, "ignored"), ({"multi_query": True}, "ignored"), ({"multi_query": False}, "applied")]
)
def test_vllm_leaves_out_a_projection_that_it_fuses_by_the_config_of_the_base(
    tmp_path: Path, options: dict[str, bool], expected: str
) -> None:
    spec = base(tmp_path / "base")
    spec = dataclasses.replace(spec, architecture="GPTBigCodeForCausalLM", tensors={}, config={**spec.config, **options})
    shapes = {f"transformer.h.0.attn.c_attn.{part}": shape for part, shape in PAIR.items()}
    assert checks.check(adapter(tmp_path / "a", shapes), base=spec).verdicts["vllm"].verdict == expected


@pytest.mark.parametrize(
    ("prefix", "module", "expected"),
    [
        ("", "model.layers.0.self_attn.q_proj", "applied"),
        ("", "layers.0.self_attn.q_proj", "ignored"),
        ("base_model.model.base_model.model.", "model.layers.0.self_attn.q_proj", "applied"),
        ("", "model.layers.0.self_attn.z_proj", "refused"),
        ("", "model.layers.0.self_attn.q_proj.more", "refused"),
    ],
)
def test_vllm_finds_modules_by_their_paths_with_and_without_peft_s_prefix(
    tmp_path: Path, prefix: str, module: str, expected: str
) -> None:
    folder = adapter(tmp_path / "a", pairs(1))
    tensors = {f"{prefix}{module}.{part}": np.ones(shape, np.float32) for part, shape in PAIR.items()}
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    report = checks.check(folder, base=base(tmp_path / "base", 1))
    assert report.verdicts["vllm"].verdict == expected
    assert "key-prefix" in {problem.code for problem in report.problems}
    assert checks.check(folder).verdicts["vllm"].verdict == "unknown"


@pytest.mark.parametrize(
    ("module", "missing", "alpha", "expected"),
    [
        ("self_attn.q_proj", "A", 4, "ignored"),
        ("self_attn.q_proj", "B", 4, "refused"),
        ("self_attn.q_proj", "B", 2, "ignored"),
        ("self_attn.o_proj", "A", 2, "refused"),
        ("self_attn.o_proj", "B", 2, "refused"),
    ],
)
def test_vllm_loads_one_matrix_of_a_pair_only_for_a_part_of_a_fused_layer(
    tmp_path: Path, module: str, missing: str, alpha: int, expected: str
) -> None:
    lone = f"model.layers.0.{module}"
    shapes = {name: shape for name, shape in pairs(1).items() if not name.startswith(f"{lone}.")}
    shapes |= {f"{lone}.{part}": shape for part, shape in PAIR.items() if f"lora_{missing}" not in part}
    spec = dataclasses.replace(base(tmp_path / "base"), tensors={})
    report = checks.check(adapter(tmp_path / "a", shapes, lora_alpha=alpha), base=spec)
    assert report.verdicts["vllm"].verdict == expected


def test_vllm_reads_numbered_experts_of_some_models_and_stacks_of_others(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.experts.0.gate_proj"
    assert verdict(tmp_path / "two", "Qwen3MoeForCausalLM", "vllm", module)[0] == "applied"
    verdict_and_reason = verdict(tmp_path / "three", "Qwen3VLMoeForConditionalGeneration", "vllm", module)
    assert verdict_and_reason[0] == "refused"
    assert verdict_and_reason[1].endswith(f"received {module}: experts of this model are one stack")


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    for name in ("torch", "transformers", "peft"):
        need_module(name)

    def make(kind: str, *parameters: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        model = tiny.model(kind)
        model.save_pretrained(folder / "base")
        tiny.adapter(model, folder / "a", target_modules=["q_proj"], target_parameters=[f"experts.{p}" for p in parameters])
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "parameters", "expected", "reason"),
    [
        ("GptOssForCausalLM", ("gate_up_proj", "down_proj"), "applied", ""),
        (
            "GptOssForCausalLM",
            ("down_proj",),
            "refused",
            "AssertionError: experts need a delta on gate_up_proj and on down_proj",
        ),
        (
            "Qwen3MoeForCausalLM",
            ("gate_up_proj", "down_proj"),
            "refused",
            "reads experts of this model one by one unless enable_mixed_moe_lora_format is set",
        ),
        (
            "MixtralForCausalLM",
            ("gate_up_proj", "down_proj"),
            "ignored",
            "model.layers.0.mlp.experts.gate_up_proj has another name in vLLM, which drops it",
        ),
    ],
)
def test_vllm_reads_stacked_experts_by_the_model(
    stacked: Callable[..., Path], kind: str, parameters: tuple[str, ...], expected: str, reason: str
) -> None:
    from adapterhub_converters.bases import read_base

    folder = stacked(kind, *parameters)
    runtime_verdict = checks.check(folder / "a", base=read_base(folder / "base")).verdicts["vllm"]
    assert (runtime_verdict.verdict, next(iter(runtime_verdict.reasons), "")) == (expected, reason)
    if expected == "applied":
        assert checks.check(folder / "a").verdicts["vllm"].verdict == "unknown"  # which model is it?


@pytest.mark.parametrize(
    ("architecture", "module", "expected"),
    [
        ("Qwen3ForCausalLM", "model.layers.0.self_attn.o_proj", ("applied", "")),
        ("Qwen3ForCausalLM", "lm_head", ("applied", "")),
        ("GPT2LMHeadModel", "transformer.h.0.attn.c_attn", ("refused", "get_hidden_dim not implemented for c_attn")),
        (
            "Qwen3VLForConditionalGeneration",
            "model.visual.deepstack.down_proj",
            ("ignored", "model.visual.deepstack.down_proj is in no numbered layer, and is skipped silently"),
        ),
        (
            "LlavaForConditionalGeneration",
            "model.vision_tower.encoder.layers.0.self_attn.o_proj",
            ("crashes", "takes model.vision_tower.encoder.layers.0.self_attn.o_proj for a layer of the language model"),
        ),
        (
            "T5ForConditionalGeneration",
            "decoder.block.0.layer.0.SelfAttention.o",
            ("unknown", "T5ForConditionalGeneration is not among its models; transformers may run it there"),
        ),
    ],
)
def test_sglang_applies_modules_in_numbered_layers_that_it_has_memory_for(
    tmp_path: Path, architecture: str, module: str, expected: tuple[str, str]
) -> None:
    assert verdict(tmp_path, architecture, "sglang", module) == expected


def test_the_lists_are_of_the_releases_that_the_rules_describe() -> None:
    from adapterhub_converters.runtime_rules import RUNTIMES

    tables: dict[str, Any] = runtime_models._tables()
    assert {name: tables[name]["version"] for name in ("vllm", "sglang")} == {
        name: RUNTIMES[name].version for name in ("vllm", "sglang")
    }
