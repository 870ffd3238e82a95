"""The site builds without a warning and loads nothing from elsewhere; commands in pages are commands of this version."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import adapterhub as ah
from adapterhub.checks import CODES
from adapterhub.cli.explained_codes import codes
from adapterhub.cli.main import COMMANDS, app
from adapterhub.training.config_help import explain
from adapterhub.version import __version__
from tests.conftest import ROOT, need_module, need_program
from tests.support import pages, tool_checks

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import reference  # noqa: E402

PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_another_host(tmp_path: Path) -> None:
    need_module("material")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--strict",
        "--site-dir",
        str(tmp_path),
        "-f",
        str(ROOT / "mkdocs.yml"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'(?:src|<link[^>]* href)="(?:https?:)?//', page.read_text()), page
    assert "NAME[:TAG|@DIGEST]" in (tmp_path / "remotes.html").read_text()  # a pipe in a table is escaped for GitHub
    assert [
        name for name in COMMANDS if f"<code>adapterhub {name}</code>" not in (tmp_path / "commands.html").read_text()
    ] == []
    assert '<h3 id="growth"' in (tmp_path / "benchmarks.html").read_text()
    assert len([*(tmp_path / "reference/commands").glob("*.html")]) == len(COMMANDS)
    anchors = re.findall(r'<h3 id="([^"]+)"', (tmp_path / "reference/codes.html").read_text())
    assert sorted(anchors) == sorted(codes())
    keys = (tmp_path / "reference/training.html").read_text()
    assert [entry.key for entry in explain() if f"<code>{entry.key}</code>" not in keys] == []
    api = (tmp_path / "reference/python-api.html").read_text()
    assert [name for name in ah.__all__ if f'id="ah{name.lower()}"' not in api] == []
    assert "GET /api/adapterhub/v1/versions" in (tmp_path / "reference/hub-api.html").read_text()


def test_the_readme_links_to_files_that_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).is_file()] == []
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", PAGES)
def test_a_page_links_to_files_that_exist_without_the_site(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", pages.page(name))
    assert [link for link in links if not (DOCS / name).parent.joinpath(link).is_file()] == []


# Printed by programs: `tests.support.hf_methods`, `tests.support.tool_checks`, and `make bench` between its marks.
_PRINTED = {"hub-methods.md", "tools.md", "benchmarks.md"}


@pytest.mark.parametrize("name", sorted({*PAGES} - _PRINTED))
def test_a_page_begins_with_what_its_reader_can_do_and_is_short_enough_to_read(name: str) -> None:
    _, _, text = pages.page(name).partition("\n\n")
    assert re.match(r"(After|At the end of) th(is|ese) pages?,? ", text), text[:80]
    assert len(text.split()) <= 3000


def test_the_page_of_tools_claims_what_checks_show_and_nothing_else() -> None:
    assert (DOCS / "tools.md").read_text() == tool_checks.page()
    cells = set(itertools.product(tool_checks.TOOLS, tool_checks.ITEMS))
    assert {(check.tool, check.item) for check in tool_checks.CHECKS} <= cells


def test_the_pages_do_not_grow_back() -> None:
    # About half of the 68,000 that they were.
    assert sum(len(pages.page(name).split()) for name in {*PAGES} - _PRINTED) <= 34_000


# A row of a table that answers a question with a command.
_ANSWER = re.compile(r"^\| [^`|]+ \| `(adapterhub [^`]*)` \|$", re.MULTILINE)


def test_the_page_of_questions_has_at_least_fifty_answers() -> None:
    assert len(set(_ANSWER.findall(pages.page("how-to/index.md")))) >= 50


def shown_lines(name: str) -> list[list[str]]:
    """The words of each `adapterhub` of a page, up to a pipe, a redirection or a comment; and of answers in tables."""
    argument_lists = []
    blocks = re.findall(r"^```(?:console|bash|sh)[^\n]*\n(.*?)^```$", pages.page(name), re.MULTILINE | re.DOTALL)
    for block in (*blocks, *_ANSWER.findall(pages.page(name))):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if line.removeprefix("$ ").startswith("adapterhub "):
                typed = line.removeprefix("$ ").partition("  ")[0].replace("…", "x")  # after two spaces comes a remark
                lexer = shlex.shlex(typed, posix=True, punctuation_chars="|&<>;")
                lexer.whitespace_split, lexer.commenters = True, ""
                words = itertools.takewhile(lambda word: word[0] not in "|&<>;#", filter(None, lexer))
                argument_lists.append([*words][1:])
    return argument_lists


def parse(words: list[str]) -> None:
    """Parse a command line as the program does, without its values: unknown commands and options are errors."""
    command, context = app, click.Context(app, info_name="adapterhub")
    while isinstance(command, click.Group):
        while words and words[0].startswith("--"):  # options of the program itself
            words = words[2:] if words[0] == "--registry" else words[1:]
        if not words:
            return
        command.resolve_command(context, [words[0]])
        subcommand = command.get_command(context, words[0])
        assert subcommand is not None, words[0]
        context = click.Context(subcommand, info_name=words[0], parent=context)
        command, words = subcommand, words[1:]
    if "--help" not in words and "-h" not in words:
        command.make_parser(context).parse_args(words)


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_have_the_options_that_it_shows(name: str) -> None:
    for words in shown_lines(name):
        if not re.fullmatch(r"[A-Z]+", words[0]):  # `adapterhub COMMAND --help`
            try:
                parse([*words])
            except click.ClickException as error:
                raise AssertionError(f"adapterhub {shlex.join(words)}: {error}") from error


def test_a_man_page_of_each_command_has_its_options_and_examples() -> None:
    pages = reference.manuals()
    assert {f"adapterhub-{command}.1" for command in COMMANDS} | {"adapterhub.1", "adapterhub-hub-start.1"} <= set(pages)
    page = pages["adapterhub-push.1"]
    assert page.startswith('.TH ADAPTERHUB-PUSH 1 "" "adapterhub ')
    assert "\\fB\\-m, \\-\\-message TEXT\\fR" in page
    assert "$ adapterhub push ./sql team/sql" in page.replace("\\-", "-")


def test_groff_reads_the_man_pages_without_a_warning(tmp_path: Path) -> None:
    groff = need_program("groff")
    for name, text in reference.manuals().items():
        (tmp_path / name).write_text(text)
    result = subprocess.run(
        [groff, "-man", "-Tutf8", "-K", "utf8", "-ww", *sorted(map(str, tmp_path.glob("*.1")))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_what_a_tag_names_is_this_version() -> None:
    for name in ("docs/validate.md", "docs/tutorials/ci.md", "examples/ci/adapters.yml"):
        named = set(re.findall(r"(?:OWNER/adapterhub@|rev: )(\S+)", (ROOT / name).read_text()))
        assert named == {f"v{__version__}"}, name


def test_the_page_of_codes_has_every_code_with_its_severity_and_meaning() -> None:
    page = reference.codes_page().replace("\\", "")
    assert [code for code, (severity, meaning) in CODES.items() if f"### {code}\n\n*{severity}*: {meaning}." not in page] == []


def test_every_variable_and_file_is_on_the_page_of_configuration() -> None:
    named = {
        name
        for path in (ROOT / "adapterhub/cli").rglob("*.py")
        for name in re.findall(r"\bADAPTERHUB_[A-Z_]+\b", path.read_text())
    }
    page = pages.page("config.md")
    assert sorted(name for name in named if f"`{name}`" not in page) == []
