"""Uploads: a body goes to a file in `tmp/`, is hashed while it arrives, and becomes a blob once its digest is right.

A session outlives the connection, and even a killed hub: what has arrived is still there after a restart, and is hashed again
when the session is resumed. A session that nobody resumes is swept after a day, like everything in `tmp/`.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from adapterhub.digest import CHUNK, Digest, is_hex
from adapterhub.store.leases import hold
from adapterhub.store.store import Store
from adapterhub.store.store_files import local_errors, start_flush, write_all
from adapterhub_converters.errors import ConflictError, IntegrityError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .hub_database import HubDatabase
from .workers import Workers

_SUFFIX = ".upload"
_IDLE = 600.0  # seconds after which the file of a session is closed until it is resumed
_SWEEP_INTERVAL = 60.0  # seconds between sweeps of tmp/
_ROOM_STEP = 64 << 20  # bytes by which a body of unknown size is counted in advance
_BODY_LIFETIME = 3600.0  # seconds for which a body in one request is counted
_RENEWAL_INTERVAL = 600.0  # seconds after which it is counted again
_MAX_OPEN = 200  # sessions open at a time, unless more are being written to
SHA512 = "sha512:"
USABLE_SECONDS = 24 * 3600.0
"""Seconds in which a commit or a manifest can use an upload."""
LEASE_SECONDS = USABLE_SECONDS + 3600
"""Seconds for which a gc spares an upload, at least; at most twice as long."""


def sha256_of(database: HubDatabase, digest: str, name: str) -> Digest:
    """Return the sha256 for a digest; empty for a sha512 under which nothing was uploaded to the namespace of `name`."""
    if not digest.startswith(SHA512):
        return digest
    # Earlier versions kept one table for all namespaces, from which a tenant learned what others have: its rows have no prefix.
    rows = database.select("SELECT sha256 FROM sha512 WHERE digest IN (?, ?)", sha512_key(name, digest), digest)
    return str(rows[0][0]) if rows else ""


def sha512_key(name: str, digest: str) -> str:
    """Return the key of a sha512 in the table of hub.db, that of the namespace of a repository."""
    return f"{name.partition('/')[0]} {digest}"


class BusyError(ConflictError):
    """Another request is sending to the same session."""

    default_code = "conflict"


@dataclass
class Upload:
    """A body that is arriving.

    Attributes:
        id: 32 hexadecimal digits, impossible to guess.
        name: The repository it is for.
        count_id: The id under which its namespace counts it.
        lifetime: Seconds without data after which it no longer counts.
        room: Bytes it is counted as; None for no limit.
        granted_at: When that room was last granted, by the monotonic clock.
        size: Bytes that have arrived.
        used_at: When data last arrived, by the monotonic clock.
    """

    id: str
    name: str
    path: Path
    file: BinaryIO
    count_id: str
    lifetime: float
    room: int | None = None
    granted_at: float = 0.0
    size: int = 0
    hasher: Any = field(default_factory=hashlib.sha256)
    busy: bool = False
    used_at: float = field(default_factory=time.monotonic)


class UploadLeases:
    """Keeps uploads from a gc as long as they can be used, by two leases: the current one and its predecessor.

    Args:
        store: The store; it notes in the current lease whatever it stores or finds stored.
        clock: A clock in seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._previous, self._present = ExitStack(), ExitStack()
        self._since = clock()
        self._begin()

    def _begin(self) -> None:
        self._store.files.lease = self._present.enter_context(hold(self._store.files, "hub", required=True))

    def rotate(self) -> None:
        """Once the current lease has lasted its time, end its predecessor and begin another."""
        if self._clock() - self._since >= LEASE_SECONDS:
            self._since = self._clock()
            previous, self._previous, self._present = self._previous, self._present, ExitStack()
            self._begin()
            previous.close()

    def close(self) -> None:
        """End both leases."""
        self._present.close()
        self._previous.close()


class UploadCounter(Protocol):
    """A callback that counts an open upload in its namespace, as `Quotas.open` does; called in a thread."""

    def __call__(self, name: str, upload: str, size: int, extra: int, lifetime: float, /) -> int | None:
        """Return the bytes the upload is counted as; None for no limit. RefusedError if there is no room."""


