"""promptfoo as it is, on a served adapter: `eval --import` knows from its result file which version answered."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, need_module, need_program
from tests.support import llama_server, serving
from tests.support.environments import node_packages
from tests.support.serving import Gateway

pytestmark = pytest.mark.peer
_ASSERTION_FAILED = 100  # promptfoo's exit code when it ran, and a test failed


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway on two adapters of the registry in the working folder of `run`."""
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    models = serving.make_models(tmp_path / "models", adapters=2)
    serving.registry(tmp_path, models, 2).close()
    options = ("--program", llama_server.program())
    with serving.gateway(models.gguf, tmp_path, tmp_path / "gateway", *options) as gateway_process:
        yield gateway_process


def run_promptfoo(config: dict[str, Any], folder: Path) -> Path:
    """Run a configuration without the network; return the file of its results."""
    package = node_packages("promptfoo@0.121.20") / "node_modules/promptfoo"
    script = package / json.loads((package / "package.json").read_text())["bin"]["promptfoo"]
    (folder / "promptfooconfig.json").write_text(json.dumps(config))
    words = [need_program("node"), script, "eval", "-c", folder / "promptfooconfig.json", "--no-cache", "--no-progress-bar"]
    offline = {"PROMPTFOO_DISABLE_TELEMETRY": "1", "PROMPTFOO_DISABLE_UPDATE": "1", "NO_PROXY": "127.0.0.1"}
    variables = {**os.environ, **offline, "PROMPTFOO_CONFIG_DIR": str(folder), "HOME": str(folder)}
    result = subprocess.run(
        [*map(str, words), "-o", str(folder / "out.json")], cwd=folder, env=variables, capture_output=True, text=True,
        timeout=900, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == _ASSERTION_FAILED, result.stdout[-2000:] + result.stderr[-3000:]
    return folder / "out.json"


def test_its_results_are_those_of_the_version_that_answered(gateway: Gateway, run: Run, tmp_path: Path) -> None:
    provider = {"apiBaseUrl": f"{gateway.url}/v1", "apiKey": "x", "max_tokens": 8, "temperature": 0}
    has_text = [{"type": "javascript", "value": "output.length > 0"}]
    config = {
        "description": "golden",
        "prompts": ["{{q}}"],
        "providers": [{"id": "openai:chat:team/a1:prod", "config": provider}],
        "tests": [
            {"description": "not empty", "vars": {"q": "ab"}, "assert": has_text},
            {"description": "in SQL", "vars": {"q": "cd"}, "assert": [{"type": "contains", "value": "SELECT"}]},
        ],
    }
    results = run_promptfoo(config, tmp_path)
    document = json.loads(run("eval", "team/a1:prod", "--import", results, "--gate", "pass_rate>=0.5", "--json").stdout)
    [evaluation] = document["evaluations"]
    assert (evaluation["name"], evaluation["cases"]) == ("golden", {"not empty": 1.0, "in SQL": 0.0})
    assert evaluation["base"]["tool"] == "promptfoo"
    assert "[other-version]" in run("eval", "team/a0", "--import", results, code=6).stderr
