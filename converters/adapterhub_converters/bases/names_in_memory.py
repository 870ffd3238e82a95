"""The names that transformers 5 gives the tensors of a file when it loads them, from its own rules.

transformers renames parameters when it loads and again when it saves them (transformers 5.24, `conversion_mapping.py`): files
keep the names of transformers 4 or of the model's makers, while peft sees, and writes, those of the model in memory.
`names_in_memory.json` has the rules for every class; `python -m tests.support.transformers_names` writes it from the installed
transformers. Rules that change values too, for example by splitting a tensor, are not renamings and are not in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.lazy_dataclass import dataclass

_TABLE = Path(__file__).with_name("names_in_memory.json")
# What every model still reads: TensorFlow's names for a normalization's weight and bias.
_TENSORFLOW_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True, slots=True)
class Rule:
    r"""One renaming: what it finds in a name, and what it puts in its place (core_model_loading.py, `WeightTransform`).

    Attributes:
        find: The pattern. It has no lookaround, which RE2 lacks; `not_after` and `not_before` are in its place.
        put: The new text; `\1` is the first group.
        not_after: What must not be before a match.
        not_before: What must not follow it.
        when: A pattern that some name of the file must have, or the rule does not apply.
        add: Added to the number that is the first group.
        divide: By what the number is then divided.
        places: The prefixes of names that the rule is for, and that it ignores; the first that fits.
        literal: Text that every match contains, to be looked for before the pattern, which takes much longer.
    """

    find: safe_regex.Pattern
    put: str
    not_after: safe_regex.Pattern | None = None
    not_before: safe_regex.Pattern | None = None
    when: safe_regex.Pattern | None = None
    add: int = 0
    divide: int = 1
    places: tuple[str, ...] = ("",)
    literal: str = ""

    def rename(self, name: str) -> str:
        """Return the name that the rule makes of a name; the same name if it does not apply."""
        place = next((place for place in self.places if name.startswith(place)), None)
        if place is None:
            return name
        inner = name.removeprefix(place)
        match = self._match(inner) if self.literal in inner else None
        if match is None:
            return name
        put = self.put.replace(r"\1", self._group(match)) if r"\1" in self.put else self.put
        # As transformers does it: the first occurrence of the matched text.
        return place + inner.replace(match[0], put, 1)

    def _match(self, name: str) -> safe_regex.Match | None:
        if self.not_after is None and self.not_before is None:
            return self.find.search(name)
        for match in self.find.finditer(name):
            end = match.start() + len(match[0])
            after, before = self.not_after, self.not_before
            if not (after and after.search(name[: match.start()])) and not (before and before.match(name[end:])):
                return match
        return None

    def _group(self, match: safe_regex.Match) -> str:
        text = match[1] or ""
        return str((int(text) + self.add) // self.divide) if (self.add, self.divide) != (0, 1) else text


@dataclass(frozen=True)
class Renaming:
    """The renaming of a model's tensors, in the order of its rules: one may apply to the result of one before it."""

    rules: tuple[Rule, ...]

    def __call__(self, name: str) -> str:
        """Return the name in memory of a tensor, or of a module, whose file's other names are not known."""
        return self.names([name])[name]

    def names(self, names: Iterable[str]) -> dict[str, str]:
        """Return the names in memory of all tensors of a file, by their names in it."""
        renamed = {name: name for name in names}
        for rule in self.rules:
            if rule.when is None or any(rule.when.search(name) for name in renamed.values()):
                renamed = {name: rule.rename(new) for name, new in renamed.items()}
        return {name: _without_tensorflow(new) for name, new in renamed.items()}

    def has_model_at(self, prefix: str) -> bool:
        """Return whether names with this prefix are known to be those of a model inside the model."""
        return any(prefix in rule.places for rule in self.rules)

    def module(self, target: str) -> str:
        """Return the name in memory of a module."""
        return self(f"{target}.weight").removesuffix(".weight")


def _without_tensorflow(name: str) -> str:
    suffix = next((suffix for suffix in _TENSORFLOW_NAMES if name.endswith(suffix)), None)
    return name.removesuffix(suffix) + _TENSORFLOW_NAMES[suffix] if suffix else name


@cache
def renaming(model_type: str, class_name: str = "") -> Renaming:
    """Return the renaming of a class of models, or of the usual class of a model type if the class is not known.

    It is empty where transformers renames nothing.
    """
    table = _table()
    # A type that is a row itself has its own rules for another type's class.
    names = (model_type, class_name, table["types"].get(model_type, ""))
    row = next((table["models"][name] for name in names if name in table["models"]), None)
    if row is None:
        return Renaming(())
    return Renaming(tuple(rule for place, key in row["rules"] for rule in _rules(key, _places(row["prefix"], place))))


def _places(prefix: str, place: str | None) -> tuple[str, ...]:
    """Return the prefixes of names in a model inside the model: with or without that of the base model, whose files lack it."""
    if place is None:
        return ("",)
    inner, outer = (f"{part}." if part else "" for part in (place, prefix))
    return (outer + inner, inner)


def _rules(key: str, places: tuple[str, ...]) -> Iterable[Rule]:
    return (dataclasses.replace(rule, places=places) for rule in _rules_of_key(key))


@cache
def _rules_of_key(key: str) -> tuple[Rule, ...]:
    return tuple(_rule(find, put, *conditions) for find, put, *conditions in _table()["rules"][key])


def _rule(find: str, put: str, conditions: Mapping[str, Any] | None = None) -> Rule:
    values: dict[str, Any] = {**(conditions or {})}
    values |= {name: safe_regex.Pattern(value) for name, value in values.items() if isinstance(value, str)}
    return Rule(safe_regex.Pattern(find), put, **values, literal=_literal_start(find))


def _literal_start(pattern: str) -> str:
    """Return the text with which every match of a pattern begins, as far as that is plain; empty if it has alternatives."""
    text = pattern.removeprefix("^").replace(r"\.", "\0")
    end = next((i for i, c in enumerate(text) if not (c.isalnum() or c in "_\0")), len(text))
    # What may be repeated may also be absent.
    end -= text[end : end + 1] in ("?", "*", "{")
    return "" if "|" in pattern else text[: max(end, 0)].replace("\0", ".")


@cache
def _table() -> dict[str, Any]:
    return json_file.read_object(_TABLE)
