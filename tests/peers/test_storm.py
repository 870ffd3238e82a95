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
from tests.support import llama_server, serving, storm
from tests.support.serving import Models

pytestmark = pytest.mark.peer
SECONDS = float(os.environ.get("STORM_SECONDS", "60"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    return serving.make_models(tmp_path_factory.mktemp("models"), adapters=storm.ADAPTERS)


@pytest.mark.parametrize("engine", ["torch", "llama.cpp", "llama.cpp in one process"])
def test_every_answer_is_of_the_version_that_its_header_names(models: Models, tmp_path: Path, engine: str) -> None:
    base, more = (models.base, {}) if engine == "torch" else (models.gguf, {"logit_bias": serving.BIAS})
    options: tuple[object, ...] = ("--engine", "torch", "--max-adapters", 4)
    if engine != "torch":
        options = ("--program", llama_server.program(), "--max-adapters", 10)
    if engine.endswith("process"):
        options += ("--one-process",)
    with storm.storm(models, base, tmp_path, *options, more=more) as found:
        figures = storm.run(found, seconds=SECONDS)
    print(engine, json.dumps(figures))
