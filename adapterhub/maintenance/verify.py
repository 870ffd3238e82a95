"""Verification of one version, or of an adapter's folder: its bytes by their digests, and its facts by its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import survey
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.export import linked_folder
from adapterhub.store.store import ByteCounter, Progress, Store, counter
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError

from .findings import REPAIR, REPAIR_MISSING, Finding, Findings

if TYPE_CHECKING:
    from adapterhub.manifest.folder_contents import FolderContents


def verify(registry: Registry, ref: Ref, progress: Progress | None = None) -> Findings:
    """Compare the bytes of a version's blobs with their digests."""
    version = registry.row(ref)  # also a withdrawn one, whose bytes stay for the audit
    manifest = oci_manifest.parse(registry.store.read_document(version.digest), str(version.ref))
    blobs = (manifest.config, *manifest.layers)
    count_bytes = counter(progress, sum(blob.size for blob in blobs))
    findings = []
    for blob in blobs:
        finding = blob_finding(registry.store, str(version.ref), blob, {})
        if finding is None and not _is_right(registry.store, blob.digest, count_bytes):
            message = f"its bytes do not have the digest of its name ({version.ref}, {blob.path})"
            finding = Finding("flipped", "error", str(registry.store.blob_path(blob.digest)), message, *REPAIR)
        if finding:
            findings.append(finding)
    # Facts are compared only if the bytes are right; wrong bytes would just give more findings.
    return findings or list(compare_facts(registry.store, str(version.ref), manifest))


def compare_facts(store: Store, ref: str, manifest: Manifest) -> Iterator[Finding]:
    """Compare the adapter.json of a version with the headers of its weights; unreadable weights yield no finding."""
    if manifest.adapter_json is not None:
        with contextlib.suppress(NotFoundError, RefusedError, FormatError), linked_folder(store, manifest.layers) as folder:
            yield from _compare_folder_facts(folder, ref)


def _compare_folder_facts(folder: Path, source: str, contents: FolderContents | None = None) -> Iterator[Finding]:
    """Compare the adapter.json of a folder with the headers of its weights, naming the adapter `source`."""
    from adapterhub.manifest import weight_facts

    try:
        if contents is None:
            weight_facts.manifest_matching_weights(folder, location=source)
        else:
            manifest = AdapterManifest.parse(contents.manifest_text or "", f"{folder}/{ADAPTER_JSON}")
            weight_facts.check_facts_of_author(manifest, weight_facts.inspect_contents(contents), source, folder=folder)
    except IntegrityError as error:
        location = error.where.replace(f"{folder}/", f"{source}: ") if str(folder) != source else error.where
        yield Finding(weight_facts.WRONG_FACTS, "error", location, error.what, error.hint)


def _is_right(store: Store, digest: Digest, count_bytes: ByteCounter | None) -> bool:
    """Return whether the stored bytes of a blob have its digest."""
    try:
        return store.rehash(digest, count_bytes) == digest
    except FormatError:  # an unreadable pack
        return False


def verify_folder(folder: Path, progress: Progress | None = None) -> Findings:
    """Compare the bytes of an adapter's folder with its adapter.json; a file that it does not list is a note."""
    from adapterhub.manifest.folder_contents import read_folder  # needs numpy

    if folder.is_file():
        raise NotFoundError(str(folder), "is a file", "Put it in a folder of its own and name that")
    location = folder / ADAPTER_JSON
    if not location.exists():
        raise NotFoundError(str(folder), f"there is no {ADAPTER_JSON} to check its files against", "Pull it, or push it first")
    text = json_file.read_text(location)
    manifest = AdapterManifest.parse(text, str(location))
    size = sum(_file_size(folder / path) for path in survey(folder)[0])
    contents = read_folder(folder, on_bytes=counter(progress, size), text=text)
    digests = contents.files
    findings = []
    for entry in manifest.files:
        path, digest = entry.path, digests.get(entry.path, ("", 0))[0]
        if not digest:
            findings.append(Finding("missing", "error", f"{folder}/{path}", "is missing", "Pull the adapter again"))
        elif digest != entry.digest:
            problem = "does not have the digest in adapter.json"
            findings.append(Finding("flipped", "error", f"{folder}/{path}", problem, "Pull it again"))
    listed_paths = {entry.path for entry in manifest.files} | {ADAPTER_JSON}
    if not findings:
        with contextlib.suppress(NotFoundError, RefusedError, FormatError):
            findings += _compare_folder_facts(folder, str(folder), contents)
    findings += [
        Finding("unlisted", "note", f"{folder}/{path}", "not listed in adapter.json")
        for path in sorted(set(digests) - listed_paths)
    ]
    return findings


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed in the meantime
        return 0


def blob_finding(store: Store, ref: str, blob: Descriptor, damaged: dict[Digest, Finding]) -> Finding | None:
    """Return the problem with a blob that `ref` needs; None if the blob is right or already reported."""
    label = blob.path or ("its manifest" if blob.media_type == oci_manifest.MANIFEST_TYPE else "its config")
    path = store.blob_path(blob.digest)
    size = store.size(blob.digest)
    if size is None and blob.digest not in damaged:
        state = "packed, and cannot be unpacked" if store.has_pack(blob.digest) else "missing"
        return Finding("missing", "error", ref, f"{label}: blob {blob.digest} is {state}", *REPAIR_MISSING)
    if blob.digest not in damaged and size != blob.size:
        return Finding("truncated", "error", str(path), f"{size} bytes instead of {blob.size} ({ref}, {label})", *REPAIR)
    if blob.digest in damaged:
        return Finding("damaged", "error", ref, f"{label} is damaged: {path.name[:12]}", *REPAIR)
    return None
