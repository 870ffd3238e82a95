"""The table of official clients in docs/gateway.md is what they do, unmodified, on each engine.

UPDATE_DOCS=1 python -m pytest tests/peers/test_official_clients.py    writes it anew
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

import adapterhub as ah
from tests.conftest import ROOT, need_module
from tests.support import llama_server, official_clients, serving, tool_templates, vllm

pytestmark = pytest.mark.peer
PAGE = ROOT / "docs/gateway.md"
BEGIN = "| client | features |"
TOOL_OPTIONS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> serving.Models:
    for module in ("torch", "transformers", "peft", "llguidance"):
        need_module(module)
    models = serving.make_models(tmp_path_factory.mktemp("models"), adapters=2, hidden=128, head=32)
    config = models.base / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": tool_templates.HERMES}))
    models.gguf.unlink()
    ah.convert_model(models.base, models.gguf, to="gguf")
    return models


def outcomes(models: serving.Models, folder: Path, engine: str) -> dict[str, dict[str, str]]:
    """Return what came of each feature of each client, on a gateway with an engine."""
    folder.mkdir()
    serving.registry(folder / "registry", models, 2).close()
    base, options, environ = models.base, ("--engine", "torch"), {}
    if engine == "llama.cpp":
        base, options = models.gguf, ("--program", llama_server.program())
    elif engine == "vLLM":
        words = ("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4", *TOOL_OPTIONS)
        options = ("--engine", "vllm", "--program", vllm.python(), "--dtype", "float32", "--max-rank", 8, "--", *words)
        environ = vllm.environ(folder)
    with serving.gateway(base, folder / "registry", folder / "gateway", *options, env=environ) as gateway:
        return {client: official_clients.outcomes(client, gateway.url) for client in official_clients.CLIENTS}


def test_the_table_in_the_docs_is_what_official_clients_do(models: serving.Models, tmp_path: Path) -> None:
    results: Mapping[str, Mapping[str, Mapping[str, str]]] = {
        engine: outcomes(models, tmp_path / engine, engine) for engine in ("torch", "llama.cpp", "vLLM")
    }
    table = official_clients.table(results)
    page = PAGE.read_text()
    start = page.index(BEGIN)
    table_on_page = page[start : page.index("\n\n", start) + 1]
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page.replace(table_on_page, table))
    assert [line for line in table.splitlines()[2:] if official_clients.is_problem(line)] == []
    assert table_on_page == table
