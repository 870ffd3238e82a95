"""The reasons of problems name what is wrong, once, and help with what is at hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import adapterhub as ah
from adapterhub import checks
from adapterhub.checks import repair
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.support import tiny
from tests.support.folders import adapter, base, pairs


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_pattern_that_is_none_is_reported_once_under_its_option(tmp_path: Path, option: str, with_base: bool) -> None:
    folder = adapter(tmp_path / "a", pairs(2), **{option: "[("})
    report = checks.check(folder, base=base(tmp_path / "b") if with_base else None)
    places = [(problem.file, problem.name) for problem in report.problems if problem.code == "unsupported"]
    assert places == [("adapter_config.json", option)]


def test_a_repair_with_a_base_does_not_ask_for_one(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    tensors = load_file(folder / peft.WEIGHTS)
    save_file(
        {name.replace("base_model.model.model.", "other."): array for name, array in tensors.items()}, folder / peft.WEIGHTS
    )
    for spec, hint in ((None, "Repair it with its base model"), (base(tmp_path / "b"), "the base has no such modules")):
        [proposal] = [
            item
            for item in repair.fix(folder, tmp_path / "out", base=spec, dry_run=True).proposals
            if item.code == "key-prefix"
        ]
        assert hint in proposal.do


def test_a_base_without_architectures_is_called_that(tmp_path: Path) -> None:
    spec = dataclasses.replace(base(tmp_path / "b"), architecture="")
    verdicts = checks.check(adapter(tmp_path / "a", pairs(2)), base=spec).verdicts
    for runtime in ("vllm", "llama.cpp"):
        assert any("a base whose config has no architectures " in reason for reason in verdicts[runtime].reasons)
    with pytest.raises(RefusedError, match="a base whose config has no architectures has no verified mapping"):
        spec.llama_cpp_architecture()


@pytest.mark.peer
def test_what_beft_adds_to_biases_is_counted_and_covers_its_modules(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    import peft as real

    model = tiny.model("Qwen2ForCausalLM")
    model.save_pretrained(tmp_path / "base")
    config = real.BeftConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"])
    real.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    report = checks.check(tmp_path / "a", base=read_base(tmp_path / "base"))
    assert "uncovered-module" not in report.counted()
    assert (report.facts["modules"], report.facts["targets"]) == (4, ["q_proj", "up_proj"])
    assert report.facts["parameters"] == sum(tensor.numel() for tensor in _biases(model).values())
    with pytest.raises(RefusedError, match="this module of the base has no bias"):
        ah.merge_into(tmp_path / "a", tmp_path / "base", tmp_path / "merged")


def _biases(model: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in model.state_dict().items() if "beft_bias" in name}
