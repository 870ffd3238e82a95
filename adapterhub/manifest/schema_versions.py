"""The versions of adapter.json: which of them are read, and how a document of each becomes one of the current version.

`major.minor` since 1.0; the integers 1 and 2 are the drafts before it. A minor version adds fields that older readers ignore; a
major version changes what a field means, or how the digest of a version is derived. `schemas/SPECIFICATION.md` has the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import adapterhub_schemas
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import FormatError, RefusedError

MAJOR, MINOR = 1, 0
CURRENT = f"{MAJOR}.{MINOR}"
_ID = "urn:adapterhub:schema:adapter:"
SCHEMA_ID = f"{_ID}{CURRENT}"
DRAFTS = ("1", "2")
"""The versions of the drafts, as text."""
_VERSION = safe_regex.Pattern(r"(?P<major>0|[1-9][0-9]{0,5})\.(?P<minor>0|[1-9][0-9]{0,5})")
# British in draft 1, American since.
_RENAMED = {"licence": "license", "quantisation": "quantization"}  # codespell:ignore


def version_of(document: Mapping[str, Any]) -> str:
    """Return the version of a document as text, `2` or `1.0`; empty if it has none."""
    version = document.get("schema_version")
    return str(version) if isinstance(version, str) or type(version) is int else ""


def is_newer_minor(version: str) -> bool:
    """Return whether a version has fields that are not known here, and that a reader ignores."""
    parsed = _parsed(version)
    return parsed is not None and parsed[0] == MAJOR and parsed[1] > MINOR


def check(document: Mapping[str, Any], location: str) -> None:
    """Raise RefusedError for a document of a version that would be misread here, FormatError for one of two versions."""
    version = document.get("schema_version")
    parsed = _parsed(version) if isinstance(version, str) else None
    if (parsed and parsed[0] > MAJOR) or (type(version) is int and version > int(DRAFTS[-1])):
        problem = f"schema_version {version} is newer than the {CURRENT} known here"
        raise RefusedError(location, problem, "Upgrade adapterhub", code="newer-version")
    if is_newer_minor(version_of(document)) and document.get("$schema") != f"{_ID}{version}":
        raise FormatError(location, f"$schema: '{_ID}{version}' was expected")


def upgrade(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document in the current version: a draft with today's names, a newer minor version without unknown fields."""
    version = version_of(document)
    if is_newer_minor(version):
        schema = adapterhub_schemas.load("adapter")
        document = _without_unknown_fields(document, schema, schema)
        return _with_version(document, version)
    if version not in DRAFTS or type(document["schema_version"]) is not int:
        return dict(document)
    upgraded = dict(document)
    # The renamed keys occur in these places only.
    if version == DRAFTS[0]:
        upgraded = _with_new_spelling(document)
        if isinstance(document.get("base"), dict):
            upgraded["base"] = _with_new_spelling(document["base"])
        training = document.get("training")
        if isinstance(training, dict) and isinstance(training.get("data"), list):
            data = [_with_new_spelling(entry) if isinstance(entry, dict) else entry for entry in training["data"]]
            upgraded["training"] = {**training, "data": data}
    # The drafts had two spellings of a field without a value.
    recipe = upgraded.pop("recipe", None)
    if isinstance(recipe, dict):
        recipe = {"rank": None, **recipe}
        upgraded["recipe"] = {key: value for key, value in recipe.items() if (key, value) != ("base", None)}
    elif recipe is not None:
        upgraded["recipe"] = recipe
    return _with_version(upgraded, version)


def _with_version(document: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Return a document as one of the current version, if its `$schema` is that of `version`."""
    upgraded = {**document, "schema_version": CURRENT}
    if document.get("$schema") == f"{_ID}{version}":
        upgraded["$schema"] = SCHEMA_ID
    return upgraded


def _parsed(version: str) -> tuple[int, int] | None:
    match = _VERSION.fullmatch(version)
    return (int(match["major"]), int(match["minor"])) if match else None


def _with_new_spelling(table: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(key, key): value for key, value in table.items()}


def _without_unknown_fields(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Return a JSON value without the fields of closed objects that the schema does not list."""
    if isinstance(value, list) and "items" in schema:
        return [_without_unknown_fields(item, schema["items"], root) for item in value]
    if not isinstance(value, dict):
        return value
    properties, additional = schema.get("properties", {}), schema.get("additionalProperties", True)
    rules = {key: properties.get(key, additional) for key in value}
    return {
        key: _without_unknown_fields(item, rules[key], root) if isinstance(rules[key], dict) else item
        for key, item in value.items()
        if rules[key] is not False
    }
