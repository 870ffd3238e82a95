"""Every hint leads on: the commands that texts of the program name are accepted, and do not end with the same error."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from adapterhub.cli import corrections, errors
from adapterhub.cli.main import app
from adapterhub_converters.errors import AdapterhubError
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs
from tests.support.import_graph import PACKAGES, module_paths, nodes

TEMPLATES = {
    **errors.HINTS,
    **{f"{code} elsewhere": hint for code, hint in errors._HINTS_ELSEWHERE.items()},
    **{f"{code} without the option": hint for code, (_, hint) in errors._HINTS_WITHOUT_OPTION.items()},
}
# Words of a text that a person replaces, and what they may be.
STANDS_FOR = {"N": "4", "R": "4", "T": "4", "ROLE": "read", "FORMAT": "peft", "SHELL": "bash", "DIGEST": "absent"}
_FIELD = re.compile(r"\{[^{}]*\}")


def fields_of(template: str) -> set[str]:
    """The fields that a template needs."""
    return {name.partition(".")[0] for _, name, _, _ in string.Formatter().parse(template) if name}


# ---- placeholders


def raised(path: Path) -> Iterator[tuple[int, str, set[str] | None]]:
    """Line, code, and the named fields of each error with a code; None for the fields if they are passed as a mapping."""
    for node in nodes(path):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        for value in ast.walk(keywords["code"]) if "code" in keywords else ():
            if isinstance(value, ast.Constant) and value.value in errors.HINTS:
                yield node.lineno, str(value.value), None if None in keywords else {str(name) for name in keywords}


def test_an_error_has_the_fields_that_its_hint_names() -> None:
    lacking = {
        f"{path}:{line}: {code}": fields_of(errors.HINTS[code]) - fields
        for path in module_paths(*PACKAGES).values()
        for line, code, fields in raised(path)
        if fields is not None
    }
    assert len(lacking) > 100
    assert {place: missing for place, missing in lacking.items() if missing} == {}


@pytest.mark.parametrize("code", errors.HINTS)
def test_a_hint_whose_fields_are_missing_is_not_printed(code: str) -> None:
    error = AdapterhubError("here", "what", "the hint of the library", code=code)
    if fields_of(errors.HINTS[code]):
        assert errors._hint(error, set()) == "the hint of the library"
    assert not _FIELD.search(errors.reword(error).hint)


def test_the_hint_of_a_finding_has_its_fields_or_is_that_of_the_library() -> None:
    from adapterhub.maintenance.findings import Finding

    finding = Finding("signature", "error", "here", "what", "the hint of the library", "signature-name")
    assert errors.hint_of(finding) == "the hint of the library"
    with_name = dataclasses.replace(finding, fields={"name": "sql"})
    assert errors.hint_of(with_name).startswith("Pass --signed-as sql if")


# ---- commands


def texts(path: Path) -> Iterator[str]:
    """Each string of a module; a value in a template is a ref."""
    for node in nodes(path):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(value.value) if isinstance(value, ast.Constant) else "{}" for value in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def named_commands(text: str) -> list[list[str]]:
    """The words of each `adapterhub …` in a text, with a value for each field and each word in capitals."""
    lines = re.findall(r"`adapterhub ([^`]*)`", text)
    return [[STANDS_FOR.get(word, word) for word in shlex.split(_FIELD.sub("team/sql", line))] for line in lines]


def check_accepted(words: list[str], *, complete: bool) -> None:
    """Fail unless a command line is parsed: as a whole if `complete`, else as far as it is written."""
    command: click.Command = app
    rest = [word for word in words if word != "help"]
    while rest and isinstance(command, click.Group):
        inner = command.get_command(click.Context(command), rest[0])
        if inner is None:
            break
        command, rest = inner, rest[1:]
    if words[0] == "help" or rest == ["--help"] or (not rest and not complete):
        return
    assert command is not app, words
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("--")} <= flags, words
    if complete and rest and not isinstance(command, click.Group):
        command.make_context("adapterhub", [word.rstrip("…") for word in rest])


@pytest.mark.parametrize("code", [code for code, hint in TEMPLATES.items() if "`adapterhub " in hint])
def test_a_command_of_a_hint_is_parsed_as_it_is_written(code: str) -> None:
    for words in named_commands(TEMPLATES[code].replace("hub {kind}", "hub token")):
        check_accepted(words, complete=True)


# Texts with a word that is not fixed in the place of a command.
_OPEN = ("adapterhub COMMAND", "adapterhub {}", "hub {kind}")


def test_a_command_in_any_text_of_the_program_exists_with_its_options() -> None:
    lines = {
        text for path in module_paths(*PACKAGES).values() for text in texts(path) if not any(word in text for word in _OPEN)
    }
    commands = [words for text in sorted(lines) for words in named_commands(text)]
    assert len(commands) > 100
    for words in commands:
        check_accepted(words, complete=False)


# ---- followed


def _edited(run: Run, place: Path) -> None:
    path = place / "sql/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 3}))


def _removed(run: Run, place: Path) -> None:
    run("rm", "team/sql", "-y")


def _protected(run: Run, place: Path) -> None:
    run("tag", "team/sql:v1", "prod")
    run("tag", "team/sql:prod", "--protect")
    run("push", "other", "team/sql")


def _recipe(run: Run, place: Path) -> None:
    run("merge", "team/sql", "--into", "base", "--recipe-only", "-o", "kept")


def _no_registry(run: Run, place: Path) -> None:
    (place / "new").mkdir()


def _no_more(run: Run, place: Path) -> None:
    """Leave the world as it is."""


# Code of the error, what happens before, the command that ends with it, and values for what the hint leaves open.
FOLLOWED: dict[str, tuple[Callable[[Run, Path], None], str, dict[str, str]]] = {
    "check-failed": (_edited, "push sql team/new", {"SRC": "sql", "REF": "team/new"}),
    "check-failed-on-base": (_edited, "push sql team/new --base base", {"SRC": "sql", "REF": "team/new"}),
    "check-failed-to-convert": (_edited, "convert sql out --to mlx", {}),
    "config-key": (_no_more, "train --explain nosuch", {}),
    "invalid-usage": (_no_more, "list --jsn", {}),
    "latest-tag": (_no_more, "tag team/sql:v1 latest", {}),
    "no-lock-file": (_no_more, "pull --locked", {"REF…": "team/sql"}),
    "no-registry": (_no_registry, "list --registry new", {}),
    "no-such-account": (_no_more, "hub member set team nobody --role read", {}),
    "no-such-adapter": (_no_more, "show team/nosuch", {}),
    "no-such-base": (_no_more, "base show nosuch", {}),
    "no-such-recipe": (_no_more, "rebuild --remove nosuch", {}),
    "no-such-tag": (_no_more, "show team/sql:nosuch", {}),
    "no-such-version": (_no_more, "show team/sql:v9", {}),
    "peft-type-missing": (_no_more, "convert bare out --to mlx", {}),
    "version-stays": (_no_more, "rm team/sql:v1", {}),
    "protected": (_protected, "tag team/sql:v2 prod", {}),
    "recipe-name-taken": (_recipe, "merge other --into base --recipe-only -o kept", {}),
    "removed": (_removed, "pull team/sql", {}),
    "removed-name": (_removed, "push sql team/sql", {}),
    "unknown-method": (_no_more, "merge --explain nosuch", {}),
}


@pytest.fixture
def place(run: Run, tmp_path: Path) -> Path:
    """A base, two adapters, and a registry that has one of them."""
    base(tmp_path / "base", 2)
    adapter(tmp_path / "sql", pairs(2))
    adapter(tmp_path / "other", pairs(1))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/adapter_config.json").write_text("{}")
    run("push", "sql", "team/sql")
    return tmp_path


@pytest.mark.parametrize("code", FOLLOWED)
def test_what_a_hint_says_does_not_end_with_the_same_error(run: Run, place: Path, code: str) -> None:
    before, line, values = FOLLOWED[code]
    before(run, place)
    result = run(*shlex.split(line), code=None)
    assert result.returncode, line
    assert f"[{code}]" in result.stderr, result.stderr
    assert not _FIELD.search(result.stderr)
    error = result.stderr.partition("\n")[0]
    for text in re.findall(r"`adapterhub ([^`]*)`", result.stderr):
        words = [values.get(word, word) for word in shlex.split(text)]
        followed = run(*words, code=None)
        assert error not in followed.stderr, words
        assert "[invalid-usage]" not in followed.stderr or len(words) == 1, (words, followed.stderr)


def test_synonyms_of_options_are_options_that_some_command_has() -> None:
    leaves = [command for _, command in _leaves(app)]
    flags = {flag for command in leaves for parameter in command.params for flag in parameter.opts}
    assert set(corrections._OPTION_SYNONYMS.values()) <= flags


def _leaves(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _leaves(command)
        elif command is not None:
            yield name, command
