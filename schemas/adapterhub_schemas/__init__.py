"""JSON Schemas of adapterhub's own files; standard library only."""

import json
from functools import cache
from pathlib import Path
from typing import Any


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
