"""The blobs of a hub on several machines: in a bucket, with copies of those this machine reads.

    blobs/sha256/<hex>      as in an OCI image layout, and as `adapterhub pull s3://…` reads them
    refs/, bases/, …        copies of the log (`shared_log`)

A blob is in the bucket before its name appears here, and everything here is a copy: whatever is missing is fetched, and hashed
on the way.

A process notes a blob in the database before it relies on the bucket having it, as for a version that names it, and may then
rely on it for an hour. A gc (`bucket_gc`) removes only blobs that were not noted for longer than that. A change that fails
cannot take back what it has stored, as another process may rely on it by now without a note that is newer: it is collected
(`folder_store`), and counts for the namespace until a gc has had its time, even if an entry of the log has named it since.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import BinaryIO, TypeVar

from adapterhub.digest import Digest, copy_hashing
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub.store.signature_files import MAX_SIGNATURES, Signatures
from adapterhub.store.store import ByteCounter, Store
from adapterhub.store.store_files import local_errors
from adapterhub_converters.errors import IntegrityError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .folder_store import collected_blobs, state_of
from .postgres import PostgresDatabase
from .shared_log import LogMirror, NoIndexFile, SharedLog

T = TypeVar("T")
_PART_SIZE = 8 << 20  # bytes in one part of an upload
_MAX_REMEMBERED = 1_000_000  # blobs about which facts are kept in memory
RELIANCE_SECONDS = 3600.0
"""Seconds in which a process may rely on a blob it has noted."""
_MIN_AGE = 3600.0  # seconds for which a copy stays after its last use
_TRIM_FRACTION = 16  # the cache is trimmed when it has grown by this fraction of its limit


@dataclass
class BucketBlobs:
    """The state of the bucket that all threads of a process share.

    Attributes:
        bucket: The bucket with the blobs.
        cache: Limit in bytes of the local copies; the last used ones stay, and those used in the last hour in any case.
        sizes: Sizes of blobs that are or were in the bucket.
        noted: When blobs were noted.
        relied: For blobs that were in the bucket after they were noted: when they were noted, and their sizes.
        grown: Bytes of copies added since the cache was last trimmed.
    """

    bucket: Bucket
    database: PostgresDatabase
    cache: int
    sizes: dict[Digest, int] = field(default_factory=dict)
    noted: dict[Digest, float] = field(default_factory=dict)
    relied: dict[Digest, tuple[float, int]] = field(default_factory=dict)
    grown: int = 0

    def size(self, digest: Digest) -> int | None:
        """Return the size in bytes of a blob in the bucket; None if it is not there."""
        size = self.sizes.get(digest)
        if size is None and (size := self.bucket.size(blob_key(digest))) is not None:
            _remember(self.sizes, digest, size)
        return size

    def rely(self, digest: Digest) -> int | None:
        """Return the size in bytes of a blob that the bucket will keep for the next hour; None if it is not there."""
        relied_on = self.relied.get(digest)
        if relied_on and relied_on[0] > time.monotonic() - RELIANCE_SECONDS:
            return relied_on[1]
        noted_at = self._note(digest)  # note first, then look: a gc that runs in between spares the blob
        size = self.bucket.size(blob_key(digest))
        if size is None:
            self.sizes.pop(digest, None)
        else:
            self._record_presence(digest, size, noted_at)
        return size

    def _note(self, digest: Digest) -> float:
        """Protect a blob from a gc, waiting while one is removing it; return when it was noted."""
        now = time.monotonic()
        noted_at = self.noted.get(digest)
        if noted_at is None or noted_at <= now - RELIANCE_SECONDS:
            self.database.note_blob(digest)
            _remember(self.noted, digest, now)
            return now
        return noted_at

    def _record_presence(self, digest: Digest, size: int, noted: float) -> None:
        _remember(self.sizes, digest, size)
        _remember(self.relied, digest, (noted, size))

    def put(self, digest: Digest, file: BinaryIO, size: int) -> None:
        """Write a blob into the bucket."""
        noted_at = self._note(digest)
        file.seek(0)
        put_pieces(self.bucket, digest, read_pieces(file), size)
        self._record_presence(digest, size, noted_at)


class SharedStore(Store):
    """A store with its blobs in a bucket and its log in PostgreSQL; its folder has only what can be fetched again."""

    def __init__(self, root: Path, blobs: BucketBlobs, log: LogMirror) -> None:
        super().__init__(root)
        self._shared = blobs
        self.log = SharedLog(self.files, log)
        self.signatures = _AttachedSignatures(root / "signatures" / "sha256", self.files)
        self.index_file = NoIndexFile(self.files)

    def has_blob(self, digest: Digest, size: int) -> bool:
        """Return whether the bucket has a blob of that digest and size."""
        return self._shared.rely(digest) == size

    def size(self, digest: Digest, depth: int = 0) -> int | None:
        """Return the size of a blob in bytes; None if it is missing."""
        local_size = super().size(digest, depth)
        return self._shared.size(digest) if local_size is None else local_size

    def open_stream(self, digest: Digest, depth: int = 0) -> BinaryIO:
        """Open a blob, fetching it if it is not here."""
        self.has_plain(digest)
        with contextlib.suppress(OSError):
            # The time of last use, by which `trim` chooses.
            self.files.touch(self.blob_path(digest))
        return super().open_stream(digest, depth)

    def has_plain(self, digest: Digest) -> bool:
        """Return whether a blob has an uncompressed file here, fetching it from the bucket if needed."""
        return super().has_plain(digest) or self._fetch(digest)

    def require_packs(self) -> None:
        """Raise RefusedError: clients read the bucket, in which every blob is as its digest says."""
        raise RefusedError(self._shared.bucket.location, "a hub in a bucket has no packed files", "Pack a registry in a folder")

    def is_here(self, digest: Digest) -> bool:
        """Return whether a blob can be read without asking the bucket."""
        return super().has_plain(digest)

    def commit_blob(self, path: Path, file: BinaryIO, digest: Digest) -> None:
        """Make a complete file in tmp/ a blob, in the bucket first."""
        if (blobs := collected_blobs()) is not None:
            blobs[digest] = state_of(os.fstat(file.fileno()))
        # Bucket first: a name here must never exist without the blob there.
        self._shared.put(digest, file, os.fstat(file.fileno()).st_size)
        self._keep(path, file, digest)

    def _fetch(self, digest: Digest) -> bool:
        size = self._shared.size(digest)
        if size is None:
            return False
        location = f"{self._shared.bucket.location}/{blob_key(digest)}"
        with self.files.temporary() as (path, file):
            with self._shared.bucket.stream(blob_key(digest), size, 0, location) as source:
                # Hashed on arrival: a damaged blob of the bucket must not become a copy here.
                received = copy_hashing(source, file, limit=size)
            if received != (digest, size):
                raise IntegrityError(location, f"its bytes do not have the digest {digest}", "Restore it from a backup")
            self._keep(path, file, digest)
        return True

    def _keep(self, path: Path, file: BinaryIO, digest: Digest) -> None:
        self._shared.grown += os.fstat(file.fileno()).st_size
        super().commit_blob(path, file, digest)
        # Not at each blob: trimming looks at every file of the cache.
        if self._shared.grown * _TRIM_FRACTION > self._shared.cache:
            self._shared.grown = 0
            self.trim()

    def trim(self) -> None:
        """Remove the copies unused for longest, until the rest fits the cache."""
        copies = []
        for path in self.blobs():
            with contextlib.suppress(FileNotFoundError):
                status = self.files.status(path)
                copies.append((status.st_mtime, status.st_size, path))
        total, spared_since = sum(size for _, size, _ in copies), time.time() - _MIN_AGE
        for used, size, path in sorted(copies):
            if total <= self._shared.cache or used > spared_since:
                return
            with local_errors(path), contextlib.suppress(FileNotFoundError):
                self.files.remove(path)
            total -= size


class CommandStore(SharedStore):
    """The store as an operator's command sees it: what the bucket has, whatever is copied here."""

    def size(self, digest: Digest, depth: int = 0) -> int | None:
        """Return the size of a blob in the bucket in bytes; None if it is missing."""
        return self._shared.size(digest)

    def stored_size(self, digest: Digest) -> int:
        """Return the size of a blob in the bucket in bytes; 0 if it is missing."""
        return self._shared.size(digest) or 0

    def rehash(self, digest: Digest, count_bytes: ByteCounter | None = None) -> Digest:
        """Read a blob in the bucket, and return the digest of its bytes."""
        location = f"{self._shared.bucket.location}/{blob_key(digest)}"
        size = self._shared.size(digest)
        if size is None:
            raise IntegrityError(location, "is missing", "Restore it from a backup")
        return hash_blob(self._shared.bucket, digest, size, count_bytes)


