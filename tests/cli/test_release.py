"""`promote`, `approve`, `rollback` and `withdraw`: what they print, their documents, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.conftest import Run, Terminal
from tests.support.adapters import Make

RULES = '[promote.prod]\nfrom = "staging"\n[promote.prod.require]\nscan = "clean"\napprovals = 1\napprovers = ["ana.pub"]\n'


@pytest.fixture
def place(tmp_path: Path, make: Make) -> Path:
    """A project with requirements on prod, and a registry with two versions, the first of which is prod."""
    with Registry.init(tmp_path) as registry:
        for seed in (1, 2):
            registry.push(make(f"a{seed}", seed), Ref.parse("team/sql:prod" if seed == 1 else "team/sql"))
    (tmp_path / "adapterhub.toml").write_text(RULES)
    return tmp_path


def test_what_is_missing_is_a_document_with_exit_6_and_moves_nothing(place: Path, run: Run) -> None:
    for option in ([], ["--dry-run"]):
        document = json.loads(run("promote", "team/sql:v2", "prod", *option, "--json", code=6).stdout)
        assert (document["ok"], document["moved"], document["current"]) == (False, False, 1)
        scan = next(item for item in document["requirements"] if item["rule"] == "scan")
        assert scan == {
            "rule": "scan", "needed": "clean", "value": "clean", "ok": True, "evidence": "scanned now",
            "file": str(place / "adapterhub.toml"),
        }  # fmt: skip
    error = run("tag", "team/sql:v2", "prod", code=6).stderr
    assert "from: was never staging (needed: staging); approvals: 0 of 1 (needed: 1)" in error
    assert "`adapterhub promote team/sql:v2 prod --dry-run` shows each" in error


def test_a_push_that_would_move_the_tag_is_refused_as_a_dry_run_too(place: Path, run: Run) -> None:
    run("pull", "team/sql:v2", "-o", "second")
    for option in ([], ["--dry-run"]):
        assert "[requirements-unmet]" in run("push", "second", "team/sql:prod", *option, code=6).stderr
    assert "already there, nothing would be pushed" in run("push", "second", "team/sql:other", "--dry-run").stdout
    assert "other" not in run("list", "team/sql").stdout


def test_the_table_fits_a_terminal_of_80_columns(place: Path, terminal: Terminal) -> None:
    lines = terminal("promote", "team/sql:v2", "prod").splitlines()
    assert any("MISSING" in line for line in lines)
    assert all(len(line) <= 80 for line in lines), lines


def test_an_approval_is_signed_and_a_dry_run_then_moves_nothing(place: Path, run: Run) -> None:
    run("key", "generate", "ana")
    run("tag", "team/sql:v2", "staging")
    assert "[keys-to-approve]" in run("approve", "team/sql:v2", "--for", "prod", "-m", "fine", code=2).stderr
    document = json.loads(run("approve", "team/sql:v2", "--for", "prod", "-m", "ok", "--key", "ana.key", "--json").stdout)
    assert (document["ref"], document["tag"], document["signed"]) == ("team/sql:v2", "prod", True)
    output = run("promote", "team/sql:staging", "prod", "--dry-run").stdout
    assert output.endswith("team/sql:v2 meets 3 requirements: `adapterhub promote team/sql:v2 prod` moves team/sql:prod\n")
    assert json.loads(run("show", "team/sql:prod", "--json").stdout)["number"] == 1
    assert run("promote", "team/sql:staging", "prod").stdout.endswith("team/sql:prod is team/sql:v2\n")
    assert run("promote", "team/sql:v2", "prod").stdout.endswith("team/sql:prod is team/sql:v2 already\n")
    printed = run("promote", "team/sql:v2", "prd").stdout  # a misspelled tag, or a folder outside the project
    assert printed == "team/sql:prd is team/sql:v2; no requirements of this tag are in force here\n"
    document = json.loads(run("rollback", "team/sql:prod", "-m", "no", "--json").stdout)
    assert (document["number"], document["left"]["number"], document["message"]) == (1, 2, "no")


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["withdraw", "team/sql:v2"], 2, "[reason-required]"),
        (["withdraw", "team/sql:v2", "-m", " "], 2, "[reason-required]"),
        (["withdraw", "team/sql:v2", "-m", "x", "--undo"], 2, "[conflicting-options]"),
        (["withdraw", "team/sql:v9", "-m", "x"], 3, "[no-such-version]"),
        (["rollback", "team/sql"], 2, "has no tag"),
        (["rollback", "team/sql:latest"], 6, "[latest-tag]"),
        (["rollback", "team/sql:prod"], 3, "[look-at-log]"),
        (["promote", "team/sql:v2", "latest"], 6, "[latest-tag]"),
        (["promote", "team/sql:v9", "prod"], 3, "[no-such-version]"),
        (["approve", "team/sql:v2", "-m", "x"], 2, "Missing option '--for'"),
    ],
)
def test_errors_are_one_line_with_a_code(words: list[str], code: int, error: str, place: Path, run: Run) -> None:
    result = run(*words, code=code)
    assert error in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_hint_of_a_refused_push_is_about_a_version_that_exists(place: Path, run: Run, make: Make) -> None:
    (place / "adapterhub.toml").write_text("[promote.prod.require]\napprovals = 1\n")
    error = run("push", make("new", 9), "team/sql:prod", code=6).stderr
    assert "`adapterhub promote team/sql prod --dry-run` shows each" in error
    assert "approvals" in run("promote", "team/sql", "prod", "--dry-run", code=None).stdout


def test_a_withdrawal_says_what_happens_to_tags(place: Path, run: Run, tmp_path: Path) -> None:
    printed = run("withdraw", "team/sql:v1", "-m", "leaked").stdout
    assert printed == (
        "team/sql:v1 is withdrawn: leaked\n"
        "team/sql:prod cannot be used until it moves: `adapterhub rollback team/sql:prod`,"
        " or `adapterhub promote team/sql:v2 prod` if it meant no other version before\n"
    )  # fmt: skip
    (withdrawn,) = json.loads(run("withdraw", "team/sql:v2", "-m", "too", "--json").stdout)["withdrawn"]
    assert (withdrawn["reason"], withdrawn["latest"], withdrawn["tags"]) == ("too", None, [])
    result = run("show", "team/sql:v1")
    assert "warning: team/sql:v1 was withdrawn: leaked" in result.stderr
    assert "[withdrawn]" in run("push", "./a1", "team/sql", code=6).stderr
    assert "prod, (withdrawn)" in run("list").stdout
    assert [row["withdrawn"] for row in json.loads(run("list", "--json").stdout)["adapters"]] == ["too", "leaked"]
    assert "withdraw" in run("log", "team/sql").stdout


def test_everywhere_is_every_name_of_the_registry(place: Path, run: Run) -> None:
    run("copy", "team/sql:v2", "other/copy")
    printed = run("withdraw", "team/sql:v2", "-m", "leaked", "--everywhere").stdout
    assert "other/copy:v1 is withdrawn: leaked\n" in printed
    run("pull", "other/copy:v1", "-o", "out", code=6)


def test_locks_learn_it_when_they_are_checked_updated_or_pulled(place: Path, run: Run) -> None:
    run("lock", "team/sql:v2")
    run("pull", "--locked")
    run("withdraw", "team/sql:v2", "-m", "leaked")
    for words in (["lock", "--check"], ["lock", "--update"], ["pull", "--locked"]):
        assert "v2 was withdrawn: leaked" in run(*words, code=6).stderr


def test_a_misspelled_requirement_is_an_error_of_every_move(place: Path, run: Run) -> None:
    (place / "adapterhub.toml").write_text("[promote.prod.require]\napprovls = 2\n")
    error = run("tag", "team/sql:v2", "prod", code=2).stderr
    assert "'promote.prod.require.approvls' is unknown" in error


ADDRESSES: dict[str, Callable[[str], list[str]]] = {
    "push": lambda at: ["push", "team/sql:v2", f"{at}:prod"],
    "push of a folder": lambda at: ["push", "./a2", f"{at}:prod"],
    "copy": lambda at: ["copy", "team/sql:v2", f"{at}:prod"],
    "tag": lambda at: ["tag", f"{at}:v2", "prod"],
}


@pytest.mark.parametrize("way", ADDRESSES)
def test_a_tag_at_an_address_is_set_only_to_what_has_it_here(way: str, place: Path, run: Run) -> None:
    run("push", "team/sql:v2", "layout://out:v2")
    result: Any = run(*ADDRESSES[way]("layout://out"), code=6)
    assert "[requirements-unmet]" in result.stderr
    run("tag", "layout://out:v2", "other")
    (place / "adapterhub.toml").unlink()
    run("tag", "team/sql:v2", "prod")
    (place / "adapterhub.toml").write_text(RULES)
    run(*ADDRESSES[way]("layout://out"))
    assert "team/sql:prod cannot be used until it moves" in run("withdraw", "team/sql:v2", "-m", "leaked").stdout
    assert run(*ADDRESSES[way]("layout://out"), code=6).stderr
