"""`adapterhub list`: which registry, on any terminal, and as a tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.cli.views import tree
from adapterhub.index.queries import VersionRow
from tests.cli.test_finding import registry
from tests.conftest import Run, Terminal
from tests.support.folders import adapter, pairs

__all__ = ["registry"]

LONG = "a-rather-long-namespace-of-a-team/and-an-even-longer-name-of-an-adapter-for-sql"


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    return adapter(tmp_path / "sql", pairs(2))


def document(run: Run, *args: object, **options: Any) -> Any:
    return json.loads(run(*args, "--json", **options).stdout)


def test_which_registry(run: Run, sql: Path, tmp_path: Path) -> None:
    for name in ("flag", "variable", "upwards"):
        run("push", "sql", f"team/{name}", "--registry", name)
    inside = tmp_path / "upwards/below"
    inside.mkdir()

    def names(*args: str, **options: Any) -> list[str]:
        return [row["name"] for row in document(run, "list", *args, **options)["adapters"]]

    assert names(cwd=inside) == ["team/upwards"]
    assert names(cwd=inside, env={"ADAPTERHUB_REGISTRY": str(tmp_path / "variable")}) == ["team/variable"]
    flag = str(tmp_path / "flag/registry.db")
    assert names("--registry", flag, cwd=inside, env={"ADAPTERHUB_REGISTRY": str(tmp_path / "variable")}) == ["team/flag"]
    result = run("--registry", flag, "list", cwd=inside)
    assert "team/flag:v1" in result.stdout


@pytest.mark.parametrize("columns", [50, 80, 140])
def test_a_list_on_a_terminal_fits_and_never_cuts_a_ref(
    run: Run, terminal: Terminal, sql: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    run("push", "sql", LONG)
    run("push", "sql", "team/sql:prod")
    screen = terminal("list", columns=columns)
    lines = screen.splitlines()
    assert any(line.startswith(f"{LONG}:v1") for line in lines)
    assert [line.startswith("not shown for the width: ") for line in lines[3:]] == [True] * ("METHOD" not in lines[0])
    assert all(len(line) <= max(columns, len(LONG) + 3) for line in lines)
    assert "SIZE" in run("list").stdout


def test_at_80_columns_the_reason_in_a_log_and_the_mark_in_a_list_stay(run: Run, terminal: Terminal, sql: Path) -> None:
    run("push", "sql", "team/a-name-of-some-length:a-tag-of-some-length")
    run("deprecate", "team/a-name-of-some-length:v1", "trained on the wrong split")
    log = terminal("log", "team/a-name-of-some-length")
    assert "WHY" in log
    assert "not shown for the width: WHEN, DIGEST" in log
    assert " ".join(log.split()).count("trained on the wrong") == 1
    assert "(deprecated)" in terminal("list")


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
    child = row(1, parents=(f"sha256:{7:064}",))
    parents = [row(7, name="dev/x"), row(2, name="prod/x")]
    assert list(tree.lines([child], lambda digest: parents if digest == child.parents[0] else [], screen=None))[-1] == (
        "      from dev/x:v7 (also prod/x:v2)"
    )


@pytest.mark.parametrize("screen", [40, 80])
def test_a_long_tree_is_cut_to_the_screen_but_not_its_tags(screen: int) -> None:
    rows = [row(n, base=f"org/{'long' * 30}\x1b[2J") for n in range(30, 1, -1)]
    rows.append(row(1, tags=("prod",), parents=tuple(f"sha256:{n:064}" for n in range(1, 13))))
    lines = list(tree.lines(rows, nobody, screen=screen))
    assert all(len(line) <= screen and "\x1b" not in line for line in lines)
    assert any(line.startswith("    v1   prod") for line in lines)
    assert lines[-1] == "    … 19 older versions"
    whole = list(tree.lines(rows, nobody, screen=None))
    assert len(whole) == 2 + 30 + 1
    assert whole[-1].startswith("      from team/sql:v1, team/sql:v2, ")
    assert whole[-1].count("team/sql") == 12


@pytest.mark.parametrize("command", ["list", "du"])
@pytest.mark.parametrize(
    ("prefix", "hint"), [("team/slq", "Did you mean team/sql?"), ("taem", "Did you mean team?"), ("x", "Run")]
)
def test_a_misspelled_prefix_is_answered_with_the_one_that_was_meant(
    run: Run, registry: Path, command: str, prefix: str, hint: str
) -> None:
    assert f"{prefix}: no adapter of this name or namespace. {hint}" in run(command, prefix, code=3).stderr


def test_a_pattern_lists_the_names_that_match(run: Run, registry: Path) -> None:
    refs = [row["ref"] for row in document(run, "list", "team/s*")["adapters"]]
    assert refs == ["team/sql:v2", "team/sql:v1"]
    assert len(document(run, "list", "*")["adapters"]) == 3
    assert "poems" in run("list", "team/[p]*", "--tree").stdout


def test_versions_are_under_one_key_wherever_they_are_listed(run: Run, tmp_path: Path) -> None:
    """So that a pipeline reads a registry, a name and an address alike, and one adapter like several."""
    adapter(tmp_path / "sql", pairs(1))
    for place in ("team/sql", "layout://there:v1"):
        run("push", "sql", place)
    for words in ([], ["team/sql"], ["layout://there"]):
        [row] = json.loads(run("list", *words, "--json").stdout)["adapters"]
        assert {"ref", "tags", "digest", "size", "base"} <= row.keys()
    first, second = (json.loads(run("validate", *sources, "--json").stdout) for sources in (["sql"], ["sql", "team/sql"]))
    assert first.keys() == second.keys()
    assert first["reports"][0].keys() == second["reports"][0].keys()
