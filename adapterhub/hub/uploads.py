"""Blobs in: a body goes into a file in `tmp/`, is hashed while it arrives, and gets its name once its digest is right.

A session outlives the connection, and a killed hub too: what has arrived is still there after a restart, and is hashed again
when the session goes on. One that nobody goes on with is swept after a day, as everything in `tmp/`.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from adapterhub.digest import CHUNK, Digest, is_hex
from adapterhub.store.atomic import local_errors, start_flush, write_all
from adapterhub.store.leases import hold
from adapterhub.store.store import Store
from adapterhub_converters.errors import ConflictError, IntegrityError, NotFoundError, RefusedError

from .database import HubDatabase
from .workers import Workers

_SUFFIX = ".upload"
_IDLE = 600.0  # seconds after which a session is closed until somebody goes on with it
_SWEPT = 60.0  # seconds between two looks at what was left in tmp/
_STEP = 64 << 20  # bytes that a body of unknown size is counted ahead
_SENDING, _ASKED = 3600.0, 600.0  # seconds that a whole body is counted, and until that is done again
_OPEN = 200  # sessions that are open at a time, unless more of them are being sent to
SHA512 = "sha512:"
USABLE = 24 * 3600.0
"""Seconds that an upload can be used by a commit or a manifest."""
HELD = USABLE + 3600
"""Seconds that a gc leaves alone what was uploaded, at least; at most twice as many."""


def stored(database: HubDatabase, digest: str) -> Digest:
    """The sha256 of a digest; empty for a sha512 that nothing was sent under."""
    if not digest.startswith(SHA512):
        return digest
    rows = database.select("SELECT sha256 FROM sha512 WHERE digest = ?", digest)
    return str(rows[0][0]) if rows else ""


class TooLargeError(Exception):
    """A body has more bytes than this request may have."""


class BusyError(ConflictError):
    """Another request is sending to the same session."""

    default_code = "conflict"


@dataclass
class Upload:
    """A body that is arriving.

    Attributes:
        id: 32 hexadecimal digits, which nobody can guess.
        name: The repository that it is for.
        counted: The id under which its namespace counts it.
        lifetime: Seconds without data after which it is no longer counted.
        room: Bytes that it is counted as; None for no limit.
        asked: When room for those was last granted, by the monotonic clock.
        size: Bytes that have arrived.
        used: When something arrived last, by the monotonic clock.
    """

    id: str
    name: str
    path: Path
    file: BinaryIO
    counted: str
    lifetime: float
    room: int | None = None
    asked: float = 0.0
    size: int = 0
    state: Any = field(default_factory=hashlib.sha256)
    busy: bool = False
    used: float = field(default_factory=time.monotonic)


class Held:
    """Keeps what is stored from a gc as long as it can be used, by two leases: the present one, and the one before.

    Args:
        store: Notes in the present lease whatever it stores, or finds that it has.
        clock: In seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._before, self._present = ExitStack(), ExitStack()
        self._since = clock()
        self._begin()

    def _begin(self) -> None:
        self._store.files.lease = self._present.enter_context(hold(self._store.files, "hub", required=True))

    def turn(self) -> None:
        """Once the present lease has lasted its time, end the one before, and begin another."""
        if self._clock() - self._since >= HELD:
            self._since = self._clock()
            before, self._before, self._present = self._before, self._present, ExitStack()
            self._begin()
            before.close()

    def close(self) -> None:
        """End both."""
        self._present.close()
        self._before.close()


class Room(Protocol):
    """Count an open upload in the namespace of a repository, as `Quotas.open` does; called in a thread."""

    def __call__(self, name: str, upload: str, size: int, more: int, lifetime: float, /) -> int | None:
        """Return the bytes that it is counted as; None for no limit. RefusedError if there is no room."""


