"""The lists of models are those of the releases' sources, and vLLM itself does with adapters what its verdict says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub_converters.bases import read_base
from tests.conftest import ROOT, need_module
from tests.support import runtime_models, tiny, vllm

pytestmark = pytest.mark.peer


def test_the_lists_are_what_the_sources_of_the_releases_say() -> None:
    content = json.loads(runtime_models.PATH.read_text())
    del content["date"]
    assert content == runtime_models.tables(runtime_models.vllm_folder(), runtime_models.sglang_folder())


def printed(script: str, folder: Path, *words: str) -> list[dict[str, Any]]:
    """Return the lines of JSON that a script prints, run by the Python that has vLLM."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -P: the folder of the script has modules with names of others.
    command = [str(vllm.python()), "-P", str(ROOT / "tests/support" / script), *words]
    env = {**inherited, **vllm.environ(folder), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"name"')]


def test_what_is_read_of_sources_is_what_their_classes_say(tmp_path: Path) -> None:
    """By the release that is built for CPUs."""
    [sources] = vllm.python().parents[1].glob("lib/python*/site-packages")
    models = runtime_models.vllm_table(runtime_models.Sources(sources))["models"]
    compared, different = 0, set()
    for row in printed("vllm_classes.py", tmp_path):
        if "error" in row:
            continue
        record = models.get(row["name"])
        compared += 1
        components = {key: sorted((record or {}).get(key, [])) for key in ("language", "towers", "connectors")}
        same = (record is not None) == row["lora"] and bool((record or {}).get("stacked_experts")) == row.get("stacked", False)
        if row.get("components"):
            same &= components == {key: sorted(value or []) for key, value in row["components"].items()}
        different |= set() if same else {row["name"]}
    assert compared > 300
    assert different == {"DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration"}  # LoRA on other hardware alone


HEAD = {"target_modules": ["q_proj", "lm_head"]}
# Each takes vLLM a third of a minute or more on two busy cores: of the families, those that differ in a rule.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}, {}),
    "head": ("LlamaForCausalLM", {}, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "no-head": ("Qwen2ForCausalLM", {}, HEAD),
    "gpt2": ("GPT2LMHeadModel", {}, {}),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """What vLLM did with the adapter of each case, and its folder; one process for all."""
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    folder = tmp_path_factory.mktemp("cases")
    words: list[str] = []
    for name, (kind, sizes, config) in CASES.items():
        model = tiny.model(kind, hidden_size=128, head_dim=32, **sizes)  # the smallest head of its attention on a CPU
        model.save_pretrained(folder / name / "base")
        tiny.adapter(model, folder / name / "a", **config)
        words += [name, str(folder / name / "base"), str(folder / name / "a")]
    results = printed("vllm_loads.py", folder, *words)
    return {result["name"]: (folder / result["name"], result) for result in results}


@pytest.mark.parametrize("name", CASES)
def test_vllm_does_what_its_verdict_says(name: str, outcomes: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    folder, outcome = outcomes[name]
    verdict = checks.check(folder / "a", base=read_base(folder / "base")).verdicts["vllm"]
    happened = "refused" if outcome["error"] else "ignored" if outcome["ignored"] else "applied"
    assert verdict.verdict == happened, outcome
    if happened == "applied":
        assert outcome["adapted"] != outcome["base"]
