"""Copies of blobs out of a store: each file is read once and hashed as it is copied."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapterhub.digest import Digest, copy_hashing
from adapterhub.manifest.existing_folder import ExistingFolder
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub_converters.errors import IntegrityError

from .store import ByteCounter, Progress, Store, counter, local_errors


def export(
    store: Store,
    layers: Sequence[Descriptor],
    folder: Path,
    progress: Progress | None = None,
    *,
    present: ExistingFolder | None = None,
) -> None:
    """Write the files of a version into `folder`, which must be new and the caller's own.

    Args:
        store: The store.
        layers: The files.
        folder: The new folder.
        progress: Called with bytes written and total bytes.
        present: The folder that the new one replaces; files that it already has are linked from there.

    Raises:
        IntegrityError: A blob is missing or damaged.
    """
    count_bytes = counter(progress, sum(layer.size for layer in layers))
    for layer in layers:
        if present is not None and present.has_file(layer):
            present.link_or_copy(layer.path, folder / layer.path)
            if count_bytes:
                count_bytes(layer.size)
        else:
            with store.open_blob(layer.digest) as blob:
                write_layer(folder, layer, blob, count_bytes)
    if present is not None:
        # An edit made in the meantime would be lost with the old folder.
        present.check_unchanged()


@contextmanager
def linked_folder(store: Store, layers: Sequence[Descriptor], staged: Mapping[Digest, Path] | None = None) -> Iterator[Path]:
    """Yield a temporary folder in which the blobs of a version have the names of its files.

    `staged`: Files that are no blobs yet, by digest.
    """
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        for layer in layers:
            path = Path(temporary) / layer.path
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                source = (staged or {}).get(layer.digest)
                if source is None and not store.has_plain(layer.digest):
                    raise FileNotFoundError
                path.symlink_to((source or store.blob_path(layer.digest)).absolute())
            except OSError:  # stored compressed, or a file system without links
                with store.open_blob(layer.digest) as blob, open(path, "wb") as file:
                    shutil.copyfileobj(blob, file)
        yield Path(temporary)


def write_layer(folder: Path, layer: Descriptor, source: object, count_bytes: ByteCounter | None = None) -> None:
    """Write one file below `folder`, which must be new and the caller's own; IntegrityError if its bytes are wrong.

    The caller has checked `layer.path` (`oci_manifest.parse` or `package_files.listing`).
    """
    path = folder / layer.path
    # Never write through a link or into a file that somebody put into the folder meanwhile. Windows needs O_BINARY.
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with local_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0) as file:
            digest, size = copy_hashing(source, file, limit=layer.size, on_bytes=count_bytes)
    if (digest, size) != (layer.digest, layer.size):
        problem = (
            f"{size} bytes with digest {digest} instead of {layer.size} bytes with digest {layer.digest}; nothing was written"
        )
        raise IntegrityError(layer.path, problem, "Check the registry", code="check-registry")