class Uploads:
    """The upload sessions of a hub.

    Args:
        store: Receives the blobs.
        workers: Threads.
        limit: Limit in bytes of a file.
        room: Counts open uploads.
        count: Called with a repository, the digest and size of a file that is complete, and the upload that no longer counts;
            RefusedError if the namespace may not hold it.
        forget: Called with a repository and the digest of a file that was counted and could not be stored.
        on_end: Called with a repository and the uploads that no longer count.
    """

    def __init__(
        self,
        store: Store,
        workers: Workers,
        *,
        limit: int,
        room: UploadCounter,
        count: Callable[[str, Digest, int, str], object],
        forget: Callable[[str, Digest], object],
        on_end: Callable[[str, Sequence[str]], object],
    ) -> None:
        self._store = store
        self._workers = workers
        self._limit = limit
        self._room, self._count_file, self._forget_file, self._on_end = room, count, forget, on_end
        self._open: dict[str, Upload] = {}
        self._whole_bodies: set[str] = set()  # count ids of bodies sent in one request
        self._lock = threading.Lock()
        self._swept_at = float("-inf")

    @property
    def count(self) -> int:
        """The number of open sessions, as far as this process knows."""
        return len(self._open)

    async def begin(self, name: str) -> Upload:
        """Begin a session for a repository."""
        ident = secrets.token_hex(16)
        return await self._begin(ident, name, ident, 0, USABLE_SECONDS)

    async def _begin(self, ident: str, name: str, count_id: str, size: int, lifetime: float) -> Upload:
        self._close_idle()
        upload = await self._workers.read(self._create, ident, name, count_id, size, lifetime)
        self._open[ident] = upload
        return upload

    def _close_idle(self) -> None:
        """Close the files of sessions that have been idle, and those idle longest if too many are open.

        `find` opens them again.
        """
        idle_since = time.monotonic() - _IDLE
        waiting = sorted((session for session in self._open.values() if not session.busy), key=lambda session: session.used_at)
        excess = len(self._open) - _MAX_OPEN
        for upload in [
            session for position, session in enumerate(waiting) if session.used_at < idle_since or position < excess
        ]:
            del self._open[upload.id]
            upload.file.close()

    def _create(self, ident: str, name: str, count_id: str, size: int, lifetime: float) -> Upload:
        self.sweep()
        path = self._path(ident, name)
        with local_errors(path):
            upload = Upload(ident, name, path, self._store.files.create(path), count_id, lifetime)
        try:
            self._count(upload, size)
        except BaseException:
            self._forget(upload)
            raise
        return upload

    def sweep(self) -> None:
        """Delete what was left in tmp/ more than a day ago; does nothing if the last sweep was recent."""
        now = time.monotonic()
        if now - self._swept_at > _SWEEP_INTERVAL:
            self._swept_at = now
            self._store.files.sweep()

    def _path(self, ident: str, name: str) -> Path:
        # The file name includes the repository, so that no other repository can take over the session after a restart.
        return self._store.root / "tmp" / f"{ident}-{hashlib.sha256(name.encode()).hexdigest()[:16]}{_SUFFIX}"

    async def find(self, ident: str, name: str) -> Upload:
        """Return a session of a repository, reopening its file if needed.

        Raises:
            NotFoundError: There is no such session.
        """
        upload = self._open.get(ident)
        if upload is None and is_hex(ident, 32):
            upload = await self._workers.read(self._reopen, ident, name)
            with self._lock:
                # Two requests may reopen a session at once: both must use the same file and hash.
                upload = self._open.setdefault(ident, upload)
        if upload is None or upload.name != name:
            raise NotFoundError(ident[:64], "no such upload", "Begin a new one")
        upload.used_at = time.monotonic()
        return upload

    def _reopen(self, ident: str, name: str) -> Upload:
        path = self._path(ident, name)
        with local_errors(path):
            if not self._store.files.is_file(path):
                raise NotFoundError(ident, "no such upload", "Begin a new one")
            upload = Upload(ident, name, path, self._store.files.resume(path), ident, USABLE_SECONDS)
            while piece := upload.file.read(CHUNK):
                upload.hasher.update(piece)
                upload.size += len(piece)
        self._count(upload, upload.size)
        return upload

    def _check_free(self, upload: Upload) -> None:
        if self._open.get(upload.id) is not upload:
            raise NotFoundError(upload.id, "this upload was ended by another request", "Begin a new one")
        if upload.busy:
            raise BusyError(upload.id, "another request is sending to this upload", "Try again")

    def _count(self, upload: Upload, size: int, extra: int = 0) -> None:
        upload.room, upload.granted_at = (
            self._room(upload.name, upload.count_id, size, extra, upload.lifetime),
            time.monotonic(),
        )

    async def append(self, upload: Upload, body: AsyncIterator[bytes], length: int = 0) -> None:
        """Add a body to a session; what had arrived when the connection broke stays.

        Args:
            upload: The session.
            body: The body, in pieces.
            length: The announced size in bytes; 0 if unknown.

        Raises:
            BusyError: Another request is writing to the session.
            NotFoundError: Another request has ended the session.
            RefusedError: The file would be larger than allowed, or than there is room for.
        """
        self._check_free(upload)
        upload.busy = True
        pending: asyncio.Future[None] | None = None
        try:
            if upload.room is not None and upload.size + length > upload.room:
                await self._workers.read(self._count, upload, upload.size + length)
            # Receive the next pieces while a thread writes the last ones.
            async for pieces in _in_chunks(body):
                if pending:
                    await pending
                size = upload.size + sum(map(len, pieces))
                if size > self._limit:
                    raise RefusedError(upload.name, f"a file may have at most {self._limit:,} bytes here")
                if upload.room is not None and (size > upload.room or upload.granted_at < time.monotonic() - _RENEWAL_INTERVAL):
                    await self._workers.read(
                        self._count, upload, max(size, upload.room), _ROOM_STEP if size > upload.room else 0
                    )
                pending = asyncio.ensure_future(self._workers.read(self._write, upload, pieces))
        finally:
            try:
                if pending:
                    await asyncio.shield(pending)
                if upload.room is not None and upload.room > upload.size:
                    await asyncio.shield(self._workers.read(self._count, upload, upload.size))
            finally:
                upload.busy, upload.used_at = False, time.monotonic()

    def _write(self, upload: Upload, pieces: list[bytes]) -> None:
        start = upload.size
        with local_errors(upload.path):
            for piece in pieces:
                write_all(upload.file, piece)
                upload.hasher.update(piece)
                upload.size += len(piece)
            # Start writing to disk now, so that the sync at the end is short.
            start_flush(upload.file, start, upload.size - start)

    async def finish(self, upload: Upload, digest: str, size: int | None = None) -> Digest:
        """Store a session's bytes as a blob, and return its sha256; the session ends in any case.

        Args:
            upload: The session.
            digest: The digest announced by the client: a sha256, or a sha512, which costs reading the file once more.
            size: The size in bytes, if known.

        Raises:
            BusyError: Another request is writing to the session, which stays open.
            IntegrityError: The bytes have another digest or size.
        """
        self._check_free(upload)
        del self._open[upload.id]
        return await self._workers.read(self._finish, upload, digest, size)

    def _finish(self, upload: Upload, digest: str, size: int | None) -> Digest:
        sha256 = f"sha256:{upload.hasher.hexdigest()}"
        try:
            received = self._sha512(upload) if digest.startswith(SHA512) else sha256
            if received != digest or size not in (None, upload.size):
                raise IntegrityError(
                    upload.name, f"received {upload.size} bytes of {received}, which is not {digest}", "Send it again"
                )
            # Counted before it is a blob, so that a file that is refused leaves nothing.
            self._count_file(upload.name, sha256, upload.size, upload.count_id)
            try:
                # Another upload may have stored the blob meanwhile.
                if not self._store.retain_if_present(sha256, upload.size):
                    self._store.adopt(upload.path, upload.file, sha256)
                    self._store.sync_blobs()
            except BaseException:
                if not self._store.has_blob(sha256, upload.size):
                    self._forget_file(upload.name, sha256)
                raise
            return sha256
        finally:
            upload.file.close()
            with suppress(FileNotFoundError):
                self._store.files.remove(upload.path)
            self._end(upload)

    def _end(self, upload: Upload) -> None:
        if upload.room is not None:
            self._on_end(upload.name, [upload.count_id])

    def _sha512(self, upload: Upload) -> str:
        with local_errors(upload.path):
            upload.file.seek(0)
            hasher = hashlib.sha512()
            while piece := upload.file.read(CHUNK):
                hasher.update(piece)
        return SHA512 + hasher.hexdigest()

    async def cancel(self, upload: Upload) -> None:
        """End a session and delete its bytes.

        Raises:
            BusyError: Another request is writing to it.
        """
        self._check_free(upload)
        del self._open[upload.id]
        await self._workers.read(self._forget, upload)

    def _forget(self, upload: Upload) -> None:
        upload.file.close()
        with local_errors(upload.path), suppress(FileNotFoundError):
            self._store.files.remove(upload.path)
        self._end(upload)

    @asynccontextmanager
    async def hold(self, name: str, body: AsyncIterator[bytes], *, length: int = 0) -> AsyncIterator[Upload]:
        """Receive a body into a file that counts, and is removed unless it is moved, until the context ends."""
        ident = secrets.token_hex(16)
        upload = await self._begin(ident, name, ident, length, _BODY_LIFETIME)
        try:
            await self.append(upload, body)
            yield upload
        finally:
            self._open.pop(ident, None)
            await asyncio.shield(self._workers.read(self._forget, upload))

    async def receive(
        self, name: str, body: AsyncIterator[bytes], digest: str, size: int | None = None, *, length: int = 0
    ) -> Digest:
        """Store a complete body as a blob, and return its sha256.

        `size` is its exact size, if known; `length` is only the announced one.
        """
        # A body sent again after this process or its client was killed replaces the first count; one sent twice at the same
        # time needs room twice.
        ident, count_id = secrets.token_hex(16), f"{name}@{digest}"
        count_id = ident if count_id in self._whole_bodies else count_id
        self._whole_bodies.add(count_id)
        try:
            upload = await self._begin(ident, name, count_id, size or length, _BODY_LIFETIME)
            try:
                await self.append(upload, body)
            except BaseException:
                await asyncio.shield(self.cancel(upload))
                raise
            return await self.finish(upload, digest, size)
        finally:
            self._whole_bodies.discard(count_id)


async def _in_chunks(body: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Yield the pieces of a body in lists of about 1 MiB: a thread hop per 64 KiB piece would cost more than hashing it."""
    pieces: list[bytes] = []
    size = 0
    async for piece in body:
        pieces.append(piece)
        size += len(piece)
        if size >= CHUNK:
            yield pieces
            pieces, size = [], 0
    if pieces:
        yield pieces
