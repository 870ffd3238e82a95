"""Conversion between JSON and the dataclasses of adapter.json, by the types of their fields."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from adapterhub_converters.containers import json_file

NullableFields = Mapping[type, tuple[str, ...]]
"""The fields that each class writes as null if they are None; its other fields are left out. Digests depend on it."""


def plain(value: Any, nullable: NullableFields) -> Any:
    """Return a value as JSON has it: dataclasses as objects under the names of their fields, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: plain(item, nullable) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, nullable) for item in value]
    if not is_dataclass(value):
        return value
    null = nullable.get(type(value), ())
    items = ((item.name, getattr(value, item.name)) for item in fields(value))
    return {name: plain(item, nullable) for name, item in items if item is not None or name in null}


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def build(kind: Any, value: Any) -> Any:
    """Return `value` as the type `kind`; None or empty if it has another type. In a list or a map, items that fit are kept."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:
        return next(
            (build(member, value) for member in arguments if member is not types.NoneType and fits(member, value)), None
        )
    if origin is tuple:
        return tuple(build(arguments[0], item) for item in value if fits(arguments[0], item)) if fits(kind, value) else ()
    if origin is Mapping:
        items = value.items() if fits(kind, value) else ()
        return {key: build(arguments[1], item) for key, item in items if fits(arguments[1], item)}
    if is_dataclass(kind):
        table = value if isinstance(value, Mapping) else {}
        record_type: Any = kind
        return record_type(**{name: build(hint, table.get(name)) for name, hint in _hints(record_type).items()})
    return _scalar(kind, value) if fits(kind, value) else kind()


def _scalar(kind: type, value: Any) -> Any:
    """Return an integer of an integer field also for 8.0, whose text would be another in a digest."""
    return int(value) if kind is int and abs(value) < 2**53 else value


def fits(kind: Any, value: object) -> bool:
    """Return True if a JSON value has the outer type `kind`; as in JSON Schema, 8.0 is an integer, and true is not a number."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return True
    if origin is types.UnionType:
        return any(fits(member, value) for member in typing.get_args(kind))
    if kind in (int, float):
        number = json_file.is_number(value)
        return number and (kind is float or float(typing.cast(float, value)).is_integer())
    if origin is Mapping or is_dataclass(kind):
        return isinstance(value, Mapping)
    return isinstance(value, list) if origin is tuple else isinstance(value, kind)
