"""An adapter that comes or goes, held against what its project asks: from its adapter.json, before its weights move."""

from __future__ import annotations

from adapterhub.digest import sha256_bytes
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.project.settings import Policy
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import IntegrityError, RefusedError

from .protocol import Source


def check(policy: Policy, source: Source, reference: str, where: str) -> None:
    """RefusedError when a version of `source` is not what the policy asks, or doesn't say."""
    if policy.needs_manifest:
        made = source.manifest(reference)
        policy.check_manifest(_manifest(source, made, where), where)


def _manifest(source: Source, made: Manifest, where: str) -> AdapterManifest:
    blob = made.adapter_json
    if blob is None or blob.size > json_file.MAX_CONFIG:
        what = f"it has no {ADAPTER_JSON} that could be held against the project's policy"
        raise RefusedError(where, what, "Copy it to a registry without one first: that derives it")
    raw, buffer = bytearray(), memoryview(bytearray(1 << 16))
    with source.open_blob(blob) as reader:
        while len(raw) <= blob.size and (n := reader.readinto(buffer)):
            raw += buffer[:n]
    if (sha256_bytes(bytes(raw)), len(raw)) != (blob.digest, blob.size):
        raise IntegrityError(f"{where}: {ADAPTER_JSON}", f"{len(raw)} bytes came that are not those of {blob.digest}")
    return AdapterManifest.parse(bytes(raw), f"{where}: {ADAPTER_JSON}")
