"""After a repair, peft loads the function that was meant; what is uncertain is left alone and proposed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.checks.repair import fix
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.formats import peft
from tests.cli.test_commands import document
from tests.conftest import Run, need_module
from tests.support import tiny
from tests.support.folders import adapter, pairs

PREFIX = "base_model.model."


def tensors(path: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(path / peft.WEIGHTS) as file:
        return {name: file.tensor(name) for name in file.tensors}


def renamed(path: Path, change: Callable[[str], str]) -> None:
    safetensors_file.write(path / peft.WEIGHTS, {change(name): array for name, array in tensors(path).items()})


def configured(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / peft.CONFIG).read_text())
    change(config)
    (path / peft.CONFIG).write_text(json.dumps(config))


def codes(path: Path, **options: Any) -> set[str]:
    return {problem.code for problem in checks.check(path, **options).problems}


def without(key: str) -> Callable[[Path], None]:
    return lambda path: configured(path, lambda config: config.pop(key))


def setting(**values: Any) -> Callable[[Path], None]:
    return lambda path: configured(path, lambda config: config.update(values))


def renaming(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda path: renamed(path, change)


RANKS = {"rank_pattern": {r"layers\.0\..*\.q_proj": 6}}
BREAKS: dict[str, tuple[str, dict[str, Any], Callable[[Path], None]]] = {
    "doubled prefix": ("key-prefix", {}, renaming(lambda name: PREFIX + name)),
    "torch.compile": ("key-prefix", {}, renaming(lambda name: name.replace("model.layers", "_orig_mod.model.layers"))),
    "distributed": ("key-prefix", {}, renaming(lambda name: f"module.{name}")),
    "adapter's name": ("adapter-name", {}, renaming(lambda name: name.replace(".weight", ".default.weight"))),
    "no prefix": ("key-prefix", {}, renaming(lambda name: name.removeprefix(PREFIX))),
    "no peft_type": ("peft-type", {}, without("peft_type")),
    "no targets": ("no-targets", {}, setting(target_modules=None)),
    "stale targets": ("not-targeted", {}, setting(target_modules=["q_proj"])),
    "excluded": ("not-targeted", {}, setting(exclude_modules=["v_proj"])),
    "stale layers": ("not-targeted", {}, setting(layers_to_transform=[1])),
    "wrong rank": ("rank-config", {}, setting(r=16)),
    "lost ranks": ("rank-config", RANKS, setting(rank_pattern={})),
    "overlap": ("rank-config", RANKS, setting(rank_pattern={"q_proj": 4, r"layers\.0\..*\.q_proj": 6})),
    "bias": ("bias-flag", {"lora_bias": True}, setting(lora_bias=False)),
    "no bias": ("no-bias", {}, setting(lora_bias=True)),
    "dora": ("magnitude-flag", {"use_dora": True}, setting(use_dora=False)),
    "newer peft": ("unknown-key", {}, setting(use_next_big_thing=False, next_config=None, more={})),
}


@pytest.mark.peer
@pytest.mark.parametrize("name", BREAKS)
def test_peft_loads_a_repaired_adapter_to_the_function_that_was_meant(tmp_path: Path, name: str) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    import peft as real
    import torch

    code, config, spoil = BREAKS[name]
    model = tiny.adapter(tiny.model(), tmp_path / "a", target_modules=["q_proj", "v_proj", "down_proj"], **config)
    spoil(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    fixed = fix(tmp_path / "a", tmp_path / "out")
    assert code in {repair.code for repair in fixed.repairs}
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert not codes(tmp_path / "out") & {repair.code for repair in fixed.repairs}
    loaded = real.PeftModel.from_pretrained(tiny.model(), tmp_path / "out").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, logits = model(ids).logits, loaded(ids).logits
    assert torch.allclose(expected, logits, atol=1e-5)
    again = fix(tmp_path / "out", tmp_path / "again")
    assert (again.repairs, again.out) == ((), None)
    assert not (tmp_path / "again").exists()


def test_the_command(run: Run, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(2), r=8, base_model_name_or_path="org/base")
    assert "`adapterhub fix` repairs it" in run("validate", "a", code=1).stdout
    assert "1 repair, nothing written (--dry-run)" in run("fix", "a", "--dry-run").stdout
    assert not (tmp_path / "a-fixed").exists()
    report = document(run, "fix", "a")
    assert (report["output"], [repair["code"] for repair in report["repaired"]]) == ("a-fixed", ["rank-config"])
    assert run("fix", "a-fixed").stdout == "a-fixed: nothing to repair, nothing written\n"
    assert "already exists" in run("fix", "a", code=2).stderr
    without("peft_type")(path)
    assert "`adapterhub fix a` adds a missing peft_type" in run("validate", "a", code=1).stdout
    assert "repaired[peft-type]" in run("fix", "a", "-o", "b").stdout
    run("push", "b", "team/b")
    assert "nothing to repair" in run("fix", "team/b").stdout
