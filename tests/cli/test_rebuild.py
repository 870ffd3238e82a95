"""`merge --into --recipe-only` and `rebuild`: a model kept as what it is made of comes out again byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.containers import gguf_output
from adapterhub_converters.containers.gguf_types import string_value, u32_value
from tests.support.merge_recipes import KEEP, mergeable


@pytest.fixture
def place(tmp_path: Path, run: Any) -> Path:
    mergeable(tmp_path, run)
    return tmp_path


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return {"" if path.is_file() else item.relative_to(path).as_posix(): item.read_bytes() for item in files}


def gguf_base(place: Path) -> None:
    metadata = {
        "general.architecture": string_value("llama"),
        "llama.attention.head_count": u32_value(4),
        "llama.block_count": u32_value(1),
    }
    metadata["general.type"] = string_value("model")
    rng = np.random.default_rng(1)
    tensors = {"token_embd.weight": np.ones((40, 64)), "blk.0.attn_q.weight": rng.normal(size=(64, 64))}
    gguf_output.write(place / "base.gguf", metadata, {name: array.astype(np.float32) for name, array in tensors.items()})


@pytest.mark.parametrize(
    "options",
    [[], ["--dtype", "f32", "--shard-size", "10 KB"], ["--dtype", "f16", "--weights", "-0.5"]],
    ids=["plain", "shards", "weighted"],
)
def test_a_recipe_is_small_and_makes_the_merge_byte_for_byte_elsewhere(place: Path, run: Any, options: list[str]) -> None:
    run("merge", "team/a", "--into", "base", *options, "-o", "merged", cwd=place)
    document = json.loads(run(*KEEP, *options, "--json", cwd=place).stdout)
    assert sorted(path.name for path in place.iterdir() if "xdg" not in path.name) == ["a", "a.json", "base", "merged"]
    assert document["size"] == (place / "a.json").stat().st_size < 10_000
    (place / "base").rename(place / "moved")
    report = json.loads(run("rebuild", "a.json", "--base", "moved", "-o", "out", "--json", cwd=place).stdout)
    assert report["same"]
    assert contents(place / "out") == contents(place / "merged")


@pytest.mark.parametrize(
    "options", [[], ["--requantize", "q8_0"], ["--dtype", "f16", "--shard-size", "10 KB"]], ids=["plain", "q8_0", "split"]
)
def test_so_does_one_of_a_gguf(place: Path, run: Any, options: list[str]) -> None:
    gguf_base(place)
    out = "merged" if "--shard-size" in options else "merged.gguf"
    run("merge", "team/a", "--into", "base.gguf", *options, "-o", out, cwd=place)
    run("merge", "team/a", "--into", "base.gguf", *options, "--recipe-only", "-o", "a.json", cwd=place)
    (place / out).rename(place / f"first-{out}")
    text = run("rebuild", "a.json", "-o", out, cwd=place).stdout
    assert "byte for byte" in text
    assert contents(place / out) == contents(place / f"first-{out}")


def test_an_adapter_that_no_name_is_left_for_is_found_by_its_digest(place: Path, run: Any) -> None:
    run(*KEEP, cwd=place)
    run("rm", "team/a", cwd=place)
    assert "byte for byte" in run("rebuild", "a.json", "-o", "out", cwd=place).stdout


def test_a_folder_that_is_in_no_registry_is_reported_and_has_to_be_named(place: Path, run: Any) -> None:
    (place / "a" / "README.md").write_text("# Another version\n")
    stderr = run("merge", "./a", "--into", "base", "--recipe-only", "-o", "a.json", cwd=place).stderr
    assert "rebuild --adapter" in stderr
    missing = run("rebuild", "a.json", "-o", "out", cwd=place, code=3).stderr
    assert "is not in the registry" in missing
    assert missing.endswith("[recipe-adapter-missing]\n")
    assert "byte for byte" in run("rebuild", "a.json", "--adapter", "./a", "-o", "out", cwd=place).stdout
    assert "is not an adapter of the recipe" in run("rebuild", "a.json", "--adapter", "team/a", cwd=place, code=2).stderr


def test_an_adapter_whose_address_leads_to_another_one_now_is_refused(place: Path, run: Any) -> None:
    address = f"layout://{place}/images:sql"
    run("push", "./a", address, cwd=place)
    run("merge", address, "--into", "base", "--recipe-only", "-o", "a.json", cwd=place)
    assert "byte for byte" in run("rebuild", "a.json", "-o", "out", cwd=place).stdout
    (place / "a" / "README.md").write_text("# Another version\n")
    run("push", "./a", address, cwd=place)
    run("rm", "team/a", cwd=place)
    run("gc", "--grace", "0", cwd=place)
    error = run("rebuild", "a.json", "-o", "second", cwd=place, code=3).stderr
    assert f"error: {address}: is another adapter now: sha256:" in error
    assert ". Pass the right one with --adapter  [recipe-adapter-moved]\n" in error
    assert not (place / "second").exists()


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["merge", "team/a", "--into", "base", "--recipe-only", "-o", "team/b"], 2, "or one word for a name in the registry"),
        (["rebuild", "nothing"], 3, "no merge recipe of this name"),
        (["rebuild", "nothing", "--remove"], 3, "[no-such-recipe]"),
        (["rebuild"], 2, "--list"),
        (["merge", "team/a", "--into", "base", "--no-digest", "-o", "out"], 2, "Add --recipe-only"),
        (["merge", "team/a", "--recipe-only", "-o", "a.json"], 2, "is for a merge into a base"),
        (["rebuild", "nowhere.json"], 3, "no such file"),
        (["rebuild", "base/config.json"], 4, "not a merge recipe"),
        (["rebuild", "base/model.safetensors"], 4, "not"),
    ],
)
def test_refused_in_one_line(place: Path, run: Any, args: list[str], code: int, says: str) -> None:
    result = run(*args, cwd=place, code=code)
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
