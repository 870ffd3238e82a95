"""What peft does with each value of `init_lora_weights` as it loads an adapter, and what a check says of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub_converters.bases import read_base
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.support import tiny

pytestmark = pytest.mark.peer

TOKENS = [[3, 17, 99, 5]]
# LoftQ is not here: peft's needs scipy and a GPU.
WORDS = [
    True, False, None, "", "gaussian", "Gaussian", "GAUSSIAN", "orthogonal", "Orthogonal", "eva", "EVA", "mica", "MiCA",
    "olora", "OLoRA", "pissa", "PiSSA", "pissa_niter_4", "pissa_niter_x", "pissa_x", "corda", "corda_x", "CorDA", "lora_ga",
    "LoRA_GA", "LoftQ", "xavier", "true",
]  # fmt: skip
LINEAR, TABLE = {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["embed_tokens"]}
CASES = [
    *((word, LINEAR) for word in WORDS),
    *((word, TABLE) for word in ("Gaussian", "mica", "pissa", "xavier", "eva", "lora_ga")),
    *((word, {**LINEAR, "r": 3}) for word in ("orthogonal", "eva")),
    *((word, {**LINEAR, "lora_bias": True}) for word in (True, False, None, "", "gaussian")),
]


class _Adapters:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = tiny.model()
        self._model.save_pretrained(folder / "base")
        self.base = read_base(folder / "base")

    def write(self, path: Path, word: object, options: dict[str, Any]) -> None:
        trained = self._folder / str(len(json.dumps(options)))
        if not trained.exists():
            tiny.adapter(tiny.model(), trained, **options)
        shutil.copytree(trained, path)
        config = json.loads((path / peft.CONFIG).read_text())
        (path / peft.CONFIG).write_text(json.dumps(config | {"init_lora_weights": word}))

    def logits(self, adapter: Path) -> np.ndarray:
        import torch
        from peft import PeftModel

        model = type(self._model).from_pretrained(self._folder / "base", dtype="float32")
        with torch.no_grad():
            loaded = PeftModel.from_pretrained(model, adapter).eval()
            return np.asarray(loaded(input_ids=torch.tensor(TOKENS)).logits.float())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> _Adapters:
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    return _Adapters(tmp_path_factory.mktemp("init"))


@pytest.mark.parametrize(("word", "options"), CASES, ids=json.dumps)
def test_a_check_says_what_peft_makes_of_an_initialization(
    adapters: _Adapters, tmp_path: Path, word: object, options: dict[str, Any]
) -> None:
    adapters.write(tmp_path / "plain", True, options)
    adapters.write(tmp_path / "a", word, options)
    report = checks.check(tmp_path / "a", base=adapters.base)
    logits = None
    with contextlib.suppress(ValueError, TypeError):
        logits = adapters.logits(tmp_path / "a")
    is_refused = logits is None
    assert (report.verdicts["peft"].verdict == "refused") == is_refused
    assert (report.verdicts["transformers"].verdict == "refused") == is_refused
    assert ("peft-refuses" in report.counted()) == is_refused
    if logits is None:
        return
    keeps_base = bool(np.allclose(logits, adapters.logits(tmp_path / "plain"), atol=1e-5))
    # A table stays as it is with any word, and LoRA-GA moves the base in training, but not again as peft loads it.
    if options["target_modules"] != ["embed_tokens"] and word != "lora_ga":
        assert peft.residual_init(word) == (not keeps_base)
