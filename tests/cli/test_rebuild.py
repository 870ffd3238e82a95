"""`merge --into --recipe-only` and `rebuild`: a model kept as what it is made of comes out again byte for byte."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import gguf_output, safetensors_file
from adapterhub_converters.containers.gguf_types import string_value, u32_value
from adapterhub_converters.formats import peft

Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False}
KEEP = ("merge", "team/a", "--into", "base", "--recipe-only", "-o", "a.json")


def write_base(folder: Path, seed: int = 1) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {f"{Q}.weight": rng.normal(size=(64, 64)).astype(dtypes.BF16), "model.norm.weight": np.ones(64, dtypes.BF16)}
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture
def place(tmp_path: Path, run: Any) -> Path:
    """A base, an adapter beside it that is `team/a` in the registry as well."""
    write_base(tmp_path / "base")
    rng = np.random.default_rng(2)
    lora_A, lora_B = rng.normal(size=(4, 64)), 0.03 * rng.normal(size=(64, 4))
    (tmp_path / "a").mkdir()
    peft.write(Adapter({Q: LowRank(lora_A.astype(np.float32), lora_B.astype(np.float32), alpha=4)}), tmp_path / "a")
    run("push", "./a", "team/a", cwd=tmp_path)
    return tmp_path


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return {"" if path.is_file() else item.relative_to(path).as_posix(): item.read_bytes() for item in files}


def gguf_base(place: Path) -> None:
    said = {
        "general.architecture": string_value("llama"),
        "llama.attention.head_count": u32_value(4),
        "llama.block_count": u32_value(1),
    }
    said["general.type"] = string_value("model")
    rng = np.random.default_rng(1)
    tensors = {"token_embd.weight": np.ones((40, 64)), "blk.0.attn_q.weight": rng.normal(size=(64, 64))}
    gguf_output.write(place / "base.gguf", said, {name: array.astype(np.float32) for name, array in tensors.items()})


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
    done = json.loads(run("rebuild", "a.json", "--base", "moved", "-o", "out", "--json", cwd=place).stdout)
    assert done["same"]
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


def test_another_base_is_refused_and_nothing_is_written(place: Path, run: Any) -> None:
    run(*KEEP, cwd=place)
    write_base(place / "other", seed=3)  # of the same names, shapes and sizes
    assert "has other numbers" in run("rebuild", "a.json", "--base", "other", "-o", "out", cwd=place, code=6).stderr
    write_base(place / "third")
    safetensors_file.write(place / "third" / "model.safetensors", {f"{Q}.weight": np.ones((64, 64), dtypes.BF16)})
    assert "not the base model of the recipe" in run("rebuild", "a.json", "--base", "third", cwd=place, code=6).stderr
    (place / "base").rename(place / "moved")
    gone = "error: base: the recipe has its base at base, and nothing is there. Pass its path with --base"
    assert run("rebuild", "a.json", "-o", "out", cwd=place, code=3).stderr == f"{gone}  [recipe-base-elsewhere]\n"
    assert not [path for path in place.iterdir() if path.name.startswith((".", "out"))]


def test_a_different_result_is_kept_and_reported_in_units_in_the_last_place(place: Path, run: Any) -> None:
    run(*KEEP, cwd=place)
    recipe = json.loads((place / "a.json").read_text())
    file = next(file for file in recipe["output"]["files"] if file["path"] == "model.safetensors")
    numbers = np.frombuffer(base64.b64decode(file["sample"]), "<f4").astype(dtypes.BF16)
    bits = numbers.view(np.uint16).copy()
    bits[:3] += np.array([1, 2, 1], np.uint16)  # as if another CPU had rounded three of them otherwise
    moved = bits.view(dtypes.BF16).astype("<f4")
    file |= {"digest": "sha256:" + 64 * "0", "sample": base64.b64encode(moved.tobytes()).decode()}
    (place / "a.json").write_text(json.dumps(recipe))
    document = json.loads(run("rebuild", "a.json", "-o", "out", "--json", cwd=place, code=1).stdout)
    assert [(difference["name"], difference["ulps"]) for difference in document["differences"]] == [("model.safetensors", 2)]
    assert document["differences"][0]["what"] == "bytes differ; 3 of the 512 numbers in the recipe differ"
    assert (place / "out" / "model.safetensors").exists()


def test_without_digests_the_merge_is_not_run_and_nothing_is_called_proven(place: Path, run: Any) -> None:
    run(*KEEP, "--no-digest", cwd=place)
    result = run("rebuild", "a.json", "-o", "out", cwd=place)
    assert "has no digests" in result.stdout
    assert "byte for byte" not in result.stdout
    assert "only names, shapes and sizes of the base were compared" in result.stderr


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


def test_a_name_of_an_output_in_a_recipe_leads_nowhere(place: Path, run: Any) -> None:
    run(*KEEP, cwd=place)
    recipe = json.loads((place / "a.json").read_text())
    recipe["output"]["files"].append({"path": "../../etc/passwd", "size": 1, "digest": "sha256:" + 64 * "0"})
    (place / "a.json").write_text(json.dumps(recipe))
    document = json.loads(run("rebuild", "a.json", "-o", "out", "--json", cwd=place, code=1).stdout)
    assert document["differences"] == [{"name": "../../etc/passwd", "what": "missing", "ulps": None}]
    shutil.rmtree(place / "out")


@pytest.fixture
def named(place: Path, run: Any) -> Path:
    """The model `team/a` in `base` is kept as `sql`."""
    run("merge", "team/a", "--into", "base", "--recipe-only", "-o", "sql", cwd=place)
    return place


def test_a_recipe_under_a_name_outlives_the_name_of_its_adapter(named: Path, run: Any) -> None:
    run("merge", "team/a", "--into", "base", "-o", "merged", cwd=named)
    run("rm", "team/a", cwd=named)
    run("gc", "--grace", "0", cwd=named)
    run("fsck", "--rebuild-index", cwd=named)
    assert json.loads(run("fsck", "--json", cwd=named).stdout)["findings"] == []
    assert "byte for byte" in run("rebuild", "sql", cwd=named).stdout
    assert contents(named / "sql") == contents(named / "merged")
    assert "both a file and a recipe" in run("rebuild", "sql", "-o", "out", cwd=named, code=2).stderr
    assert "byte for byte" in run("rebuild", "merge:sql", "-o", "out", cwd=named).stdout
    run("rebuild", "merge:sql", "--remove", cwd=named)
    swept = json.loads(run("gc", "--grace", "0", "--json", cwd=named).stdout)
    assert swept["blobs"] >= 4  # the recipe, and the adapter's manifest, config and files
    assert run("rebuild", "--list", "--json", cwd=named).stdout.strip() == json.dumps({"merges": [], "damaged": []}, indent=2)


def test_what_is_kept_is_listed_and_belongs_to_the_lineage(named: Path, run: Any) -> None:
    listed = run("rebuild", "--list", cwd=named).stdout
    assert "sql " in listed
    assert "1 × team/a:v1" in listed
    assert "models in recipes:\n   sql  1 × team/a:v1 in base" in run("lineage", "team/a", cwd=named).stdout
    document = json.loads(run("lineage", "team/a", "--json", cwd=named).stdout)
    assert [model["name"] for model in document["models"]] == ["sql"]


def test_a_name_means_one_model(named: Path, run: Any) -> None:
    other = ("merge", "team/a", "--weights", "0.5", "--into", "base", "--recipe-only", "-o", "sql")
    assert run(*other, cwd=named, code=7).stderr.endswith("[recipe-name-taken]\n")
    run("rebuild", "sql", "--remove", cwd=named)
    run(*other, cwd=named)
    assert json.loads(run("rebuild", "--list", "--json", cwd=named).stdout)["merges"][0]["adapters"][0]["weight"] == 0.5


def test_an_adapter_that_gc_could_not_keep_is_refused(place: Path, run: Any) -> None:
    (place / "a" / "README.md").write_text("# Another version\n")
    stderr = run("merge", "./a", "--into", "base", "--recipe-only", "-o", "sql", cwd=place, code=3).stderr
    what = "is not in this registry, so nothing would keep it for the recipe"
    assert f": {what}. Push it first, or write the recipe to a .json file  [not-found]\n" in stderr


def test_fsck_finds_what_a_recipe_lacks(named: Path, run: Any) -> None:
    root = next((named / "xdg").rglob(".adapterhub"))
    entry = json.loads((root / "merges" / "sql" / "00000001.json").read_text())
    recipe = json.loads((root / "blobs" / "sha256" / entry["digest"].removeprefix("sha256:")).read_text())
    run("rm", "team/a", cwd=named)
    (root / "blobs" / "sha256" / recipe["adapters"][0]["digest"].removeprefix("sha256:")).unlink()
    findings = json.loads(run("fsck", "--json", cwd=named, code=None).stdout)["findings"]
    assert [(finding["code"], finding["where"]) for finding in findings if finding["severity"] == "error"] == [
        ("missing", "merge:sql")
    ]
    (root / "blobs" / "sha256" / entry["digest"].removeprefix("sha256:")).unlink()
    assert "nothing was removed" in run("gc", "--grace", "0", cwd=named, code=4).stderr
