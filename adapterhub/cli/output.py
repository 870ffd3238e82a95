"""Results on stdout and messages on stderr: tables, JSON with stable keys, one line for each thing.

All output goes through `write` and `say`, which remove what could control a terminal or a runner of workflows, so callers pass
texts from others as they are. A document has the escapes of its own language (`write_document`).

A table prints whole cells and never cuts a ref: on a narrow terminal, less important columns are dropped and named below it. A
pipe gets every column, no color and no progress. rich is not used for tables: `list` would take 28 ms longer to start, and rich
cuts cells.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from adapterhub_converters import display
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

size, number, plural = display.format_size, display.format_count, display.format_plural


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout.isatty()


def width() -> int | None:
    """Return the columns of the terminal; None for a pipe, where lines have no limit."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def color(text: str, name: str) -> str:
    """Return `text` in a color, on a terminal with colors (https://no-color.org)."""
    codes = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "bold": "1", "dim": "2"}
    return _in_color(text, codes[name])


# Stands in front of the code of a color until the line is printed. It is random, so a text from others cannot contain it and
# has no color.
_MARK = f"\x1b{os.urandom(8).hex()}"
_COLOR = re.compile(re.escape(_MARK) + "([0-9;]+)m")


def _in_color(text: str, code: str) -> str:
    return f"{_MARK}{code}m{text}{_MARK}0m" if has_color() else text


def has_color(stream: TextIO | None = None) -> bool:
    """Return whether a stream, by default stdout, is a terminal with colors whose user wants them."""
    is_tty = stream.isatty() if stream else is_terminal()
    return is_tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# Some of the 256 colors of terminals, from violet over green to yellow: ever lighter, the first one still visible on black.
_HEAT = (61, 62, 31, 37, 72, 77, 113, 149, 184, 220)
_BARS = "▁▂▃▄▅▆▇█"


def heat(share: float, columns: int) -> str:
    """Return a cell for a number from 0 to 1: a color, or a bar on a terminal without colors."""
    share = min(1.0, max(0.0, share))
    if has_color():
        return _in_color("█" * columns, f"38;5;{_HEAT[round(share * (len(_HEAT) - 1))]}")
    return _BARS[round(share * (len(_BARS) - 1))] * columns


def has_blocks() -> bool:
    """Return whether stdout is a terminal that can show block characters."""
    return is_terminal() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def one_line(text: str) -> str:
    """Return `text` as one printable line, with its indentation."""
    inner = text.lstrip(" ")
    return " " * (len(text) - len(inner)) + printable(" ".join(inner.split()))


# Texts that runners of workflows take for a command: GitHub's `::` at the start of a line, its older `##[` anywhere
# (actions/runner, `ActionCommand.cs`), `##vso[` of Azure and `##teamcity[`. The last character of the match is replaced.
_WORKFLOW_COMMAND = re.compile(r"(?m)(?<=#)#(?=[a-z]*\[)|^ *:(?=:)")


def escape_workflow_commands(text: str, spelled: str = "\\x{:02x}") -> str:
    """Return `text` without commands to a runner of workflows.

    `spelled` is a format that writes a character as an escape of the text's language.
    """
    return _WORKFLOW_COMMAND.sub(lambda match: match[0][:-1] + spelled.format(ord(match[0][-1])), text)


def _line(text: str) -> str:
    """Return the line to print for `text`: printable characters, and our own colors."""
    # Even items are texts, odd items the codes of our own colors between them.
    codes = _COLOR.split(text)
    codes[::2] = map(printable, codes[::2])
    codes[1::2] = [f"\x1b[{code}m" for code in codes[1::2]]
    return escape_workflow_commands("".join(codes))


def write(text: str = "") -> None:
    """Print one line of the result; a terminal gets it broken between words if it does not fit."""
    line, screen = _line(text), width()
    for piece in [line] if screen is None else _wrap_line(line, screen):
        print(piece)


_PRINTED_COLOR = re.compile("\x1b\\[[0-9;]+m")
# A word with the spaces before it; a command in backticks counts as one word, so that it can be copied.
_WORD = re.compile("^ +$| *(?:`[^`]*`|[^ ])+| +$")


def _wrap_line(line: str, screen: int) -> list[str]:
    """Break a printable line into pieces of at most `screen` columns; all but the first are indented, and no word is cut."""

    def wide(piece_: str) -> int:
        return len(_PRINTED_COLOR.sub("", piece_))

    indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
    pieces, piece = [], ""
    for word in _WORD.findall(line):
        if piece and wide(piece + word) > screen:
            pieces.append(piece)
            piece = indent + word.lstrip(" ")
        else:
            piece += word
    return [*pieces, piece]


