"""Transfer of several blobs at once: progress, a limit on the rate, and a first failure that stops all.

Transfers are stopped by an exception in the code that reads a source, so that every target keeps its partial data for the next
run, as if its own network had failed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import field
from pathlib import Path
from typing import Any, cast

from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.store.store import open_regular
from adapterhub_converters.lazy_dataclass import dataclass

from .protocol import Progress, Reader, Source

JOBS = 4


class StoppedError(Exception):
    """Another blob failed, so this one was stopped."""


@dataclass
class RateLimit:
    """A limit in bytes per second, shared by all threads; None for no limit."""

    rate: float | None = None
    _free_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def chunk_size(self) -> int:
        """Return how many bytes to pass at a time: a tenth of a second's worth."""
        return 1 << 30 if self.rate is None else max(int(self.rate / 10), 1 << 10)

    def delay_after(self, count: int) -> float:
        """Count bytes that have passed; return the seconds to wait."""
        if self.rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            # Reserve time on a clock that all threads share; idle time does not accumulate.
            self._free_at = max(self._free_at, now) + count / self.rate
            return self._free_at - now


class Transfer:
    """Blobs that are transferred together: read them from a source that `watch` returned, in `run_all`.

    Attributes:
        jobs: How many blobs are transferred at once.
        pace: The limit on their rate.
    """

    def __init__(
        self, blobs: Sequence[Descriptor], progress: Progress | None, jobs: int = JOBS, pace: RateLimit | None = None
    ) -> None:
        self.jobs, self.pace = jobs, pace or RateLimit()
        self._total = sum(blob.size for blob in blobs)
        self._progress = progress
        self._positions: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def watch(self, source: Source) -> WatchedSource:
        """Return the source with every byte that is read from it counted."""
        return WatchedSource(source, self)

    def report(self, digest: str, position: int, new_bytes: int = 0) -> None:
        """Report that a blob has been read up to `position`, `new_bytes` just now; StoppedError after another blob failed."""
        seconds = self.pace.delay_after(new_bytes) if new_bytes else 0.0
        if self._stop.is_set() or (seconds > 0 and self._stop.wait(seconds)):
            raise StoppedError
        with self._lock:
            # A retried blob starts again: progress never goes back.
            if position > self._positions.get(digest, -1):
                self._positions[digest] = position
                if self._progress:
                    self._progress(sum(self._positions.values()), self._total)

    def run_all(self, work: Callable[[Descriptor], Any], blobs: Sequence[Descriptor], *places: Source) -> list[Any]:
        """Call `work` for each blob, and return its results. The first error stops the other blobs and `places`."""
        # An earlier run that failed may have stopped them.
        self._stop_places(places, on=False)
        if self.jobs < 2 or len(blobs) < 2:
            return [self._run_one(work, blob) for blob in blobs]
        with ThreadPoolExecutor(min(self.jobs, len(blobs))) as pool:
            jobs: list[Future[Any]] = []
            finished: set[Future[Any]] = set()
            try:
                for blob in blobs:  # one by one: a signal may arrive while some of them are waiting
                    jobs.append(pool.submit(self._run_one, work, blob))
                finished, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # after a signal as well
                if len(jobs) < len(blobs) or not all(job.done() and not job.exception() for job in jobs):
                    self._stop_all(jobs, places)
        # Only without a signal: one may arrive while a thread starts that the pool does not know yet, and that thread must
        # still be stopped.
        self._stop_places(places, on=False)
        # Prefer the failures that `wait` returned for: the others may only be their consequence.
        failed_jobs = [job for job in jobs if job in finished and job.exception()] or [job for job in jobs if job.exception()]
        for job in failed_jobs:
            if not isinstance(job.exception(), StoppedError):
                job.result()
        return [job.result() for job in jobs]

    def _run_one(self, work: Callable[[Descriptor], Any], blob: Descriptor) -> Any:
        if self._stop.is_set():
            raise StoppedError
        result = work(blob)
        # Whole, even if nothing was read because the target had it.
        self.report(blob.digest, blob.size)
        return result

    def _stop_all(self, jobs: Sequence[Future[Any]], places: Sequence[Source]) -> None:
        self._stop.set()
        for job in jobs:
            job.cancel()
        self._stop_places(places, on=True)

    def _stop_places(self, places: Sequence[Source], *, on: bool) -> None:
        for place in places:
            place.stop(on=on)


class _SourceWrapper:
    """A source with another way to its blobs."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def location(self) -> str:
        """The source's name in errors."""
        return self.source.location

    def manifest(self, reference: str) -> Manifest:
        """Return the source's manifest."""
        return self.source.manifest(reference)

    def tags(self) -> list[str]:
        """Return the source's tags."""
        return self.source.tags()

    def stop(self, *, on: bool = True) -> None:
        """Stop the source."""
        self.source.stop(on=on)


class WatchedSource(_SourceWrapper):
    """A source that reports how much of it has been read."""

    def __init__(self, source: Source, move: Transfer) -> None:
        super().__init__(source)
        self._transfer = move

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a blob with a reader that reports its progress."""
        self._transfer.report(blob.digest, start)
        with self.source.open_blob(blob, start) as reader:
            yield _WatchedReader(reader, blob, start, self._transfer)


class _WatchedReader:
    def __init__(self, reader: Reader, blob: Descriptor, start: int, move: Transfer) -> None:
        self._reader, self._blob, self._position, self._move = reader, blob, start, move

    def readinto(self, buffer: memoryview, /) -> int:
        count = int(self._reader.readinto(buffer[: self._move.pace.chunk_size()]) or 0)
        self._position += count
        self._move.report(self._blob.digest, self._position, count)
        return count


class PinnedSource(_SourceWrapper):
    """A source that resolves each reference only once, so that the version that was checked is the one that is transferred.

    A tag may move between two requests, and a hostile registry could move it at every one.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._manifests: dict[str, Manifest] = {}

    def manifest(self, reference: str) -> Manifest:
        """Return the source's manifest, as it was at the first request."""
        if reference not in self._manifests:
            self._manifests[reference] = self.source.manifest(reference)
        return self._manifests[reference]

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a blob of the source."""
        with self.source.open_blob(blob, start) as reader:
            yield reader


class DownloadedSource(_SourceWrapper):
    """A source with a version that was downloaded into a folder: its files are read there, everything else from the source.

    `unwrapped` still returns the source, so that a registry can mount blobs of another repository.
    """

    def __init__(self, source: Source, folder: Path, manifest: Manifest) -> None:
        super().__init__(source)
        self._paths = {layer.digest: folder / layer.path for layer in manifest.layers}

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a file that was downloaded, else the blob at the source."""
        if blob.digest not in self._paths:
            with self.source.open_blob(blob, start) as reader:
                yield reader
            return
        with open_regular(self._paths[blob.digest]) as file:
            file.seek(start)
            yield cast(Reader, file)


def unwrapped(source: Source) -> Source:
    """Return the source behind the wrappers of this module."""
    while isinstance(source, _SourceWrapper):
        source = source.source
    return source
