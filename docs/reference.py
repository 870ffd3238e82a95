"""The reference of the command line, from its own commands: Markdown for the site, and man pages.

python docs/reference.py DIR      writes adapterhub.1, adapterhub-push.1 … to DIR
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]

from adapterhub.cli.explained_codes import codes, explanation
from adapterhub.cli.main import GROUPS, PROGRAM, app
from adapterhub.training.config_help import explain
from adapterhub.version import __version__

# Exit codes in the words of docs/exit-codes.md would be a second copy; a man page names the page.
_SEE = "Exit codes are in docs/exit-codes.md, and `adapterhub explain CODE` explains a code."


@dataclass(frozen=True)
class Entry:
    """One command as its help has it: paragraphs, options as (how it is written, what it does), and examples."""

    path: str
    usage: str
    short: str
    paragraphs: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]
    subcommands: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """The path with dashes, as pages and man pages are called: `adapterhub-hub-start`."""
        return self.path.replace(" ", "-")


def entries() -> dict[str, list[Entry]]:
    """Return every command under the title of its group, in the order of the program's help."""
    with click.Context(app, info_name=PROGRAM) as context:
        return {
            title: [_entry(context, name, description) for name, description in group.items()]
            for title, group in GROUPS.items()
        }


def _entry(parent: click.Context, name: str, description: str = "") -> Entry:
    assert isinstance(parent.command, click.Group)
    command = parent.command.get_command(parent, name)
    assert command is not None, name
    with click.Context(command, info_name=name, parent=parent) as context:
        pieces = " ".join(command.collect_usage_pieces(context))
        text = inspect.cleandoc(command.help or "").partition("\f")[0]
        records = (parameter.get_help_record(context) for parameter in command.get_params(context))
        inner = command.list_commands(context) if isinstance(command, click.Group) else ()
        return Entry(
            path=context.command_path,
            usage=f"{context.command_path} {pieces}".rstrip(),
            short=description or command.get_short_help_str(120),
            paragraphs=tuple(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()),
            options=tuple(record for record in records if record and record[1]),
            examples=tuple(line.strip() for line in getattr(command, "example", "").strip().splitlines()),
            subcommands=tuple(_entry(context, subcommand) for subcommand in inner),
        )


def commands_table() -> str:
    """Return the Markdown of the table of commands by purpose, each with a link to its page."""
    lines = ["| command | does |", "| --- | --- |"]
    for title, group in entries().items():
        lines.append(f"| **{title}** | |")
        lines += [f"| [`{entry.path}`](reference/commands/{entry.name}.md) | {_plain(_cell(entry.short))} |" for entry in group]
    return "\n".join(lines) + "\n"


def page(entry: Entry) -> str:
    """Return the Markdown of a command and the commands below it."""
    return "\n".join(_markdown(entry, 1)) + "\n"


