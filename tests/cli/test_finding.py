"""`search`, for words, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, Terminal
from tests.support.fixtures import Filled
from tests.support.folders import adapter, pairs


@pytest.fixture
def registry(run: Run, filled: Filled, tmp_path: Path) -> Path:
    """team/sql in two versions, the first tagged prod, and team/poems."""

    def commands() -> None:
        described = {"sql": "Turns questions into SQL. " * 5, "poems": "Writes sonnets."}
        for name, description in described.items():
            folder = adapter(tmp_path / name, pairs(2), lambda _, array, name=name: array * len(name))
            (folder / "adapter.toml").write_text(f"description = '{description}'\n[training.metrics]\nloss = 0.5\n")
        run("push", "sql", "team/sql:prod")
        run("push", "poems", "team/poems")
        (tmp_path / "sql" / "notes.txt").write_text("more")
        run("push", "sql", "team/sql")

    return filled("registry", tmp_path, commands)


def document(run: Run, *args: object, **options: Any) -> Any:
    return json.loads(run(*args, "--json", **options).stdout)


def refs(listing: Any) -> list[str]:
    return [row["ref"] for row in listing["adapters"]]


def test_search_as_it_is_typed(run: Run, registry: Path) -> None:
    results = document(run, "search", "quest", "sql")
    assert (refs(results), results["total"], results["facets"]["target"]) == (["team/sql:v2"], 1, {"q_proj": 1})
    filters = ["--rank", "1..4", "--size", "<1MB", "--metric", "loss<=0.5", "--target", "q_proj", "--method", "lora"]
    assert refs(document(run, "search", "--tag", "prod", *filters)) == ["team/sql:v1"]
    assert len(refs(document(run, "search", "--all-versions"))) == 3
    assert "loss" not in run("search", "sonn").stdout
    assert "target  q_proj 2" in run("search", "--facets").stdout


@pytest.mark.parametrize("words", [["nowhere"], ['"'], ["NEAR(", "*", "a:b"], ["--", "-x"], ["\udcff"], [""]])
def test_no_words_are_an_error(run: Run, registry: Path, words: list[str]) -> None:
    result = run("search", *words)
    assert result.stderr in ("no matches\n", "")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--size", "10MB"], "'10MB' is an exact size. Write '<10MB'"),
        (["--rank", "many"], "'many' is not a number"),
        (["--metric", "loss"], "Write it like 'accuracy>0.8'"),
        (["--limit", "-1"], "--limit"),
    ],
)
def test_an_empty_filter_is_a_usage_error(run: Run, registry: Path, args: list[str], says: str) -> None:
    assert says in run("search", *args, code=2).stderr


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_search_on_a_terminal_fits(terminal: Terminal, registry: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = terminal("search", "--all-versions", cwd=registry, columns=columns).splitlines()
    assert all(len(line.rstrip("\r")) <= columns for line in lines)
    hidden = [line.rstrip() for line in lines[4:]]
    assert hidden == (["not shown for the width: TAGS, BASE, ME…"] if columns == 40 else [])
    assert lines[0].split()[-1] == "DESCRIPTION"
    assert any("…" in line for line in lines[1:4])


def test_the_rank_of_an_adapter_is_its_largest_everywhere(run: Run, tmp_path: Path) -> None:
    """Two modules of rank 2, one of 4: lists show the range, and searches, filters and policies take 4."""
    run("init", "r")
    shapes = {**pairs(2), **pairs(1, r=4, module="model.layers.{}.self_attn.v_proj")}
    adapter(tmp_path / "a", shapes, rank_pattern={"v_proj": 4})
    store = ("--registry", "r")
    run("push", "a", "team/a", *store)
    row = document(run, "list", *store)["adapters"][0]
    assert (row["r"], row["least_r"]) == (4, 2)
    for result in (run("list", *store), run("list", "--tree", *store), run("show", "team/a", *store)):
        assert "2 to 4" in result.stdout
    refs_by_rank = {rank: refs(document(run, "search", "--rank", rank, *store)) for rank in ("2", "4", ">2")}
    assert refs_by_rank == {"2": [], "4": ["team/a:v1"], ">2": ["team/a:v1"]}
    assert document(run, "search", "--facets", *store)["facets"]["r"] == {"4": 1}
    (tmp_path / "adapterhub.toml").write_text("[policy]\nmax_rank = 3\n")
    assert "max_rank: rank 4 is over 3" in run("pull", "team/a", "-o", "b", *store, code=6).stderr
