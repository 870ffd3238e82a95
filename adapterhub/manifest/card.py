"""Model cards: the README of an adapter, its front matter and its prose.

The front matter is YAML (Hugging Face's docs, "Model Cards"). Of YAML only the forms that cards use are parsed: `key: value`,
`key: [a, b]` and lists of `- value` lines. Anything else is skipped: this feeds a search, and nothing is decided by it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NAMES = ("readme.md", "model_card.md")
MAX_BYTES = 1 << 20  # a larger card is not read
MAX_PROSE = 32_768  # characters that are searched
_MAX_VALUES, _MAX_VALUE = 100, 200
_KEY = re.compile(r"([A-Za-z_][\w-]*):(?:\s+(.*))?$")


@dataclass(frozen=True)
class Card:
    """Front matter as key to values, and the first of the text below it."""

    fields: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prose: str = ""

    def values(self, *keys: str) -> tuple[str, ...]:
        """The values under any of these keys."""
        return tuple(value for key in keys for value in self.fields.get(key, ()))

    @property
    def title(self) -> str:
        """Its first heading, if the text begins with one."""
        first = self.prose.lstrip().partition("\n")[0]
        return first.lstrip("#").strip() if first.startswith("#") else ""


def parse(text: str) -> Card:
    """Parse the text of a README; any text is a card."""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return Card(prose=text[:MAX_PROSE])
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")), 0)
    return Card(_front_matter(lines[1:end]), "\n".join(lines[end + 1 if end else 1 :])[:MAX_PROSE])


def _front_matter(lines: list[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    key = ""
    for line in lines:
        if match := _KEY.match(line):
            key, value = match[1], (match[2] or "").strip()
            inner = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
            found[key] = [item for item in map(_scalar, inner) if item]
        elif key and re.match(r"\s*-\s+", line):
            value = _scalar(line.partition("-")[2])
            if value and len(found[key]) < _MAX_VALUES:
                found[key].append(value)
        elif line[:1].strip():
            key = ""
    return {key: tuple(values[:_MAX_VALUES]) for key, values in found.items() if values}


def _scalar(text: str) -> str:
    """A plain or quoted value; empty for null, maps and blocks."""
    text = text.strip()
    if text[:1] in ("'", '"') and text[-1:] == text[0] and len(text) > 1:
        return text[1:-1][:_MAX_VALUE]
    text = re.sub(r"\s+#.*", "", text)
    return "" if not text or text[0] in "{[|>&*!#" or text in ("null", "~") or ": " in text else text[:_MAX_VALUE]
