"""Checking an adapter on a base of which only a part is known: what can be compared is, the rest is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub import checks
from adapterhub_converters.bases import BaseSpec, read_base
from adapterhub_converters.containers import safetensors_file
from tests.support.folders import adapter, base, pairs


def index_alone(path: Path, layers: int) -> BaseSpec:
    """Names and config of a base of so many layers, without its weights."""
    base(path, layers)
    names = safetensors_file.SafetensorsFile(path / "model.safetensors").tensors
    (path / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return read_base(path / "model.safetensors.index.json")


def codes(report: checks.Report) -> list[str]:
    return [problem.code for problem in report.problems if problem.code != "unpinned"]


@pytest.mark.parametrize(
    ("layers", "module", "says"),
    [
        (3, "q_proj", []),
        (2, "q_proj", ["base-shallower"]),
        (4, "q_proj", ["base-deeper"]),
        (3, "k_proj", ["no-such-module"] * 3),
    ],
)
def test_names_alone_are_compared_in_both_directions(tmp_path: Path, layers: int, module: str, says: list[str]) -> None:
    name = f"model.layers.{{}}.self_attn.{module}"
    folder = adapter(tmp_path / "a", pairs(3, module=name), target_modules=[f"self_attn.{module}"])
    report = checks.check(folder, base=index_alone(tmp_path / "b", layers))
    assert codes(report) == [*says, "base-incomplete"]
    assert "names are known, shapes are not" in report.problems[len(says)].what
    assert report.ok is not bool(says)


def test_without_a_config_a_weight_that_fits_the_other_way_round_is_no_error(tmp_path: Path) -> None:
    module = "h.{}.attn.c_attn"
    folder = adapter(tmp_path / "a", pairs(1, module=module, size=(24, 8)), target_modules=["c_attn"], fan_in_fan_out=True)
    weights = {"h.0.attn.c_attn.weight": np.zeros((8, 24), np.float32), "wte.weight": np.zeros((12, 8), np.float32)}
    safetensors_file.write(tmp_path / "m.safetensors", weights)
    assert codes(checks.check(folder, base=read_base(tmp_path / "m.safetensors"))) == ["base-incomplete", "shape-unknown"]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    assert codes(checks.check(folder, base=read_base(tmp_path / "m.safetensors"))) == []
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    assert codes(checks.check(folder, base=read_base(tmp_path / "m.safetensors"))) == ["shape-mismatch"]
