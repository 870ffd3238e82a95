"""The reference of the Python API, from the signatures and docstrings of the public names."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]

import adapterhub as ah

_SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example):\n", re.MULTILINE)
_ENTRY = re.compile(r"^    (?=\S)", re.MULTILINE)
_LINE = 100


def page() -> str:
    """Return the Markdown of every public name: functions, then classes with their methods."""
    values = {name: getattr(ah, name) for name in ah.__all__}
    lines = [
        "# Python API",
        "",
        "Every public name of `import adapterhub as ah`. [Python](../python.md) shows them at work.",
        "",
    ]
    lines.append("## Functions\n")
    for name, value in values.items():
        if not inspect.isclass(value):
            lines += _named(f"ah.{name}", value, "###")
    lines.append("## Classes\n")
    for name, value in values.items():
        if inspect.isclass(value):
            lines += _named(f"ah.{name}", value, "###")
            for method, member in vars(value).items():
                if not method.startswith("_") and inspect.isfunction(member):
                    lines += _named(f"{name}.{method}", member, "####")
    return "\n".join(lines)


def _named(name: str, value: Callable[..., Any], heading: str) -> Iterator[str]:
    yield from (f"{heading} {name}", "", "```python", _signature(name, value), "```", "")
    first, *sections = _SECTIONS.split(inspect.getdoc(value) or "")
    yield from (_text(first), "")
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        if title == "Example":
            yield from ("```pycon", inspect.cleandoc(text), "```", "")
        elif title in ("Returns", "Yields"):
            yield from (f"**{title}:** {_text(text)}", "")
        else:
            yield from (f"**{title}:**", "", *map(_item, _ENTRY.split(text)[1:]), "")


def _signature(name: str, value: Callable[..., Any]) -> str:
    """How it is called, a parameter a line if one does not do; errors and the like have none of their own."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return name
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    whole = str(signature.replace(parameters=parameters))
    whole = re.sub(r"(: |-> )'([^']*)'", r"\1\2", whole)  # annotations are kept as texts
    line = name.removeprefix("ah.") + whole
    return line if len(line) <= _LINE else re.sub(r", (?=[*\w]+(?:: |, |=))", ",\n    ", line.replace("(", "(\n    ", 1))


def _item(entry: str) -> str:
    term, _, about = entry.partition(": ")
    return f"- `{' '.join(term.split())}`: {_text(about)}"


def _text(text: str) -> str:
    """Words of a docstring, whose code is in backquotes, as Markdown that looks the same."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))
    pieces = re.split(r"(`[^`]*`)", "\n\n".join(paragraphs))
    pieces[::2] = [re.sub(r"([*_\[])", r"\\\1", piece.replace("<", "&lt;")) for piece in pieces[::2]]
    return "".join(pieces)
