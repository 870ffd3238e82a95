"""Results on stdout and messages on stderr: tables, JSON with stable keys, one line for one thing.

All output goes through `write` and `say`, which leave nothing in it that could control a terminal or a runner of
workflows: callers pass texts of strangers as they are. A document has the escapes of its own language (`write_document`).

A table prints whole cells and never cuts a ref: on a narrow terminal, less important columns are dropped, and named below it. A
pipe gets every column, no color and no progress. Tables are not rich's: `list` would take 28 ms longer to start, and rich cuts
cells.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from adapterhub_converters import display
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, RefusedError

size, number, plural = display.size, display.number, display.plural


def is_terminal() -> bool:
    """True if stdout is a terminal."""
    return sys.stdout.isatty()


def width() -> int | None:
    """Columns of the terminal; None for a pipe, where lines have no limit."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def color(text: str, name: str) -> str:
    """`text` in a color, on a terminal with colors (https://no-color.org)."""
    codes = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "bold": "1", "dim": "2"}
    return _colored(text, codes[name])


# In front of the code of a color until the line is printed: no text of a stranger has it, so none has a color.
_MARK = f"\x1b{os.urandom(8).hex()}"
_COLOR = re.compile(re.escape(_MARK) + "([0-9;]+)m")


def _colored(text: str, code: str) -> str:
    return f"{_MARK}{code}m{text}{_MARK}0m" if has_color() else text


def has_color(stream: TextIO | None = None) -> bool:
    """True if a stream, or else stdout, is a terminal with colors and its user wants them."""
    here = stream.isatty() if stream else is_terminal()
    return here and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# Of the 256 colors of terminals, from violet over green to yellow: ever lighter, and the first one still visible on black.
_HEAT = (61, 62, 31, 37, 72, 77, 113, 149, 184, 220)
_BARS = "▁▂▃▄▅▆▇█"


def heat(share: float, wide: int) -> str:
    """A cell for a number from 0 to 1: a color, or a bar on a terminal without."""
    share = min(1.0, max(0.0, share))
    if has_color():
        return _colored("█" * wide, f"38;5;{_HEAT[round(share * (len(_HEAT) - 1))]}")
    return _BARS[round(share * (len(_BARS) - 1))] * wide


def has_blocks() -> bool:
    """True if stdout is a terminal that can show block characters."""
    return is_terminal() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def one_line(text: str) -> str:
    """`text` as one printable line, with its indentation."""
    inner = text.lstrip(" ")
    return " " * (len(text) - len(inner)) + printable(" ".join(inner.split()))


# What runners of workflows take for a command: GitHub's `::` that begins a line, its older `##[` anywhere (actions/runner,
# `ActionCommand.cs`), `##vso[` of Azure and `##teamcity[`. The character that is replaced is the match's last.
_COMMAND = re.compile(r"(?m)(?<=#)#(?=[a-z]*\[)|^ *:(?=:)")


def inert(text: str, spelled: str = "\\x{:02x}") -> str:
    """`text` without commands to a runner of workflows; `spelled` writes a character as an escape of the text's language."""
    return _COMMAND.sub(lambda found: found[0][:-1] + spelled.format(ord(found[0][-1])), text)


def _line(text: str) -> str:
    """The line to print for `text`: everything but our own colors as printable characters."""
    codes = _COLOR.split(text)
    codes[::2] = map(printable, codes[::2])
    codes[1::2] = [f"\x1b[{code}m" for code in codes[1::2]]
    return inert("".join(codes))


def write(text: str = "") -> None:
    """Print one line of the result; a terminal gets it broken between words, where it does not fit."""
    line, screen = _line(text), width()
    for piece in [line] if screen is None else _broken(line, screen):
        print(piece)


_SHOWN_COLOR = re.compile("\x1b\\[[0-9;]+m")
# With the spaces before it; a command in backticks is one, so that it can be copied.
_WORD = re.compile("^ +$| *(?:`[^`]*`|[^ ])+| +$")


def _broken(line: str, screen: int) -> list[str]:
    """A printable line in pieces of at most `screen` columns; those after the first are indented, and no word is cut."""

    def wide(text: str) -> int:
        return len(_SHOWN_COLOR.sub("", text))

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
    """Text that comes in pieces: shown at once on a terminal, elsewhere line by line, because a command may be cut in two."""

    def __init__(self) -> None:
        self._line = ""

    def write(self, piece: str) -> None:
        """Print what is complete of the text, its tabs as spaces."""
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


def redraw(text: str, *, done: bool) -> None:
    """Print one line in the place of the last that was not done, which it has to cover; a dumb terminal gets those that are."""
    if os.environ.get("TERM") != "dumb":
        print(f"\r{_line(text)}", end="\n" if done else "", flush=True)
    elif done:
        print(_line(text))


def flush() -> None:
    """Send what was printed so far: a pipe or a file would hold the address of a server back until the server ends."""
    sys.stdout.flush()


def write_lines(lines: Iterable[str]) -> None:
    """Print lines of the result."""
    for line in lines:
        write(line)


def write_document(text: str) -> None:
    """Print a document in a language of its own, in which the caller has escaped foreign texts."""
    print(text)


def say(text: str, *, aside: str = "", whole: bool = False) -> None:
    """Print one line about the work to stderr, broken as by `write` unless it is to be copied whole.

    An aside at its end is dim on a terminal with colors.
    """
    if aside:
        aside = f"  \x1b[2m{_line(aside)}\x1b[0m" if has_color(sys.stderr) else f"  {_line(aside)}"
    line = _line(text) + aside
    pieces = _broken(line, shutil.get_terminal_size().columns) if sys.stderr.isatty() and not whole else [line]
    print("\n".join(pieces), file=sys.stderr)


