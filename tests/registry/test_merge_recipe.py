"""A recipe is of one base, one result and files inside its folder: anything else is refused or reported."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.registry import merge_recipe
from adapterhub_converters import dtypes
from adapterhub_converters.containers import safetensors_file
from tests.support.merge_recipes import KEEP, Q, mergeable, write_base


@pytest.fixture
def place(tmp_path: Path, run: Any) -> Path:
    mergeable(tmp_path, run)
    return tmp_path


def test_another_base_is_refused_and_nothing_is_written(place: Path, run: Any) -> None:
    run(*KEEP, cwd=place)
    write_base(place / "other", seed=3)  # of the same names, shapes and sizes
    assert "has other numbers" in run("rebuild", "a.json", "--base", "other", "-o", "out", cwd=place, code=6).stderr
    write_base(place / "third")
    safetensors_file.write(place / "third" / "model.safetensors", {f"{Q}.weight": np.ones((64, 64), dtypes.BF16)})
    assert "not the base model of the recipe" in run("rebuild", "a.json", "--base", "third", cwd=place, code=6).stderr
    (place / "base").rename(place / "moved")
    message = "error: base: the recipe has its base at base, and nothing is there. Pass its path with --base"
    assert run("rebuild", "a.json", "-o", "out", cwd=place, code=3).stderr == f"{message}  [recipe-base-elsewhere]\n"
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


def test_a_model_from_before_chat_templates_were_kept_is_made_again_without_one(place: Path, run: Any) -> None:
    (place / "a/chat_template.jinja").write_text("{{ messages[0].content }}")
    run("push", "./a", "team/a", cwd=place)
    run(*KEEP, cwd=place)
    recipe = json.loads((place / "a.json").read_text())
    files = recipe["output"]["files"]
    assert "chat_template.jinja" in {file["path"] for file in files}
    recipe["output"]["files"] = [file for file in files if file["path"] != "chat_template.jinja"]
    (place / "older.json").write_text(json.dumps(recipe))
    for name, has_template in (("a.json", True), ("older.json", False)):
        assert "byte for byte" in run("rebuild", name, "-o", f"{name} made", cwd=place).stdout
        assert (place / f"{name} made/chat_template.jinja").exists() == has_template


def test_a_name_of_an_output_in_a_recipe_leads_nowhere(place: Path, run: Any) -> None:
    run(*KEEP, cwd=place)
    recipe = json.loads((place / "a.json").read_text())
    recipe["output"]["files"].append({"path": "../../etc/passwd", "size": 1, "digest": "sha256:" + 64 * "0"})
    (place / "a.json").write_text(json.dumps(recipe))
    document = json.loads(run("rebuild", "a.json", "-o", "out", "--json", cwd=place, code=1).stdout)
    assert document["differences"] == [{"name": "../../etc/passwd", "what": "missing", "ulps": None}]
    shutil.rmtree(place / "out")


STORED = Path(__file__).parent.parent / "manifest/schema_1"
VERSIONS = {
    "team/sql:v1": "sha256:6acb3b8a9260bcad758b0eb57028b10795d804114a46a1bbc61b0b678bb61ee2",
    "team/french:v1": "sha256:ee703ac4eb3f87fbd0a4e7ad55e6e48e577cb73540f5dbce463acb526aca0197",
}


def test_a_recipe_of_a_merged_model_of_schema_1_is_read() -> None:
    recipe = merge_recipe.parse((STORED / "merge.json").read_text(), "merge.json")
    assert (recipe.to_dict()["schema_version"], recipe.adapters[0].digest) == (2, VERSIONS["team/sql:v1"])
    assert (recipe.merge_options().requantize, recipe.form) == (None, "folder")
    raw = recipe.dump()
    assert merge_recipe.parse(raw.decode(), "merge.json").dump() == raw