class Stream:
    """Text that arrives in pieces: shown at once on a terminal, elsewhere line by line.

    A whole line lets `escape_workflow_commands` see each command of it.
    """

    def __init__(self) -> None:
        self._line = ""

    def write(self, piece: str) -> None:
        """Print the complete lines of the text so far, its tabs as spaces."""
        # `printable` would show a tab as an escape.
        piece = piece.expandtabs(4)
        if is_terminal():
            print("\n".join(map(printable, piece.split("\n"))), end="", flush=True)
            return
        *lines, self._line = (self._line + piece).split("\n")
        write_lines(lines)
        sys.stdout.flush()

    def end(self) -> None:
        """End the last line."""
        write(self._line)
        self._line = ""


def redraw(text: str, *, is_final: bool) -> None:
    """Print one line over the last one that was not done; a dumb terminal gets only lines that are done."""
    if os.environ.get("TERM") != "dumb":
        print(f"\r{_line(text)}", end="\n" if is_final else "", flush=True)
    elif is_final:
        print(_line(text))


def flush() -> None:
    """Send what was printed so far: otherwise a pipe or a file gets the address of a server when the server ends."""
    sys.stdout.flush()


def write_lines(lines: Iterable[str]) -> None:
    """Print lines of the result."""
    for line in lines:
        write(line)


def write_document(text: str) -> None:
    """Print a document in a language of its own, in which the caller has escaped texts from others."""
    print(text)


# First words of a line on stderr that are in a color on a terminal.
_LABELS = {"error:": "31", "warning:": "33"}


def say(text: str, *, aside: str = "", whole: bool = False) -> None:
    """Print one line about the work to stderr, broken as by `write` unless it is to be copied whole.

    On a terminal with colors, an aside at its end is dim, and `error:` at its beginning red.
    """
    if aside:
        aside = f"  \x1b[2m{_line(aside)}\x1b[0m" if has_color(sys.stderr) else f"  {_line(aside)}"
    line = _line(text) + aside
    pieces = _wrap_line(line, shutil.get_terminal_size().columns) if sys.stderr.isatty() and not whole else [line]
    label = next((label for label in _LABELS if pieces[0].startswith(label)), "")
    if label and has_color(sys.stderr):
        pieces[0] = f"\x1b[{_LABELS[label]}m{label}\x1b[0m{pieces[0].removeprefix(label)}"
    # In the log of a CI job, both streams are one file: what was printed before must be in it before.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print("\n".join(pieces), file=sys.stderr)


@functools.cache
def warn_deprecated(ref: str, message: str | None) -> None:
    """Warn on stderr, once, that an adapter is deprecated; do nothing if `message` is None."""
    if message is not None:
        say(one_line(f"warning: {ref} is deprecated" + (f": {message}" if message else "")))


def confirm(question: str) -> bool:
    """Ask a yes-or-no question on the terminal; return False for no, an empty answer and an interrupt."""
    import click

    try:
        return click.confirm(one_line(question), err=True)
    except click.Abort:
        say("")
        return False


def write_json(document: Any) -> None:
    """Print the result as one JSON document; a lone surrogate in a file name becomes an escape."""
    write_document(json_text(document, indent=2))


def json_text(document: Any, *, indent: int | None = None) -> str:
    """Return JSON in ASCII, without commands to a runner of workflows."""
    return escape_workflow_commands(json.dumps(document, indent=indent, ensure_ascii=True), "\\u{:04x}")


def emit(document: Any, *, as_json: bool, text: Callable[[], None]) -> None:
    """Print the document, or call `text` to print for people."""
    if as_json:
        write_json(document)
    else:
        text()


def emit_change(document: dict[str, Any], *, as_json: bool, text: Callable[[], None], dry_run: bool) -> None:
    """Print what was changed as `emit` does; of a dry run, say that nothing was."""
    if dry_run and not as_json:
        write("dry run, nothing was changed; without --dry-run:")
    emit({**document, "dry_run": True} if dry_run else document, as_json=as_json, text=text)


def error_document(error: AdapterhubError) -> dict[str, Any]:
    """Return an error for `--json`.

    `refused` has every reason of a refusal, with its tensor or module; `problems` has one line each.
    """
    refused = [_reason(item) for item in error.items] if isinstance(error, RefusedError) else []
    return {
        "type": type(error).__name__,
        "where": error.where,
        "what": error.what,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "code": error.code,
        **({"refused": refused} if refused else {}),
        **({"problems": list(error.problems)} if error.problems else {}),
    }


def _reason(item: str) -> dict[str, str]:
    name, colon, reason = item.partition(": ")
    return {"name": name, "reason": reason} if colon and " " not in name else {"name": "", "reason": item}


def digest(text: str) -> str:
    """Return a digest; on a terminal its first 12 digits, which a ref accepts too."""
    return text[: len("sha256:") + 12] if is_terminal() else text


