"""The schemas are documents for people as well: valid, and every field explained by an example that validates."""

from __future__ import annotations

from collections.abc import Iterator
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
    seen = dict(fields(schema))
    assert seen
    for path, field in seen.items():
        assert field.get("description"), path
        assert field.get("examples"), path
        for example in field["examples"]:
            Draft202012Validator({**field, "$defs": schema.get("$defs", {})}).validate(example)


def test_an_unknown_schema_is_a_key_error() -> None:
    for name in ("nothing", "../adapter"):
        with pytest.raises(KeyError):
            adapterhub_schemas.load(name)
