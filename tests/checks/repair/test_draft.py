"""A draft of a repair: sound files keep their bytes, what describes others is left out, what is not from peft is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub.checks.repair import config_repairs as repair_config
from adapterhub.checks.repair import fix
from adapterhub.manifest import derive
from adapterhub.manifest.document import Training
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import convert, peft
from tests.checks.test_repair import configured
from tests.conftest import need_module
from tests.support import tiny
from tests.support.folders import adapter, base, pairs

RANKS = {"rank_pattern": {r"layers\.0\..*\.q_proj": 6}}


@pytest.mark.peer
def test_what_peft_itself_saved_needs_nothing(tmp_path: Path) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    from peft import LoraConfig

    configs: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": {"use_dora": True},
        "ranks": RANKS,
        "linear": {"target_modules": "all-linear"},
    }
    for name, config in configs.items():
        tiny.adapter(tiny.model(), tmp_path / name, **({"target_modules": ["q_proj", "v_proj"]} | config))
        assert fix(tmp_path / name, tmp_path / "out").repairs == ()
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - peft.INERT - peft.READ <= repair_config._WRITTEN


def test_a_manifest_of_other_files_is_left_out_and_reported(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(1))
    derive.describe(path).write(path)
    configured(path, lambda config: config.update(r=5, lora_alpha=99))
    (path / "training_args.bin").write_bytes(b"x")
    fixed = fix(path, tmp_path / "out")
    assert "files-changed" in {proposal.code for proposal in fixed.proposals}
    assert fixed.left_out == ("training_args.bin",)
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [peft.CONFIG, peft.WEIGHTS]


@pytest.mark.parametrize("text", [json.dumps, partial(json.dumps, indent=2, sort_keys=True)])
def test_an_edit_that_is_put_back_keeps_the_manifest_with_its_training(tmp_path: Path, text: Callable[[object], str]) -> None:
    path = adapter(tmp_path / "a", pairs(1), base_model_name_or_path="acme/tiny")
    original = text(json.loads((path / peft.CONFIG).read_text()))
    (path / peft.CONFIG).write_text(original)
    described = derive.describe(path, files=derive.digests(path))
    dataclasses.replace(described, training=Training(config={"seed": 7})).write(path)
    configured(path, lambda config: config.update(r=5))
    (changed,) = (problem for problem in checks.check(path).problems if problem.code == "files-changed")
    assert changed.hint == "Undo the edit, or fetch the file again: the training record in adapter.json then stays"
    fixed = fix(path, tmp_path / "out")
    assert fixed.proposals == ()
    assert (tmp_path / "out" / peft.CONFIG).read_text() == original
    assert json.loads((tmp_path / "out" / ADAPTER_JSON).read_text())["training"]["config"] == {"seed": 7}
    assert checks.check(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("gguf", "convert-to-peft", "only PEFT adapters can be repaired"),
        ("mlx", "convert-to-peft", "an MLX adapter; only PEFT adapters can be repaired"),
        ("none", "no-adapter", "no PEFT adapter: neither adapter_config.json nor adapter_model.safetensors"),
    ],
)
def test_what_is_not_pefts_is_refused(tmp_path: Path, kind: str, code: str, words: str) -> None:
    target = tmp_path / "b"
    if kind == "none":
        target.mkdir()
    else:
        convert.convert(adapter(tmp_path / "a", pairs(2)), target, to=kind, base=base(tmp_path / "base", 2))
    with pytest.raises(AdapterhubError) as error:
        fix(target, tmp_path / "out")
    assert (error.value.code, error.value.what) == (code, words)
    assert not (tmp_path / "out").exists()
