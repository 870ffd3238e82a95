"""JSON Schemas of adapterhub's own files, and the check of a document against one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["accepts", "load", "names", "violation"]

# A keyword of a schema: its argument, the value that is checked, and the whole schema, in which a $ref is looked up.
Keyword = Callable[[Any, Any, Mapping[str, Any]], bool]


@cache
def load(name: str) -> dict[str, Any]:
    """Load the schema `name`, a JSON Schema 2020-12 document that callers must not modify; KeyError if there is none."""
    if name not in names():
        raise KeyError(name)
    path = Path(__file__).with_name(f"{name}.schema.json")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def names() -> list[str]:
    """Return the names of all schemas, sorted."""
    return sorted(path.name.removesuffix(".schema.json") for path in Path(__file__).parent.glob("*.schema.json"))


def violation(document: Any, name: str) -> tuple[list[str | int], str] | None:
    """Return where and how a document violates the schema `name` most tellingly: keys and a message; None if it conforms."""
    schema = load(name)
    if accepts(document, schema, schema):
        return None
    import jsonschema  # late: it takes as long as the rest of a command, and a document rarely violates its schema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(document))
    return None if error is None else ([*error.absolute_path], error.message)


def accepts(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """Return True only for a value that conforms to a schema; False also if that takes more than these few rules to tell.

    Raises KeyError for a keyword that is not listed here.
    """
    return all(_KEYWORDS[keyword](argument, value, root) for keyword, argument in schema.items() if keyword not in _NOTES) and (
        not isinstance(value, dict) or _accepts_items(value, schema, root)
    )


def _accepts_items(table: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """Check the items of an object: by `properties`, and those that it does not list by `additionalProperties`."""
    properties, additional = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key, item in table.items():
        rule = properties.get(key, additional)
        if rule is False or (rule is not True and not accepts(item, rule, root)):
            return False
    return True


def _has_type(names: str | list[str], value: Any, _root: Mapping[str, Any]) -> bool:
    return any(_TYPES[name](value) for name in ([names] if isinstance(names, str) else names))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(constant: Any, value: Any) -> bool:
    """Compare two plain values as JSON does, in which 1 is 1.0 and is not true; False for lists and objects."""
    return constant == value and isinstance(constant, bool) == isinstance(value, bool) and not isinstance(constant, dict | list)


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_NOTES = {"$schema", "$id", "$defs", "title", "description", "examples", "properties", "additionalProperties"}
# As in JSON Schema, a keyword says nothing about values of other types than its own.
_KEYWORDS: Mapping[str, Keyword] = {
    "type": _has_type,
    "const": lambda constant, value, _: _equal(constant, value),
    "enum": lambda members, value, _: any(_equal(member, value) for member in members),
    "pattern": lambda pattern, value, _: not isinstance(value, str) or re.search(pattern, value) is not None,
    "minLength": lambda limit, value, _: not isinstance(value, str) or len(value) >= limit,
    "maxLength": lambda limit, value, _: not isinstance(value, str) or len(value) <= limit,
    "minimum": lambda limit, value, _: not _is_number(value) or value >= limit,
    "maximum": lambda limit, value, _: not _is_number(value) or value <= limit,
    "exclusiveMinimum": lambda limit, value, _: not _is_number(value) or value > limit,
    "required": lambda keys, value, _: not isinstance(value, dict) or all(key in value for key in keys),
    "propertyNames": lambda rule, value, root: not isinstance(value, dict) or all(accepts(key, rule, root) for key in value),
    "items": lambda rule, value, root: not isinstance(value, list) or all(accepts(item, rule, root) for item in value),
    "minItems": lambda limit, value, _: not isinstance(value, list) or len(value) >= limit,
    "maxItems": lambda limit, value, _: not isinstance(value, list) or len(value) <= limit,
    # Equal texts only: other lists are left to jsonschema.
    "uniqueItems": lambda _, value, __: (
        not isinstance(value, list) or (all(isinstance(item, str) for item in value) and len({*value}) == len(value))
    ),
    "anyOf": lambda rules, value, root: any(accepts(value, rule, root) for rule in rules),
    "$ref": lambda target, value, root: accepts(value, root["$defs"][target.removeprefix("#/$defs/")], root),
}
