"""The schemas are documents for people as well: valid, and every field explained by an example that validates."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import adapterhub_schemas


def fields(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property at every depth."""
    if isinstance(schema, list):
        for item in schema:
            yield from fields(item, path)
    if not isinstance(schema, dict):
        return
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(field, f"{path}.{name}")
    for key in ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "$defs"):
        inner = schema.get(key)
        yield from fields(list(inner.values()) if key == "$defs" and inner else inner, f"{path}[]")


@pytest.mark.parametrize("name", adapterhub_schemas.names())
def test_schema_is_valid_and_every_field_has_a_description_and_examples_that_validate(name: str) -> None:
    schema = adapterhub_schemas.load(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"].startswith("urn:adapterhub:schema:")
    documented_fields = dict(fields(schema))
    assert documented_fields
    for path, field in documented_fields.items():
        assert field.get("description"), path
        assert field.get("examples"), path
        for example in field["examples"]:
            Draft202012Validator({**field, "$defs": schema.get("$defs", {})}).validate(example)


def test_an_unknown_schema_is_a_key_error() -> None:
    for name in ("nothing", "../adapter"):
        with pytest.raises(KeyError):
            adapterhub_schemas.load(name)


ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1.0, 0.5, 2.0, 2**70, -0.0, float("inf"), "", "x", "x" * 70_000, "1", "é\n",
    "sha256:" + "0" * 64, "sha256:" + "0" * 64 + "\n", [], [1], ["x", "x"], ["x", "y"], [[]], [None], [True, 1], {}, {"x": 1},
    {"r": 8, "alpha": 16.0}, {"path": "a", "size": 1, "digest": "sha256:" + "0" * 64},
]  # fmt: skip


@pytest.mark.parametrize("name", adapterhub_schemas.names())
def test_the_quick_check_of_every_part_accepts_what_jsonschema_accepts(name: str) -> None:
    schema = adapterhub_schemas.load(name)
    accepted = 0
    for path, rule in [("", schema), *fields(schema), *fields(list(schema["$defs"].values()))]:
        oracle = Draft202012Validator({**rule, "$defs": schema["$defs"]})
        for value in [*ODD_VALUES, *rule.get("examples", ()), *nearly(rule.get("examples", ()))]:
            accepted += adapterhub_schemas.accepts(value, rule, schema)
            assert adapterhub_schemas.accepts(value, rule, schema) == oracle.is_valid(value), (path, value)
    assert accepted > 150


def nearly(examples: Iterable[Any]) -> Iterator[Any]:
    """Return each example that is an object or a list with each of its items left out, and replaced by odd values."""
    for example in examples:
        keys = list(example) if isinstance(example, dict) else range(len(example)) if isinstance(example, list) else ()
        for key in keys:
            shorter = copy.deepcopy(example)
            del shorter[key]
            yield shorter
            for value in [None, True, -1, "", [], {}, *nearly([example[key]])]:
                changed = copy.deepcopy(example)
                changed[key] = value
                yield changed
        if isinstance(example, dict):
            yield {**example, "unlisted": 1}


def test_a_rule_that_the_quick_check_does_not_know_is_an_error_and_no_pass() -> None:
    with pytest.raises(KeyError):
        adapterhub_schemas.accepts({}, {"patternProperties": {}}, {})


def test_what_violates_a_schema_is_said_in_the_words_of_jsonschema() -> None:
    assert adapterhub_schemas.violation({"schema_version": 3}, "adapter") == ([], "'$schema' is a required property")
