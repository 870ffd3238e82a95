"""lm-evaluation-harness as it is: its `local-completions` asks the gateway for the probabilities of prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Run, need_module
from tests.support import serving
from tests.support.environments import environment
from tests.support.serving import Models

pytestmark = pytest.mark.peer
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["fox", "dog"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = ("the quick brown", "the lazy")
# The harness needs transformers for the tokenizer, which is here: its own environment stands behind ours.
PROGRAM = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)"
)


def score(models: Models, context: str, choice: str) -> float:
    """The logarithm of the probability of a choice after its context, by the weights with the first adapter merged in."""
    import torch

    ids, start = models.tokens(f"{context} {choice}"), len(models.tokens(context))
    with torch.no_grad():
        logarithms = models._model(0)(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logarithms[at - 1, ids[at]]) for at in range(start, len(ids)))


def test_its_scores_of_choices_are_those_of_the_merged_weights_and_count_for_that_version(run: Run, tmp_path: Path) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    models = serving.make_models(tmp_path / "models", adapters=1)
    with serving.registry(tmp_path, models, 1) as registry:
        version = f"team/a0@{registry.resolve('team/a0').digest}"
    (tmp_path / "letters.yaml").write_text(TASK)
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps({"q": question}) + "\n" for question in QUESTIONS))
    [packages] = environment("lm_eval[api]==0.4.13").parent.parent.glob("lib/python*/site-packages")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    with serving.gateway(models.base, tmp_path, tmp_path / "gateway", "--engine", "torch") as gateway:
        arguments = f"model={version},base_url={gateway.url}/v1/completions,tokenizer={models.base}"
        words = [sys.executable, "-c", PROGRAM, packages, "--model", "local-completions", "--model_args", arguments]
        words += ["--tasks", "letters", "--include_path", tmp_path, "--log_samples", "--output_path", tmp_path / "out"]
        result = subprocess.run(
            [str(word) for word in words], cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True,
            timeout=900, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    [samples] = (tmp_path / "out").rglob("samples_letters_*.jsonl")
    rows = {row["doc"]["q"]: row["filtered_resps"] for row in map(json.loads, samples.read_text().splitlines())}
    for question in QUESTIONS:
        scores = [float(value) for value, _ in rows[question]]
        assert scores == pytest.approx([score(models, question, choice) for choice in ("fox", "dog")], abs=1e-3)
    [results] = (tmp_path / "out").rglob("results_*.json")
    document = json.loads(run("eval", "team/a0", "--import", results, "--json").stdout)
    [evaluation] = document["evaluations"]
    assert (evaluation["name"], set(evaluation["cases"])) == ("letters", {"doc-0", "doc-1"})
    assert evaluation["base"]["tool"] == "lm-evaluation-harness"
