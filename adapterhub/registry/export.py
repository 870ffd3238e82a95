"""Bytes out of a store: each read once, hashed as it passes, and visible only when its digest is right."""

from __future__ import annotations

import os
from pathlib import Path

from adapterhub.digest import Digest, copy_hashing
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.ref import Ref
from adapterhub.store.store import More, Progress, local_errors, told
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import IntegrityError

from .registry import Registry, Version


def pull(registry: Registry, ref: Ref, out: Path, progress: Progress | None = None) -> Version:
    """Write the files of a version into `out`, a folder that doesn't exist or is empty: all of them, right, or nothing.

    `progress` is told bytes written and bytes in all.
    """
    with registry.reading(ref) as version, atomic.whole(out) as folder:
        layers = registry.files(version)
        more = told(progress, sum(layer.size for layer in layers))
        for layer in layers:
            with registry.store.open_blob(layer.digest) as blob:
                write_layer(folder, layer, blob, more)
    return version


def pull_digest(registry: Registry, digest: Digest, out: Path) -> bool:
    """The same of the version with this manifest, whatever it is called here, or is not any more; whether it is here."""
    if held := registry.holding(digest):
        pull(registry, Ref(held[0].name, digest=digest), out)
        return True
    if registry.store.size(digest) is None:
        return False
    with registry.store.lease("read", required=False) as lease, atomic.whole(out) as folder:
        lease.note(digest)
        for layer in oci_manifest.parse(registry.store.read_document(digest), digest).layers:
            with registry.store.open_blob(layer.digest) as blob:
                write_layer(folder, layer, blob)
    return True


def write_layer(folder: Path, layer: Descriptor, source: object, more: More | None = None) -> None:
    """Write one file below `folder`, which must be new and ours; IntegrityError when the bytes are not the promised ones.

    `layer.path` has been checked by `manifest.parse` or `folder.listing`.
    """
    path = folder / layer.path
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with local_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0) as file:
            digest, size = copy_hashing(source, file, limit=layer.size, more=more)
    if (digest, size) != (layer.digest, layer.size):
        what = f"{size} bytes of {digest} instead of {layer.size} of {layer.digest}"
        raise IntegrityError(layer.path, what, "Run `adapterhub fsck`; nothing was written")
