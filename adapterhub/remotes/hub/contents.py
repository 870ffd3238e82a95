"""What the files of a commit are as an adapter: by its adapter.json, or, without one, by their names.

Nothing of it is believed because a hub says it: names are checked before one becomes a path, and an adapter.json is a list of
digests that the files have to have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from adapterhub.digest import Digest, parse_digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.manifest.package_files import MAX_FILES, check_names
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError
from adapterhub_converters.file_names import ADAPTER_JSON

from .api import Entry, Listing

_PICKLE, _CONFIG, _SAFE = "adapter_model.bin", "adapter_config.json", "adapter_model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-\d+/")
_EMPTY = b"{}"


def same(entry: Entry | None, data: bytes) -> bool:
    """Whether a listing says that a file has these bytes, by their digest or by git's name of them."""
    if entry is None:
        return False
    if entry.digest is not None:
        return entry.digest == sha256_bytes(data)
    return entry.oid == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def assembled(raw: bytes, where: str) -> Manifest:
    """The manifest that an adapter.json makes of the files that it lists and of itself."""
    files = {**listed(oci_manifest.parse_json(raw, where), where), ADAPTER_JSON: (sha256_bytes(raw), len(raw))}
    made = oci_manifest.assemble(files, AdapterManifest.parse(raw, where))
    checked = oci_manifest.parse(made.raw, where)
    return dataclasses.replace(checked, config_bytes=made.config_bytes)


def listed(document: Mapping[str, Any], where: str) -> dict[str, tuple[Digest, int]]:
    """Path to digest and size of what an adapter.json lists."""
    listed = document.get("files")
    found: dict[str, tuple[Digest, int]] = {}
    for entry in listed if isinstance(listed, list) else []:
        path, size = (entry.get("path"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or type(size) is not int or size < 0 or path == ADAPTER_JSON or path in found:
            raise FormatError(where, "its list of files is none")
        found[path] = (parse_digest(entry.get("digest"), where), size)
    if not found or len(found) > MAX_FILES:
        raise FormatError(where, "it lists no files, or too many")
    return found


def bare(files: Mapping[str, tuple[Digest, int]], where: str) -> Manifest:
    """An OCI manifest of files without an adapter.json."""
    layers = [
        {
            "mediaType": oci_manifest.media_type(path),
            "digest": digest,
            "size": size,
            "annotations": {oci_manifest.TITLE: path, oci_manifest.FILEPATH: path},
        }
        for path, (digest, size) in files.items()
    ]
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256_bytes(_EMPTY), "size": len(_EMPTY)}
    document = {"schemaVersion": 2, "mediaType": oci_manifest.MANIFEST_TYPE, "config": config, "layers": layers}
    raw = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return dataclasses.replace(oci_manifest.parse(raw, where), config_bytes=_EMPTY)


def importable(listing: Listing, where: str) -> tuple[list[str], list[str]]:
    """The files that an adapter may have, and the others."""
    there = listing.files
    if _CONFIG not in there and not any(path.endswith(".gguf") for path in there):
        hint = "A model without adapter_config.json is a base; name it with --base"
        raise NotFoundError(where, f"no adapter in this repository: neither {ADAPTER_JSON}, {_CONFIG} nor a GGUF file", hint)
    if _PICKLE in there and _SAFE not in there:
        hint = "Ask its owner for safetensors, or convert it with peft where that may run"
        raise RefusedError(f"{where}: {_PICKLE}", "a pickle can run code when it is loaded", hint)
    names: list[str] = []
    left: list[str] = []
    for path in sorted(there):
        parts = path.split("/")
        hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
        try:
            check_names([path], where)
        except RefusedError:
            left.append(path)
            continue
        (left if hidden or _CHECKPOINT.match(path) else names).append(path)
    return names, left
