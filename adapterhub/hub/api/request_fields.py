"""The fields of the JSON object in a request, each read as a value of one type; UsageError for a value of another type."""

from __future__ import annotations

from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import UsageError

_MAX_VALUES = 100


def text_field(fields: dict[str, Any], key: str, default: str | None = None) -> str:
    """Return a text; `default` if it is missing, and without one UsageError."""
    value = fields.get(key, default)
    if not isinstance(value, str):
        raise UsageError(key, "is not a text" if key in fields else "is missing")
    return value


def flag_field(fields: dict[str, Any], key: str) -> bool | None:
    """Return a truth value; None if it is missing."""
    value = fields.get(key)
    if not isinstance(value, bool | None):
        raise UsageError(key, "is neither true nor false")
    return value


def count_field(fields: dict[str, Any], key: str) -> int | None:
    """Return an integer; None if it is missing or null."""
    value = fields.get(key)
    if value is not None and not json_file.is_integer(value):
        raise UsageError(key, "is not an integer")
    return value


def number_field(fields: dict[str, Any], key: str) -> float | None:
    """Return a number; None if it is missing or null."""
    value = fields.get(key)
    if value is not None and not json_file.is_number(value):
        raise UsageError(key, "is not a number")
    return None if value is None else float(value)


def texts_field(fields: dict[str, Any], key: str) -> list[str]:
    """Return a list of texts, empty if it is missing."""
    values = fields.get(key, [])
    if not isinstance(values, list) or len(values) > _MAX_VALUES or not all(isinstance(value, str) for value in values):
        raise UsageError(key, f"is not a list of at most {_MAX_VALUES} texts")
    return values


def mapping_field(fields: dict[str, Any], key: str) -> dict[str, str]:
    """Return an object whose values are texts, empty if it is missing."""
    values = fields.get(key, {})
    if (
        not isinstance(values, dict)
        or len(values) > _MAX_VALUES
        or not all(isinstance(value, str) for value in values.values())
    ):
        raise UsageError(key, f"is not an object with at most {_MAX_VALUES} texts")
    return values
