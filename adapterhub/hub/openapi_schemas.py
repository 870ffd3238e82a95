"""The parts of the OpenAPI document that its sections share: an operation, and the schemas of common values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from adapterhub_converters.lazy_dataclass import dataclass

Schema = Mapping[str, Any]
JSON = "application/json"
NOTHING = ""
"""The media type of a response without a body."""
LOGIN = ("bearer", "basic")
MOVED = {200: JSON, 307: NOTHING}
"""The answers about a repository: also that it has another name now."""


@dataclass(frozen=True)
class Operation:
    """A method of a path, as the document describes it.

    Attributes:
        summary: What it does.
        answers: The media type of each successful status.
        errors: The error statuses besides those every operation of the protocol has.
        query: Parameters in the query string.
        body: What may be sent, by media type.
        needs: The security schemes of which one is always required.
    """

    summary: str
    answers: Mapping[int, str] = field(default_factory=lambda: {200: JSON})
    errors: tuple[int, ...] = ()
    query: Mapping[str, Schema] = field(default_factory=dict)
    body: Mapping[str, Schema] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def object_of(*required: str, **properties: Schema) -> Schema:
    """Return the schema of an object."""
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def list_of(items: Schema) -> Schema:
    """Return the schema of an array."""
    return {"type": "array", "items": items}


TEXT: Schema = {"type": "string"}
NONEMPTY: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$"}


def reading(summary: str, query: Mapping[str, Schema] | None = None, *, answers: Mapping[int, str] = MOVED) -> Operation:
    """Return an operation that reads a repository, for clients that may see it."""
    return Operation(summary, answers, (404,), query or {})
