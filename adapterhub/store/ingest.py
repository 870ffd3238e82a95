"""Copies of files into a store: each is opened once, read once and hashed as it is copied. No ref moves here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import Digest, sha256_file
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import IntegrityError

from .store import Progress, Store, counter, local_errors, open_regular

if TYPE_CHECKING:
    from adapterhub.manifest.derive import Draft

_Stamp = tuple[int, int, int]


def ingest(
    store: Store, folder: Path, progress: Progress | None = None, *, draft: Draft | None = None
) -> tuple[Manifest, tuple[str, ...]]:
    """Store every blob of the adapter in `folder`; return its manifest and the names that were skipped.

    Args:
        store: The target; hold a lease on it until a ref names the manifest.
        folder: An adapter in any supported format.
        progress: Called with bytes stored and total bytes.
        draft: The manifest without digests, from a caller that has read the folder; None to read it here.

    Raises:
        IntegrityError: A file changed while it was read.
    """
    from adapterhub.manifest import derive  # needs numpy, which commands that only read do without

    # What killed processes left behind may take up the space that is needed now.
    store.files.sweep()
    draft = draft or derive.draft(folder)  # before anything is stored, as this may not be an adapter
    file_list = draft.listing
    count_bytes = counter(progress, sum(_size(folder / path) for path in file_list.files)) if progress else None
    files: dict[str, tuple[Digest, int]] = {}
    stamps: dict[str, _Stamp] = {}
    with store.files.folders_kept_open():
        for path in file_list.files:
            if path == ADAPTER_JSON:  # `finalize` decides what is stored as adapter.json
                stamps[path] = _stamp(folder / path)
                continue
            with open_regular(folder / path) as file:
                stamps[path] = _stamp(file.fileno())
                files[path] = store.put_stream(file, count_bytes=count_bytes)
    adapter_manifest, raw = draft.finalize(files)
    # Compared only after the last file was read: the files must be of one state of the folder, and adapter.json about them.
    for path, stamp in stamps.items():
        with local_errors(folder / path):
            now = _stamp(folder / path)
        if now != stamp:
            raise IntegrityError(
                f"{folder}/{path}",
                "changed while it was read",
                "Try again when no other program writes to the folder",
                code="changed-meanwhile",
            )
    files[ADAPTER_JSON] = store.put_bytes(raw)
    manifest = oci_manifest.assemble(files, adapter_manifest)
    store.put_bytes(manifest.config_bytes)
    store.put_bytes(manifest.raw)
    # Before a ref moves: no log entry may name a blob that a power cut can still destroy.
    store.sync_blobs()
    return manifest, file_list.skipped


def digest_of(folder: Path, draft: Draft) -> Digest:
    """Return the digest of the manifest that `ingest` would store, and store nothing."""
    paths = [path for path in draft.listing.files if path != ADAPTER_JSON]
    files = {path: (sha256_file(folder / path), _size(folder / path)) for path in paths}
    return oci_manifest.complete(files, *draft.finalize(files)).digest


def _size(path: Path) -> int:
    with local_errors(path):
        return path.stat().st_size


def _stamp(file: Path | int) -> _Stamp:
    """Return size, modification time and inode of an open file, or of a path without following links."""
    status = os.fstat(file) if isinstance(file, int) else os.stat(file, follow_symlinks=False)
    return status.st_size, status.st_mtime_ns, status.st_ino
