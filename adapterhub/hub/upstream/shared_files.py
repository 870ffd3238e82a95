"""Files and documents of the upstream that all processes of a hub share, in its bucket, up to a limit in bytes.

    upstream/files/<key>            whole files, each verified before it is written
    upstream/documents/<name>       documents of models, each after the time it was written at
    tmp/upstream/<owner>/<key>/<n>  pieces of a file that one process fetches and another waits for; a gc removes old ones

The table `upstream_cache` has the sizes and when each was last used; the least recently used goes first. A process claims a
file (`jobs`) before it fetches it from the upstream or removes it. The others receive it from the bucket: piece by piece while
it arrives, if one of them has asked for that, and else once it is whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO
from urllib.parse import quote, unquote

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.jobs import RENEWAL_INTERVAL, Jobs
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RemoteError

from .cached_files import MAX_DOCUMENT

_log = logging.getLogger("adapterhub.hub")
PIECE_SIZE = 8 << 20
"""Bytes of a piece of a file that arrives."""
_PART_SIZE = 8 << 20  # bytes of a part of an upload to the bucket
_FILES, _DOCUMENTS, _PIECES = "upstream/files/", "upstream/documents/", "tmp/upstream/"
_USE_INTERVAL = 60.0  # seconds in which a use is recorded once
_SPARED_SECONDS = 900.0  # since the last use, in which nothing is removed: a client may be on its way with an address
_ADDRESS_SECONDS = 600
_MIN_REDIRECT = 256 << 10  # bytes; smaller files are sent by the hub
_CHECK_INTERVAL = 1.0  # seconds between two looks whether somebody waits for pieces
_REVISION = "revision "  # the beginning of the name of a document that tells the commit of a revision
_MAX_KEY = 500  # characters of the name of a document
_TIME_LENGTH = 20  # bytes before a document: the time at which it was written, in seconds


class SharedFiles:
    """The files in the bucket, as one process of the hub sees them.

    Args:
        bucket: The bucket.
        database: The tables of the hub.
        max_bytes: Limit for everything in it.
        proxy: Send all files through the hub.
    """

    def __init__(self, bucket: Bucket, database: HubDatabase, max_bytes: int, *, proxy: bool = False) -> None:
        self._bucket, self._database, self.max_bytes, self._proxy = bucket, database, max_bytes, proxy
        self._jobs = Jobs(database)

    # ---- whole files

    def size(self, key: str) -> int | None:
        """Return the size of a whole file, which counts as used; None if it is not here."""
        return self._used_size(_FILES + key)

    def open(self, key: str) -> BinaryIO:
        """Open a whole file; RemoteError if it is gone."""
        try:
            return self._bucket.open_seekable(_FILES + key)
        except NotFoundError as error:
            self._forget(_FILES + key)
            raise RemoteError(key, "it was removed to make room", "Ask again") from error

    def address(self, key: str, size: int) -> str:
        """Return where a client can get a whole file without the hub, for some minutes; empty for a small one."""
        if self._proxy or size <= _MIN_REDIRECT:
            return ""
        return self._bucket.signed_url(_FILES + key, _ADDRESS_SECONDS)

    @contextmanager
    def stream(self, key: str, size: int, start: int) -> Iterator[Callable[[memoryview], int]]:
        """Yield what reads a whole file from `start` on."""
        with self._bucket.stream(_FILES + key, size, start, key) as reader:
            yield reader.readinto

    def keep(self, key: str, file: BinaryIO, size: int) -> bool:
        """Write a verified file into the bucket, from its descriptor; return False if there is no room, or no answer."""
        try:
            if not self._make_room(size):
                return False
            if size <= _PART_SIZE:
                self._bucket.put_object(_FILES + key, os.pread(file.fileno(), size, 0))
            else:
                self._bucket.put_pieces(_FILES + key, _parts_of(file, size), _PART_SIZE)
            self._record(_FILES + key, size)
        except AdapterhubError as error:  # the requests that wait for the file have it nevertheless
            _log.warning("a file of the upstream is not kept in the bucket: %s", printable(str(error)))
            return False
        return True

    # ---- files that arrive

    def claim(self, key: str) -> bool:
        """Claim the fetching of a file; return False if another process has it. The claimant ends it with `release`."""
        return self._jobs.try_claim(f"upstream {key}")

    def release(self, key: str) -> None:
        """End a claim."""
        self._jobs.release(f"upstream {key}")

    def sharing(self, key: str, file: BinaryIO) -> ArrivingPieces:
        """Return what shares the pieces of a claimed file as they arrive, if another process waits for them."""
        return ArrivingPieces(self._bucket, self._jobs, key, file)

    def read_piece(self, key: str, number: int) -> bytes | None:
        """Return a piece of a file that another process fetches, and ask it for more; None if it is not there yet."""
        self._jobs.try_claim(f"upstream-wanted {key}")
        owner = self._jobs.owner(f"upstream {key}")
        return self._bucket.read(f"{_PIECES}{owner}/{key}/{number}", PIECE_SIZE) if owner else None

    def is_fetched(self, key: str) -> bool:
        """Return whether a process fetches a file."""
        return bool(self._jobs.owner(f"upstream {key}"))

    # ---- documents

    def read_document(self, name: str) -> tuple[bytes, float] | None:
        """Return a document and the time at which it was written, in seconds since 1970; None if it is not here."""
        key = _document_key(name)
        if self._used_size(key) is None:
            return None
        data = self._bucket.read(key, MAX_DOCUMENT + _TIME_LENGTH)
        try:
            return (data[_TIME_LENGTH:], float(data[:_TIME_LENGTH])) if data else None
        except ValueError as error:
            raise FormatError(key, "has no time") from error

    def write_document(self, name: str, data: bytes) -> None:
        """Write a document, unless there is no room."""
        if self._make_room(len(data)):
            self._bucket.put_object(_document_key(name), f"{time.time():<{_TIME_LENGTH}.6f}".encode() + data)
            self._record(_document_key(name), len(data))

    def revisions(self, limit: int) -> list[tuple[str, str]]:
        """Return the models and revisions whose commits are kept, those used last first."""
        prefix = f"{_DOCUMENTS}{quote(_REVISION, safe='')}"
        sql = "SELECT key FROM upstream_cache WHERE key >= ? AND key < ? ORDER BY used DESC LIMIT ?"
        rows = self._database.select(sql, prefix, f"{prefix}\x7f", limit)
        pairs = (unquote(key.removeprefix(prefix)).rpartition("@") for (key,) in rows)
        return [(name, revision) for name, _, revision in pairs]

    # ---- the limit

    def total(self) -> int:
        """Return the bytes of everything that is kept."""
        return int(self._database.select("SELECT COALESCE(SUM(size), 0) FROM upstream_cache")[0][0])

    def _make_room(self, size: int) -> bool:
        """Remove what was used least recently until `size` more bytes fit; return False if they cannot."""
        excess = self.total() + size - self.max_bytes
        if excess <= 0:
            return True
        sql = "SELECT key, size, used FROM upstream_cache WHERE used < ? ORDER BY used"
        for key, other_size, used in self._database.select(sql, time.time() - _SPARED_SECONDS):
            if excess <= 0:
                break
            if self._remove(key, used):
                excess -= other_size
        return excess <= 0

    def _remove(self, key: str, used: float) -> bool:
        """Remove an object unless it was used meanwhile, or is being written."""
        name = key.rpartition("/")[2]
        if not self.claim(name):
            return False
        try:
            if not self._database.execute("DELETE FROM upstream_cache WHERE key = ? AND used = ?", key, used):
                return False
            self._bucket.remove(key)
        finally:
            self.release(name)
        return True

    def _used_size(self, key: str) -> int | None:
        rows = self._database.select("SELECT size, used FROM upstream_cache WHERE key = ?", key)
        if not rows:
            return None
        size, used = rows[0]
        if used < (now := time.time()) - _USE_INTERVAL:
            self._database.execute("UPDATE upstream_cache SET used = ? WHERE key = ?", now, key)
        return int(size)

    def _record(self, key: str, size: int) -> None:
        sql = (
            "INSERT INTO upstream_cache (key, size, used) VALUES (?, ?, ?)"
            " ON CONFLICT (key) DO UPDATE SET size = excluded.size, used = excluded.used"
        )
        self._database.execute(sql, key, size, time.time())

    def _forget(self, key: str) -> None:
        self._database.execute("DELETE FROM upstream_cache WHERE key = ?", key)


class ArrivingPieces:
    """The pieces of a file that this process fetches: put into the bucket once another process wants them."""

    def __init__(self, bucket: Bucket, jobs: Jobs, key: str, file: BinaryIO) -> None:
        self._bucket, self._jobs, self._key, self._file = bucket, jobs, key, file
        self._prefix = f"{_PIECES}{jobs.identity}/{key}/"
        self._count, self._is_wanted = 0, False
        self._checked_at, self._renewed_at = 0.0, time.monotonic()

    def advance(self, written: int) -> None:
        """Renew the claim, and put the pieces into the bucket that are complete with so many bytes."""
        now = time.monotonic()
        if now - self._renewed_at > RENEWAL_INTERVAL:
            self._jobs.extend(f"upstream {self._key}")
            self._renewed_at = now
        if not self._is_wanted and now - self._checked_at > _CHECK_INTERVAL:
            self._is_wanted, self._checked_at = bool(self._jobs.owner(f"upstream-wanted {self._key}")), now
        while self._is_wanted and (self._count + 1) * PIECE_SIZE <= written:
            piece = os.pread(self._file.fileno(), PIECE_SIZE, self._count * PIECE_SIZE)
            self._bucket.put_object(f"{self._prefix}{self._count}", piece)
            self._count += 1

    def remove(self) -> None:
        """Remove the pieces: the file is whole, or not to be had."""
        with suppress(AdapterhubError):  # a gc removes what stays
            for number in range(self._count):
                self._bucket.remove(f"{self._prefix}{number}")


def _parts_of(file: BinaryIO, size: int) -> Iterator[bytearray]:
    for start in range(0, size, _PART_SIZE):
        yield bytearray(os.pread(file.fileno(), min(_PART_SIZE, size - start), start))


def _document_key(name: str) -> str:
    key = quote(name, safe="")
    return _DOCUMENTS + (key if len(key) <= _MAX_KEY else hashlib.sha256(name.encode()).hexdigest())
