"""The values in the TOML of a settings file, each read as one type; an error names the file, the line and the key."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any

from adapterhub.identity import MAX_LENGTH, Identity
from adapterhub.manifest.package_files import MAX_PATTERN, MAX_PATTERNS
from adapterhub_converters.containers import toml_file
from adapterhub_converters.errors import UsageError

Table = str | tuple[str, ...]
"""The name of a table, or its parts if one of them may contain a dot."""


class SettingsDocument:
    """A TOML document whose errors name the line; UsageError for a value of another type than the one that is read."""

    def __init__(self, text: str, path: Path) -> None:
        self._text, self._path = text, path
        self.document = toml_file.parse(text, str(path))

    def table(self, *name: str) -> dict[str, Any]:
        """Return a table, or an empty one if it is missing."""
        table = self.document
        for depth, part in enumerate(name):
            table = table.get(part, {})
            self.check(isinstance(table, dict), name[:depth], part, "is not a table")
        return table

    def check_keys(self, table: Table, keys: tuple[str, ...]) -> None:
        """Check that a table has no other keys than these."""
        for key in self.table(*_parts(table)):
            self.check(key in keys, table, key, "is unknown", f"Known keys: {', '.join(keys)}")

    def patterns(self, table: Table) -> list[str]:
        """Return the keys of a table that are names or patterns of names, of bounded length and number."""
        *above, name = _parts(table)
        patterns = list(self.table(*above, name))
        self.check(len(patterns) <= MAX_PATTERNS, tuple(above), name, f"has more than {MAX_PATTERNS} patterns")
        for pattern in patterns:
            self.check(0 < len(pattern) <= MAX_PATTERN, table, pattern, "is not a pattern of names")
        return patterns

    def text(self, table: Table, key: str, *, required: bool = False) -> str | None:
        """Return a string of one line; None if it is missing."""
        value = self.table(*_parts(table)).get(key)
        # One printable line, because these values appear in errors and tables.
        is_valid = (value is None and not required) or (isinstance(value, str) and value and value.isprintable())
        self.check(is_valid, table, key, "is missing" if value is None else "is not a string of one line")
        return value

    def texts(self, table: Table, key: str) -> tuple[str, ...]:
        """Return a list of strings; empty if it is missing."""
        rules = self.table(*_parts(table))
        value = rules.get(key, [])
        is_valid = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        self.check(is_valid and (value or key not in rules), table, key, "is not a list of strings")
        is_short = len(value) <= MAX_PATTERNS and all(len(item) <= MAX_PATTERN for item in value)
        limits = f"is not a list of at most {MAX_PATTERNS} strings of at most {MAX_PATTERN} characters"
        self.check(is_short, table, key, limits)
        return tuple(value)

    def signers(self, table: Table, key: str, file: Path) -> tuple[Path | Identity, ...]:
        """Return a list of keys and identities.

        A key is a path relative to the folder of `file`, which is made absolute; an identity is a table.
        """
        rules = self.table(*_parts(table))
        value = rules.get(key)
        is_valid = isinstance(value, list) and 0 < len(value) <= MAX_PATTERNS and all(map(_is_signer, value))
        hint = 'Write it like ["keys/team.pub", { identity = "name@example.com", issuer = "https://accounts.example.com" }]'
        self.check(is_valid, table, key, f"is not a list of at most {MAX_PATTERNS} paths of keys, and identities", hint)
        folder = file.absolute().parent
        signers: list[Path | Identity] = []
        for entry in value or ():
            if isinstance(entry, str):
                signers.append(folder / os.path.expanduser(entry))
            else:
                config = entry.get("trust_config")
                path = folder / os.path.expanduser(config) if config else None
                signers.append(Identity(entry["identity"], entry["issuer"], path))
        return tuple(signers)

    def count(self, table: Table, key: str) -> int | None:
        """Return a positive integer; None if it is missing."""
        value = self.table(*_parts(table)).get(key)
        self.check(value is None or (type(value) is int and value > 0), table, key, "is not a whole number above 0")
        return value

    def switch(self, table: Table, key: str) -> bool:
        """Return a boolean; False if it is missing."""
        value = self.table(*_parts(table)).get(key, False)
        self.check(type(value) is bool, table, key, "is neither true nor false")
        return bool(value)

    def check(self, is_valid: object, table: Table, key: str, problem: str, hint: str = "") -> None:
        """Raise UsageError, with the line of the key, unless `is_valid`."""
        if not is_valid:
            inside = ".".join(_parts(table))
            line = toml_file.line_of(self._text, inside, key)
            name = f"{inside}.{key}" if inside else key
            raise UsageError(
                f"{self._path}:{line}" if line else str(self._path), f"{name[:80]!r} {problem}", hint, code="invalid-config"
            )


def _is_signer(value: object) -> bool:
    """Return whether a value is a path, or an identity with its issuer."""
    if not isinstance(value, dict):
        return isinstance(value, str) and bool(value) and len(value) <= MAX_PATTERN and value.isprintable()
    has_known_keys = {"identity", "issuer"} <= value.keys() <= {"identity", "issuer", "trust_config"}
    return has_known_keys and all(
        isinstance(member, str) and 0 < len(member) <= MAX_LENGTH and member.isprintable() for member in value.values()
    )


def _parts(table: Table) -> tuple[str, ...]:
    """Return the parts of a table's name; the empty name is the top level."""
    return table if isinstance(table, tuple) else (table,) if table else ()
