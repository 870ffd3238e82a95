"""The command that is printed after a conversion runs what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.folders import adapter, base, pairs


@pytest.mark.parametrize(
    ("style", "target", "command"),
    [
        ("gguf", "sql.gguf", "llama-server -m tiny.gguf --lora sql.gguf"),
        ("mlx", "sql-mlx", "mlx_lm.generate --model tiny --adapter-path sql-mlx --prompt Hello"),
        ("peft", "my sql", "vllm serve tiny --enable-lora --lora-modules 'my sql=my sql' --max-lora-rank 32"),
        ("ollama", "sql-ollama", "ollama create sql-ollama -f sql-ollama/Modelfile"),
    ],
)
def test_a_conversion_prints_the_command_once_on_stderr(
    run: Run, tmp_path: Path, style: str, target: str, command: str
) -> None:
    base(tmp_path / "tiny", size=32)
    adapter(tmp_path / "sql", pairs(2, r=17, size=(32, 32)), r=17)
    result = run("convert", "sql", target, "--to", style, "--base", "tiny")
    assert [line for line in result.stderr.splitlines() if line.startswith("run it:")] == [f"run it: {command}"]
    assert "run it:" not in result.stdout
    told = run("convert", "sql", f"{target}-again", "--to", style, "--base", "tiny", "--json")
    assert "run it:" not in told.stderr
    assert json.loads(told.stdout)["run"] == command.replace(target, f"{target}-again")


def test_the_command_names_the_base_that_the_adapter_records(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2), base_model_name_or_path="acme/tiny")
    told = run("convert", "sql", "sql-mlx", "--to", "mlx").stderr
    assert "run it: mlx_lm.generate --model acme/tiny --adapter-path sql-mlx" in told
    assert "vllm serve acme/tiny " in run("convert", "sql-mlx", "again", "--to", "peft").stderr


def test_a_format_of_a_trainer_has_no_command(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    assert "run it:" not in run("convert", "sql", "sql.safetensors", "--to", "raw").stderr
