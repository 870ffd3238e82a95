"""Declarations of the owner of an adapter, in adapter.toml, which take the place of what is derived or recorded."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapterhub_schemas
from adapterhub_converters.adapter_files import ADAPTER_JSON, ADAPTER_TOML
from adapterhub_converters.containers import json_file, toml_file
from adapterhub_converters.errors import NotFoundError, UsageError

from .base_name import public_repo
from .document import OWNER, AdapterManifest

# What adapter.toml may declare; everything else follows from the files.
_DECLARABLE = {
    "name", "description", "license", "task", "base", "training", "supplier", "contact", "released", "expires",
    "download_location", "intended_use", "limitations", "languages", "trigger_words", "tokenizer_digest",
    "chat_template_digest", "evaluations", "data_sources", "energy_kwh", "extensions",
}  # fmt: skip
_DECLARABLE_BASE = {"repo", "revision", "quantization"}


def read_declared(folder: Path) -> dict[str, Any]:
    """Return the content of adapter.toml; empty without one."""
    location = f"{folder}/{ADAPTER_TOML}"
    try:
        return toml_file.parse(json_file.read_text(folder / ADAPTER_TOML), location)
    except NotFoundError:
        return {}


def declare(manifest: AdapterManifest, declared: Mapping[str, Any], folder: Path) -> AdapterManifest:
    """Return the manifest with declared values in place of derived or recorded ones, checked against the schema.

    Raises:
        UsageError: A key cannot be declared.
        FormatError: A value is not what the schema requires.
    """
    location = f"{folder}/{ADAPTER_TOML}"
    training_keys = set(adapterhub_schemas.load("adapter")["properties"]["training"]["properties"]) - {"recorder"}
    _check_keys(declared, _DECLARABLE, "", location)
    base, training = declared.get("base", {}), declared.get("training", {})
    for name, table, allowed_keys in (("base", base, _DECLARABLE_BASE), ("training", training, training_keys)):
        if not isinstance(table, Mapping):
            raise UsageError(location, f"{name} is not a table", f"Write it as [{name}]", code="invalid-config")
        _check_keys(table, allowed_keys, f"{name}.", location)
    # Declared values pass through the document, so that the schema checks them as it checks all others. The files do not: they
    # are derived, cannot be declared, and may be ten thousand.
    document = dataclasses.replace(manifest, files=()).to_dict()
    document |= {key: _json(value) for key, value in declared.items() if key not in ("base", "training")}
    document["base"] |= base
    if "evaluations" in declared:
        document["evaluations"] = _recorded_by_owner(document["evaluations"], location)
    if training:
        recorded = document["training"] or {}
        record = _json({**recorded, **training})
        # Once a part of it is declared otherwise, nobody but the owner vouches for the whole.
        document["training"] = record if record == recorded else {**record, "recorder": OWNER}
    repo = document["base"]["repo"]
    if "repo" in base and not (isinstance(repo, str) and public_repo(repo)):
        problem = f"base.repo is {json.dumps(_json(repo))[:100]}, which is no name on a hub: others do not have a path"
        raise UsageError(location, problem, "Write it as organization/name", code="invalid-config")
    checked = AdapterManifest.from_dict(document, location if declared else f"{folder}/{ADAPTER_JSON}")
    return dataclasses.replace(checked, files=manifest.files, version=manifest.version)


def _check_keys(table: Mapping[str, Any], allowed_keys: set[str], prefix: str, location: str) -> None:
    for key in sorted(set(table) - allowed_keys):
        import difflib  # late: an error alone needs it

        close = difflib.get_close_matches(key, allowed_keys, 1, 0.5)
        hint = f"Did you mean {prefix}{close[0]}?" if close else f"Known keys: {', '.join(sorted(allowed_keys))}"
        raise UsageError(location, f"unknown key {prefix}{key[:80]}", hint, code="invalid-config")


def _recorded_by_owner(evaluations: Any, location: str) -> Any:
    """Return declared results with their owner as the recorder; other values as they are, for the schema to refuse.

    Raises:
        UsageError: Somebody else is named.
    """
    tables = [item for item in evaluations if isinstance(item, dict)] if isinstance(evaluations, list) else []
    for table in tables:
        recorder = table.setdefault("recorder", OWNER)
        if recorder != OWNER:
            problem = f"evaluations: {str(recorder)[:64]!r} is no recorder of a declaration, which its {OWNER} makes"
            raise UsageError(location, problem, "Name the program that measured as harness", code="invalid-config")
    return evaluations


def _json(value: Any) -> Any:
    """Return TOML values as JSON has them: times become text, in UTC if they have an offset."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, datetime.datetime) and value.tzinfo:
        return value.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value
