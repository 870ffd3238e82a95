"""Model cards: the README of an adapter, its front matter and its prose.

The front matter is YAML (Hugging Face's docs, "Model Cards"), of which only the forms that cards use are parsed. Anything else
is skipped: this feeds a search, and nothing is decided by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from adapterhub_converters import yaml_lines

NAMES = ("readme.md", "model_card.md")
MAX_BYTES = 1 << 20  # a larger card is not read
MAX_PROSE = 32_768  # characters that are searched
_MAX_VALUES, _MAX_VALUE = 100, 200


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
    found = {
        key: tuple(value[:_MAX_VALUE] for value in values[:_MAX_VALUES])
        for key, values in yaml_lines.mapping(lines[1:end]).items()
        if values
    }
    return Card(found, "\n".join(lines[end + 1 if end else 1 :])[:MAX_PROSE])
