"""Blobs that are missing or damaged, put back from somewhere that has the right bytes: a registry, an OCI layout, a folder.

Nothing is believed: what is found is hashed as it is copied, and only what has the right digest gets its name.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import AdapterhubError, NotFoundError

from . import manifest
from .digest import Digest, sha256_bytes, sha256_file
from .folder import listing
from .manifest import Descriptor
from .store import FOLDER, Store, open_regular

Find = Callable[[Digest], Any]
"""An unbuffered file that may hold the bytes of a digest, or None; whoever asks closes it."""


def source(path: Path) -> Find:
    """What can be had from a registry (its folder or registry.db), an OCI image layout, or an adapter's folder."""
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder")
    folder = path if path.is_dir() else path.parent
    for layout in (folder / FOLDER, folder):
        if (layout / "oci-layout").is_file():
            return lambda digest: _opened(Store(layout).blob_path(digest))
    return _in_folder(folder)


def _opened(path: Path) -> Any:
    return open_regular(path) if path.is_file() else None


def _in_folder(folder: Path) -> Find:
    from . import facts  # needs numpy, which commands that only read do without

    files = {sha256_file(folder / path): folder / path for path in listing(folder).files}
    made: dict[Digest, bytes] = {}
    with contextlib.suppress(AdapterhubError):  # perhaps no whole adapter; its files may do all the same
        built = manifest.build(folder)
        made = {sha256_bytes(raw): raw for raw in (built.raw, built.config_bytes, facts.settle(folder)[1])}
    return lambda digest: io.BytesIO(made[digest]) if digest in made else _opened(files[digest]) if digest in files else None


def heal(store: Store, versions: Iterable[Descriptor], find: Find) -> list[Digest]:
    """Put back what is wrong of the blobs that versions (their manifests) need, where `find` has it; what was put back."""
    healed: list[Digest] = []
    seen: set[Digest] = set()

    def mend(blob: Descriptor) -> None:
        if blob.digest not in seen and not _is_right(store, blob):
            found = find(blob.digest)
            if found is not None:
                with found:
                    healed.extend([blob.digest] if store.put_back(found, blob.digest, blob.size) else [])
        seen.add(blob.digest)

    with store.lease("repair"):
        for version in versions:
            mend(version)
            with contextlib.suppress(AdapterhubError):
                made = manifest.parse(store.read_document(version.digest), version.digest)
                for blob in (made.config, *made.layers):
                    mend(blob)
        store.sync_blobs()
    return healed


def _is_right(store: Store, blob: Descriptor) -> bool:
    return store.has(blob.digest, blob.size) and sha256_file(store.blob_path(blob.digest)) == blob.digest
