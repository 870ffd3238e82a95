"""Blobs on their way, several at once: how far they are, how fast they may be, and stopped by the first that fails.

What stops them is an exception in whoever reads a source, so that every place, whatever it does with the bytes, keeps what it
had for the next run as if its own network had failed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from adapterhub.manifest.oci_manifest import Descriptor, Manifest

from .protocol import Progress, Reader, Source

JOBS = 4


class StoppedError(Exception):
    """Another blob failed: this one isn't wanted now."""


@dataclass
class Pace:
    """At most so many bytes a second, of all threads together; None for as fast as it goes."""

    rate: float | None = None
    _free: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def most(self) -> int:
        """Bytes that should pass at a time: what a tenth of a second has room for."""
        return 1 << 30 if self.rate is None else max(int(self.rate / 10), 1 << 10)

    def spend(self, count: int) -> float:
        """Seconds to wait now that `count` more bytes have passed."""
        if self.rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now) + count / self.rate
            return self._free - now


class Move:
    """Blobs that are moved together; make sources `watched` and run them with `each`.

    Attributes:
        jobs: How many at once.
        pace: What holds them back.
    """

    def __init__(
        self, blobs: Sequence[Descriptor], progress: Progress | None, jobs: int = JOBS, pace: Pace | None = None
    ) -> None:
        self.jobs, self.pace = jobs, pace or Pace()
        self._total = sum(blob.size for blob in blobs)
        self._progress = progress
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def watched(self, source: Source) -> Watched:
        """The source, every byte that is read of it counted."""
        return Watched(source, self)

    def at(self, digest: str, position: int, new: int = 0) -> None:
        """Say that a blob has been read up to `position`, `new` bytes of them just now; StoppedError ends it."""
        seconds = self.pace.spend(new) if new else 0.0
        if self._stop.is_set() or (seconds > 0 and self._stop.wait(seconds)):
            raise StoppedError
        with self._lock:
            if position > self._done.get(digest, -1):
                self._done[digest] = position
                if self._progress:
                    self._progress(sum(self._done.values()), self._total)

    def each(self, work: Callable[[Descriptor], Any], blobs: Sequence[Descriptor], *places: Source) -> list[Any]:
        """What `work` returns of each blob. The first error ends the others, which keep what they have, and is raised.

        `places` are told to `stop` then.
        """
        self._tell(places, on=False)
        if self.jobs < 2 or len(blobs) < 2:
            return [self._one(work, blob) for blob in blobs]
        with ThreadPoolExecutor(min(self.jobs, len(blobs))) as pool:
            jobs: list[Future[Any]] = []
            done: set[Future[Any]] = set()
            try:
                for blob in blobs:  # one by one: a signal may come when some of them wait already
                    jobs.append(pool.submit(self._one, work, blob))
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # a signal as well
                if len(jobs) < len(blobs) or not all(job.done() and not job.exception() for job in jobs):
                    self._end(jobs, places)
        # Not after a signal: it may have come as a thread began that the pool doesn't know of, and which is yet to wait.
        self._tell(places, on=False)
        failed = [job for job in jobs if job in done and job.exception()] or [job for job in jobs if job.exception()]
        for job in failed:
            if not isinstance(job.exception(), StoppedError):
                job.result()
        return [job.result() for job in jobs]

    def _one(self, work: Callable[[Descriptor], Any], blob: Descriptor) -> Any:
        if self._stop.is_set():
            raise StoppedError
        result = work(blob)
        self.at(blob.digest, blob.size)
        return result

    def _end(self, jobs: Sequence[Future[Any]], places: Sequence[Source]) -> None:
        self._stop.set()
        for job in jobs:
            job.cancel()
        self._tell(places, on=True)

    def _tell(self, places: Sequence[Source], *, on: bool) -> None:
        for place in places:
            place.stop(on=on)


class Watched:
    """A source that tells how much of it has been read."""

    def __init__(self, source: Source, move: Move) -> None:
        self.source, self._move = source, move

    @property
    def where(self) -> str:
        """What errors call it."""
        return self.source.where

    def manifest(self, reference: str) -> Manifest:
        """That of the source."""
        return self.source.manifest(reference)

    def tags(self) -> list[str]:
        """Those of the source."""
        return self.source.tags()

    def stop(self, *, on: bool = True) -> None:
        """Stop the source."""
        self.source.stop(on=on)

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """A blob, watched."""
        self._move.at(blob.digest, start)
        with self.source.open_blob(blob, start) as reader:
            yield _Reader(reader, blob, start, self._move)


class _Reader:
    def __init__(self, reader: Reader, blob: Descriptor, start: int, move: Move) -> None:
        self._reader, self._blob, self._at, self._move = reader, blob, start, move

    def readinto(self, buffer: memoryview, /) -> int:
        n = int(self._reader.readinto(buffer[: self._move.pace.most()]) or 0)
        self._at += n
        self._move.at(self._blob.digest, self._at, n)
        return n


def unwatched(source: Source) -> Source:
    """The source itself."""
    return source.source if isinstance(source, Watched) else source
