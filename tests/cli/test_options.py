"""One name and one meaning for an option in all commands; commands in groups; the command that a word probably meant."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator

import click
import pytest

from adapterhub.cli.main import COMMANDS, FIRST_SCREEN, GROUPS, app
from adapterhub.cli.suggestions import SwappedOption
from tests.conftest import Run

FILTERS = "search"  # its options are filters, each named for the field it compares
WITH_TWO_MEANINGS = {"--for"}  # the runtime of a check or a preparation, and the tag of an approval


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
    options_by_name: dict[str, dict[str, click.Option]] = defaultdict(dict)
    for name, command in commands(app):
        for option in command.params:
            if isinstance(option, click.Option) and not isinstance(option, SwappedOption) and name != FILTERS:
                for spelled in (*option.opts, *option.secondary_opts):
                    options_by_name[spelled][name] = option
    return options_by_name


@pytest.mark.parametrize(
    "name", sorted({name for name, by_command in options().items() if len(by_command) > 1} - WITH_TWO_MEANINGS)
)
def test_an_option_has_one_meaning_in_all_commands(name: str) -> None:
    same_options = options()[name].values()
    assert len({option.metavar for option in same_options}) == 1
    assert len({tuple(option.opts) for option in same_options}) == 1
    assert len({option.is_flag for option in same_options}) == 1
    helps = {option.help or "" for option in same_options}
    before_colon, two_words = {text.partition(":")[0] for text in helps}, {tuple(text.split()[:2]) for text in helps}
    assert 1 in (len(before_colon), len(two_words)), helps


def test_no_help_of_an_option_has_a_colon_before_a_preposition() -> None:
    helps = {option.help or "" for uses in options().values() for option in uses.values()}
    assert [text for text in helps if re.match(r"\w+: (at|for|from|in|of|on|where)\b", text)] == []


def leaves() -> dict[str, click.Command]:
    """Every command that does something itself."""
    return {name: command for name, command in commands(app) if not isinstance(command, click.Group)}


def flags(command: click.Command) -> set[str]:
    return {flag for parameter in command.params if isinstance(parameter, click.Option) for flag in parameter.opts}


@pytest.mark.parametrize("name", leaves())
def test_every_command_can_answer_in_json_and_without_progress(name: str) -> None:
    assert {"--json", "-q", "--quiet", "--registry"} <= flags(leaves()[name])


def test_a_base_is_an_option_wherever_a_source_meets_it() -> None:
    for name, command in leaves().items():
        words = {
            str(parameter.metavar or parameter.name) for parameter in command.params if isinstance(parameter, click.Argument)
        }
        assert name.startswith("base ") or "BASE" not in {word.upper() for word in words}, name
    with_base = {"chat", "convert", "eval", "extract", "merge", "run", "serve", "validate", "verify-merge"}
    assert {name for name, command in leaves().items() if flags(command) & {"--base", "--into"}} >= with_base


def test_what_asks_can_be_told_yes_and_what_writes_or_sends_much_can_be_tried_dry() -> None:
    for name, command in leaves().items():
        asks = "output.confirm(" in inspect.getsource(inspect.unwrap(command.callback or (lambda: None)))
        assert ("--yes" in flags(command)) == asks, name
    dry = {"describe", "fix", "gc", "hub gc", "merge", "pack", "pull", "push", "train"}
    assert {name for name, command in leaves().items() if "--dry-run" in flags(command)} >= dry


def test_p_is_the_prompt_and_no_short_option_means_two_things() -> None:
    meanings = defaultdict(set)
    for command in leaves().values():
        for parameter in command.params:
            for flag in parameter.opts:
                if len(flag) == 2 and flag[0] == "-":
                    meanings[flag].add(tuple(sorted(parameter.opts)))
    assert meanings["-p"] == {("--prompt", "-p")}
    assert {flag: names for flag, names in meanings.items() if len(names) > 1} == {}


def test_every_option_has_a_help_that_is_a_sentence() -> None:
    for name, by_command in options().items():
        for command, option in by_command.items():
            if not option.hidden:
                assert option.help, (command, name)
                assert option.help[0].isupper() or option.help.startswith("--"), option.help
                assert option.help.endswith((".", "]")), option.help


@pytest.mark.parametrize(
    ("words", "corrected"),
    [
        ("run base --adapter ./sql", "run ./sql --base base"),
        ("run base 'a b' --adapter=team/sql --seed 1", "run team/sql --base base 'a b' --seed 1"),
        ("chat --compare team/b base.gguf --adapter team/sql:v2", "chat --compare team/b team/sql:v2 --base base.gguf"),
        ("serve base.gguf --adapters team/sql --port 0", "serve team/sql --base base.gguf --port 0"),
        ("serve ./base --adapters='team/*'", "serve 'team/*' --base ./base"),
        ("serve base.gguf --adapter team/sql", "serve team/sql --base base.gguf"),
        ("serve --port 0 base.gguf --adapter team/a --adapter=team/b", "serve --port 0 team/a team/b --base base.gguf"),
        ("serve --base base.gguf --adapters team/sql", "serve --base base.gguf team/sql"),
        ("run base --adapters ./sql", "run ./sql --base base"),
        ("chat --adapters team/sql", "chat team/sql --base BASE"),
        ("run --base base --adapter ./sql -p hi", "run --base base -p hi ./sql"),
    ],
)
def test_a_source_and_its_base_in_the_wrong_order_are_put_in_the_right_one(run: Run, words: str, corrected: str) -> None:
    assert f"Did you mean `adapterhub {corrected}`?" in run(*shlex.split(words), code=2).stderr


def listed(help_text: str) -> list[tuple[str, str]]:
    """The commands that a help lists, each under the title of its group."""
    rows, title = [], ""
    for line in help_text.splitlines():
        if line[:-1] in GROUPS:
            title = line[:-1]
        elif title and line.startswith("  "):
            rows.append((title, line.split()[0]))
    return rows


def test_the_first_screen_has_at_most_28_commands_and_fits_80_columns_and_50_rows(run: Run) -> None:
    lines = run("--help").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 50 - 1  # the prompt has a row as well
    listed_commands = listed("\n".join(lines))
    assert {name for _, name in listed_commands} == FIRST_SCREEN
    assert len(FIRST_SCREEN) <= 28
    assert all(name in GROUPS[title] for title, name in listed_commands)
    assert run().stdout == run("--help").stdout == run("help").stdout


@pytest.mark.parametrize("words", ["help --all", "--help --all"])
def test_help_all_lists_every_command_in_its_group(run: Run, words: str) -> None:
    text = run(*words.split()).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert listed(text) == [(title, name) for title, group in GROUPS.items() for name in group]
    assert {name for group in GROUPS.values() for name in group} == set(COMMANDS)


def test_the_options_of_all_commands_may_come_first(run: Run) -> None:
    run("init", "adapters")
    assert run("--json", "--registry", "adapters", "list").stdout == run("list", "--registry", "adapters", "--json").stdout


def test_help_and_json_may_come_before_the_command(run: Run) -> None:
    assert run("help", "push").stdout == run("push", "--help").stdout
    assert run("help", "base", "add").stdout == run("base", "add", "--help").stdout
    assert run("help").stdout == run("--help").stdout
    assert "frobnicate: no such command" in run("help", "frobnicate", code=2).stderr
    assert json.loads(run("--json", "convert", "--list").stdout) == json.loads(run("convert", "--list", "--json").stdout)


@pytest.mark.parametrize("group", [name for name, command in commands(app) if isinstance(command, click.Group)])
def test_a_group_alone_shows_its_help(run: Run, group: str) -> None:
    result = run(*group.split())
    assert result.stdout == run(*group.split(), "--help").stdout
    assert result.stderr == ""


def test_no_line_about_a_command_is_cut_in_the_help_of_its_group() -> None:
    groups = [command for _, command in commands(app) if isinstance(command, click.Group)]
    helps = [group.get_help(click.Context(group, terminal_width=80)) for group in groups]
    assert [line for text in helps for line in text.partition("Commands:")[2].splitlines() if line.endswith("...")] == []
