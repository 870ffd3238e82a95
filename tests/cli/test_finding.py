"""`search`, `find` and `list --tree` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.cli.views import tree
from adapterhub.index.queries import VersionRow
from adapterhub_converters.formats import peft
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
    assert done.stderr in ("no matches\n", "")


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
    assert "other.txt: no version contains it" in run("find", "other.txt", code=3).stderr
    some = run("find", "other.txt", "sql", code=3)
    assert "team/sql:v2" in some.stdout
    assert some.stderr == "other.txt: no version contains it\n"
    run("find", "--sha256", "0" * 64, code=3)
    run("find", "--sha256", "xyz", code=2)
    run("find", "nowhere", code=3)
    run("find", code=2)


# ---- the tree


def test_a_tree_has_namespaces_names_versions_and_parents(run: Run, registry: Path) -> None:
    run("merge", "team/sql:v1", "team/poems", "-o", "both")
    run("push", "both", "other/merged")
    assert run("list", "--tree").stdout.startswith("other/  1 name\n  merged  1 version\n")
    text = run("list", "--tree").stdout
    assert "      from team/sql:v1, team/poems:v1\n" in text
    assert "  sql  2 versions\n    v2  latest  r 2" in text
    assert "\n    v1  prod  r 2" in text
    spaces = document(run, "list", "--tree")["namespaces"]
    assert [(space["namespace"], [name["name"] for name in space["names"]]) for space in spaces] == [
        ("other", ["other/merged"]),
        ("team", ["team/poems", "team/sql"]),
    ]
    assert [row["ref"] for row in spaces[1]["names"][1]["versions"]] == ["team/sql:v2", "team/sql:v1"]
    assert spaces[0]["names"][0]["versions"][0]["parents"] == ["team/sql:v1", "team/poems:v1"]
    assert "team" not in run("list", "other", "--tree").stdout.partition("from")[0]


def row(number: int, **changes: Any) -> VersionRow:
    fields = dict.fromkeys(VersionRow.__dataclass_fields__)
    fields |= {"name": "team/sql", "number": number, "digest": f"sha256:{number:064}", "time": "2026-01-01T00:00:00Z"}
    return VersionRow(**{**fields, "parents": (), "tags": (), **changes})


def nobody(_digest: str) -> list[VersionRow]:
    return []


def test_a_tree_names_a_parent_outside_it_by_all_its_names() -> None:
    made = row(1, parents=(f"sha256:{7:064}",))
    held = [row(7, name="dev/x"), row(2, name="prod/x")]
    assert list(tree.lines([made], lambda digest: held if digest == made.parents[0] else [], screen=None))[-1] == (
        "      from dev/x:v7 (also prod/x:v2)"
    )


@pytest.mark.parametrize("screen", [40, 80])
def test_a_long_tree_is_cut_to_the_screen_but_not_its_tags(screen: int) -> None:
    rows = [row(n, base=f"org/{'long' * 30}\x1b[2J") for n in range(30, 1, -1)]
    rows.append(row(1, tags=("prod",), parents=tuple(f"sha256:{n:064}" for n in range(1, 13))))
    shown = list(tree.lines(rows, nobody, screen=screen))
    assert all(len(line) <= screen and "\x1b" not in line for line in shown)
    assert any(line.startswith("    v1   prod") for line in shown)
    assert shown[-1] == "    … 19 older versions"
    whole = list(tree.lines(rows, nobody, screen=None))
    assert len(whole) == 2 + 30 + 1
    assert whole[-1].startswith("      from team/sql:v1, team/sql:v2, ")
    assert whole[-1].count("team/sql") == 12
