"""What the rules say of peft, peft does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub_converters.bases import read_base
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.support import tiny

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    root = tmp_path_factory.mktemp("peft")
    tiny.adapter(tiny.model(), root / "a", target_modules=["q_proj", "v_proj"])
    configs: dict[str, dict[str, Any]] = {
        "same": {},
        "deep": {"num_hidden_layers": 3},
        "shallow": {"num_hidden_layers": 1},
        "wide": {"hidden_size": 128, "head_dim": 32},
    }
    for name, config in configs.items():
        tiny.model(**config).save_pretrained(root / name)
    return root


CASES = [
    ("same", {}, "applied"),
    ("same", {"r": 5}, "refused"),
    ("same", {"lora_alpha": 3, "use_rslora": True}, "applied"),
    ("wide", {}, "refused"),
    ("deep", {}, "wrong"),
    ("shallow", {}, "ignored"),
    ("same", {"use_dora": True}, "wrong"),
    ("same", {"target_modules": ["v_proj"]}, "ignored"),
    ("same", {"_comment": "hi"}, "applied"),
    ("same", {"target_modules": ["q_proj", "v_proj", "k_proj"]}, "applied"),
]
# What peft warns of, in the reasons' words and in its own.
WARNINGS = {"missing keys": "Found missing adapter keys", "with a warning": "Unexpected keyword arguments"}


@pytest.mark.parametrize(("base", "config", "verdict"), CASES, ids=[f"{base} {config}" for base, config, _ in CASES])
def test_peft_behaves_as_the_verdict_predicts(
    folder: Path, tmp_path: Path, base: str, config: dict[str, Any], verdict: str
) -> None:
    import peft as real
    import torch
    import transformers

    changed = tmp_path / "a"
    changed.mkdir()
    (changed / peft.WEIGHTS).write_bytes((folder / "a" / peft.WEIGHTS).read_bytes())
    (changed / peft.CONFIG).write_text(json.dumps(json.loads((folder / "a" / peft.CONFIG).read_text()) | config))
    judged = checks.check(changed, base=read_base(folder / base)).verdicts["peft"]
    assert judged.verdict == verdict
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / base)
    if verdict == "refused":
        with pytest.raises(RuntimeError, match="size mismatch"):
            real.PeftModel.from_pretrained(model, changed)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = real.PeftModel.from_pretrained(model, changed).state_dict()
    warned, reasons = " ".join(str(caught_warning.message) for caught_warning in caught), " ".join(judged.reasons)
    for reason, warning in WARNINGS.items():
        assert (reason in reasons) == (warning in warned), (judged, warned)
    untouched = [name for name, tensor in loaded.items() if "lora_B" in name and not torch.count_nonzero(tensor)]
    assert bool(untouched) == (base == "deep" or "k_proj" in config.get("target_modules", ()))
    assert any("q_proj.lora_B" in name for name in loaded) == (config.get("target_modules") != ["v_proj"])