class Uploads:
    """The sessions of a hub.

    Args:
        store: Takes the blobs.
        workers: Threads.
        limit: Bytes that a file may have.
        room: Counts what is open.
        ended: Called with a repository and the uploads that are no longer counted.
    """

    def __init__(
        self, store: Store, workers: Workers, *, limit: int, room: Room, ended: Callable[[str, Sequence[str]], object]
    ) -> None:
        self._store = store
        self._workers = workers
        self._limit = limit
        self._room, self._ended = room, ended
        self._open: dict[str, Upload] = {}
        self._whole: set[str] = set()  # what is counted of bodies that are sent whole
        self._lock = threading.Lock()
        self._swept = float("-inf")

    @property
    def count(self) -> int:
        """Sessions that have begun and not ended, as far as this process knows."""
        return len(self._open)

    async def begin(self, name: str) -> Upload:
        """Begin a session for a repository."""
        ident = secrets.token_hex(16)
        return await self._begin(ident, name, ident, 0, USABLE)

    async def _begin(self, ident: str, name: str, counted: str, size: int, lifetime: float) -> Upload:
        self._close_idle()
        upload = await self._workers.read(self._create, ident, name, counted, size, lifetime)
        self._open[ident] = upload
        return upload

    def _close_idle(self) -> None:
        """Close the files of sessions that nobody has gone on with, and of those used last if too many are open.

        `find` opens them again.
        """
        before = time.monotonic() - _IDLE
        waiting = sorted((one for one in self._open.values() if not one.busy), key=lambda one: one.used)
        excess = len(self._open) - _OPEN
        for upload in [one for at, one in enumerate(waiting) if one.used < before or at < excess]:
            del self._open[upload.id]
            upload.file.close()

    def _create(self, ident: str, name: str, counted: str, size: int, lifetime: float) -> Upload:
        self.sweep()
        path = self._path(ident, name)
        with local_errors(path):
            upload = Upload(ident, name, path, self._store.files.create(path), counted, lifetime)
        try:
            self._count(upload, size)
        except BaseException:
            self._forget(upload)
            raise
        return upload

    def sweep(self) -> None:
        """Delete what was left in tmp/ more than a day ago, but look at all that is there only now and then."""
        now = time.monotonic()
        if now - self._swept > _SWEPT:
            self._swept = now
            self._store.files.sweep()

    def _path(self, ident: str, name: str) -> Path:
        # The repository is part of the name, so that a session cannot be finished through another one after a restart.
        return self._store.root / "tmp" / f"{ident}-{hashlib.sha256(name.encode()).hexdigest()[:16]}{_SUFFIX}"

    async def find(self, ident: str, name: str) -> Upload:
        """A session of a repository, opened again after a restart; NotFoundError without it."""
        upload = self._open.get(ident)
        if upload is None and is_hex(ident, 32):
            upload = await self._workers.read(self._reopen, ident, name)
            with self._lock:
                upload = self._open.setdefault(ident, upload)
        if upload is None or upload.name != name:
            raise NotFoundError(ident[:64], "no such upload", "Begin a new one")
        upload.used = time.monotonic()
        return upload

    def _reopen(self, ident: str, name: str) -> Upload:
        path = self._path(ident, name)
        with local_errors(path):
            if not self._store.files.is_file(path):
                raise NotFoundError(ident, "no such upload", "Begin a new one")
            upload = Upload(ident, name, path, self._store.files.resume(path), ident, USABLE)
            while piece := upload.file.read(CHUNK):
                upload.state.update(piece)
                upload.size += len(piece)
        self._count(upload, upload.size)
        return upload

    def _check_free(self, upload: Upload) -> None:
        if self._open.get(upload.id) is not upload:
            raise NotFoundError(upload.id, "this upload was ended by another request", "Begin a new one")
        if upload.busy:
            raise BusyError(upload.id, "another request is sending to this upload", "Try again")

    def _count(self, upload: Upload, size: int, more: int = 0) -> None:
        upload.room, upload.asked = self._room(upload.name, upload.counted, size, more, upload.lifetime), time.monotonic()

    async def append(self, upload: Upload, body: AsyncIterator[bytes], length: int = 0) -> None:
        """Add a body to a session; what had arrived when the connection broke stays.

        Args:
            upload: The session.
            body: Its pieces.
            length: Bytes that are announced; 0 if that is not known.

        Raises:
            BusyError: Another request is adding to it.
            NotFoundError: Another request has ended it.
            RefusedError: It would be larger than a file may be, or than there is room for.
        """
        self._check_free(upload)
        upload.busy = True
        pending: asyncio.Future[None] | None = None
        try:
            if upload.room is not None and upload.size + length > upload.room:
                await self._workers.read(self._count, upload, upload.size + length)
            async for pieces in _gathered(body):
                if pending:
                    await pending
                size = upload.size + sum(map(len, pieces))
                if size > self._limit:
                    raise RefusedError(upload.name, f"a file may have at most {self._limit:,} bytes here")
                if upload.room is not None and (size > upload.room or upload.asked < time.monotonic() - _ASKED):
                    await self._workers.read(self._count, upload, max(size, upload.room), _STEP if size > upload.room else 0)
                pending = asyncio.ensure_future(self._workers.read(self._write, upload, pieces))
        finally:
            try:
                if pending:
                    await asyncio.shield(pending)
                if upload.room is not None and upload.room > upload.size:
                    await asyncio.shield(self._workers.read(self._count, upload, upload.size))
            finally:
                upload.busy, upload.used = False, time.monotonic()

    def _write(self, upload: Upload, pieces: list[bytes]) -> None:
        start = upload.size
        with local_errors(upload.path):
            for piece in pieces:
                write_all(upload.file, piece)
                upload.state.update(piece)
                upload.size += len(piece)
            start_flush(upload.file, start, upload.size - start)

    async def finish(self, upload: Upload, digest: str, size: int | None = None) -> Digest:
        """Store what has arrived as a blob, and return its sha256; the session ends in any case.

        Args:
            upload: The session.
            digest: What it is by sha256 or, which costs reading it once more, by sha512.
            size: Its bytes, if they are known.

        Raises:
            BusyError: Another request is adding to it, and goes on.
            IntegrityError: It has another digest, or another size.
        """
        self._check_free(upload)
        del self._open[upload.id]
        return await self._workers.read(self._finish, upload, digest, size)

    def _finish(self, upload: Upload, digest: str, size: int | None) -> Digest:
        stored = f"sha256:{upload.state.hexdigest()}"
        try:
            found = self._sha512(upload) if digest.startswith(SHA512) else stored
            if found != digest or size not in (None, upload.size):
                raise IntegrityError(
                    upload.name, f"received {upload.size} bytes of {found}, which is not {digest}", "Send it again"
                )
            if not self._store.holds(stored, upload.size):
                self._store.adopt(upload.path, upload.file, stored)
                self._store.sync_blobs()
            return stored
        finally:
            upload.file.close()
            with suppress(FileNotFoundError):
                self._store.files.remove(upload.path)
            self._end(upload)

    def _end(self, upload: Upload) -> None:
        if upload.room is not None:
            self._ended(upload.name, [upload.counted])

    def _sha512(self, upload: Upload) -> str:
        with local_errors(upload.path):
            upload.file.seek(0)
            state = hashlib.sha512()
            while piece := upload.file.read(CHUNK):
                state.update(piece)
        return SHA512 + state.hexdigest()

    async def cancel(self, upload: Upload) -> None:
        """End a session and forget what has arrived; BusyError while another request is adding to it."""
        self._check_free(upload)
        del self._open[upload.id]
        await self._workers.read(self._forget, upload)

    def _forget(self, upload: Upload) -> None:
        upload.file.close()
        with local_errors(upload.path), suppress(FileNotFoundError):
            self._store.files.remove(upload.path)
        self._end(upload)

    async def receive(
        self, name: str, body: AsyncIterator[bytes], digest: str, size: int | None = None, *, length: int = 0
    ) -> Digest:
        """Store a whole body as a blob; return its sha256. It has `size` bytes, if that is given, or announces `length`."""
        # One that is sent again, after this process or its client was killed, takes the place of the first; one that is sent
        # twice at a time needs room twice.
        ident, counted = secrets.token_hex(16), f"{name}@{digest}"
        counted = ident if counted in self._whole else counted
        self._whole.add(counted)
        try:
            upload = await self._begin(ident, name, counted, size or length, _SENDING)
            try:
                await self.append(upload, body)
            except BaseException:
                await asyncio.shield(self.cancel(upload))
                raise
            return await self.finish(upload, digest, size)
        finally:
            self._whole.discard(counted)


async def collected(body: AsyncIterator[bytes], limit: int) -> bytes:
    """A whole body in memory; TooLargeError over `limit` bytes."""
    pieces, size = [], 0
    async for piece in body:
        size += len(piece)
        if size > limit:
            raise TooLargeError(f"the body is larger than {limit:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


async def _gathered(body: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """The pieces of a body, about 1 MiB of them at a time: a thread for each piece of 64 KiB would cost more than its hash."""
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
