"""What `push --dry-run` and `pull --dry-run` show is what the real ones do, and they change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.folders import adapter, base, pairs


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def document(run: Run, *words: object) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(*words, "--json").stdout)
    return result


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    folder = adapter(tmp_path / "sql", pairs(2))
    (folder / "notes.bin").write_text("left out")
    return folder


@pytest.mark.parametrize("target", ["team/sql", "team/sql:prod", "layout://there:v1", "FILE/bucket/team/sql"])
def test_a_push_does_what_its_dry_run_shows(run: Run, sql: Path, tmp_path: Path, target: str) -> None:
    target = target.replace("FILE", f"file://{tmp_path}")
    before = state(tmp_path)
    plan = document(run, "push", "sql", target, "--dry-run")
    assert state(tmp_path) == before
    assert plan["dry_run"] is True
    pushed = document(run, "push", "sql", target)
    assert (plan["digest"], plan["size"], plan["skipped"], plan["new"]) == (
        *(pushed["digest"], pushed["size"], pushed["skipped"]),
        True,
    )
    assert plan["size"] == sum(file["size"] for file in plan["files"])
    if "://" in target:
        assert plan["missing"] == pushed["sent"]
    again = document(run, "push", "sql", target, "--dry-run")
    assert (again["new"], again["missing"]) == (False, 0)
    assert "already there, nothing would be pushed" in run("push", "sql", target, "--dry-run").stdout


def test_a_dry_run_counts_only_what_the_target_lacks(run: Run, sql: Path) -> None:
    run("push", "sql", "team/sql")
    (sql / "README.md").write_text("# changed\n")
    plan = document(run, "push", "sql", "team/sql", "--dry-run")
    weights = next(file["size"] for file in plan["files"] if file["path"].endswith(".safetensors"))
    assert 0 < plan["missing"] < plan["size"] - weights + 2000
    assert len(document(run, "list")["adapters"]) == 1


def test_a_dry_run_fails_as_the_push_would(run: Run, sql: Path, tmp_path: Path) -> None:
    run("push", "sql", "team/sql")
    config = json.loads((sql / "adapter_config.json").read_text())
    (sql / "adapter_config.json").write_text(json.dumps({**config, "r": config["r"] + 1}))
    assert run("push", "sql", "team/sql", "--dry-run", code=6).stderr == run("push", "sql", "team/sql", code=6).stderr
    (sql / "adapter_config.json").write_text(json.dumps(config))
    words = ("push", "sql", "team/sql", "--expect", "absent")
    assert run(*words, "--dry-run", code=7).stderr == run(*words, code=7).stderr
    base(tmp_path / "base", 2)
    assert document(run, "push", "sql", "team/gguf", "--to", "gguf", "--base", "base", "--dry-run")["new"] is True


@pytest.mark.parametrize("source", ["team/sql", "layout://there:v1"])
def test_a_pull_does_what_its_dry_run_shows(run: Run, sql: Path, tmp_path: Path, source: str) -> None:
    run("push", "sql", source)
    before = state(tmp_path)
    plan = document(run, "pull", source, "-o", "out", "--dry-run")
    assert state(tmp_path) == before
    pulled = document(run, "pull", source, "-o", "out")
    assert [file["path"] for file in plan["files"]] == pulled["files"]
    assert (plan["digest"], plan["size"], plan["missing"]) == (pulled["digest"], pulled["size"], pulled["size"])
    assert document(run, "pull", source, "-o", "out", "--dry-run")["missing"] == 0
    (tmp_path / "out/README.md").write_text("mine")
    assert run("pull", source, "-o", "out", "--dry-run", code=2).stderr == run("pull", source, "-o", "out", code=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pull team/sql --dry-run --to mlx", "--dry-run: shows the files of a version. Leave out --to"),
        ("pull --locked --dry-run", "--locked: takes refs and addresses from the lock file"),
    ],
)
def test_what_has_no_dry_run_is_refused(run: Run, words: str, message: str) -> None:
    assert message in run(*words.split(), code=2).stderr
