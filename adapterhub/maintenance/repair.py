"""Repair of missing or damaged blobs, from a registry, an OCI layout, an adapter's folder or a remote that has the right bytes.

No source is trusted: bytes are hashed as they are copied, and get their name only with the right digest.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub.digest import Digest, copy_hashing, sha256_bytes, sha256_file
from adapterhub.index import queries
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.manifest.package_files import listing
from adapterhub.registry.registry import Registry
from adapterhub.store import named_documents
from adapterhub.store.store import DOCUMENTS, FOLDER, Store, open_regular
from adapterhub_converters.errors import AdapterhubError, IntegrityError, NotFoundError

Find = Callable[[Digest], Any]
"""Opens an unbuffered file that may have the bytes of a digest, or returns None; the caller closes it."""


def repair(registry: Registry, source: Path | Find) -> list[Digest]:
    """Restore missing or damaged blobs from a registry, an OCI layout, an adapter's folder, or a function that finds bytes.

    Returns the digests of the restored blobs.
    """
    find = _source(source) if isinstance(source, Path) else source
    rows = queries.versions(registry.index)
    versions = [Descriptor(oci_manifest.MANIFEST_TYPE, row.digest, row.manifest_size) for row in rows]
    restored = _restore(registry.store, versions, list(_documents(registry)), find, registry.locked)
    if restored:
        registry.rebuild_index()  # its data about a version comes from the blobs
    return restored


def _documents(registry: Registry) -> Iterator[Descriptor]:
    for log, name in [(kind, name) for kind in DOCUMENTS for name in registry.store.log.document_names(kind)]:
        with contextlib.suppress(AdapterhubError):  # a damaged log, which fsck reports
            state = named_documents.current(registry.store, name, log=log)
            if state.there and state.entry:
                yield Descriptor("application/json", state.entry.digest, state.entry.size, "its document")


def _source(path: Path) -> Find:
    """Return what finds blobs in a registry (its folder or registry.db), an OCI image layout, or an adapter's folder."""
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder", code="no-such-file")
    folder = path if path.is_dir() else path.parent
    for layout in (folder / FOLDER, folder.resolve()):
        if (store := Store(layout)).exists():
            return partial(_in_layout, store)
    return _in_folder(folder)


def _in_layout(store: Store, digest: Digest) -> Any:
    return store.opened(digest) if store.has_plain(digest) else store.packs.open(digest, store.opened)


def _opened(path: Path) -> BinaryIO | None:
    return open_regular(path) if path.is_file() else None


def _in_folder(folder: Path) -> Find:
    from adapterhub.manifest import describe  # needs numpy

    files = {sha256_file(folder / path): folder / path for path in listing(folder).files}
    made: dict[Digest, bytes] = {}
    with contextlib.suppress(AdapterhubError):  # perhaps not a complete adapter; its files may still be the right ones
        built = oci_manifest.build(folder)
        made = {sha256_bytes(raw): raw for raw in (built.raw, built.config_bytes, describe.settle(folder)[1])}
    return lambda digest: io.BytesIO(made[digest]) if digest in made else _opened(files[digest]) if digest in files else None


def _restore(
    store: Store,
    versions: Iterable[Descriptor],
    others: Iterable[Descriptor],
    find: Find,
    locked: Callable[[], AbstractContextManager[None]],
) -> list[Digest]:
    """Restore the blobs that versions (their manifests) need, and `others`, where `find` has them.

    A damaged pack is removed once its blob is restored as a plain file. Returns what was restored or is right again.
    """
    restoring = _Repair(store, find, locked)
    with store.lease("repair"):
        for version in versions:
            restoring.blob(version.digest, version.size)
            with contextlib.suppress(AdapterhubError):
                made = oci_manifest.parse(store.read_document(version.digest), version.digest)
                for blob in (made.config, *made.layers):
                    restoring.blob(blob.digest, blob.size)
        for blob in others:
            restoring.blob(blob.digest, blob.size)
        store.sync_blobs()
    return restoring.restored


class _Repair:
    """Restores blobs, each once; `restored` lists them."""

    def __init__(self, store: Store, find: Find, locked: Callable[[], AbstractContextManager[None]]) -> None:
        self._store, self._find, self._locked = store, find, locked
        self._seen: set[Digest] = set()
        self.restored: list[Digest] = []

    def blob(self, digest: Digest, size: int | None) -> None:
        """Check a blob and restore it; after the parent of its pack, as restoring that may be enough."""
        if digest in self._seen:
            return
        self._seen.add(digest)
        with contextlib.suppress(IntegrityError):
            head = self._store.packs.head(digest)
            if head and head.parent and not self._store.has_plain(digest):
                self.blob(head.parent, None)
        right = self._is_right(digest, size)
        if (not right and self._put_back(digest, size)) | self._drop_wrong_pack(digest):
            self.restored.append(digest)

    def _put_back(self, digest: Digest, size: int | None) -> bool:
        with contextlib.suppress(IntegrityError):  # the source is damaged, too
            found = self._find(digest)
            if found is not None:
                with found:
                    return self._store.put_back(found, digest, size)
        return False

    def _drop_wrong_pack(self, digest: Digest) -> bool:
        """Remove a damaged pack whose blob has a right plain file."""
        if not (self._store.has_pack(digest) and self._is_right(digest, None)):
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