def _markdown(entry: Entry, level: int) -> Iterator[str]:
    yield f"{'#' * level} {entry.path}"
    yield from ("", "```text", entry.usage, "```", "")
    for paragraph in entry.paragraphs:
        yield from (_plain(paragraph), "")
    if entry.examples:
        yield from ("```console", *(f"$ {line}" for line in entry.examples), "```", "")
    yield from ("| option | does |", "| --- | --- |")
    yield from (f"| `{_cell(written)}` | {_plain(_cell(description))} |" for written, description in entry.options)
    yield ""
    for inner in entry.subcommands:
        yield from _markdown(inner, level + 1)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text of a help as Markdown that looks the same: code in backquotes stays code, all else is only text."""
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [re.sub(r"([*_\[])", r"\\\1", piece.replace("<", "&lt;")) for piece in pieces[::2]]
    return "".join(pieces)


def codes_page() -> str:
    """Return the Markdown of all codes, each under a heading of its own."""
    lines = [
        "# Codes",
        "",
        "What `adapterhub explain CODE` tells, for every code. Codes are stable: scripts may match on them.",
        "",
    ]
    findings_intro = (
        "`adapterhub validate`, `scan`, `verify`, `fsck` and `audit verify` begin a line with them: `error[rank-config]`."
    )
    raised = "Any command ends an error with its code: `[no-such-tag]`. In the document of `--json` it is `error.code`."
    for title, about, finding in (("Findings", findings_intro, True), ("Errors", raised, False)):
        lines += [f"## {title}", "", about, ""]
        for entry in filter(None, map(explanation, codes())):
            if bool(entry.reported_by) == finding:
                meaning = f"*{entry.kind}*{f': {_plain(entry.meaning)}' if entry.meaning else ''}." if finding else ""
                lines += [f"### {entry.code}", "", *([meaning, ""] if meaning else []), _plain(entry.text), ""]
                lines += [f"{_plain(entry.fix)}.", ""] if entry.fix else []
    return "\n".join(lines)


def training_page() -> str:
    """Return the Markdown of every key in the config of a training, by its table."""
    lines = [
        "# Config of a training",
        "",
        "What `adapterhub train --explain` tells, for every key.",
        "",
    ]
    for section, keys in groupby(explain(), lambda key: key.section):
        lines += [f"## {section}", "", "| key | default | |", "| --- | --- | --- |"]
        for key in keys:
            default = f"`{_cell(key.default)}`" if key.default else "must be set" if key.needed else ""
            lines.append(f"| `{key.key}` | {default} | {_plain(_cell(key.explanation))} |")
        lines.append("")
    return "\n".join(lines)


def manual(entry: Entry) -> str:
    """Return the man page of a command, in the macros of man(7)."""
    # The date is the version's: a page is the same whenever it is built.
    lines = [f'.TH {entry.name.upper()} 1 "" "{PROGRAM} {__version__}" "{PROGRAM} manual"', ".SH NAME"]
    lines += [
        f"{_roff(entry.name)} \\- {_roff(entry.short.rstrip('.'))}",
        ".SH SYNOPSIS",
        _roff(entry.usage),
        ".SH DESCRIPTION",
    ]
    for paragraph in entry.paragraphs:
        lines += [".PP", _roff(paragraph)]
    lines.append(".SH OPTIONS")
    for written, description in entry.options:
        lines += [".TP", f"\\fB{_roff(written)}\\fR", _roff(description)]
    if entry.examples:
        lines += [".SH EXAMPLES", ".nf", *(_roff(f"$ {line}") for line in entry.examples), ".fi"]
    if entry.subcommands:
        lines.append(".SH COMMANDS")
        for inner in entry.subcommands:
            lines += [".TP", f"\\fB{_roff(inner.name)}\\fR(1)", _roff(inner.short)]
    return "\n".join([*lines, ".SH SEE ALSO", _roff(f"{PROGRAM}(1). {_SEE}" if entry.path != PROGRAM else _SEE)]) + "\n"


def _roff(text: str) -> str:
    escaped = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def _program() -> Entry:
    """The program itself, with all commands below it."""
    with click.Context(app, info_name=PROGRAM) as context:
        text = inspect.cleandoc(app.help or "")
        records = (parameter.get_help_record(context) for parameter in app.get_params(context))
        return Entry(
            path=PROGRAM,
            usage=f"{PROGRAM} {' '.join(app.collect_usage_pieces(context))}",
            short=text.partition("\n")[0],
            paragraphs=tuple(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)),
            options=tuple(record for record in records if record and record[1]),
            examples=(),
            subcommands=tuple(entry for group in entries().values() for entry in group),
        )


def manuals() -> dict[str, str]:
    """Return the man pages by file name, of every command and of those below it."""
    pages: dict[str, str] = {}
    waiting = [_program()]
    while waiting:
        entry = waiting.pop()
        pages[f"{entry.name}.1"] = manual(entry)
        waiting += entry.subcommands
    return pages


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in manuals().items():
        (folder / name).write_text(text, encoding="utf-8")
