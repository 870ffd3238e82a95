"""The blobs of a hub of several machines: in a bucket, and those that this machine reads also here.

    blobs/sha256/<hex>      as in an OCI image layout, and as `adapterhub pull s3://…` reads them
    refs/, bases/, …        copies of the log (`log`)

A blob is in the bucket before its name appears here, and here nothing is but copies: whatever is missing is fetched, and hashed
on the way.

A process notes a blob in the database before it relies on the bucket having it, as for a version that names it, and may rely on
that for an hour. A gc (`collection`) removes only what was not noted for longer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from adapterhub.digest import Digest, copy_hashing
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub.store.atomic import local_errors
from adapterhub.store.store import Store
from adapterhub_converters.errors import IntegrityError

from .log import Log, NoIndexFile, SharedLog
from .postgres import PostgresDatabase

T = TypeVar("T")
_PART = 8 << 20  # bytes of one part of an upload
_MOST = 1_000_000  # blobs of which something is remembered
RELIED = 3600.0
"""Seconds in which a process relies on what it noted."""
_YOUNG = 3600.0  # seconds that a blob stays after it was last used
_TRIM_EVERY = 16  # parts of the cache's size that may come until it is looked at


@dataclass
class Blobs:
    """What all threads of a process share of the bucket.

    Attributes:
        bucket: Has the blobs.
        cache: Bytes of copies here; those that were used last stay, and those of the last hour in any case.
        sizes: Of blobs that are in the bucket, or were.
        noted: When blobs were noted.
        relied: The sizes of those that were in the bucket after that, and when they were noted.
    """

    bucket: Bucket
    database: PostgresDatabase
    cache: int
    sizes: dict[Digest, int] = field(default_factory=dict)
    noted: dict[Digest, float] = field(default_factory=dict)
    relied: dict[Digest, tuple[float, int]] = field(default_factory=dict)
    grown: int = 0

    def size(self, digest: Digest) -> int | None:
        """The bytes of a blob of the bucket; None without it."""
        found = self.sizes.get(digest)
        if found is None and (found := self.bucket.size(blob_key(digest))) is not None:
            _remember(self.sizes, digest, found)
        return found

    def rely(self, digest: Digest) -> int | None:
        """The bytes of a blob that the bucket keeps for the next hour; None without it."""
        known = self.relied.get(digest)
        if known and known[0] > time.monotonic() - RELIED:
            return known[1]
        when = self._note(digest)  # and only then:
        found = self.bucket.size(blob_key(digest))
        if found is None:
            self.sizes.pop(digest, None)
        else:
            self._seen(digest, found, when)
        return found

    def _note(self, digest: Digest) -> float:
        """Keep a blob from a gc, waiting for one that is removing it; return when it was noted."""
        now = time.monotonic()
        when = self.noted.get(digest)
        if when is None or when <= now - RELIED:
            self.database.hold(digest)
            _remember(self.noted, digest, now)
            return now
        return when

    def _seen(self, digest: Digest, size: int, noted: float) -> None:
        _remember(self.sizes, digest, size)
        _remember(self.relied, digest, (noted, size))

    def put(self, digest: Digest, file: BinaryIO, size: int) -> None:
        """Write a blob into the bucket."""
        when = self._note(digest)
        file.seek(0)
        put_pieces(self.bucket, digest, pieces(file), size)
        self._seen(digest, size, when)


class SharedStore(Store):
    """A store whose blobs are in a bucket and whose log is in PostgreSQL; the folder has what can be made again."""

    def __init__(self, root: Path, blobs: Blobs, log: Log) -> None:
        super().__init__(root)
        self._shared = blobs
        self.log = SharedLog(self.files, log)
        self.index_file = NoIndexFile(self.files)

    def has(self, digest: Digest, size: int) -> bool:
        """Return True if the bucket has a blob of that digest and size."""
        return self._shared.rely(digest) == size

    def size(self, digest: Digest, depth: int = 0) -> int | None:
        """Return the bytes of a blob; None if it is missing."""
        found = super().size(digest, depth)
        return self._shared.size(digest) if found is None else found

    def opened(self, digest: Digest, depth: int = 0) -> BinaryIO:
        """Open a blob, which is fetched if it is not here."""
        self.has_plain(digest)
        with contextlib.suppress(OSError):
            self.files.touch(self.blob_path(digest))
        return super().opened(digest, depth)

    def has_plain(self, digest: Digest) -> bool:
        """Return True if a blob has a plain file here, which it gets if the bucket has it."""
        return super().has_plain(digest) or self._fetch(digest)

    def is_here(self, digest: Digest) -> bool:
        """Return True if a blob can be read without asking the bucket."""
        return super().has_plain(digest)

    def settle(self, path: Path, file: BinaryIO, digest: Digest) -> None:
        """Make a complete file in tmp/ a blob: of the bucket first."""
        self._shared.put(digest, file, os.fstat(file.fileno()).st_size)
        self._keep(path, file, digest)

    def _fetch(self, digest: Digest) -> bool:
        size = self._shared.size(digest)
        if size is None:
            return False
        where = f"{self._shared.bucket.where}/{blob_key(digest)}"
        with self.files.temporary() as (path, file):
            with self._shared.bucket.stream(blob_key(digest), size, 0, where) as source:
                found = copy_hashing(source, file, limit=size)
            if found != (digest, size):
                raise IntegrityError(where, f"its bytes do not have the digest {digest}", "Restore it from a backup")
            self._keep(path, file, digest)
        return True

    def _keep(self, path: Path, file: BinaryIO, digest: Digest) -> None:
        self._shared.grown += os.fstat(file.fileno()).st_size
        super().settle(path, file, digest)
        if self._shared.grown * _TRIM_EVERY > self._shared.cache:
            self._shared.grown = 0
            self.trim()

    def trim(self) -> None:
        """Remove the copies that were not used for longest, until the others fit the cache."""
        there = []
        for path in self.blobs():
            with contextlib.suppress(FileNotFoundError):
                status = self.files.status(path)
                there.append((status.st_mtime, status.st_size, path))
        total, until = sum(size for _, size, _ in there), time.time() - _YOUNG
        for used, size, path in sorted(there):
            if total <= self._shared.cache or used > until:
                return
            with local_errors(path), contextlib.suppress(FileNotFoundError):
                self.files.remove(path)
            total -= size


def _remember(what: dict[Digest, T], digest: Digest, value: T) -> None:
    if len(what) >= _MOST:
        what.clear()
    what[digest] = value


def blob_key(digest: Digest) -> str:
    """The key of a blob in the bucket."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def put_pieces(bucket: Bucket, digest: Digest, found: Iterator[bytearray], size: int) -> None:
    """Write a blob of `size` bytes into a bucket, in one request if it is one piece."""
    if size <= _PART:
        bucket.put(blob_key(digest), b"".join(found))
    else:
        bucket.put_pieces(blob_key(digest), found, _PART)


def pieces(file: BinaryIO) -> Iterator[bytearray]:
    """The bytes of an unbuffered file, some at a time."""
    while True:
        piece = bytearray(_PART)
        view, filled = memoryview(piece), 0
        while filled < _PART and (n := file.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += n
        view.release()
        if filled:
            yield piece[:filled]
        if filled < _PART:
            return
