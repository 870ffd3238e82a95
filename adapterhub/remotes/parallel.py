"""Transfer of several blobs at once: progress, a limit on the rate, and the first failure stops all.

They are stopped by an exception in the code that reads a source, so that every target keeps its partial data for the next run,
as if its own network had failed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.store.store import open_regular

from .protocol import Progress, Reader, Source

JOBS = 4


class StoppedError(Exception):
    """Another blob failed, so this one was stopped."""


@dataclass
class Pace:
    """A limit in bytes per second, for all threads together; None for no limit."""

    rate: float | None = None
    _free: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def most(self) -> int:
        """Bytes to pass at a time: a tenth of a second's."""
        return 1 << 30 if self.rate is None else max(int(self.rate / 10), 1 << 10)

    def spend(self, count: int) -> float:
        """Count bytes that have passed; return the seconds to wait."""
        if self.rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now) + count / self.rate
            return self._free - now


class Move:
    """Blobs that are transferred together: read them from a `watched` source, in `each`.

    Attributes:
        jobs: How many at once.
        pace: The limit on their rate.
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
        """The source, with every byte that is read from it counted."""
        return Watched(source, self)

    def at(self, digest: str, position: int, new: int = 0) -> None:
        """Report that a blob has been read up to `position`, `new` bytes just now; StoppedError after another one failed."""
        seconds = self.pace.spend(new) if new else 0.0
        if self._stop.is_set() or (seconds > 0 and self._stop.wait(seconds)):
            raise StoppedError
        with self._lock:
            if position > self._done.get(digest, -1):
                self._done[digest] = position
                if self._progress:
                    self._progress(sum(self._done.values()), self._total)

    def each(self, work: Callable[[Descriptor], Any], blobs: Sequence[Descriptor], *places: Source) -> list[Any]:
        """Call `work` for each blob; return its results. The first error is raised, and stops the other blobs and `places`."""
        self._tell(places, on=False)
        if self.jobs < 2 or len(blobs) < 2:
            return [self._one(work, blob) for blob in blobs]
        with ThreadPoolExecutor(min(self.jobs, len(blobs))) as pool:
            jobs: list[Future[Any]] = []
            done: set[Future[Any]] = set()
            try:
                for blob in blobs:  # one by one: a signal may come while some of them wait already
                    jobs.append(pool.submit(self._one, work, blob))
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # a signal as well
                if len(jobs) < len(blobs) or not all(job.done() and not job.exception() for job in jobs):
                    self._end(jobs, places)
        # Not after a signal: it may have come as a thread began that the pool does not know yet, and that is still to wait.
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


class _Wrapped:
    """A source with another way to its blobs."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def where(self) -> str:
        """Its name in errors."""
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


class Watched(_Wrapped):
    """A source that reports how much of it has been read."""

    def __init__(self, source: Source, move: Move) -> None:
        super().__init__(source)
        self._move = move

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """A blob whose reader reports its progress."""
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


class Settled(_Wrapped):
    """A source that answers only once what a reference is: what was checked is what is transferred.

    A tag may move between two requests, and a hostile registry may have it move at every one.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._made: dict[str, Manifest] = {}

    def manifest(self, reference: str) -> Manifest:
        """That of the source, as it was when first asked."""
        if reference not in self._made:
            self._made[reference] = self.source.manifest(reference)
        return self._made[reference]

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """A blob of the source."""
        with self.source.open_blob(blob, start) as reader:
            yield reader


class Fetched(_Wrapped):
    """A source with a version that was downloaded into a folder: its files are read there, anything else from the source.

    `unwatched` still returns the source, so that a registry can mount blobs of another repository.
    """

    def __init__(self, source: Source, folder: Path, made: Manifest) -> None:
        super().__init__(source)
        self._paths = {layer.digest: folder / layer.path for layer in made.layers}

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """A file that was downloaded, else the blob at the source."""
        if blob.digest not in self._paths:
            with self.source.open_blob(blob, start) as reader:
                yield reader
            return
        with open_regular(self._paths[blob.digest]) as file:
            file.seek(start)
            yield cast(Reader, file)


def unwatched(source: Source) -> Source:
    """The source behind those of this module."""
    while isinstance(source, _Wrapped):
        source = source.source
    return source
