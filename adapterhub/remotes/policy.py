"""An adapter that comes or goes, held against what its project asks: from its adapter.json, before its weights move."""

from __future__ import annotations

from adapterhub.digest import sha256_bytes
from adapterhub.manifest.oci_manifest import FACTS, Manifest
from adapterhub.project.settings import Policy
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, RefusedError

from .protocol import Source


def check(policy: Policy, source: Source, reference: str, where: str) -> None:
    """RefusedError when a version of `source` is not what the policy asks, or doesn't say."""
    if policy.asks_facts:
        made = source.manifest(reference)
        policy.check_facts(_facts(source, made, where), where)


def _facts(source: Source, made: Manifest, where: str) -> dict[str, object]:
    blob = made.facts
    if blob is None or blob.size > json_file.MAX_CONFIG:
        what = f"it has no {FACTS} that could be held against the project's policy"
        raise RefusedError(where, what, "Copy it to a registry without one first: that derives it")
    raw, buffer = bytearray(), memoryview(bytearray(1 << 16))
    with source.open_blob(blob) as reader:
        while len(raw) <= blob.size and (n := reader.readinto(buffer)):
            raw += buffer[:n]
    if (sha256_bytes(bytes(raw)), len(raw)) != (blob.digest, blob.size):
        raise IntegrityError(f"{where}: {FACTS}", f"{len(raw)} bytes came that are not those of {blob.digest}")
    from adapterhub.manifest import describe  # needs numpy

    try:
        return describe.parse(raw.decode(), f"{where}: {FACTS}")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: {FACTS}", "not UTF-8 text") from error
