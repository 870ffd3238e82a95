"""Blobs that are missing or damaged, put back from somewhere that has the right bytes: a registry, an OCI layout, a folder.

Nothing is believed: what is found is hashed as it is copied, and only what has the right digest gets its name.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest, copy_hashing, sha256_bytes, sha256_file
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.manifest.package_files import listing
from adapterhub.store.store import FOLDER, Store, open_regular
from adapterhub_converters.errors import AdapterhubError, IntegrityError, NotFoundError

Find = Callable[[Digest], Any]
"""An unbuffered file that may hold the bytes of a digest, or None; whoever asks closes it."""


def source(path: Path) -> Find:
    """What can be had from a registry (its folder or registry.db), an OCI image layout, or an adapter's folder."""
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder")
    folder = path if path.is_dir() else path.parent
    for layout in (folder / FOLDER, folder):
        if (layout / "oci-layout").is_file():
            return partial(_in_layout, Store(layout))
    return _in_folder(folder)


def _in_layout(store: Store, digest: Digest) -> Any:
    path = store.blob_path(digest)
    return open_regular(path) if path.is_file() else store.packs.open(digest, store.opened)


def _opened(path: Path) -> Any:
    return open_regular(path) if path.is_file() else None


def _in_folder(folder: Path) -> Find:
    from adapterhub.manifest import describe  # needs numpy, which commands that only read do without

    files = {sha256_file(folder / path): folder / path for path in listing(folder).files}
    made: dict[Digest, bytes] = {}
    with contextlib.suppress(AdapterhubError):  # perhaps no whole adapter; its files may do all the same
        built = oci_manifest.build(folder)
        made = {sha256_bytes(raw): raw for raw in (built.raw, built.config_bytes, describe.settle(folder)[1])}
    return lambda digest: io.BytesIO(made[digest]) if digest in made else _opened(files[digest]) if digest in files else None


def heal(
    store: Store,
    versions: Iterable[Descriptor],
    others: Iterable[Descriptor],
    find: Find,
    locked: Callable[[], AbstractContextManager[None]],
) -> list[Digest]:
    """Put back what is wrong of the blobs that versions (their manifests) need and of `others`, where `find` has it.

    A pack that is not right goes, once its blob is there plain. Returns what was put back or is right again.
    """
    healing = _Healing(store, find, locked)
    with store.lease("repair"):
        for version in versions:
            healing.mend(version.digest, version.size)
            with contextlib.suppress(AdapterhubError):
                made = oci_manifest.parse(store.read_document(version.digest), version.digest)
                for blob in (made.config, *made.layers):
                    healing.mend(blob.digest, blob.size)
        for blob in others:
            healing.mend(blob.digest, blob.size)
        store.sync_blobs()
    return healing.healed


class _Healing:
    """What was looked at and what was put back."""

    def __init__(self, store: Store, find: Find, locked: Callable[[], AbstractContextManager[None]]) -> None:
        self._store, self._find, self._locked = store, find, locked
        self._seen: set[Digest] = set()
        self.healed: list[Digest] = []

    def mend(self, digest: Digest, size: int | None) -> None:
        """Look at one blob, after what its pack is a difference to: with that right, it may be right as well."""
        if digest in self._seen:
            return
        self._seen.add(digest)
        with contextlib.suppress(IntegrityError):
            head = self._store.packs.head(digest)
            if head and head.parent and not self._store.blob_path(digest).exists():
                self.mend(head.parent, None)
        right = self._is_right(digest, size)
        if (not right and self._put_back(digest, size)) | self._drop_wrong_pack(digest):
            self.healed.append(digest)

    def _put_back(self, digest: Digest, size: int | None) -> bool:
        with contextlib.suppress(IntegrityError):  # where it came from, too
            found = self._find(digest)
            if found is not None:
                with found:
                    return self._store.put_back(found, digest, size)
        return False

    def _drop_wrong_pack(self, digest: Digest) -> bool:
        """Remove a pack beside its plain blob that does not give the blob."""
        if not (self._store.packs.path(digest).exists() and self._is_right(digest, None)):
            return False
        with contextlib.suppress(IntegrityError, NotFoundError), self._store.open_pack(digest) as file:
            if copy_hashing(file, None)[0] == digest:
                return False
        with self._locked():
            self._store.sync_blobs()
            self._store.drop_pack(digest)
        return True

    def _is_right(self, digest: Digest, size: int | None) -> bool:
        with contextlib.suppress(IntegrityError):
            return (size is None or self._store.has(digest, size)) and self._store.rehash(digest) == digest
        return False
