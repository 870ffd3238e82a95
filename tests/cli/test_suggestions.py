"""Words that are no command or option of ours lead to the one that was meant."""

from __future__ import annotations

import pytest

from adapterhub.cli.main import app
from adapterhub.cli.suggestions import GROUP_SYNONYMS, SYNONYMS
from tests.cli.test_options import commands
from tests.conftest import Run


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["pul"], "pull"),
        (["delete", "team/sql"], "rm"),
        (["remove"], "rm"),
        (["ls"], "list"),
        (["inspect"], "show"),
        (["download"], "pull"),
        (["upload"], "push"),
        (["history"], "log"),
        (["version"], "--version"),
        (["clone"], "pull"),
        (["rename"], "mv"),
        (["remote", "remove", "team"], "remote rm"),
        (["base", "ls"], "base list"),
        (["attached"], "attach --list"),
        (["unpack"], "pack --undo"),
        (["materialize"], "rebuild"),
        (["find"], "search --file"),
        (["formats"], "convert --list"),
        (["hub", "restore"], "hub load-backup"),
        (["hub", "audit"], "hub log"),
        (["hub", "serve"], "hub start"),
        (["checkout"], "pull"),
        (["revert"], "rollback"),
        (["images"], "list"),
        (["start"], "serve"),
        (["dist-tag"], "tag"),
    ],
)
def test_a_word_that_people_try_names_the_command(run: Run, words: list[str], suggestion: str) -> None:
    error = run(*words, code=2).stderr
    assert f"no such command. Did you mean `adapterhub {suggestion}`?" in error
    assert error.count("\n") == 1


def test_synonyms_lead_to_commands_and_options_that_exist_and_are_not_commands_themselves() -> None:
    paths = dict(commands(app))
    groups = {
        f"{group} {word}": f"{group} {suggestion}"
        for group, words in GROUP_SYNONYMS.items()
        for word, suggestion in words.items()
    }
    for word, suggestion in (SYNONYMS | groups).items():
        assert word not in paths
        name, _, option = suggestion.partition(" --")
        assert name in paths or suggestion == "--version"
        assert not option or f"--{option}" in {spelled for parameter in paths[name].params for spelled in parameter.opts}


@pytest.mark.parametrize("words", [["frobnicate"], ["hub", "version"], ["rot13", "team/sql"]])
def test_a_word_near_no_command_leads_to_the_list_of_commands(run: Run, words: list[str]) -> None:
    assert "no such command. See `adapterhub" in run(*words, code=2).stderr


def test_an_option_with_a_typo_names_the_right_one(run: Run, started: Run) -> None:
    assert run("list", "--jsn", code=2).stderr == "error: No such option '--jsn'. Did you mean '--json'?  [invalid-usage]\n"
    foreign = started("train", "x.toml", "--plan", code=2).stderr  # which fails before it imports torch
    assert foreign == "error: No such option '--plan'. Did you mean '--dry-run'?  [invalid-usage]\n"
    assert "Did you mean '--to'?" in run("convert", "a", "b", "--fromat", "gguf", code=2).stderr
    assert "No such option '--xyzzy'. See `adapterhub convert --help`" in run("convert", "a", "b", "--xyzzy", code=2).stderr
