"""Values in a notebook: a small HTML table of rows, with every text escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[object]], *, head: Sequence[object] = (), caption: object = "") -> str:
    """An HTML table; texts are escaped, None is shown as an empty cell.

    Example:
        >>> table([["r", 8]], head=["field", "value"])
        '<table><tr><th>field</th><th>value</th></tr><tr><td>r</td><td>8</td></tr></table>'
    """
    lines = [f"<caption>{_text(caption)}</caption>"] if caption else []
    if head:
        lines.append("".join(f"<th>{_text(cell)}</th>" for cell in head))
        lines[-1] = f"<tr>{lines[-1]}</tr>"
    lines += [f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _text(value: object) -> str:
    return "" if value is None else html.escape(str(value))
