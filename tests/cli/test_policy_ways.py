"""The policy at every way out: what a command makes of a version, or answers with it, is refused as a pull of it is.

A command that takes a SRC, a REF or an ADDRESS and is in neither table fails here, so that none is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from adapterhub.cli.commands import policy
from adapterhub.cli.main import COMMANDS, app
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs

# What uses a version, as it is run here.
USES = (
    "run team/sql hello --base base",
    "eval team/sql --base base --data rows.jsonl",
    "merge team/sql team/other -o merged",
    "merge team/sql team/other -o team/both:latest",
    "merge team/sql --into base -o model",
    "merge team/sql --into base --recipe-only -o recipe.json",
    "convert team/sql sql.gguf --to gguf --base base",
    "convert layout://layout:team/sql:v1 sql.gguf --to gguf --base base",
    "fix team/sql -o fixed",
    "rebuild team/made -o again",
    "pull team/sql -o pulled",
    "pull team/sql -o sql.gguf --to gguf",
    "pull layout://layout:team/sql:v1 -o pulled",
    "bundle team/sql -o bundle.tar",
    "lock team/sql",
)
# What reports on a version, records something about it, or sends it to a name that the policy is asked about; and chat, serve
# and resolve, which ask for each version they prepare (tests/serve).
OTHERS = {
    "approve", "attach", "attest", "base", "bom", "chat", "copy", "deprecate", "describe", "diff", "du", "keep",
    "lineage", "list", "log", "login", "logout", "mv", "pack", "policy", "promote", "push", "resolve", "restore", "rm",
    "rollback", "rollout", "scan", "serve", "show", "sign", "tag", "validate", "verify", "verify-merge", "withdraw",
}  # fmt: skip


def _commands_with_sources() -> Iterator[str]:
    context = click.Context(app)
    for name in COMMANDS:
        command = app.get_command(context, name)
        assert command is not None
        metavars = [str(parameter.metavar) for parameter in command.params if isinstance(parameter, click.Argument)]
        if any(word in metavar for metavar in metavars for word in ("SRC", "REF", "NAME", "ADDRESS")):
            yield name


def test_each_command_that_takes_a_version_is_in_a_table() -> None:
    names = {words.partition(" ")[0] for words in USES}
    assert not names & OTHERS
    assert {*_commands_with_sources()} <= names | OTHERS


def test_a_check_of_a_policy_names_each_of_these_ways() -> None:
    assert {words.partition(" ")[0] for words in USES} <= {*policy.USES}


@pytest.fixture
def refused(tmp_path: Path, run: Run) -> Path:
    """A folder with versions, and a policy by which none of them may be used."""
    base(tmp_path / "base")
    for seed, name in enumerate(("sql", "other")):
        adapter(tmp_path / name, pairs(2), lambda _, array, seed=seed: array * (seed + 1), base_model_name_or_path="base")
        run("push", name, f"team/{name}")
    run("merge", "team/sql", "team/other", "--method", "linear", "-o", "team/made:latest")
    run("copy", "team/sql", "layout://layout:team/sql:v1")
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "adapterhub.toml").write_text('[policy]\nallow = ["nobody/*"]\n')
    return tmp_path


@pytest.mark.parametrize("words", USES)
def test_what_uses_a_version_asks_the_policy_and_writes_nothing(refused: Path, run: Run, words: str) -> None:
    before = {*refused.iterdir()}
    assert "[against-policy]" in run(*words.split(), code=6).stderr
    assert {*refused.iterdir()} == before


@pytest.mark.parametrize("words", ["validate team/sql", "show team/sql", "scan team/sql", "diff team/sql team/other"])
def test_a_report_on_a_version_is_not_a_use_of_it(refused: Path, run: Run, words: str) -> None:
    run(*words.split())
