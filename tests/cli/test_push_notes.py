"""What a push says about a version: a reason, more tags, results of other programs, and who pushed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.folders import adapter, base, pairs

ADA = {"ADAPTERHUB_AUTHOR": "Ada"}


@pytest.fixture(autouse=True)
def sql(tmp_path: Path) -> Path:
    return adapter(tmp_path / "sql", pairs(2))


def log(run: Run, ref: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(run("log", ref, "--json").stdout)["entries"]
    return entries


def test_the_log_shows_the_message_and_the_author_of_a_push(run: Run) -> None:
    run("push", "sql", "team/sql", "-m", "twice the data", env=ADA)
    (entry,) = log(run, "team/sql")
    assert (entry["op"], entry["message"], entry["author"]) == ("push", "twice the data", "Ada")
    shown = run("log", "team/sql").stdout
    assert "Ada" in shown
    assert "twice the data" in shown


def test_a_user_may_be_named_by_git_or_not_at_all(run: Run) -> None:
    run("push", "sql", "team/sql", env={"GIT_AUTHOR_NAME": "Grace"})
    run("tag", "team/sql", "prod", env={"GIT_AUTHOR_NAME": "Grace", "ADAPTERHUB_AUTHOR": ""})
    assert [entry["author"] for entry in log(run, "team/sql")] == [None, "Grace"]


def test_one_push_moves_several_tags(run: Run) -> None:
    made = json.loads(run("push", "sql", "team/sql", "--tag", "prod", "--tag", "1.0.0", "--json").stdout)
    assert (made["ref"], made["tags"]) == ("team/sql:v1", ["1.0.0", "latest", "prod"])
    assert "tagged stage (its bytes were there)" in run("push", "sql", "team/sql", "--tag", "stage", "-m", "try it").stdout
    assert [(entry["op"], entry["tags"], entry["message"]) for entry in log(run, "team/sql")] == [
        ("tag", ["stage"], "try it"),
        ("push", ["latest", "prod", "1.0.0"], None),
    ]
    assert "a push assigns" in run("push", "sql", "team/sql", "--tag", "v3", code=2).stderr
    assert "nothing has changed, so the message is not recorded" in run("push", "sql", "team/sql", "-m", "again").stderr


def test_results_of_other_programs_are_logged_shown_and_searched(run: Run) -> None:
    run("push", "sql", "team/sql", "--metric", "exact_match=0.71", "--metric", "bleu=31")
    assert "reported: bleu 31, exact_match 0.71" in run("log", "team/sql").stdout
    assert "reported: bleu 31" in run("show", "team/sql").stdout
    assert "team/sql:v1" in run("search", "--metric", "reported_exact_match>0.7").stdout
    run("push", "sql", "team/sql", "--metric", "exact_match=0.5")
    assert "no matches" in run("search", "--metric", "reported_exact_match>0.7").stderr


@pytest.mark.parametrize("text", ["exact_match", "exact_match=high", "exact_match=nan", "=1", "a:b=1"])
def test_what_is_not_a_metric_is_refused_before_anything_is_stored(run: Run, tmp_path: Path, text: str) -> None:
    assert run("push", "sql", "team/sql", "--metric", text, code=2).stderr.count("\n") == 1
    assert "no registry there" in run("list", "--registry", str(tmp_path / "xdg/adapterhub"), code=3).stderr


def test_a_log_elsewhere_has_messages_and_authors_and_what_has_no_log_refuses_them(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    address = f"file://{tmp_path}/bucket/team/sql"
    run("push", "sql", address, "-m", "twice the data", "--tag", "prod", env=ADA)
    assert [(entry["op"], entry["message"], entry["author"]) for entry in log(run, address)] == [
        ("tag", None, "Ada"),
        ("push", "twice the data", "Ada"),
    ]
    layout = f"layout://{tmp_path}/x.tar:v1"
    unkept = "error: --message: an image layout keeps no messages. Leave it out  [invalid-parameter]\n"
    assert run("push", "sql", layout, "-m", "why", code=2).stderr == unkept
    what = "--expect: an image layout cannot compare and move a tag in one step. Leave out --expect  [expect-unsupported]"
    assert run("push", "sql", layout, "--expect", "absent", code=2).stderr == f"error: {what}\n"
    assert "--metric: is recorded by the local registry" in run("push", "sql", address, "--metric", "a=1", code=2).stderr


def test_the_registry_that_a_push_creates_is_named(run: Run, tmp_path: Path) -> None:
    created = run("push", "sql", "team/sql").stderr
    assert "created the registry " in created
    folder = created.partition("created the registry ")[2].splitlines()[0]
    assert (Path(folder) / "registry.db").is_file()
    assert "created" not in run("push", "sql", "team/sql").stderr
    run("init", "other")
    assert f"no adapters yet in {tmp_path / 'other'}" in run("list", "--registry", str(tmp_path / "other")).stderr


def test_latest_stays_at_the_newest_version_and_a_push_of_older_bytes_says_so(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "newer", pairs(3))
    run("push", "sql", "team/sql")
    run("push", "newer", "team/sql")
    done = run("push", "sql", "team/sql")
    assert done.stdout.startswith("already there: team/sql:v1 ")
    assert "team/sql:latest stays at the newer version" in done.stderr


def test_disk_usage_tells_a_base_that_is_pinned_from_one_that_is_only_named(run: Run, sql: Path, tmp_path: Path) -> None:
    base(tmp_path / "base", 2)
    adapter(tmp_path / "other", pairs(2), base_model_name_or_path="org/base")
    adapter(tmp_path / "pinned", pairs(2), base_model_name_or_path="org/base")
    run("describe", "pinned", "--base", "base", "--set", "base.repo=org/base")
    run("push", "pinned", "team/pinned")
    run("push", "other", "team/other")
    assert {"org/base (not pinned)", "org/base (sha256"} <= {line.partition(":")[0] for line in run("du").stdout.splitlines()}


def test_an_author_of_any_length_in_a_log_of_others_is_shown_as_a_harmless_line(run: Run, tmp_path: Path) -> None:
    run("init", "r")
    run("push", "sql", "team/sql", "--registry", "r", env=ADA)
    (entry,) = (tmp_path / "r/.adapterhub/refs/team/sql").iterdir()
    written = json.loads(entry.read_bytes()) | {"author": "\x1b[31m" + "a" * 100_000}
    entry.chmod(0o644)
    entry.write_text(json.dumps(written))
    (tmp_path / "r/registry.db").unlink()
    shown = run("log", "team/sql", "--registry", "r").stdout
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 400
