"""A version of a registry as one JSON document: what `show` prints, and what a hub answers."""

from __future__ import annotations

from typing import Any, TypedDict

from adapterhub.digest import Digest
from adapterhub.manifest import measurement, oci_manifest, schema_versions
from adapterhub.ref import Ref
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file

from .ledger import Ledger
from .version_lookup import deprecation_in, find_row_with_marks


class VersionDocument(TypedDict):
    """A version as JSON.

    Attributes:
        protected: Its tags that may not move.
        deprecated: Why it is deprecated; None if it is not.
        withdrawn: Why it was withdrawn; None if it was not.
        time: When it was stored, ISO 8601 in UTC.
        evaluations: Its recorded measurements.
        manifest: Its adapter.json, upgraded to the current schema; empty for an artifact of another tool.
        oci_manifest: The document whose digest is the version.
    """

    ref: str
    name: str
    number: int
    tags: list[str]
    protected: list[str]
    deprecated: str | None
    withdrawn: str | None
    digest: Digest
    size: int
    time: str
    evaluations: list[dict[str, Any]]
    manifest: dict[str, Any]
    oci_manifest: dict[str, Any]


def show(ledger: Ledger, ref: Ref) -> VersionDocument:
    """Return a version as JSON: its refs, its adapter.json upgraded to the current schema, and its OCI manifest."""
    kinds = ("protect", "deprecate", "evaluate", "withdraw")
    row, (protected, reasons, evaluations, withdrawn) = find_row_with_marks(ledger, ref, *kinds)
    # Artifacts of other tools may have no adapter.json.
    raw = ledger.store.read_document(row.digest)
    manifest = oci_manifest.parse(raw, str(row.ref))
    adapter_json = ledger.store.read_document(manifest.adapter_json.digest) if manifest.adapter_json else b"{}"
    return {
        "ref": str(row.ref),
        "name": row.name,
        "number": row.number,
        "tags": list(row.tags),
        "protected": sorted(set(row.tags) & set(protected)),
        "deprecated": deprecation_in(reasons, row),
        "withdrawn": withdrawn.get(row.digest),
        "digest": row.digest,
        "size": manifest.size,
        "time": row.time,
        "evaluations": measurement.version_evaluations(evaluations, row.number),
        "manifest": schema_versions.upgrade(json_file.parse_object(adapter_json, f"{row.ref}/{ADAPTER_JSON}")),
        "oci_manifest": json_file.parse_object(raw, str(row.ref)),
    }
