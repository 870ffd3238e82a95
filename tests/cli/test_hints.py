"""Hints of the converters in the words of the command line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.formats import peft, raw
from tests.conftest import Run
from tests.converters import trained

Q = "model.layers.0.self_attn.q_proj"
A, B = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)


@pytest.mark.parametrize(
    ("args", "code", "hint"),
    [
        (["sql", "x", "--to", "gguf"], 6, "Pass --base with its folder"),
        (["alone", "x", "--to", "peft"], 6, "Pass --alpha N, and --rslora if it was trained with it"),
        (["raw", "x", "--to", "peft", "--alpha", "4"], 6, "Leave out --alpha and --rslora"),
        (["dora", "x", "--to", "litgpt", "--base", "base"], 6, "--allow-approx would help"),
        (["pickle.bin", "x", "--to", "peft"], 6, "or convert it with --unsafe-pickle"),
        (["bare", "x", "--to", "peft"], 4, "`adapterhub fix bare` adds a missing peft_type"),
        (["sql", "x", "--to", "mlx", "--model", "x"], 2, "--model: mlx does not name a base"),
        (["sql", "x", "--to", "mlx", "--alpha", "2"], 2, "--alpha: "),
    ],
)
def test_the_hint_names_the_option(run: Run, tmp_path: Path, args: list[str], code: int, hint: str) -> None:
    sql = trained.folder(trained.full("q_proj"), tmp_path / "sql")
    (tmp_path / "alone").write_bytes((sql / peft.WEIGHTS).read_bytes())
    raw.write(Adapter({Q: LowRank(A, B, 2.0)}), tmp_path / "raw")
    trained.folder(trained.full("q_proj", magnitude=np.ones(16, np.float32)), tmp_path / "dora")
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps({}))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / peft.CONFIG).write_text("{}")
    (tmp_path / "base").mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **trained.CONFIG}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert hint in run("convert", *args, code=code).stderr


def test_the_refusal_of_an_architecture_is_a_short_line_with_the_way_that_works(run: Run, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7"}))
    trained.folder(trained.full("q_proj"), tmp_path / "sql")
    (line,) = run("convert", "sql", "sql.gguf", "--base", "base", code=6).stderr.splitlines()
    assert "RWKV7ForCausalLM has no verified mapping to llama.cpp. `adapterhub merge sql --into base -o OUT` works" in line
    assert "`adapterhub convert --list --verbose` lists" in line
    assert len(line) < 300


def test_a_file_that_ends_with_gguf_needs_no_format(run: Run, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **trained.CONFIG}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    trained.folder(trained.full("q_proj"), tmp_path / "sql")
    run("convert", "sql", "sql.gguf", "--base", "base")
    assert (tmp_path / "sql.gguf").read_bytes()[:4] == b"GGUF"
    assert "--to: is required unless DST ends with .gguf" in run("convert", "sql", "x", code=2).stderr
