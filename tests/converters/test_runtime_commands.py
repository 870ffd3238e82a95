"""The command that is printed after a conversion runs what was written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from adapterhub_converters import runtime_commands
from adapterhub_converters.bases import read_base
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs


@pytest.mark.parametrize(
    ("style", "target", "command"),
    [
        ("gguf", "sql.gguf", "adapterhub convert tiny tiny.gguf && llama-server -m tiny.gguf --lora sql.gguf"),
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
    repeated = run("convert", "sql", f"{target}-again", "--to", style, "--base", "tiny", "--json")
    assert "run it:" not in repeated.stderr
    assert json.loads(repeated.stdout)["run"] == command.replace(target, f"{target}-again")


def test_the_command_names_the_base_that_the_adapter_records(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2), base_model_name_or_path="acme/tiny")
    stderr = run("convert", "sql", "sql-mlx", "--to", "mlx").stderr
    assert "run it: mlx_lm.generate --model acme/tiny --adapter-path sql-mlx" in stderr
    assert "vllm serve acme/tiny " in run("convert", "sql-mlx", "again", "--to", "peft").stderr


def test_the_command_for_llama_cpp_makes_a_gguf_of_the_base_unless_there_is_one(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "tiny", size=32)
    adapter(tmp_path / "sql", pairs(2, size=(32, 32)))
    command = json.loads(run("convert", "sql", "sql.gguf", "--base", "tiny", "--json").stdout)["run"]
    run(*command.split(" && ")[0].split()[1:])  # the tiny.gguf of the second command
    again = run("convert", "sql", "again.gguf", "--base", "tiny", "--json").stdout
    assert json.loads(again)["run"] == "llama-server -m tiny.gguf --lora again.gguf"
    named = dataclasses.replace(read_base(tmp_path / "tiny"), folder=None, repo="acme/small")
    assert runtime_commands.adapter_command("gguf", Path("sql.gguf"), named) == (
        "hf download acme/small --local-dir small && adapterhub convert small small.gguf"
        " && llama-server -m small.gguf --lora sql.gguf"
    )


@pytest.mark.parametrize("style", ["mlx", "peft"])
def test_a_command_without_its_base_is_not_printed(run: Run, tmp_path: Path, style: str) -> None:
    adapter(tmp_path / "sql", pairs(2))
    assert "run it:" not in run("convert", "sql", "out", "--to", style).stderr


def test_a_format_of_a_trainer_has_no_command(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    assert "run it:" not in run("convert", "sql", "sql.safetensors", "--to", "raw").stderr
