"""A merge into a base opens each of the base's files twice at most, and computes digests of its weights for a recipe alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.opens import opens

pytestmark = pytest.mark.peer


@pytest.fixture
def place(torch: Any, tmp_path: Path) -> Path:
    """A base in three files with a tokenizer, the same as GGUF, and an adapter."""
    model = tiny.model()
    tiny.write_gguf(model, tmp_path / "base.gguf")
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "base" / name).write_text("{}")
    tiny.adapter(model, tmp_path / "adapter", r=2)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--into", "base", "-o", "out"],
        ["--into", "base", "-o", "out", "--dtype", "bf16"],
        ["--into", "base", "-o", "out", "--requantize", "nf4", "--force"],
        ["--into", "base", "-o", "out", "--shard-size", "60KB"],
        ["--into", "base", "-o", "out.gguf"],
        ["--into", "base.gguf", "-o", "out.gguf"],
        ["--into", "base", "-o", "out", "--dry-run"],
    ],
    ids=" ".join,
)
def test_each_file_of_the_base_is_opened_twice_at_most(place: Path, run: Callable[..., Any], arguments: list[str]) -> None:
    if arguments[-1] == "out.gguf" and "base" in arguments:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (place / "base" / name).unlink()
    counts = opens(run, place, place, "merge", "adapter", *arguments, cwd=place)
    base = {name: count for name, count in counts.items() if name.startswith("base")}
    assert base
    assert max(base.values()) <= 2, base
    adapter = {name: count for name, count in counts.items() if name.startswith("adapter/")}
    assert adapter
    assert max(adapter.values()) <= 2, adapter
    shards = [name for name in base if name.endswith((".safetensors", ".gguf"))]
    assert len(shards) == (1 if "base.gguf" in arguments else len(list((place / "base").glob("*.safetensors"))))
    if "--dry-run" in arguments:
        assert {base[name] for name in shards} == {1}


def test_the_weights_of_a_base_are_hashed_for_a_recipe_alone(place: Path, run: Callable[..., Any]) -> None:
    recipe = ("merge", "adapter", "--into", "base", "--recipe-only", "-o", "recipe.json")
    counts = opens(run, place, place, *recipe, cwd=place)
    files = json.loads((place / "recipe.json").read_text())["base"]["files"]
    assert all(file["digest"] for file in files)
    assert {counts[f"base/{file['path']}"] for file in files} == {3}  # and once more for the digest
