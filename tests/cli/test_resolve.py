"""`adapterhub resolve`: a path and the options to serve it with, and what a gc does to it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.folders import adapter, base, pairs

QV = {**pairs(2), **pairs(2, module="model.layers.{}.self_attn.v_proj")}


@pytest.fixture
def digest(run: Run, tmp_path: Path) -> str:
    """A registry with an adapter and a base."""
    base(tmp_path / "base")
    adapter(tmp_path / "sql", QV, use_rslora=True)
    run("init")
    return str(json.loads(run("push", "sql", "team/sql:prod", "--json").stdout)["digest"])


def test_it_prints_the_path_and_the_options(run: Run, digest: str) -> None:
    result = run("resolve", "team/sql:prod", "--for", "sglang", "--base", "base")
    path, options = result.stdout.splitlines()
    assert (Path(path) / "adapter_config.json").is_file()
    assert shlex.split(options)[:3] == ["--enable-lora", "--lora-strict-loading", "--max-lora-rank"]
    assert json.loads(shlex.split(options)[-1]) == {"lora_name": f"team/sql@{digest}", "lora_path": path}
    assert "note: rsLoRA is folded into lora_alpha" in result.stderr


def test_its_document_has_all_that_a_program_needs(run: Run, digest: str, tmp_path: Path) -> None:
    document = json.loads(run("resolve", f"team/sql@{digest}", "--for", "vllm", "--base", "base", "--json").stdout)
    assert (document["ref"], document["model"], document["runtime"], document["rank"]) == (
        "team/sql:v1",
        f"team/sql@{digest}",
        "vllm",
        2,
    )
    module = {"name": document["model"], "path": document["path"], "base_model_name": "base"}
    assert json.loads(document["flags"][-1]) == module
    assert Path(document["path"]).is_relative_to(tmp_path / "xdg-cache/adapterhub/served")


def test_a_misfit_is_exit_6_in_the_words_of_the_runtime(run: Run, digest: str, tmp_path: Path) -> None:
    adapter(tmp_path / "odd", {**QV, **pairs(1, module="model.layers.{}.other.x_proj")})
    run("push", "odd", "team/odd")
    result = run("resolve", "team/odd", "--for", "vllm", "--base", "base", "--json", code=6)
    error = json.loads(result.stdout)["error"]
    assert (error["where"], error["code"]) == ("team/odd:v1", "runtime")
    assert error["what"] == "vllm: refused: expected target modules in …, but received model.layers.0.other.x_proj"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["team/none", "--for", "vllm"], 3, "team/none: no such adapter"),
        (["./sql", "--for", "vllm"], 2, "./sql: a path, and only versions are served. Push it first"),
        (["team/sql", "--for", "ollama"], 2, "'ollama' is not one of"),
        (["team/sql"], 2, "Missing option '--for'"),
        (["team/sql", "--for", "vllm", "--base", "nowhere"], 3, "nowhere"),
    ],
)
def test_what_cannot_be_resolved_is_one_line(run: Run, digest: str, words: list[str], code: int, says: str) -> None:
    result = run("resolve", *words, code=code)
    assert says in result.stderr
    assert result.stdout == ""


def test_a_gc_removes_what_was_not_resolved_for_a_month(run: Run, digest: str, tmp_path: Path) -> None:
    run("resolve", "team/sql", "--for", "vllm", "--base", "base")
    document: Any = json.loads(run("gc", "--json").stdout)
    assert (document["served"], document["served_held"]) == (0, 0)
    (folder,) = (tmp_path / "xdg-cache/adapterhub/served").glob("sha256-*/*")
    os.utime(folder, (1, 1))
    assert "would remove 1 served version" in run("gc", "--dry-run").stdout
    assert "removed 1 served version" in run("gc").stdout
    assert not folder.exists()
