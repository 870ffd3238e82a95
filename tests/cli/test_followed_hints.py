"""Every hint leads on: the commands that texts of the program name are accepted, and do not end with the same error."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import shlex
import string
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from adapterhub.cli import errors, suggestions
from adapterhub.cli.main import app
from adapterhub_converters.errors import AdapterhubError
from tests.cli import provoked_errors
from tests.cli.provoked_errors import ELSEWHERE, PROVOCATIONS
from tests.cli.test_errors import COMMANDS
from tests.conftest import ROOT, Run
from tests.support.folders import adapter, pairs
from tests.support.import_graph import PACKAGES, module_paths, nodes

TEMPLATES = {
    **errors.HINTS,
    **{f"{code} elsewhere": hint for code, hint in errors._HINTS_ELSEWHERE.items()},
    **{f"{code} without the option": hint for code, (_, hint) in errors._HINTS_WITHOUT_OPTION.items()},
}
# Words of a text that a person replaces, and what they may be.
STANDS_FOR = {
    "COMMAND": "list", "DIGEST": "absent", "FORMAT": "peft", "N": "4", "R": "4", "ROLE": "read", "SHELL": "bash", "T": "4",
}  # fmt: skip
# Values in templates of texts, by the expression or the field, and what they may be if not a ref.
VALUES = {
    "item.reported_by": "validate",
    "kind": "token",
    "named_remote.name": "team",
    "options": "",
    "place_words(remote)": "",
    "undo": "restore team/sql",
    "verdict.convert_to": "peft",
}
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
    """Each string of a module that can be printed; a value in a template is what `VALUES` has for it, else a ref."""
    for node in nodes(path):
        if isinstance(node, ast.JoinedStr):
            values = (ast.unparse(value.value) if isinstance(value, ast.FormattedValue) else value for value in node.values)
            yield "".join(
                VALUES.get(value, "team/sql") if isinstance(value, str) else str(value.value)  # type: ignore[attr-defined]
                for value in values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in not_printed(path):
            yield node.value


@functools.cache
def not_printed(path: Path) -> set[ast.AST]:
    """The docstrings of a module but those of commands, which are their help."""
    documented = [
        node
        for node in nodes(path)
        if isinstance(node, ast.Module | ast.ClassDef) or (isinstance(node, ast.FunctionDef) and not node.decorator_list)
    ]
    first = [node.body[0] for node in documented if node.body]
    return {node.value for node in first if isinstance(node, ast.Expr)}


def named_commands(text: str) -> list[list[str]]:
    """The words of each `adapterhub …` in a text, with a value for each field and each word in capitals."""
    lines = re.findall(r"`adapterhub ([^`]*)`", text)
    fields = [_FIELD.sub(lambda field: VALUES.get(field[0][1:-1], "team/sql"), line) for line in lines]
    return [[STANDS_FOR.get(word, word) for word in shlex.split(line)] for line in fields]


def check_accepted(words: list[str], *, complete: bool) -> None:
    """Fail unless click parses a command line; one that only names a command needs to be complete only if `complete`."""
    command: click.Command = app
    remaining = [word for word in words if word != "help"]
    while remaining and isinstance(command, click.Group):
        inner = command.get_command(click.Context(command), remaining[0])
        if inner is None:
            break
        command, remaining = inner, remaining[1:]
    if words[0] == "help" or remaining == ["--help"] or not (remaining or complete):
        return
    assert command is not app, words
    assert not isinstance(command, click.Group), words
    command.make_context("adapterhub", [word.rstrip("…") for word in remaining if word != "…"])


@pytest.mark.parametrize("code", [code for code, hint in TEMPLATES.items() if "`adapterhub " in hint])
def test_a_command_of_a_hint_is_parsed_as_it_is_written(code: str) -> None:
    for words in named_commands(TEMPLATES[code]):
        check_accepted(words, complete=True)


def test_a_command_in_any_text_of_the_program_is_parsed_as_it_is_written() -> None:
    lines = {text for path in module_paths(*PACKAGES).values() for text in texts(path)}
    commands = [words for text in sorted(lines) for words in named_commands(text)]
    assert len(commands) > 100
    for words in commands:
        check_accepted(words, complete=False)


# ---- followed


def test_each_hint_is_followed_or_a_test_elsewhere_ends_with_its_code() -> None:
    assert PROVOCATIONS.keys() | ELSEWHERE.keys() == errors.HINTS.keys()
    assert not PROVOCATIONS.keys() & ELSEWHERE.keys()
    for code, path in ELSEWHERE.items():
        text = (ROOT / "tests" / path).read_text()
        assert f'"{code}"' in text or f"[{code}]" in text, code


_PLACEHOLDER = re.compile(r"NAMESPACE/NAME|\b[A-Z]{2,}\b")
# What serves until it is stopped is parsed alone, and what asks at a terminal says so here.
_SERVES, _ASKS = ("serve",), "there is no terminal to ask on"


@pytest.mark.parametrize("code", PROVOCATIONS)
def test_what_a_hint_says_does_not_end_with_the_same_error(run: Run, tmp_path: Path, code: str) -> None:
    provocation = PROVOCATIONS[code]
    provoked_errors.world(tmp_path)
    for step in ("init", "push sql team/sql", *provocation.before):
        _ = run(*shlex.split(step)) if isinstance(step, str) else step(tmp_path)
    result = run(*shlex.split(provocation.line), code=None)
    report = result.stdout + result.stderr
    assert f"[{provocation.finding or code}]" in report, report
    assert not _FIELD.search(report)
    error = report.partition("\n")[0]
    lines = re.findall(r"`adapterhub ([^`]*)`", report)
    # What the reader of a hint has to fill in is what the program cannot know.
    assert {word for line in lines for word in _PLACEHOLDER.findall(line)} - {"NAMESPACE/NAME"} <= provocation.values.keys()
    for line in lines:
        words = [
            _PLACEHOLDER.sub(lambda word: provocation.values.get(word[0], word[0].lower()), word) for word in shlex.split(line)
        ]
        words = [word.rstrip("…") for word in words]
        if words[0] in _SERVES:
            check_accepted(words, complete=True)
            continue
        followed = run(*words, code=None)
        assert error not in followed.stderr, words
        assert "[invalid-usage]" not in followed.stderr or _ASKS in followed.stderr, (words, followed.stderr)
    hint = errors.HINTS[code]
    options = set(re.findall(r"--[a-z-]+", re.sub("`[^`]*`", "", hint))) - {"--registry"}
    assert provocation.then or not options, "the options of a hint are tried"
    if provocation.then:
        after = run(*shlex.split(provocation.then), code=None)
        assert f"[{code}]" not in after.stderr, after.stderr
        assert "[invalid-usage]" not in after.stderr, after.stderr


def test_a_hint_repeats_what_the_user_has_written(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "my sql", pairs(2), r=3)
    run("init")
    refused = run("push", "my sql", "team/sql", code=6).stderr
    assert "`adapterhub validate 'my sql'` shows all of them; `adapterhub push 'my sql' team/sql --force` stores" in refused
    assert "`adapterhub push 'my sql' NAMESPACE/NAME`" in run("bundle", "my sql", "-o", "x.tar", code=2).stderr
    adapter(tmp_path / "{0.where} `x`", pairs(2), r=3)  # what a stranger may call a folder
    assert "`adapterhub validate '{0.where} `x`'` shows" in run("push", "{0.where} `x`", "team/sql", code=6).stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show legal/terms", "Run `adapterhub list --registry 'a b'`"),
        ("push ./sql", "like `adapterhub push ./sql team/sql --registry 'a b'`"),
        ("rm team/sql:v1", "`adapterhub withdraw team/sql:v1 -m REASON --registry 'a b'` takes it"),
        ("push wrong team/new", "`adapterhub push wrong team/new --force --registry 'a b'` stores it"),
        ("lineage oci://a.example/x", "`adapterhub copy oci://a.example/x NAMESPACE/NAME --registry 'a b'`"),
        ("serve ./other --base base", "`adapterhub run ./other Hello --base base --registry 'a b'` tries"),
        ("rm team/sql -y", "`adapterhub restore team/sql --registry 'a b'` undoes it"),
        ("mv team/sql team/text", "`adapterhub mv team/text team/sql --registry 'a b'` undoes it"),
        ("promote team/sql:v1 prod --dry-run", "`adapterhub promote team/sql:v1 prod --registry 'a b'` moves"),
        ("explain xyzzy", "`adapterhub explain` lists them"),
        ("pull oci://ada:x@a.example/x", "use `adapterhub login a.example`"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_hint_is_about_the_registry_that_the_command_was_given(
    run: Run, tmp_path: Path, line: str, message: str, is_first: bool
) -> None:
    provoked_errors.world(tmp_path)
    run("push", "sql", "team/sql", "--registry", "a b")
    option, words = ["--registry", "a b"], shlex.split(line)
    result = run(*([*option, *words] if is_first else [*words, *option]), code=None)
    assert message in result.stdout + result.stderr


def test_a_registry_of_the_environment_is_the_same_where_a_hint_is_pasted(run: Run, tmp_path: Path) -> None:
    provoked_errors.world(tmp_path)
    run("push", "sql", "team/sql", "--registry", "elsewhere")
    error = run("show", "legal/terms", code=3, env={"ADAPTERHUB_REGISTRY": "elsewhere"}).stderr
    assert "Run `adapterhub list`  [" in error


@pytest.mark.parametrize(
    "name", ["a SRC ;touch x; b", "a`b`adapterhub push SRC`; touch x;", "{0.where} REF `adapterhub list SRC`"]
)
def test_a_command_has_the_name_of_a_stranger_as_one_word(run: Run, tmp_path: Path, name: str) -> None:
    adapter(tmp_path / name, pairs(2), r=3)
    refused = run("push", name, "team/sql", code=6).stderr
    assert (
        f"`adapterhub validate {shlex.quote(name)}` shows all of them; `adapterhub push {shlex.quote(name)} team/sql "
        in refused
    )


def worded(line: str, code: str, **fields: str) -> str:
    """The hint of an error of a command line."""
    name = next(name for name in sorted(COMMANDS, key=len, reverse=True) if f"{line} ".startswith(f"{name} "))
    with COMMANDS[name].make_context(name, shlex.split(line.removeprefix(name))):
        return errors.reword(AdapterhubError("here", "what", "", code=code, **fields)).hint


def test_an_option_of_another_meaning_is_not_repeated(tmp_path: Path) -> None:
    hint = worded("hub start --database postgresql://ada:secret@db.example/hub", "unknown-host", owner="models.example")
    assert hint.endswith("`adapterhub remote add NAME URL`")
    hint = worded(f"eval {tmp_path} --against team/sql", "check-failed", adapter="sql")
    assert "`adapterhub push sql REF --force`" in hint
    assert "`adapterhub base add tiny BASE --force`" in worded("base show tiny", "add-base", name="tiny")


def test_a_value_of_an_option_is_one_word_too() -> None:
    assert worded("run sql hi", "base-not-here", recorded="hf://a/b;id").endswith(
        "--base 'hf://a/b;id', which downloads it from the Hub"
    )
    assert worded("verify sql", "signature-name", name="a $(id)").startswith("Pass --signed-as 'a $(id)' if you")


def test_synonyms_of_options_are_options_that_some_command_has() -> None:
    leaves = [command for _, command in _leaves(app)]
    flags = {flag for command in leaves for parameter in command.params for flag in parameter.opts}
    assert set(suggestions._OPTION_SYNONYMS.values()) <= flags


def _leaves(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _leaves(command)
        elif command is not None:
            yield name, command