@functools.cache
def deprecated(ref: str, message: str | None) -> None:
    """Warn on stderr, once, about a deprecated adapter; None if it is not deprecated."""
    if message is not None:
        say(one_line(f"warning: {ref} is deprecated" + (f": {message}" if message else "")))


def agreed(question: str) -> bool:
    """Ask a yes-or-no question on the terminal; False for no, for an empty answer and for none."""
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
    """JSON in ASCII, without commands to a runner of workflows."""
    return inert(json.dumps(document, indent=indent, ensure_ascii=True), "\\u{:04x}")


def emit(document: Any, *, as_json: bool, text: Callable[[], None]) -> None:
    """Print the document, or call `text` to print for people."""
    if as_json:
        write_json(document)
    else:
        text()


def error_document(error: AdapterhubError) -> dict[str, Any]:
    """An error for `--json`.

    `refused` has every reason of a refusal, with its tensor or module, `problems` one line each.
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
    """A digest; on a terminal its first 12 digits, which a ref accepts too."""
    return text[: len("sha256:") + 12] if is_terminal() else text


def more(count: int, noun: str = "") -> str:
    """The line for the rest of a shortened table or list."""
    return f"… and {count:,} more{f' {noun}' if noun else ''} (--json has all)"


@dataclass(frozen=True)
class Column:
    """`drop`: may be dropped on a narrow screen, the highest first, 0 never. `wrap`, `cut`: for the last column."""

    title: str
    drop: int = 0
    right: bool = False
    wrap: bool = False
    cut: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, screen: int | None = None) -> list[str]:
    """Lines of a table within `screen` columns; None for no limit."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = _widths(columns, rows)
    shown = _shown(columns, widths, screen)
    lines = [_row([column.title for column in columns], columns, widths, shown, None)]
    lines += [_row(row, columns, widths, shown, screen) for row in cells]
    return [line for block in lines for line in block]


def write_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table within the columns of the terminal, and which of its own columns that leaves out."""
    screen = width()
    write_lines(table(columns, rows, screen=screen))
    shown = _shown(columns, _widths(columns, rows), screen)
    hidden = [column.title for i, column in enumerate(columns) if i not in shown and column.title]
    if hidden:
        write(color(cut(f"not shown for the width: {', '.join(hidden)}", screen), "dim"))


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max([len(column.title), *(len(printable(row[i])) for row in rows)]) for i, column in enumerate(columns)]


def _shown(columns: Sequence[Column], widths: Sequence[int], screen: int | None) -> list[int]:
    """The columns to show: those that cannot be dropped, and of the others, the least droppable first, each that still fits."""
    shown = [i for i, column in enumerate(columns) if not column.drop or screen is None]
    for i in sorted(set(range(len(columns))) - set(shown), key=lambda i: (columns[i].drop, i)):
        more = sorted([*shown, i])
        if screen is not None and _least(columns, widths, more) <= screen:
            shown = more
    return shown


def _least(columns: Sequence[Column], widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(min(widths[i], 24) if columns[i].wrap or columns[i].cut else widths[i] for i in shown) + 2 * (len(shown) - 1)


def _row(
    row: Sequence[str], columns: Sequence[Column], widths: Sequence[int], shown: Sequence[int], screen: int | None
) -> list[str]:
    parts = [row[i].rjust(widths[i]) if columns[i].right else row[i].ljust(widths[i]) for i in shown]
    line = "  ".join(parts).rstrip()
    last = shown[-1]
    if screen is not None and columns[last].cut:
        return [cut(line, screen)]
    if screen is None or len(line) <= screen or not columns[last].wrap:
        return [line]
    left = sum(widths[i] for i in shown[:-1]) + 2 * (len(shown) - 1)
    pieces = textwrap.wrap(row[last], max(screen - left, 20), break_long_words=False, break_on_hyphens=False)
    head = "  ".join(parts[:-1])
    return [f"{head}  {pieces[0]}", *(" " * left + piece for piece in pieces[1:])]


def cut(text: str, screen: int | None) -> str:
    """`text` as a printable one within `screen` columns, with an ellipsis if it was longer."""
    text = printable(text)
    return text if screen is None or len(text) <= screen else text[: max(screen - 1, 0)].rstrip() + "…"


def wrapped(text: str, screen: int | None, *, indent: int = 0) -> list[str]:
    """`text` as one printable line, or wrapped between words, with later lines indented."""
    text = printable(text)
    if screen is None or len(text) <= screen:
        return [text]
    return textwrap.wrap(text, screen, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def pairs(items: Mapping[str, str], *, screen: int | None = None) -> list[str]:
    """`key  value` lines, the values aligned and wrapped under themselves."""
    wide = max((len(key) for key in items), default=0)
    lines = []
    for key, value in items.items():
        text, room = printable(value), (screen or 10_000) - wide - 2
        pieces = textwrap.wrap(text, max(room, 20), break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(f"{key.ljust(wide)}  {pieces[0]}".rstrip())
        lines += [" " * (wide + 2) + piece for piece in pieces[1:]]
    return lines


def write_pairs(items: Mapping[str, str]) -> None:
    """Print `key  value` lines within the columns of the terminal."""
    write_lines(pairs(items, screen=width()))
