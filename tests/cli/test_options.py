"""One name and one meaning for an option in all commands; commands in groups; the command that a word probably meant."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Iterator

import click
import pytest

from adapterhub.cli.main import COMMANDS, GROUPS, app
from adapterhub.cli.options import SYNONYMS, SwappedOption
from tests.conftest import Run

FILTERS = "search"  # its options are filters, each named for the field it compares


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")


def options() -> dict[str, dict[str, click.Option]]:
    """Options by name, and by the command that has them."""
    found: dict[str, dict[str, click.Option]] = defaultdict(dict)
    for name, command in commands(app):
        for option in command.params:
            if isinstance(option, click.Option) and not isinstance(option, SwappedOption) and name != FILTERS:
                for spelled in (*option.opts, *option.secondary_opts):
                    found[spelled][name] = option
    return found


@pytest.mark.parametrize("name", sorted(name for name, where in options().items() if len(where) > 1))
def test_an_option_has_one_meaning_in_all_commands(name: str) -> None:
    found = options()[name].values()
    assert len({option.metavar for option in found}) == 1
    assert len({tuple(option.opts) for option in found}) == 1
    assert len({option.is_flag for option in found}) == 1
    helps = {option.help or "" for option in found}
    before_colon, two_words = {text.partition(":")[0] for text in helps}, {tuple(text.split()[:2]) for text in helps}
    assert 1 in (len(before_colon), len(two_words)), helps


def test_every_option_has_a_help_that_is_a_sentence() -> None:
    for name, where in options().items():
        for command, option in where.items():
            if not option.hidden:
                assert option.help, (command, name)
                assert option.help[0].isupper() or option.help.startswith("--"), option.help
                assert option.help.endswith((".", "]")), option.help


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("run base --adapter ./sql", "run ./sql --base base"),
        ("run base 'a b' --adapter=team/sql --seed 1", "run team/sql --base base 'a b' --seed 1"),
        ("chat --compare team/b base.gguf --adapter team/sql:v2", "chat --compare team/b team/sql:v2 --base base.gguf"),
        ("serve team/sql:v2 --base base.gguf -- -ngl 9", "serve base.gguf --adapters team/sql -- -ngl 9"),
        ("serve team/sql --base=./base --port 0", "serve ./base --adapters team/sql --port 0"),
    ],
)
def test_a_source_and_its_base_in_the_wrong_order_are_put_in_the_right_one(run: Run, words: str, meant: str) -> None:
    assert f"Did you mean `adapterhub {meant}`?" in run(*shlex.split(words), code=2).stderr


def test_the_help_of_the_program_fits_80_columns_and_has_every_command_in_a_group(run: Run) -> None:
    lines = run("--help").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:-1] for line in lines if line[:-1] in GROUPS] == list(GROUPS)
    assert {name for group in GROUPS.values() for name in group} == set(COMMANDS)
    for group in GROUPS.values():
        for name, text in group.items():
            assert f"  {name:<12}  {text}" in lines


def test_the_options_of_all_commands_may_come_first(run: Run) -> None:
    run("init", "adapters")
    assert run("--json", "--registry", "adapters", "list").stdout == run("list", "--registry", "adapters", "--json").stdout


@pytest.mark.parametrize(
    ("words", "meant"),
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
        (["rename"], "copy"),
        (["remote", "remove", "team"], "remote rm"),
        (["base", "ls"], "base list"),
    ],
)
def test_a_word_that_people_try_names_the_command(run: Run, words: list[str], meant: str) -> None:
    error = run(*words, code=2).stderr
    assert f"no such command. Did you mean `adapterhub {meant}`?" in error
    assert error.count("\n") == 1


def test_synonyms_are_of_commands_and_not_commands_themselves() -> None:
    assert set(SYNONYMS.values()) <= {*COMMANDS, "--version"}
    assert not set(SYNONYMS) & set(COMMANDS)


def test_an_option_with_a_typo_names_the_right_one(run: Run, started: Run) -> None:
    assert run("list", "--jsn", code=2).stderr == "error: No such option '--jsn'. Did you mean '--json'?  [invalid-usage]\n"
    several = started("train", "x.toml", "--plan", code=2).stderr  # which fails before it imports torch
    assert several == "error: No such option '--plan'. Did you mean '--explain' or '--replace'?  [invalid-usage]\n"


def test_help_and_json_may_come_before_the_command(run: Run) -> None:
    assert run("help", "push").stdout == run("push", "--help").stdout
    assert run("help", "base", "add").stdout == run("base", "add", "--help").stdout
    assert run("help").stdout == run("--help").stdout
    assert "frobnicate: no such command" in run("help", "frobnicate", code=2).stderr
    assert json.loads(run("--json", "formats").stdout) == json.loads(run("formats", "--json").stdout)


@pytest.mark.parametrize("group", [name for name, command in commands(app) if isinstance(command, click.Group)])
def test_a_group_alone_shows_its_help(run: Run, group: str) -> None:
    result = run(*group.split())
    assert result.stdout == run(*group.split(), "--help").stdout
    assert result.stderr == ""


def test_a_mistyped_choice_names_the_one_that_was_meant(run: Run) -> None:
    error = run("convert", "sql", "x", "--to", "guff", code=2).stderr
    assert error.endswith("Did you mean gguf?  [invalid-usage]\n")
    assert error.count("\n") == 1
