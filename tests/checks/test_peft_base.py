"""Experts: peft's adapters on transformers 5's stacks, on bases whose files have them one by one or have none at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub_converters.bases import read_base
from tests.conftest import need_module
from tests.support import tiny

pytestmark = pytest.mark.peer

KINDS = ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM"]
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    return tmp_path_factory.mktemp("bases")


def base(bases: Path, kind: str, **changes: Any) -> Path:
    folder = bases / f"{kind}{len(changes)}"
    if not folder.exists():
        tiny.model(kind, **changes).save_pretrained(folder)
    return folder


def codes(folder: Path, path: Path) -> set[str]:
    return {problem.code for problem in checks.check(folder, base=read_base(path)).problems} - {"unpinned"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=["all-linear", "by name", "by parameter"])
def test_no_false_alarm_on_experts(bases: Path, tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    tiny.adapter(tiny.model(kind), tmp_path / "a", **config)
    assert codes(tmp_path / "a", base(bases, kind)) <= {"renamed-modules"}
    (tmp_path / "config").mkdir()
    shutil.copy(base(bases, kind) / "config.json", tmp_path / "config")
    assert codes(tmp_path / "a", tmp_path / "config") == {"base-without-weights"}


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_experts_is_found(bases: Path, tmp_path: Path, kind: str) -> None:
    tiny.adapter(tiny.model(kind), tmp_path / "a", **CONFIGS[2])
    number = {"Mixtral": "num_local_experts", "GptOss": "num_local_experts", "Deepseek": "n_routed_experts"}
    key = next((key for name, key in number.items() if kind.startswith(name)), "num_experts")
    assert codes(tmp_path / "a", base(bases, kind, **{key: 8})) == {"shape-mismatch"}
