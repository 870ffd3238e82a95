"""`--dry-run`: what changes names, or much, can be tried first, with the answer and the exit code of the real thing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.trust import keys
from tests.cli.test_options import flags, leaves
from tests.conftest import Run
from tests.support.adapters import write_adapter

READS = {
    "audit verify", "base list", "base show", "completion", "diff", "du", "explain", "hub admission list", "hub doctor",
    "hub log", "hub member list", "hub namespace list", "hub publisher list", "hub token list", "hub user list",
    "hub webhook list", "info", "lineage", "list", "log", "policy check", "remote list", "remote test", "rollout show", "scan",
    "search", "served", "show", "usage", "validate", "verify", "verify-merge",
}  # fmt: skip
# Write one new file or folder that the command line names, and refuse what is there; or record what they answer.
WRITES_WHAT_IT_IS_TOLD = {
    "attest", "audit checkpoint", "bom", "bundle", "convert", "eval", "extract", "hub backup", "init", "key generate", "lock",
    "rebuild", "resolve", "sign",
}  # fmt: skip
RUNS = {"chat", "hub start", "run", "serve"}
# One setting or row each, which its opposite undoes, or a login.
ONE_SETTING = {
    "attach", "base add", "base rm", "hub admission add", "hub admission rm", "hub approve", "hub member rm", "hub member set",
    "hub namespace set", "hub publisher add", "hub publisher rm", "hub token create", "hub token revoke", "hub user add",
    "hub user link", "hub user rm", "hub webhook add", "hub webhook rm", "login", "logout", "remote add", "remote default",
    "remote rm", "rollout abort", "rollout resume",
}  # fmt: skip
# Repair what is broken and report it first without an option, or fill an empty hub.
REPAIRS = {"fsck", "hub load-backup", "hub migrate", "hub recover"}


def test_every_command_can_be_tried_or_says_here_why_not() -> None:
    without = {name for name, command in leaves().items() if "--dry-run" not in flags(command)}
    assert without == READS | WRITES_WHAT_IT_IS_TOLD | RUNS | ONE_SETTING | REPAIRS


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a name of two versions, a tag that moved, another name, a removed one, and a key."""
    folder = tmp_path_factory.mktemp("template")
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(folder / name, seed)
    with Registry.init(folder) as registry:
        for name in ("one", "two"):
            registry.push(folder / name, Ref("team/sql", tag="prod"))
        for name in ("team/other", "team/gone"):
            registry.push(folder / "three", Ref(name))
        registry.rm(Ref("team/gone"))
    keys.generate(folder / "ana")
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    """All files, except what SQLite keeps beside a database and the locks of processes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "registry.db" not in path.name and "leases" not in path.parts
    }


def timeless(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: timeless(value) for key, value in document.items() if key not in ("time", "dry_run")}
    return document


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("rm team/sql:prod", 0),
        ("rm team/sql", 0),
        ("rm team/sql:v1", 6),
        ("rm team/none", 3),
        ("restore team/gone", 0),
        ("restore team/sql", 6),
        ("keep team/sql --last 1", 0),
        ("keep team/none --last 1", 3),
        ("mv team/sql team/new", 0),
        ("mv team/sql team/other", 7),
        ("tag team/sql:v1 stable", 0),
        ("tag team/sql:prod --restore", 0),
        ("tag team/sql:prod --protect", 0),
        ("tag team/sql:v1 latest", 6),
        ("deprecate team/sql:v1 old", 0),
        ("rollback team/sql:prod", 0),
        ("rollback team/other:prod", 3),
        ("withdraw team/sql:v2 -m leaked", 0),
        ("withdraw team/sql:v2", 2),
        ("approve team/sql:v1 --for prod -m read --key ana.key", 0),
    ],
)
def test_a_dry_run_answers_as_the_real_one_and_changes_nothing(place: Path, run: Run, words: str, code: int) -> None:
    before = files(place)
    rehearsed = run(*words.split(), "--dry-run", "--json", code=code)
    assert files(place) == before
    answer = json.loads(rehearsed.stdout)
    assert answer.get("dry_run", False) == (code == 0)
    assert timeless(answer) == timeless(json.loads(run(*words.split(), "--json", code=code).stdout))
    assert (files(place) == before) == (code != 0)


def test_a_rename_names_the_command_that_undoes_it(place: Path, run: Run) -> None:
    before = run("list").stdout
    assert "team/sql is now team/new, with" in (text := run("mv", "team/sql", "team/new").stdout)
    assert text.endswith("; `adapterhub mv team/new team/sql` undoes it\n")
    run("mv", "team/new", "team/sql")
    assert run("list").stdout == before


def test_a_dry_run_says_that_it_is_one_and_asks_nothing(place: Path, run: Run) -> None:
    first, second = run("rm", "team/sql", "--dry-run").stdout.splitlines()
    assert first == "dry run, nothing was changed; without --dry-run:"
    assert second == "removed name team/sql; `adapterhub restore team/sql` undoes it"
    assert (
        "--dry-run: is for the local registry and hubs of adapterhub, and not for oci://h.example/a/b:c. Leave it out to make"
        in run("rm", "oci://h.example/a/b:c", "--dry-run", code=2).stderr
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("copy team/sql:v1 team/copied", 0),
        ("copy team/sql:v1 team/other:stable", 0),
        ("copy team/sql:v1 layout://out:v1", 0),
        ("copy team/sql:v1 ./pulled", 0),
        ("copy ./one team/packed", 0),
        ("copy team/sql:v1 team/gone", 7),
        ("copy team/sql:v9 team/copied", 3),
        ("copy ./one ./two", 2),
    ],
)
def test_a_dry_run_of_a_copy_has_the_digest_of_the_copy_and_writes_nothing(
    place: Path, run: Run, words: str, code: int
) -> None:
    before = files(place)
    planned = json.loads(run(*words.split(), "--dry-run", "--json", code=code).stdout)
    assert files(place) == before
    copied = json.loads(run(*words.split(), "--json", code=code).stdout)
    assert planned == copied if code else planned["digest"] == copied["digest"]
