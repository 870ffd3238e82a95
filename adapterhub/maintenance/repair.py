"""Repair of missing or damaged blobs from a registry, an OCI layout, an adapter's folder or a remote with the right bytes.

No source is trusted: bytes are hashed as they are copied, and are stored under a digest only if they have it.
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

OpenBlob = Callable[[Digest], Any]
"""Opens an unbuffered file that may have the bytes of a digest, or returns None; the caller closes the file."""


def repair(registry: Registry, source: Path | OpenBlob) -> list[Digest]:
    """Restore missing or damaged blobs from a registry, an OCI layout, an adapter's folder, or a function that opens blobs.

    Returns the digests of the restored blobs.
    """
    open_blob = _blob_opener(source) if isinstance(source, Path) else source
    rows = queries.versions(registry.index)
    versions = [Descriptor(oci_manifest.MANIFEST_TYPE, row.digest, row.manifest_size) for row in rows]
    restored = _restore(registry.store, versions, list(_documents(registry)), open_blob, registry.write_lock)
    if restored:
        registry.rebuild_index()  # its data about a version comes from the restored blobs
    return restored


def _documents(registry: Registry) -> Iterator[Descriptor]:
    """Yield the documents that bases, recipes and repositories need."""
    for log, name in [(kind, name) for kind in DOCUMENTS for name in registry.store.log.document_names(kind)]:
        with contextlib.suppress(AdapterhubError):  # a damaged log, which fsck reports
            state = named_documents.current(registry.store, name, log=log)
            if state.exists and state.entry:
                yield Descriptor("application/json", state.entry.digest, state.entry.size, "its document")


def _blob_opener(path: Path) -> OpenBlob:
    """Return the blob opener of a registry (its folder or registry.db), an OCI image layout, or an adapter's folder."""
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder", code="no-such-file")
    folder = path if path.is_dir() else path.parent
    # A registry's folder has the store inside; an OCI layout is the store itself.
    for layout in (folder / FOLDER, folder.resolve()):
        if (store := Store(layout)).exists():
            return partial(_in_layout, store)
    return _in_folder(folder)


def _in_layout(store: Store, digest: Digest) -> Any:
    """Open a blob of a store, plain or unpacked."""
    return store.open_stream(digest) if store.has_plain(digest) else store.packs.open(digest, store.open_stream)


def _open_if_file(path: Path) -> BinaryIO | None:
    return open_regular(path) if path.is_file() else None


def _in_folder(folder: Path) -> OpenBlob:
    """Return a function that opens an adapter's files, and the manifest, config and adapter.json generated from them."""
    from adapterhub.manifest import derive  # needs numpy

    files = {sha256_file(folder / path): folder / path for path in listing(folder).files}
    generated: dict[Digest, bytes] = {}
    with contextlib.suppress(AdapterhubError):  # perhaps an incomplete adapter, whose files may still be the right ones
        built = oci_manifest.build(folder)
        generated = {sha256_bytes(raw): raw for raw in (built.raw, built.config_bytes, derive.finalize(folder)[1])}
    return lambda digest: (
        io.BytesIO(generated[digest]) if digest in generated else _open_if_file(files[digest]) if digest in files else None
    )


def _restore(
    store: Store,
    versions: Iterable[Descriptor],
    documents: Iterable[Descriptor],
    open_blob: OpenBlob,
    locked: Callable[[], AbstractContextManager[None]],
) -> list[Digest]:
    """Restore the blobs that versions (given by their manifests) and `documents` need, where `open_blob` has them.

    A damaged pack is removed once its blob is restored as a plain file. Returns the digests of the blobs that were restored or
    are right again.
    """
    restoring = _Repair(store, open_blob, locked)
    # Keeps a gc from removing what has just been restored.
    with store.lease("repair"):
        for version in versions:
            # The manifest first, because it names the other blobs.
            restoring.blob(version.digest, version.size)
            with contextlib.suppress(AdapterhubError):
                manifest = oci_manifest.parse(store.read_document(version.digest), version.digest)
                for blob in (manifest.config, *manifest.layers):
                    restoring.blob(blob.digest, blob.size)
        for blob in documents:
            restoring.blob(blob.digest, blob.size)
        store.sync_blobs()
    return restoring.restored


class _Repair:
    """A repair that restores each blob at most once.

    Attributes:
        restored: The digests of the restored blobs.
    """

    def __init__(self, store: Store, open_blob: OpenBlob, locked: Callable[[], AbstractContextManager[None]]) -> None:
        self._store, self._open_blob, self._locked = store, open_blob, locked
        self._seen: set[Digest] = set()
        self.restored: list[Digest] = []

    def blob(self, digest: Digest, size: int | None) -> None:
        """Check a blob and restore it, after the parent of its pack: restoring the parent may be enough."""
        if digest in self._seen:
            return
        self._seen.add(digest)
        with contextlib.suppress(IntegrityError):
            head = self._store.packs.head(digest)
            if head and head.parent and not self._store.has_plain(digest):
                self.blob(head.parent, None)
        right = self._is_right(digest, size)
        # Not `or`: a wrong pack is dropped even if the blob has just been restored.
        if (not right and self._put_back(digest, size)) | self._drop_wrong_pack(digest):
            self.restored.append(digest)

    def _put_back(self, digest: Digest, size: int | None) -> bool:
        """Store the blob with the bytes of the source; return False if the source lacks them."""
        with contextlib.suppress(IntegrityError):  # the source is damaged, too
            file = self._open_blob(digest)
            if file is not None:
                with file:
                    return self._store.put_back(file, digest, size)
        return False

    def _drop_wrong_pack(self, digest: Digest) -> bool:
        """Remove a damaged pack whose blob has a right plain file."""
        if not (self._store.has_pack(digest) and self._is_right(digest, None)):
            return False
        with contextlib.suppress(IntegrityError, NotFoundError), self._store.open_pack(digest) as file:
            if copy_hashing(file, None)[0] == digest:
                return False
        with self._locked():
            # The plain file must be on disk before its pack is removed.
            self._store.sync_blobs()
            self._store.drop_pack(digest)
        return True

    def _is_right(self, digest: Digest, size: int | None) -> bool:
        """Return whether the stored bytes have the digest and, if given, the size."""
        with contextlib.suppress(IntegrityError):
            return (size is None or self._store.has_blob(digest, size)) and self._store.rehash(digest) == digest
        return False