class _AttachedSignatures(Signatures):
    """No signatures: those of a hub are attached by and for its clients, and nobody would see others."""

    def add(self, digest: Digest, signature: bytes, limit: int = MAX_SIGNATURES) -> bool:
        """Raise RefusedError."""
        raise RefusedError(
            digest, "a hub in a bucket keeps signatures that its clients attach", "Sign it at hub+https://HOST/NAME"
        )


def _remember(memory: dict[Digest, T], digest: Digest, value: T) -> None:
    if len(memory) >= _MAX_REMEMBERED:
        memory.clear()
    memory[digest] = value


def blob_key(digest: Digest) -> str:
    """Return the key of a blob in the bucket."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def hash_blob(bucket: Bucket, digest: Digest, size: int, count_bytes: ByteCounter | None = None) -> Digest:
    """Read a blob of `size` bytes in a bucket, and return the digest that its bytes have."""
    key = blob_key(digest)
    with bucket.stream(key, size, 0, f"{bucket.location}/{key}") as source:
        return copy_hashing(source, None, on_bytes=count_bytes)[0]


def put_pieces(bucket: Bucket, digest: Digest, parts: Iterator[bytearray], size: int) -> None:
    """Write a blob of `size` bytes into a bucket, in one request if it is one piece."""
    if size <= _PART_SIZE:
        bucket.put_object(blob_key(digest), b"".join(parts))
    else:
        bucket.put_pieces(blob_key(digest), parts, _PART_SIZE)


def read_pieces(file: BinaryIO) -> Iterator[bytearray]:
    """Yield the bytes of an unbuffered file in pieces."""
    while True:
        piece = bytearray(_PART_SIZE)
        view, filled = memoryview(piece), 0
        while filled < _PART_SIZE and (count := file.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += count
        view.release()
        if filled:
            yield piece[:filled]
        if filled < _PART_SIZE:
            return
