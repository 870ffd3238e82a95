"""Output files made of ranges copied from others and of tensors changed on the way, a tile at a time.

A range is copied inside the kernel; a changed tensor is read, changed and written in tiles of a million elements. Memory
is a few tiles a worker, whatever the size of the model.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.files import staging
from adapterhub_converters.files.safetensors_file import byte_view

from .files import copy_range, write_at
from .parts import Copy, Made, OutFile, Part, Ready, Text, UnfitError, explained
from .sources import Opened

F32Array = NDArray[np.float32]

TILE = 1 << 20  # elements; below 64 Ki the calls cost more than the work, above 4 Mi the caches stop helping
_COPY = 64 << 20  # bytes copied in one job
_FLUSH = 128 << 20  # bytes after which what is written so far is sent to the disk, while more is computed
_WORKERS = 2

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Run:
    """The writing of files: a pool of workers, each with its own buffers."""

    def __init__(self, progress: Progress | None, size: int) -> None:
        self._progress = progress or (lambda done, size: None)
        self._size = size
        self._done = 0
        self._local = threading.local()

    def write(self, files: Sequence[OutFile], folder: Path, finished: Callable[[Path], None] = staging.sync) -> None:
        """Write every file; what is written goes to the disk while the next is computed, and the smallest file comes last."""
        with Opened() as opened, ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(_WORKERS) as pool:
            flushed: list[Future[None]] = []
            for file in sorted(files, key=_bytes, reverse=True):
                target = folder / file.name
                for _ in self._file(file, target, opened, pool):
                    flushed.append(flusher.submit(staging.sync, target))
                flushed.append(flusher.submit(finished, target))
            for future in flushed:
                future.result()

    def _file(self, file: OutFile, target: Path, opened: Opened, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Write one file, stopping whenever there is enough to flush."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        sink = os.open(target, flags, 0o666)
        due = _FLUSH
        try:
            for size in self._drain((job for part in file.parts for job in self._jobs(part, opened, sink)), pool):
                self._advance(size)
                due -= size
                if due <= 0:
                    due = _FLUSH
                    yield
        finally:
            os.close(sink)

    def skip(self, size: int) -> None:
        """Count bytes that are there already."""
        self._advance(size)

    def _drain(self, jobs: Iterator[Callable[[], int]], pool: ThreadPoolExecutor) -> Iterator[int]:
        """Run the jobs a few ahead of their results, so that at most a few tensors' factors are laid out at once."""
        waiting: deque[Future[int]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > 2 * _WORKERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled():
                    future.exception()  # wait: the files are about to be closed

    def _advance(self, size: int) -> None:
        self._done += size
        self._progress(self._done, self._size)

    def _jobs(self, part: Part, opened: Opened, sink: int) -> Iterator[Callable[[], int]]:
        if isinstance(part, Text):
            write_at(sink, memoryview(part.data), part.at)
        elif isinstance(part, Copy):
            yield from _copies(part, opened.fd(part.path), sink)
        else:
            yield from self._tiles(part, opened, sink)

    def _tiles(self, made: Made, opened: Opened, sink: int) -> Iterator[Callable[[], int]]:
        ready = made.ready()
        rows, columns = made.source.rows, made.source.columns
        if not columns:
            return  # rows of nothing may be any number
        self.look(ready, opened)
        step = _step(made)
        put = made.packing.writer(sink) if made.packing else None
        for start in range(0, rows, step):
            stop = min(start + step, rows)

            def tile(start: int = start, stop: int = stop) -> int:
                wide, raw = self._tile(ready, start, stop, opened)
                if put:
                    made.kind.decode(raw, wide)
                    return put(wide, start * columns)
                write_at(sink, byte_view(raw), made.at + start * raw.shape[1])
                return raw.nbytes

            yield tile

    def look(self, ready: Ready, opened: Opened) -> None:
        """Go over all rows of a tensor that takes two passes."""
        if not ready.twice:
            return
        rows, step = ready.made.source.rows, _step(ready.made)
        for start in range(0, rows, step):
            self._read(ready, start, min(start + step, rows), opened, ready.look)

    def _tile(self, ready: Ready, start: int, stop: int, opened: Opened) -> tuple[F32Array, NDArray[np.uint8]]:
        """Rows that are changed, as they are stored, and the memory of their numbers."""
        return self._read(ready, start, stop, opened, ready.change)

    def _read(
        self, ready: Ready, start: int, stop: int, opened: Opened, do: Callable[..., None]
    ) -> tuple[F32Array, NDArray[np.uint8]]:
        made = ready.made
        columns, width = made.source.columns, made.kind.row_size(made.source.columns)
        wide = self.floats("wide", (stop - start) * columns).reshape(stop - start, columns)
        made.source.read(opened, start, stop, wide, self.buffer)
        raw = self.buffer("out", (stop - start) * width).reshape(stop - start, width)
        try:
            do(wide, raw, start, self.floats("scratch", wide.size + columns))
        except UnfitError as unfit:
            made.source.read(opened, start, stop, wide, self.buffer)
            raise explained(made, wide) from unfit
        return wide, raw

    def floats(self, use: str, count: int) -> F32Array:
        """This thread's memory for `count` float32 numbers."""
        return self.buffer(use, 4 * count).view(np.float32)

    def buffer(self, use: str, size: int) -> NDArray[np.uint8]:
        """This thread's memory for `use`, grown when it has to be."""
        held = getattr(self._local, use, None)
        if held is None or held.nbytes < size:
            held = np.empty(size, np.uint8)
            setattr(self._local, use, held)
        return held[:size]


def _step(made: Made) -> int:
    """Rows of a tile."""
    least = made.packing.step(made.source.columns) if made.packing else 2
    return max(least, TILE // made.source.columns // least * least)


def _bytes(file: OutFile) -> int:
    return sum(len(part.data) if isinstance(part, Text) else part.size for part in file.parts)


def _copies(part: Copy, source: int, sink: int) -> Iterator[Callable[[], int]]:
    uncounted = part.size - part.counted
    for done in range(0, part.size, _COPY):
        size = min(_COPY, part.size - done)

        def copy(done: int = done, size: int = size) -> int:
            copy_range(source, sink, part.offset + done, size, part.at + done)
            return size - max(0, min(uncounted - done, size))  # a header is no tensor

        yield copy
