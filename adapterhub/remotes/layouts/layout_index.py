"""The index.json of an image layout as a value: names, and the manifests they point at.

Entries stay as they were read, so that a change keeps everything that others wrote (image-spec v1.1, `image-layout.md` and
`image-index.md`). A name is the annotation `org.opencontainers.image.ref.name`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterhub.digest import Digest, parse_digest
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

NAME = "org.opencontainers.image.ref.name"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
LAYOUT_MARK = b'{"imageLayoutVersion":"1.0.0"}'
MAX_INDEX = 64 << 20  # bytes; that of a registry of 50,000 versions has 17 MB
_MAX_NAME = 1000  # characters of a name

Entry = dict[str, Any]
"""A descriptor with a valid digest and size."""


def parse(raw: bytes, location: str) -> list[Entry]:
    """Return the checked entries of an index.json.

    Raises:
        FormatError: It is malformed, or two manifests have the same name.
    """
    # A descriptor is mostly digest: the objects take six times its size.
    document = json_file.parse_object(raw, location, memory=max(json_file.MAX_MEMORY, 8 * len(raw)))
    entries = document.get("manifests")
    # Two programs could read such a document as two different things: CVE-2021-41190.
    if "layers" in document and entries is not None:
        raise FormatError(location, "both an image index, with manifests, and an image manifest, with layers")
    if not isinstance(entries, list):
        raise FormatError(location, "not an image index: it has no list of manifests")
    digests_by_name: dict[str, str] = {}
    for entry in entries:
        check_descriptor(entry, location)
        name = name_of(entry)
        if name and (len(name) > _MAX_NAME or not name.isprintable()):
            raise FormatError(location, f"{name[:80]!r} is not a valid name")
        # Which of two manifests a name selects would depend on the reader.
        if name and digests_by_name.setdefault(name, entry["digest"]) != entry["digest"]:
            raise FormatError(location, f"two manifests have the name {name[:80]!r}")
    return entries


def check_descriptor(entry: object, location: str) -> Entry:
    """Return a descriptor after checking its form; FormatError if it is invalid."""
    if not isinstance(entry, dict) or not isinstance(entry.get("mediaType"), str):
        raise FormatError(location, "an entry is not a descriptor")
    size = entry.get("size")
    if type(size) is not int or not 0 <= size < 2**63:
        raise FormatError(location, "an entry has no valid size")
    parse_digest(entry.get("digest"), location)
    annotations = entry.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise FormatError(location, "annotations are not a map of strings to strings")
    return entry


def check_mark(raw: bytes, location: str) -> None:
    """Raise a FormatError unless these are the bytes of an `oci-layout` of a supported version."""
    version = json_file.parse_object(raw, location).get("imageLayoutVersion")
    if version != "1.0.0":
        raise FormatError(location, f"an image layout of version {str(version)[:40]!r}, not 1.0.0")


def name_of(entry: Entry) -> str | None:
    """Return the name of an entry, or None."""
    name: str | None = (entry.get("annotations") or {}).get(NAME)
    return name or None


def names(entries: Sequence[Entry]) -> list[str]:
    """Return all names, sorted."""
    return sorted({name for entry in entries if (name := name_of(entry))})


def find_entry(entries: Sequence[Entry], name: str) -> Entry | None:
    """Return the entry with a name, or None."""
    return next((entry for entry in entries if name_of(entry) == name), None)


def only_entry(entries: Sequence[Entry]) -> Entry | None:
    """Return the only named entry, else the only entry; None if there are several. Attachments have no names."""
    candidates = [entry for entry in entries if name_of(entry)] or list(entries)
    return candidates[0] if len({entry["digest"] for entry in candidates}) == 1 else None


def with_entry(entries: Sequence[Entry], descriptor: Entry, name: str | None) -> list[Entry]:
    """Return the entries with a descriptor under a name, which is taken from any other entry.

    Without a name, the descriptor is added if it is missing.
    """
    if name is None:
        exists = any(entry["digest"] == descriptor["digest"] for entry in entries)
        return [*entries] if exists else [*entries, descriptor]
    remaining = [
        entry
        for entry in entries
        if name_of(entry) != name and (name_of(entry) is not None or entry["digest"] != descriptor["digest"])
    ]
    return [*remaining, {**descriptor, "annotations": {**(descriptor.get("annotations") or {}), NAME: name}}]


def without_name(entries: Sequence[Entry], name: str) -> list[Entry]:
    """Return the entries without a name; a manifest that had no other name stays without one."""
    remaining = [entry for entry in entries if name_of(entry) != name]
    remaining_digests = {entry["digest"] for entry in remaining}
    for entry in entries:
        if name_of(entry) == name and entry["digest"] not in remaining_digests:
            annotations = {key: value for key, value in entry["annotations"].items() if key != NAME}
            unnamed_entry = {key: value for key, value in entry.items() if key != "annotations"}
            remaining.append({**unnamed_entry, **({"annotations": annotations} if annotations else {})})
    return remaining


def describe_manifest(raw: bytes, digest: Digest, location: str) -> Entry:
    """Return the entry for a manifest, with its artifact type."""
    document = json_file.parse_object(raw, location)
    entry = {"mediaType": document.get("mediaType"), "digest": digest, "size": len(raw)}
    if artifact := artifact_type(document):
        entry["artifactType"] = artifact
    return entry


def artifact_type(document: Entry) -> str:
    """Return the artifact type of a manifest, else the type of its config (distribution-spec, "Listing Referrers")."""
    config = document.get("config")
    media_type = document.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else None)
    return media_type if isinstance(media_type, str) else ""


def dump_index(entries: Sequence[Entry]) -> bytes:
    """Return the bytes of an index.json, the same for the same entries in any order."""
    # Sorted, so that the bytes don't depend on the order of pushes.
    ordered = sorted(entries, key=lambda entry: (name_of(entry) or "", entry["digest"]))
    document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": ordered}
    return json_file.canonical_bytes(document)
