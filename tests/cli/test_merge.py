"""`adapterhub merge` of adapters, from the words typed to the version in the registry, made again from its recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from adapterhub.cli.main import app
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import Recipe
from adapterhub.merging import METHODS
from adapterhub.registry import adapter_recipe
from tests.conftest import Run, need_module
from tests.support.fixtures import Filled
from tests.support.folders import adapter, base, pairs, two_adapters

TWO = [name for name, method in METHODS.items() if method.count[0] <= 2 <= method.count[1]]


@pytest.fixture
def team(run: Run, filled: Filled, tmp_path: Path) -> Path:
    """team/a and team/b in a registry, and as folders."""

    def commands() -> None:
        base(tmp_path / "base", 2)
        two_adapters(tmp_path)
        for name in "ab":
            run("push", name, f"team/{name}", "--base", "base")

    return filled("team", tmp_path, commands)


def document(run: Run, *args: object, **options: Any) -> Any:
    return json.loads(run(*args, "--json", **options).stdout)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[adapter_recipe.ParentAdapter]:
    folder = tmp_path_factory.mktemp("parents")
    two_adapters(folder)
    return [
        adapter_recipe.ParentAdapter(folder / name, folder / name, oci_manifest.build(folder / name).digest) for name in "ab"
    ]


def test_a_terminal_gets_the_conclusion_of_a_merge_and_the_worst_modules_only_if_something_was_lost(
    tmp_path: Path, terminal: Any
) -> None:
    two_adapters(tmp_path)
    exact = terminal("merge", "a", "b", "-o", "./exact")
    assert "exact: nothing was lost" in exact
    assert "signs apart up to " in exact
    assert "ENERGY LOST" not in exact
    truncated = terminal("merge", "a", "b", "--method", "svd", "--rank", "1", "-o", "./truncated")
    assert re.search(r"truncation lost up to [\d.]+% of a module's energy; relative error up to [\d.]+%", truncated)
    assert "ENERGY LOST" in truncated


@pytest.mark.parametrize("method", TWO)
def test_a_merge_by_any_method_is_made_again_to_the_last_byte(tmp_path: Path, parents: Any, method: str) -> None:
    _, merged = adapter_recipe.merge(parents, tmp_path / "both", Recipe("merge", method=method, seed=3))
    assert merged.recipe is not None
    assert merged.recipe.method == method
    assert set(merged.recipe.parameters or {}) == set(METHODS[method].parameters)
    assert merged.recipe.seed in ((3,) if METHODS[method].random else (None, 3))
    adapter_recipe.rebuild_adapter(tmp_path / "both", parents, tmp_path / "again")
    assert adapter_recipe.differences(tmp_path / "both", tmp_path / "again") == []
    assert oci_manifest.build(tmp_path / "both").digest == oci_manifest.build(tmp_path / "again").digest


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "svd", "--rank", "1"], {"rank": 1}),
        (["--method", "linear", "--energy", "0.9"], {"energy": 0.9, "rank": None}),
        (["--method", "iso_c", "--rank-budget", "1000", "--set", "lambda=2"], {"budget": 1000, "parameters": {"lambda": 2.0}}),
        (["--method", "nuslerp", "--set", "by=rows", "--weights", "1,3"], {"parameters": {"by": "rows"}}),
        (["--method", "ties", "--set", "density=0.4"], {"parameters": {"density": 0.4, "lambda": 1.0}, "seed": 0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_all_that_was_asked_for_is_in_the_recipe(run: Run, team: Path, options: list[str], expected: dict[str, Any]) -> None:
    run("merge", "team/a", "team/b", *options, "-o", "team/both:x")
    recipe = document(run, "lineage", "team/both")["nodes"][0]["recipe"]
    assert {key: recipe[key] for key in expected} == expected
    assert document(run, "rebuild", "team/both")["same"] is True


def test_the_result_in_a_registry_is_the_one_in_a_folder(run: Run, team: Path) -> None:
    arguments = ["team/a", "team/b", "--method", "dare_ties", "--set", "density=0.6"]
    in_registry, in_folder = (
        document(run, "merge", *arguments, "-o", "team/both:x"),
        document(run, "merge", *arguments, "-o", "both"),
    )
    assert document(run, "show", "both")["digest"] == in_registry["digest"]
    assert {**in_registry, "output": 0, "ref": 0, "digest": 0} == {**in_folder, "output": 0, "ref": 0, "digest": 0}
    assert [parent["ref"] for parent in in_registry["parents"]] == ["team/a:v1", "team/b:v1"]


def test_out_is_a_folder_or_a_ref_and_never_guessed(run: Run, team: Path) -> None:
    (team / "team").mkdir()
    says = run("merge", "a", "b", "-o", "team/both", code=2).stderr
    assert "could be a folder or a ref. Write ./team/both for the folder, team/both:latest for the ref" in says
    assert document(run, "merge", "a", "b", "-o", "./team/both")["ref"] is None
    assert (team / "team/both/adapter.json").is_file()
    assert document(run, "merge", "a", "b", "-o", "team/both:latest")["ref"] == "team/both:v1"
    assert document(run, "merge", "a", "b", "--method", "svd", "-o", "other/both")["ref"] == "other/both:v1"
    assert "names a version, and a merge creates a new one" in run("merge", "a", "b", "-o", "team/both:v3", code=2).stderr
    assert (
        "is an address, and a merge is stored locally"
        in run("merge", "a", "b", "-o", "oci://localhost/team/both", code=2).stderr
    )
    assert "already exists" in run("merge", "a", "b", "-o", "./team/both", code=2).stderr


def test_the_report_has_the_distance_between_the_adapters(run: Run, team: Path) -> None:
    report = document(run, "merge", "a", "b", "--method", "svd", "--rank", "2", "-o", "both")
    [module, _] = report["modules"].values()
    assert module["cosines"][0][1] == module["cosines"][1][0] != 1
    assert 0 < module["sign_disagreement"] < 1
    assert module["sign_disagreement_exact"] is True
    assert module["error"] ** 2 == pytest.approx(module["lost_energy"], rel=1e-3)
    text = run("merge", "a", "b", "--method", "svd", "--rank", "2", "-o", "again").stdout
    assert "again: svd, 2 modules, r 2" in text
    assert "MODULE" in text
    assert "model.layers.1.self_attn.q_proj" in text


def test_the_report_as_a_picture(run: Run, team: Path) -> None:
    need_module("matplotlib")
    run("merge", "a", "b", "--method", "ties", "-o", "both", "--plot", "both.png")
    assert (team / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "already exists" in run("merge", "a", "b", "-o", "both3", "--plot", "both.png", code=2).stderr
    assert not (team / "both3").exists()


def test_methods_are_listed_and_explained(run: Run, team: Path) -> None:
    assert [method["name"] for method in document(run, "merge", "--method", "list")["methods"]] == list(METHODS)
    assert "ties  " in run("merge", "--method", "list").stdout
    text = run("merge", "--explain", "della").stdout
    assert "Paper: DELLA-Merging" in text
    assert "--set epsilon=0.1\nspread of the probabilities around density: a number, from 0 to 1" in text
    assert run("merge", "--method", "della", "--explain").stdout == text
    assert document(run, "merge", "--explain") == document(run, "merge", "--method", "list")
    assert document(run, "merge", "--method", "core_space", "--explain")["parameters"]["rule"] == {
        "type": "word",
        "default": "ties",
        "limits": "one of ties, linear, dare_ties, dare_linear",
        "meaning": "merge of the cores",
    }
    assert "Did you mean ties?" in run("merge", "--explain", "tie", code=2).stderr


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["--method", "della", "--set", ""], ["density=", "epsilon=", "lambda="]),
        (["--set", ""], []),
        (["--method", "bread"], ["breadcrumbs"]),
        (["--explain", "slerp"], ["slerp"]),
    ],
    ids=" ".join,
)
def test_methods_and_their_parameters_are_completed(words: list[str], completed: list[str]) -> None:
    assert [
        item.value for item in ShellComplete(app, {}, "adapterhub", "").get_completions(["merge", *words[:-1]], words[-1])
    ] == completed


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-o", "out"], "SRC: is missing"),
        (["a", "b"], "-o: is missing"),
        (
            ["a", "b", "-o", "out", "--method", "svd", "--set", "density=0.5"],
            "--set density: is not a parameter of svd. It takes none",
        ),
        (
            ["a", "b", "-o", "out", "--method", "ties", "--set", "t=1"],
            "--set t: is not a parameter of ties. It takes density, lambda",
        ),
        (["a", "b", "-o", "out", "--method", "ties", "--set", "density=nan"], "--set density: nan is not above 0"),
        (["a", "b", "-o", "out", "--method", "ties", "--set", "density=much"], "--set density: much is not above 0"),
        (
            ["a", "b", "-o", "out", "--method", "ties", "--set", "density"],
            "--set: 'density' is not KEY=VALUE. Write it like density=0.2",
        ),
        (
            ["a", "b", "-o", "out", "--method", "della", "--set", "density=1"],
            "--set epsilon: density 1 plus or minus epsilon 0.1",
        ),
        (["a", "b", "-o", "out", "--method", "core_space", "--set", "rule=best"], "--set rule: best is not one of ties"),
        (["a", "--into", "base", "-o", "out", "--set", "lambda=2"], "--set lambda: is not a parameter of cat"),
        (["a", "--into", "base", "-o", "out", "--rank-budget", "2"], "--rank-budget: is for a merge of adapters"),
        (["a", "b", "-o", "out", "--method", "svd", "--rank", "2", "--energy", "0.5"], "Give one of them"),
        (["a", "b", "-o", "out", "--method", "slerp", "--weights", "1,2"], "slerp takes no weights. Pass --set t=T instead"),
        (
            ["a", "-o", "out.gguf"],
            "out.gguf: is a GGUF file, and a merge of adapters writes a folder. For a model, add --into FOLDER",
        ),
        (["a", "-o", "out", "--method", "slerp"], "slerp merges exactly 2 adapters, not 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(run: Run, team: Path, args: list[str], says: str) -> None:
    assert says in run("merge", *args, code=2).stderr
    assert not (team / "out").exists()


def test_an_option_for_a_base_names_the_base_that_the_adapter_records(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(1), base_model_name_or_path="acme/tiny")
    error = run("merge", "a", "-o", "out", "--dry-run", code=2).stderr
    assert (
        error
        == "error: --dry-run: is for a merge into a base. Add --into hf://acme/tiny, which a records  [conflicting-options]\n"
    )
    assert "add --into hf://acme/tiny" in run("merge", "a", "-o", "out.gguf", code=2).stderr
