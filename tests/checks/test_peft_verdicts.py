"""What the rules say of peft, peft does."""

from __future__ import annotations

import json
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
    for name, config in {"same": {}, "deep": {"num_hidden_layers": 3}, "shallow": {"num_hidden_layers": 1},
                         "wide": {"hidden_size": 128, "head_dim": 32}}.items():  # fmt: skip
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
]


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
    assert checks.check(changed, base=read_base(folder / base)).verdicts["peft"].verdict == verdict
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / base)
    if verdict == "refused":
        with pytest.raises(RuntimeError, match="size mismatch"):
            real.PeftModel.from_pretrained(model, changed)
        return
    loaded = real.PeftModel.from_pretrained(model, changed).state_dict()
    untouched = [name for name, tensor in loaded.items() if "lora_B" in name and not torch.count_nonzero(tensor)]
    assert bool(untouched) == (base == "deep")
    assert any("q_proj.lora_B" in name for name in loaded) == ("target_modules" not in config)
