"""`search`, `find` and `list --tree` as they are typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_converters import peft
from tests.cli.test_commands import terminal
from tests.conftest import Run
from tests.folders import adapter, pairs


@pytest.fixture
def registry(run: Run, tmp_path: Path) -> Path:
    """team/sql in two versions, the first tagged prod, and team/poems."""
    described = {"sql": "Turns questions into SQL. " * 5, "poems": "Writes sonnets."}
    for name, description in described.items():
        folder = adapter(tmp_path / name, pairs(2), lambda _, array, name=name: array * len(name))
        (folder / "adapter.toml").write_text(f"description = '{description}'\n[training.metrics]\nloss = 0.5\n")
    run("push", "sql", "team/sql:prod")
    run("push", "poems", "team/poems")
    (tmp_path / "sql" / "notes.txt").write_text("more")
    run("push", "sql", "team/sql")
    return tmp_path


def document(run: Run, *args: object, **options: Any) -> Any:
    return json.loads(run(*args, "--json", **options).stdout)


def refs(found: Any) -> list[str]:
    return [row["ref"] for row in found["adapters"]]


def test_search_as_it_is_typed(run: Run, registry: Path) -> None:
    found = document(run, "search", "quest", "sql")
    assert (refs(found), found["total"], found["facets"]["target"]) == (["team/sql:v2"], 1, {"q_proj": 1})
    filters = ["--rank", "1..4", "--size", "<1MB", "--metric", "loss<=0.5", "--target", "q_proj", "--method", "lora"]
    assert refs(document(run, "search", "--tag", "prod", *filters)) == ["team/sql:v1"]
    assert len(refs(document(run, "search", "--all-versions"))) == 3
    assert "loss" not in run("search", "sonn").stdout
    assert "target  q_proj 2" in run("search", "--facets").stdout


@pytest.mark.parametrize("words", [["nowhere"], ['"'], ["NEAR(", "*", "a:b"], ["--", "-x"], ["\udcff"], [""]])
def test_no_words_are_an_error(run: Run, registry: Path, words: list[str]) -> None:
    done = run("search", *words)
    assert done.stderr in ("nothing matches\n", "")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--size", "10MB"], "'10MB' is one size. Write '<10MB'"),
        (["--rank", "many"], "'many' is not a number"),
        (["--metric", "loss"], "Write it like 'accuracy>0.8'"),
        (["--limit", "-1"], "--limit"),
    ],
)
def test_a_filter_that_says_nothing_is_a_usage_error(run: Run, registry: Path, args: list[str], says: str) -> None:
    assert says in run("search", *args, code=2).stderr


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_search_on_a_terminal_fits(run: Run, registry: Path, columns: int) -> None:
    lines = terminal([sys.executable, "-m", "adapterhub", "search", "--all-versions"], registry, columns).splitlines()
    assert len(lines) == 4
    assert all(len(line.rstrip("\r")) <= columns for line in lines)
    assert ("…" in lines[1]) == (columns >= 80)


def test_find_by_bytes(run: Run, registry: Path) -> None:
    weights = registry / "sql" / peft.WEIGHTS
    [found] = document(run, "find", weights)["found"]
    assert [(held["ref"], held["path"]) for held in found["holders"]] == [
        ("team/sql:v2", peft.WEIGHTS),
        ("team/sql:v1", peft.WEIGHTS),
    ]
    pushed = document(run, "show", "team/sql:v2")["digest"]
    [whole] = document(run, "find", "sql")["found"]
    assert [(held["ref"], held["path"], held["digest"]) for held in whole["holders"]] == [("team/sql:v2", None, pushed)]
    assert "team/sql:v2" in run("find", "--sha256", pushed).stdout
    assert "team/sql:v2" in run("find", "--sha256", pushed[7:20].upper()).stdout


def test_a_folder_that_has_changed_is_found_by_its_weights(run: Run, registry: Path) -> None:
    (registry / "poems" / "README.md").write_text("new")
    [found] = document(run, "find", "poems")["found"]
    assert [(held["ref"], held["path"]) for held in found["holders"]] == [("team/poems:v1", peft.WEIGHTS)]


def test_what_no_version_holds_is_exit_3(run: Run, registry: Path) -> None:
    (registry / "other.txt").write_text("other")
    assert "other.txt: no version holds it" in run("find", "other.txt", code=3).stderr
    some = run("find", "other.txt", "sql", code=3)
    assert "team/sql:v2" in some.stdout
    assert some.stderr == "other.txt: no version holds it\n"
    run("find", "--sha256", "0" * 64, code=3)
    run("find", "--sha256", "xyz", code=2)
    run("find", "nowhere", code=3)
    run("find", code=2)
