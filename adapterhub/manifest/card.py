"""Model cards: the README of an adapter, with its front matter and its prose.

The front matter is YAML (Hugging Face's docs, "Model Cards"); only the forms that cards use are parsed, and everything else is
skipped. The license and the description of a card count if neither adapter.toml nor adapter.json has one.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from adapterhub_converters import yaml_lines
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

from .base_name import public_repo
from .document import AdapterManifest

NAMES = ("readme.md", "model_card.md")
MAX_BYTES = 1 << 20  # a larger card is not read
MAX_PROSE = 32_768  # characters that are searched
_MAX_VALUES, _MAX_VALUE = 100, 200  # values of a key, and characters of a value


@dataclass(frozen=True)
class Card:
    """A model card: front matter as key to values, and the beginning of the text below it."""

    fields: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prose: str = ""

    def values(self, *keys: str) -> tuple[str, ...]:
        """Return the values under any of these keys."""
        return tuple(value for key in keys for value in self.fields.get(key, ()))

    @property
    def title(self) -> str:
        """Its first heading, if the text begins with one."""
        first = self.prose.lstrip().partition("\n")[0]
        return first.lstrip("#").strip() if first.startswith("#") else ""


def with_card(manifest: AdapterManifest, card: Card) -> AdapterManifest:
    """Return the manifest with the license, the description and the base's name of a card where it has none."""
    additions: dict[str, Any] = {}
    for key in ("license", "description"):
        values = card.values(key)
        # Of two licenses, nothing says which one applies.
        if getattr(manifest, key) is None and len(values) == 1:
            additions[key] = values[0]
    if manifest.base.repo is None and (repo := base_repo(card)):
        additions["base"] = replace(manifest.base, repo=repo)
    return replace(manifest, **additions) if additions else manifest


def base_repo(card: Card) -> str | None:
    """Return the name of the base on the Hub by its card; None unless there is exactly one."""
    values = card.values("base_model")
    return public_repo(values[0]) if len(values) == 1 else None


def license_in(folder: Path) -> str | None:
    """Return the license in the card of a folder, such as that of a base model; None unless there is exactly one."""
    card_file = find(folder)
    values = decode(card_file[1]).values("license") if card_file else ()
    return values[0] if len(values) == 1 else None


def find(folder: Path) -> tuple[Path, bytes] | None:
    """Return the path and the bytes of the card in a folder; None if there is none that can be read."""
    # The usual spellings first: file systems may or may not distinguish case.
    for name in ("README.md", "MODEL_CARD.md", *NAMES):
        with suppress(OSError, AdapterhubError), open_regular(folder / name) as file:
            raw = file.read(MAX_BYTES + 1)
            return (folder / name, raw) if len(raw) <= MAX_BYTES else None
    return None


def read(folder: Path) -> Card:
    """Return the card in a folder; empty if there is none that can be read."""
    card_file = find(folder)
    return decode(card_file[1]) if card_file else Card()


def decode(raw: bytes) -> Card:
    """Return the card in the bytes of a README."""
    return parse(raw.decode("utf-8", "replace"))


def parse(text: str) -> Card:
    """Parse the text of a README; any text is a valid card."""
    # Some editors begin a file with a byte order mark.
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return Card(prose=text[:MAX_PROSE])
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")), 0)
    front_matter = {
        key: tuple(value[:_MAX_VALUE] for value in values[:_MAX_VALUES])
        for key, values in yaml_lines.mapping(lines[1:end]).items()
        if values
    }
    return Card(front_matter, "\n".join(lines[end + 1 if end else 1 :])[:MAX_PROSE])
