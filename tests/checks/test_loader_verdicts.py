"""The verdicts for peft and transformers on damaged files are what the two do with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from adapterhub import checks
from adapterhub_converters.bases import BaseSpec, read_base
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.support import tiny

pytestmark = pytest.mark.peer

torch = pytest.importorskip("torch")
TOKENS = [[3, 17, 99, 5]]
Q, K = (f"base_model.model.model.layers.0.self_attn.{name}_proj." for name in "qk")
Tensors = dict[str, Any]  # of torch
DAMAGES: dict[str, Callable[[Tensors], Tensors]] = {
    "an unknown tensor": lambda tensors: tensors | {f"{Q}lora_C.weight": torch.ones(3, 3)},
    "lora_A alone": lambda tensors: _without(tensors, f"{Q}lora_B.weight"),
    "lora_B alone": lambda tensors: _without(tensors, f"{Q}lora_A.weight"),
    "half a pair beyond": lambda tensors: tensors | {f"{K}lora_A.weight": torch.ones(4, 64)},
    "no prefix": lambda tensors: _renamed(tensors, "base_model.model.", ""),
    "a doubled prefix": lambda tensors: _renamed(tensors, "base_model.model.", "base_model.model.base_model.model."),
    "another prefix": lambda tensors: _renamed(tensors, "base_model.model.", "module.base_model.model."),
    "another adapter's name": lambda tensors: _renamed(tensors, ".weight", ".sql.weight"),
    "the adapter's name": lambda tensors: _renamed(tensors, ".weight", ".default.weight"),
    "a flat factor": lambda tensors: tensors | {f"{Q}lora_A.weight": tensors[f"{Q}lora_A.weight"].reshape(-1)},
    "an empty factor": lambda tensors: tensors | {f"{Q}lora_A.weight": torch.ones(0, 64)},
    "another rank": lambda tensors: tensors | {f"{Q}lora_B.weight": torch.ones(64, 2)},
    "integers": lambda tensors: tensors | {f"{Q}lora_A.weight": tensors[f"{Q}lora_A.weight"].to(torch.int32)},
}
# What became of the model's outputs, for each verdict.
OUTCOMES = {"applied": {"applied"}, "ignored": {"base", "other", "applied"}, "wrong": {"other"}, "refused": {"refused"}}


def _without(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def _renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


class _Loaders:
    def __init__(self, folder: Path) -> None:
        self.adapter, self._base = folder / "a", folder / "base"
        model = tiny.model()
        self._class = type(model)
        model.save_pretrained(self._base)
        tiny.adapter(model, self.adapter, target_modules=["q_proj", "v_proj"])
        self.spec: BaseSpec = read_base(self._base)
        self._base_logits, self._trained = self._logits("none", self.adapter), self._logits("peft", self.adapter)

    def _logits(self, loader: str, adapter: Path) -> np.ndarray:
        from peft import PeftModel

        model = self._class.from_pretrained(self._base, dtype="float32")
        if loader == "peft":
            model = PeftModel.from_pretrained(model, adapter)
        elif loader == "transformers":
            model.load_adapter(str(adapter))
        with torch.no_grad():
            return np.asarray(model.eval()(input_ids=torch.tensor(TOKENS)).logits.float())

    def outcome(self, loader: str, adapter: Path) -> str:
        try:
            logits = self._logits(loader, adapter)
        except (RuntimeError, ValueError, KeyError):
            return "refused"
        if np.allclose(logits, self._trained, atol=1e-4):
            return "applied"
        return "base" if np.allclose(logits, self._base_logits, atol=1e-4) else "other"


@pytest.fixture(scope="module")
def loaders(tmp_path_factory: pytest.TempPathFactory) -> _Loaders:
    for name in ("transformers", "peft"):
        need_module(name)
    return _Loaders(tmp_path_factory.mktemp("loaders"))


@pytest.mark.parametrize("loader", ["peft", "transformers"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_loader_does_with_a_damaged_file_what_its_verdict_says(
    loaders: _Loaders, tmp_path: Path, damage: str, loader: str
) -> None:
    shutil.copytree(loaders.adapter, tmp_path / "a")
    tensors = DAMAGES[damage](load_file(tmp_path / "a" / peft.WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a" / peft.WEIGHTS, {"format": "pt"})
    verdict = checks.check(tmp_path / "a", base=loaders.spec).verdicts[loader]
    assert loaders.outcome(loader, tmp_path / "a") in OUTCOMES[verdict.verdict], verdict


@pytest.mark.parametrize("runtime", ["transformers", "vllm", "llama.cpp", "mlx", "sglang"])
def test_no_other_program_is_said_to_raise_an_error_of_peft(loaders: _Loaders, tmp_path: Path, runtime: str) -> None:
    shutil.copytree(loaders.adapter, tmp_path / "a")
    config = tmp_path / "a" / peft.CONFIG
    config.write_text(config.read_text().replace('"modules_to_save": null', '"modules_to_save": ["lm_head"]'))
    report = checks.check(tmp_path / "a", base=loaders.spec)
    assert report.verdicts["peft"].verdict == "refused"
    verdict = report.verdicts[runtime]
    assert verdict.verdict in ("wrong", "refused")
    assert not any("KeyError" in reason or "peft" in reason for reason in verdict.reasons)
