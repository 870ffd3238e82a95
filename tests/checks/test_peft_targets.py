"""The modules that peft adapts: its defaults for a model type, and the options with which it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub.checks.peft_targets import DEFAULT_TARGETS
from tests.checks.test_peft_load import of_type
from tests.conftest import need_module
from tests.support import tiny
from tests.support.folders import Shapes, adapter, pairs

Q, OUT = (pairs(2, module=f"model.layers.{{}}.self_attn.{name}_proj") for name in "qo")


@pytest.mark.peer
def test_the_default_targets_are_those_of_peft() -> None:
    need_module("peft")
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as of_peft

    assert {
        kind: targets if isinstance(targets, str) else list(targets) for kind, targets in DEFAULT_TARGETS.items()
    } == of_peft


@pytest.mark.parametrize(
    ("shapes", "model_type", "verdict", "code"),
    [
        (Q, "llama", "applied", ""),
        ({**Q, **OUT}, "llama", "ignored", "not-targeted"),
        (Q, "olmo2", "refused", "peft-refuses"),
        (Q, "", "unknown", ""),
    ],
)
def test_missing_target_modules_are_those_that_peft_takes_for_the_model_type(
    tmp_path: Path, shapes: Shapes, model_type: str, verdict: str, code: str
) -> None:
    folder = adapter(tmp_path / "a", shapes, target_modules=None)
    report = checks.check(folder, base=of_type(tmp_path / "b", model_type) if model_type else None)
    assert report.verdicts["peft"].verdict == verdict
    assert "no-targets" in report.counted()
    assert report.ok == (not code)
    assert not code or code in report.counted()


@pytest.mark.peer
@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 4.0}, {"rank_pattern": {"q_proj": 4.0}}, {"target_modules": 5}, {"exclude_modules": 3},
        {"modules_to_save": [3]}, {"trainable_token_indices": "abc"}, {"bias": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_a_type_with_which_peft_fails_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    from peft import LoraConfig, get_peft_model

    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | wrong
    with pytest.raises((TypeError, AttributeError, IndexError, ValueError)):
        get_peft_model(tiny.model(), LoraConfig(**config))
    folder = adapter(tmp_path / "a", Q, **config)
    assert checks.check(folder, base=of_type(tmp_path / "b", "llama")).verdicts["peft"].verdict == "refused"
