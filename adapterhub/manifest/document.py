"""adapter.json across its schemas: documents of schema 1, which spelled two keys otherwise, stay readable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 2
SCHEMA_ID = f"urn:adapterhub:schema:adapter:{SCHEMA_VERSION}"
# British in schema 1, American since.
_RENAMED = {"licence": "license", "quantisation": "quantization"}


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """The document of schema 1 as one of schema 2; any other as it is. Nothing else of it is looked at."""
    if document.get("schema_version") != 1 or isinstance(document["schema_version"], bool):
        return document
    upgraded = _renamed(document)
    if isinstance(document.get("base"), dict):
        upgraded["base"] = _renamed(document["base"])
    training = document.get("training")
    if isinstance(training, dict) and isinstance(training.get("data"), list):
        data = [_renamed(entry) if isinstance(entry, dict) else entry for entry in training["data"]]
        upgraded["training"] = {**training, "data": data}
    if "$schema" in document:
        upgraded["$schema"] = str(document["$schema"]).replace("adapter:1", "adapter:2")
    return {**upgraded, "schema_version": SCHEMA_VERSION}


def _renamed(table: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(key, key): value for key, value in table.items()}
