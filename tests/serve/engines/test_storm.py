"""A short storm on each engine that is there; tests/peers has the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import need_module
from tests.support import llama_server, serving, storm
from tests.support.serving import Models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    return serving.make_models(tmp_path_factory.mktemp("models"), adapters=storm.ADAPTERS)


def test_torch_with_more_versions_than_slots(models: Models, tmp_path: Path) -> None:
    with storm.storm(models, models.base, tmp_path, "--engine", "torch", "--max-adapters", 4, fields={}, prompts=3) as replies:
        assert storm.run(replies, rounds=2)["unloads"] == 0  # the host takes slots itself


@pytest.mark.peer
def test_llama_cpp_with_more_versions_than_processes(models: Models, tmp_path: Path) -> None:
    options = ("--program", llama_server.program(), "--max-adapters", 10)
    with storm.storm(models, models.gguf, tmp_path, *options, fields={"logit_bias": serving.BIAS}) as replies:
        assert storm.run(replies)["unloads"] > 0
