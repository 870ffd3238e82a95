"""Mixed load for a minute on each engine, or for as long as STORM_SECONDS says.

    STORM_SECONDS=600 pytest -rP tests/peers/test_storm.py

Eight prompts by eight tags and the base, from eight clients, while tags move, versions come to the engine and leave it, and
clients hang up in the middle of streams. Not one answer may be of another version than its header names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import need_module
from tests.support import llama_server, serving, storm, vllm
from tests.support.serving import Models

pytestmark = pytest.mark.peer
SECONDS = float(os.environ.get("STORM_SECONDS", "60"))


# More tokens than a client that hangs up waits for; adapters leave its memory, and are read again from their folders.
VLLM = ("--dtype", "float32", "--enforce-eager", "--max-model-len", 1100, "--max-num-seqs", 16, "--max-cpu-loras", 6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    return serving.make_models(tmp_path_factory.mktemp("models"), adapters=storm.ADAPTERS)


def test_every_answer_of_torch_is_of_the_version_that_its_header_names(models: Models, tmp_path: Path) -> None:
    with storm.storm(models, models.base, tmp_path, "--engine", "torch", "--max-adapters", 4, more={}) as found:
        run("torch", found)


@pytest.mark.parametrize("shape", [(), ("--one-process",)], ids=["router", "one process"])
def test_so_is_every_answer_of_llama_cpp(models: Models, tmp_path: Path, shape: tuple[str, ...]) -> None:
    options = ("--program", llama_server.program(), "--max-adapters", 10, *shape)
    with storm.storm(models, models.gguf, tmp_path, *options, more={"logit_bias": serving.BIAS}) as found:
        run("llama.cpp", found)


def test_so_is_every_answer_of_vllm(tmp_path: Path) -> None:
    models = serving.make_models(tmp_path, adapters=storm.ADAPTERS, hidden=128, head=32)  # vLLM's smallest head on a CPU
    options = ("--engine", "vllm", "--program", vllm.python(), "--max-adapters", 4, "--max-rank", 8, "--", *VLLM)
    more, env = {"logit_bias": serving.BIAS}, vllm.environ(tmp_path)
    with storm.storm(models, models.base, tmp_path, *options, more=more, env=env) as found:
        run("vllm", found)


def run(engine: str, found: storm.Storm) -> None:
    print(engine, json.dumps(storm.run(found, seconds=SECONDS)))
