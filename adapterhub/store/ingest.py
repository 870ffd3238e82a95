"""Bytes into a store: each file of a folder read once and hashed as it passes; no ref moves here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.errors import IntegrityError

from .store import Progress, Store, local_errors, open_regular, told
from .tensor_digests import Hashing

if TYPE_CHECKING:
    from adapterhub.manifest.describe import Draft

_Stamp = tuple[int, int, int]


def take_in(
    store: Store, folder: Path, progress: Progress | None = None, draft: Draft | None = None
) -> tuple[Manifest, tuple[str, ...]]:
    """Store every blob of the adapter in `folder`; its manifest, and the names that were skipped. No ref moves.

    `progress` is told bytes stored and bytes in all; `draft` is what was read of the folder already.
    """
    from adapterhub.manifest import describe  # needs numpy, which commands that only read do without

    store.sweep()
    draft = draft or describe.draft(folder)  # before anything is stored: this may be no adapter at all
    found = draft.listing
    more = told(progress, sum(_size(folder / path) for path in found.files)) if progress else None
    files: dict[str, tuple[Digest, int]] = {}
    stamps: dict[str, _Stamp] = {}
    listed: dict[Digest, Hashing] = {}
    for path in found.files:
        with open_regular(folder / path) as file:
            stamps[path] = _stamp(os.fstat(file.fileno()))
            if path != ADAPTER_JSON:
                beside = Hashing.of(file, stamps[path][0]) if is_weights(path) else None
                files[path] = store.put_stream(file, beside=beside, more=more)
                if beside:
                    listed[files[path][0]] = beside
    manifest, raw = draft.settle(files)
    for path, stamp in stamps.items():
        with local_errors(folder / path):
            now = os.stat(folder / path, follow_symlinks=False)
        if _stamp(now) != stamp:
            raise IntegrityError(f"{folder}/{path}", "changed while it was read", "Try again when nothing writes to the folder")
    for digest, hashing in listed.items():  # only now: had a file changed, its header might be that of other bytes
        if (tensors := hashing.result()) is not None:
            store.keep_tensors(digest, tensors)
    files[ADAPTER_JSON] = store.put_bytes(raw)
    made = oci_manifest.assemble(files, manifest)
    store.put_bytes(made.config_bytes)
    store.put_bytes(made.raw)
    store.sync_blobs()
    return made, found.skipped


def _size(path: Path) -> int:
    with local_errors(path):
        return path.stat().st_size


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ino
