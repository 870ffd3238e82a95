"""Files on their way from the upstream into the cache: one download for all who read, verified before its end is sent.

A client that waits longer than a few seconds for the first byte gives up, so large files are sent while they arrive. Their last
bytes are held back until the digest of all is right: a client never gets a whole file whose bytes are wrong. What a killed
process received is hashed again, and the rest is asked for.

Of several processes that share a bucket, one receives a file from the upstream, and the others from it by way of the bucket.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from adapterhub.digest import CHUNK
from adapterhub.http.http_errors import TruncatedBodyError
from adapterhub.hub.git_objects import GitFile, new_object_hash
from adapterhub.store.store_files import write_all
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from .cached_files import CachedFiles, key_of
from .model_client import MIN_RATE, RATE_SECONDS, ModelClient, open_range
from .shared_files import PIECE_SIZE, ArrivingPieces, SharedFiles

_log = logging.getLogger("adapterhub.hub")
_THREADS = 4  # files fetched at a time
# Bytes read at a time: a read waits until it has all of them, and so do clients of a slow upstream.
_PIECE_SIZE = 1 << 16
HELD_BACK = 1 << 16  # bytes at the end of a file that are sent once all of it is verified
_MAX_REQUESTS = 50  # for one file, if the connection is cut again and again
_BAD_TTL = 60.0  # seconds in which a file whose bytes were wrong is not fetched again
_FULL_TTL = 30.0  # seconds in which nothing is kept after a write has failed
_FOLLOW_SECONDS = 0.25  # between looks for the next piece of a file that another process fetches
_MAX_BAD = 10_000  # files remembered because their bytes were wrong


class NotKeptError(LocalIOError):
    """A file cannot be kept: it is larger than the limit, the disk is full, or another process is fetching it."""

    default_code = "not-kept"


class Fill:
    """A file that is being fetched.

    Attributes:
        file: The file.
        key: The name of its content.
        has_begun: Whether it is asked for; False while it waits for others to arrive.
        written: Bytes that have arrived.
        is_whole: Whether all have, and are right.
        error: Why the download has ended; None as long as it runs, or if the file is whole.
    """

    def __init__(self, file: GitFile, loop: asyncio.AbstractEventLoop) -> None:
        self.file, self.key = file, key_of(file)
        self.has_begun, self.written, self.is_whole = False, 0, False
        self.error: AdapterhubError | None = None
        self._loop, self._news = loop, asyncio.Event()

    @property
    def readable(self) -> int:
        """The number of bytes at its beginning that may be sent."""
        return self.file.size if self.is_whole else max(min(self.written, self.file.size - HELD_BACK), 0)

    def advance(self, written: int) -> None:
        """Set the number of bytes that have arrived; called in the thread that fetches."""
        self.written = written
        self._loop.call_soon_threadsafe(self._wake)

    def end(self, error: AdapterhubError | None) -> None:
        """End it; without an error, the file is whole. Called in the event loop."""
        self.error, self.is_whole = error, error is None
        self._wake()

    def _wake(self) -> None:
        # Everybody who waits has this event; whoever comes later gets the next one.
        self._news.set()
        self._news = asyncio.Event()

    async def wait_beyond(self, position: int) -> None:
        """Wait until more than `position` bytes may be sent, or the download has ended."""
        while self.readable <= position and not self.is_whole and self.error is None:
            await self._news.wait()


class Fills:
    """The downloads of a process.

    Args:
        client: A client of the upstream.
        cached: Where files are kept.
        shared: Where the processes of a hub keep them for each other; None for a hub in one folder.

    Attributes:
        received_bytes: The bytes that came from the upstream.
    """

    def __init__(self, client: ModelClient, cached: CachedFiles, shared: SharedFiles | None = None) -> None:
        self._client, self._cached, self._shared = client, cached, shared
        self.received_bytes = 0
        self._pool = ThreadPoolExecutor(_THREADS, "hub-upstream-file")
        self._running: dict[str, Fill] = {}
        self._bad: dict[str, float] = {}
        self._full_until = 0.0
        self._room, self._stopping = threading.Lock(), threading.Event()

    def close(self) -> None:
        """Wait for the downloads, which the client has been told to stop."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def was_wrong(self, file: GitFile) -> bool:
        """Return whether wrong bytes of a file were received: a client may have the first of them."""
        return key_of(file) in self._bad

    def start(self, file: GitFile, url: str, location: str) -> Fill:
        """Return the running download of a file, starting it if there is none.

        Raises:
            IntegrityError: Wrong bytes were received a moment ago.
            NotKeptError: Files cannot be kept.
        """
        key = key_of(file)
        if fill := self._running.get(key):
            return fill
        if self._bad.get(key, -_BAD_TTL) + _BAD_TTL > time.monotonic():
            raise wrong_bytes(location)
        if file.size > self._cached.max_bytes or self._full_until > time.monotonic():
            raise NotKeptError(location, "cannot be kept")
        loop = asyncio.get_running_loop()
        fill = self._running[key] = Fill(file, loop)
        task = loop.run_in_executor(self._pool, self._fetch, fill, url, location)
        task.add_done_callback(lambda _: self._end(fill, task))
        return fill

    def _end(self, fill: Fill, task: asyncio.Future[None]) -> None:
        del self._running[fill.key]
        failure = RemoteError("upstream", "stopped") if task.cancelled() else task.exception()  # codespell:ignore
        if failure and not isinstance(failure, AdapterhubError):
            _log.error("a download from the upstream failed", exc_info=failure)
        error = failure if failure is None or isinstance(failure, AdapterhubError) else RemoteError("upstream", "failed")
        if isinstance(error, IntegrityError):
            if len(self._bad) >= _MAX_BAD:
                self._bad.clear()
            self._bad[fill.key] = time.monotonic()
        elif isinstance(error, LocalIOError) and not isinstance(error, NotKeptError):
            self._full_until = time.monotonic() + _FULL_TTL
        if error:
            _log.warning("a file of the upstream is not kept: %s", printable(str(error)))
        fill.end(error)

    # ---- in a thread

    def _fetch(self, fill: Fill, url: str, location: str) -> None:
        fill.has_begun = True
        if self._cached.has_whole(fill.key):
            return
        with self._cached.part(fill.key) as part:
            state, size = _hash_part(part, fill.file)
            with self._room:
                # What the other downloads have yet to receive is taken.
                others = sum(other.file.size - other.written for other in list(self._running.values()) if other is not fill)
                fill.advance(size)
                if not self._cached.make_room(fill.file.size - size + others):
                    raise NotKeptError(location, "does not fit beside what is being fetched")
            arrival = _Arrival(fill, part, state, location)
            try:
                if self._shared:
                    self._receive_shared(self._shared, arrival, url)
                else:
                    self._receive(arrival, url)
                self._cached.keep(fill.key, part)
            except IntegrityError:
                self._cached.discard(fill.key)
                raise

    def _receive_shared(self, shared: SharedFiles, arrival: _Arrival, url: str) -> None:
        """Receive the rest of a file as `_receive` does, in one process of the hub; in the others from that."""
        fill = arrival.fill
        while not shared.claim(fill.key):
            if self._follow(shared, arrival):
                return
        try:
            if shared.size(fill.key) == fill.file.size:
                _copy_whole(shared, arrival)
                return
            pieces = shared.sharing(fill.key, arrival.part)
            try:
                self._receive(arrival, url, pieces)
                if not shared.keep(fill.key, arrival.part, fill.file.size):
                    _log.warning("the bucket does not keep a file of the upstream: %s", printable(arrival.location))
            finally:
                pieces.remove()
        finally:
            shared.release(fill.key)

    def _follow(self, shared: SharedFiles, arrival: _Arrival) -> bool:
        """Receive a file that another process fetches; return False if that process has given up."""
        fill = arrival.fill
        while fill.written < fill.file.size:
            number, offset = divmod(fill.written, PIECE_SIZE)
            if shared.size(fill.key) == fill.file.size:
                _copy_whole(shared, arrival)
                return True
            if piece := shared.read_piece(fill.key, number):
                arrival.add(piece[offset:])
            elif not shared.is_fetched(fill.key):
                return False
            elif self._stopping.wait(_FOLLOW_SECONDS):
                raise RemoteError(arrival.location, "the hub is stopping")
        arrival.check_digest()
        return True

    def _receive(self, arrival: _Arrival, url: str, pieces: ArrivingPieces | None = None) -> None:
        """Receive the rest of a file from the upstream, and compare its digest.

        Args:
            pieces: Shares it with other processes while it arrives.

        Raises:
            IntegrityError: The upstream sends other bytes than it lists.
            RemoteError: It does not answer, or is too slow.
        """
        fill, location = arrival.fill, arrival.location
        buffer, requests, pace = memoryview(bytearray(_PIECE_SIZE)), 0, Pace(location)
        while fill.written < fill.file.size:
            requests += 1
            try:
                with open_range(self._client, url, location, fill.written, fill.file.size - 1, size=fill.file.size) as body:
                    while count := body.readinto(buffer):
                        if fill.written + count > fill.file.size:
                            raise wrong_bytes(location)
                        arrival.add(buffer[:count])
                        self.received_bytes += count
                        pace.add(count)
                        if pieces:
                            pieces.advance(fill.written)
                if fill.written < fill.file.size:
                    raise IntegrityError(location, f"the upstream has {fill.written:,} bytes of it, not {fill.file.size:,}")
            except TruncatedBodyError:
                if requests >= _MAX_REQUESTS:
                    raise
        arrival.check_digest()


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What a thread writes a file to, with the hash of the bytes that it has, and its name in errors."""

    fill: Fill
    part: BinaryIO
    state: hashlib._Hash
    location: str

    def add(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self.state.update(data)
        write_all(self.part, bytes(data))
        self.fill.advance(self.fill.written + len(data))

    def check_digest(self) -> None:
        """Raise IntegrityError unless the bytes are those of the file."""
        if self.state.hexdigest() != (self.fill.file.lfs or self.fill.file.oid):
            raise wrong_bytes(self.location)


def _copy_whole(shared: SharedFiles, arrival: _Arrival) -> None:
    """Receive the rest of a file that is whole in the bucket."""
    fill, buffer = arrival.fill, memoryview(bytearray(CHUNK))
    with shared.stream(fill.key, fill.file.size, fill.written) as readinto:
        while fill.written < fill.file.size and (count := readinto(buffer)):
            arrival.add(buffer[: min(count, fill.file.size - fill.written)])
    arrival.check_digest()


class Pace:
    """The least speed of a download, with its pauses and all connections that it takes."""

    def __init__(self, location: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._location, self._clock = location, clock
        self._since, self._count = clock(), 0

    def add(self, count: int) -> None:
        """Count bytes. RemoteError if they are too few for the time."""
        self._count += count
        if (elapsed := self._clock() - self._since) >= RATE_SECONDS:
            if self._count < MIN_RATE * elapsed:
                raise RemoteError(self._location, f"the upstream sends less than {MIN_RATE // 1000} kB a second")
            self._since, self._count = self._clock(), 0


def new_hash(file: GitFile) -> hashlib._Hash:
    """Return the state of the digest that names a file, before its first byte."""
    return hashlib.sha256() if file.lfs else new_object_hash(file.size)


def _hash_part(part: BinaryIO, file: GitFile) -> tuple[hashlib._Hash, int]:
    """Return the hash and the number of the bytes that an earlier process received of a file; the part is at their end."""
    state, size, buffer = new_hash(file), 0, memoryview(bytearray(CHUNK))
    while size < file.size and (count := part.readinto(buffer[: min(CHUNK, file.size - size)])):  # type: ignore[attr-defined]
        state.update(buffer[:count])
        size += count
    part.seek(size)
    part.truncate(size)
    return state, size


def wrong_bytes(location: str) -> IntegrityError:
    """Return the error for a file of the upstream that is not what it lists."""
    return IntegrityError(location, "the upstream sends other bytes than the digest that it names")