def pinned(text: str) -> str:
    """Return `NAME@DIGEST` with its digest as it is shown, and any other text as it is."""
    name, at, version_digest = text.partition("@")
    return f"{name}@{digest(version_digest)}" if at else text


def utc_time(seconds: float) -> str:
    """Return seconds of Unix time as ISO 8601 in UTC, to the second."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def remainder_line(count: int, noun: str = "") -> str:
    """Return the last line of a shortened table or list, with the number of missing rows."""
    return f"… and {count:,} more{f' {noun}' if noun else ''} (--json has all)"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    `drop`: the priority for dropping it on a narrow screen, the highest first; 0 means never. `wrap`, `cut`: for the last
    column.
    """

    title: str
    drop: int = 0
    right: bool = False
    wrap: bool = False
    cut: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, screen: int | None = None) -> list[str]:
    """Return the lines of a table within `screen` columns; None for no limit."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = _widths(columns, rows)
    visible = _visible_columns(columns, widths, screen)
    lines = [_row([column.title for column in columns], columns, widths, visible, None)]
    lines += [_row(row, columns, widths, visible, screen) for row in cells]
    return [line for block in lines for line in block]


def write_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table within the columns of the terminal, and the titles of its own columns that were left out."""
    screen = width()
    write_lines(table(columns, rows, screen=screen))
    visible = _visible_columns(columns, _widths(columns, rows), screen)
    hidden = [column.title for i, column in enumerate(columns) if i not in visible and column.title]
    if hidden:
        write(color(cut(f"not shown for the width: {', '.join(hidden)}", screen), "dim"))


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max([len(column.title), *(len(printable(row[i])) for row in rows)]) for i, column in enumerate(columns)]


def _visible_columns(columns: Sequence[Column], widths: Sequence[int], screen: int | None) -> list[int]:
    """Return the columns to show: all that cannot be dropped, then each that still fits, the least droppable first."""
    visible = [i for i, column in enumerate(columns) if not column.drop or screen is None]
    for i in sorted(set(range(len(columns))) - set(visible), key=lambda i: (columns[i].drop, i)):
        candidate = sorted([*visible, i])
        if screen is not None and _minimum_width(columns, widths, candidate) <= screen:
            visible = candidate
    return visible


def _minimum_width(columns: Sequence[Column], widths: Sequence[int], visible: Sequence[int]) -> int:
    # A last column that is wrapped or cut is useful from 24 characters on.
    return sum(min(widths[i], 24) if columns[i].wrap or columns[i].cut else widths[i] for i in visible) + 2 * (len(visible) - 1)


def _row(
    row: Sequence[str], columns: Sequence[Column], widths: Sequence[int], visible: Sequence[int], screen: int | None
) -> list[str]:
    cells = [row[i].rjust(widths[i]) if columns[i].right else row[i].ljust(widths[i]) for i in visible]
    line = "  ".join(cells).rstrip()
    last = visible[-1]
    if screen is not None and columns[last].cut:
        return [cut(line, screen)]
    if screen is None or len(line) <= screen or not columns[last].wrap:
        return [line]
    offset = sum(widths[i] for i in visible[:-1]) + 2 * (len(visible) - 1)
    pieces = textwrap.wrap(row[last], max(screen - offset, 20), break_long_words=False, break_on_hyphens=False)
    first_cells = "  ".join(cells[:-1])
    return [f"{first_cells}  {pieces[0]}", *(" " * offset + piece for piece in pieces[1:])]


def cut(text: str, screen: int | None) -> str:
    """Return `text` in printable characters within `screen` columns, with an ellipsis if it was longer."""
    text = printable(text)
    return text if screen is None or len(text) <= screen else text[: max(screen - 1, 0)].rstrip() + "…"


def wrap(text: str, screen: int | None, *, indent: int = 0) -> list[str]:
    """Return `text` as one printable line, or wrapped between words, with later lines indented."""
    text = printable(text)
    if screen is None or len(text) <= screen:
        return [text]
    return textwrap.wrap(text, screen, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def pairs(items: Mapping[str, str], *, screen: int | None = None) -> list[str]:
    """Return `key  value` lines, the values aligned and wrapped under themselves."""
    key_width = max((len(key) for key in items), default=0)
    lines = []
    for key, value in items.items():
        text, available = printable(value), (screen or 10_000) - key_width - 2
        value_lines = textwrap.wrap(text, max(available, 20), break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(f"{key.ljust(key_width)}  {value_lines[0]}".rstrip())
        lines += [" " * (key_width + 2) + piece for piece in value_lines[1:]]
    return lines


def write_pairs(items: Mapping[str, str]) -> None:
    """Print `key  value` lines within the columns of the terminal."""
    write_lines(pairs(items, screen=width()))
