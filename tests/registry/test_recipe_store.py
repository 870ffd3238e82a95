"""Recipes under a name: kept with their adapters, listed, and checked as what versions need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_rebuild import contents
from tests.support.merge_recipes import mergeable


@pytest.fixture
def place(tmp_path: Path, run: Any) -> Path:
    mergeable(tmp_path, run)
    return tmp_path


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
    other_merge = ("merge", "team/a", "--weights", "0.5", "--into", "base", "--recipe-only", "-o", "sql")
    assert run(*other_merge, cwd=named, code=7).stderr.endswith("[recipe-name-taken]\n")
    run("rebuild", "sql", "--remove", cwd=named)
    run(*other_merge, cwd=named)
    assert json.loads(run("rebuild", "--list", "--json", cwd=named).stdout)["merges"][0]["adapters"][0]["weight"] == 0.5


def test_an_adapter_that_gc_could_not_keep_is_refused(place: Path, run: Any) -> None:
    (place / "a" / "README.md").write_text("# Another version\n")
    stderr = run("merge", "./a", "--into", "base", "--recipe-only", "-o", "sql", cwd=place, code=3).stderr
    reason = "is not in this registry, so nothing would keep it for the recipe"
    assert f": {reason}. Push it first, or write the recipe to a .json file  [not-found]\n" in stderr


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
