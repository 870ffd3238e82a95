"""Versions are found by the bytes of a file, or by the tensors in it where no version has the whole file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub_converters.formats import peft
from tests.conftest import Run
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


def test_find_by_bytes(run: Run, registry: Path) -> None:
    weights = registry / "sql" / peft.WEIGHTS
    [matched_file] = document(run, "search", "--file", weights)["found"]
    assert [(holder["ref"], holder["path"]) for holder in matched_file["holders"]] == [
        ("team/sql:v2", peft.WEIGHTS),
        ("team/sql:v1", peft.WEIGHTS),
    ]
    pushed = document(run, "show", "team/sql:v2")["digest"]
    [whole] = document(run, "search", "--file", "sql")["found"]
    assert [(holder["ref"], holder["path"], holder["digest"]) for holder in whole["holders"]] == [("team/sql:v2", None, pushed)]
    assert "team/sql:v2" in run("search", "--sha256", pushed).stdout
    assert "team/sql:v2" in run("search", "--sha256", pushed[7:20].upper()).stdout


def test_a_folder_that_has_changed_is_found_by_its_weights(run: Run, registry: Path) -> None:
    (registry / "poems" / "README.md").write_text("new")
    [matched_file] = document(run, "search", "--file", "poems")["found"]
    assert [(holder["ref"], holder["path"]) for holder in matched_file["holders"]] == [("team/poems:v1", peft.WEIGHTS)]


def test_what_no_version_holds_is_exit_3(run: Run, registry: Path) -> None:
    (registry / "other.txt").write_text("other")
    assert "other.txt: no version contains it" in run("search", "--file", "other.txt", code=3).stderr
    result = run("search", "--file", "other.txt", "--file", "sql", code=3)
    assert "team/sql:v2" in result.stdout
    assert result.stderr == "other.txt: no version contains it\n"
    run("search", "--sha256", "0" * 64, code=3)
    run("search", "--sha256", "xyz", code=2)
    run("search", "--file", "nowhere", code=3)
