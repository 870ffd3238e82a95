"""Escaping of untrusted text for the place that shows it: a terminal, Markdown, HTML.

The command line's writer (`adapterhub/cli/output.py`) applies `printable` to everything that it prints, and
`adapterhub/picture.py` to labels. Code that writes a page calls the function for that place.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

# Characters without a shape that Unicode counts as letters, marks or symbols (DerivedCoreProperties,
# Default_Ignorable_Code_Point, and the empty pattern of Braille).
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_MAX_CELL_ITEMS = 20  # of a list in one cell, such as a curve of losses
# Markup within a line (a _ inside a word is not markup), and what GitHub turns into links: addresses, people, issues.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|^[#+>=-]|#(?=[0-9])|:(?=//)|(?<=www)\.|@", re.IGNORECASE)


def has_invisible(text: str) -> bool:
    """Return whether a character has no shape of its own: a control character, a zero width, a mark of text direction."""
    return any(unicodedata.category(char) in _HIDDEN for char in text) or bool(_INVISIBLE.search(text))


def printable(text: str) -> str:
    """Return `text` with all invisible characters escaped, so that it cannot control a terminal or look like another text."""
    # The common case, without a loop over characters.
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() and not _INVISIBLE.match(char) else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def markdown(text: str) -> str:
    """Return `text` as one line of Markdown that shows only the text: no markup, no HTML, no link, one cell of a table."""
    # `&` first, or it would escape the escapes.
    escaped = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", escaped)


def front_matter(values: Mapping[str, object]) -> list[str]:
    """Return the lines of a model card's front matter; each value is JSON, whose escapes are YAML's too."""
    pairs = [f"{key}: {printable(json.dumps(value, ensure_ascii=False))}" for key, value in values.items() if value]
    return ["---", *pairs, "---"]


def table(rows: Iterable[Sequence[object]], *, head: Sequence[object] = (), caption: object = "") -> str:
    """Return an HTML table; texts are escaped, numbers are for people, and None is an empty cell.

    A caption may be a repr: its angle brackets are left out.

    Example:
        >>> table([["r", 8]], head=["field", "value"])
        '<table><tr><th>field</th><th>value</th></tr><tr><td>r</td><td>8</td></tr></table>'
    """
    lines = [f"<caption>{_html_text(str(caption).removeprefix('<').removesuffix('>'))}</caption>"] if caption else []
    if head:
        lines.append("".join(f"<th>{_html_text(cell)}</th>" for cell in head))
        lines[-1] = f"<tr>{lines[-1]}</tr>"
    lines += [f"<tr>{''.join(f'<td>{_html_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _html_text(value: object) -> str:
    import html  # 2 ms, for notebooks alone

    if isinstance(value, float):
        value = f"{value:.3g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return "" if value is None else html.escape(printable(str(value)))


def cell_value(value: object) -> object:
    """Return a JSON value for a cell of `table`: numbers and texts as they are, lists and objects in one line, cut if long."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell_value(item)}" for key, item in value.items() if item not in (None, [], {}))
    if isinstance(value, list | tuple):
        remainder = [f"and {len(value) - _MAX_CELL_ITEMS:,} more"] if len(value) > _MAX_CELL_ITEMS else []
        return ", ".join([*(str(cell_value(item)) for item in value[:_MAX_CELL_ITEMS]), *remainder])
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value


# ---- numbers for people


def format_size(count: int) -> str:
    """Return a number of bytes for people, such as `4.2 MB`; powers of 1000, as disks are sold."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"


def format_count(count: int) -> str:
    """Return a count for people, such as `2.4 M`."""
    value, units = float(count), ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count}" if not units[0] else f"{value:.1f} {units[0]}"


def format_plural(count: int, noun: str) -> str:
    """Return a count with its noun: `1 error`, `2 errors`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
