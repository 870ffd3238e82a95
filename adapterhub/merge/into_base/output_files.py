"""What an output file is made of: bytes copied from others, text, and tensors that are changed on the way."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.safetensors_file import byte_view
from adapterhub_converters.errors import RefusedError

from .edits import Apply, Edit, TwoPasses, Within, look
from .tensor_io import Floats, Kind, Opened, Source, copy_range, write_at

F32Array = NDArray[np.float32]


class Packing(Protocol):
    """How a tensor is stored that is no rows of bytes."""

    @property
    def size(self) -> int:
        """Bytes of it."""

    def step(self, columns: int) -> int:
        """The number of rows that tiles must have a multiple of; even."""

    def through(self, rows: F32Array) -> F32Array:
        """Rows as they come back."""

    def writer(self, sink: int) -> Callable[[F32Array, int], int]:
        """What writes tiles, given the number of their first element, and says how many bytes."""


@dataclass(frozen=True)
class Copy:
    """`size` bytes of a file from `offset` on, put to byte `at`; `counted` of them are tensors."""

    path: Path
    offset: int
    size: int
    at: int
    counted: int


@dataclass(frozen=True)
class Text:
    """Bytes that are no tensor."""

    data: bytes
    at: int


@dataclass(frozen=True)
class Made:
    """A tensor that is changed on the way, put to byte `at` as `kind`.

    `stepwise` rounds after every edit, as peft does when it merges one adapter after the other. With a `packing` the numbers of
    `kind` are stored so, where that says.
    """

    name: str
    source: Source
    kind: Kind
    at: int
    edits: tuple[Edit, ...]
    stepwise: bool = False
    packing: Packing | None = None

    @property
    def size(self) -> int:
        """Bytes in the output."""
        if self.packing:
            return self.packing.size
        return self.source.rows * self.kind.row_size(self.source.columns)

    def ready(self) -> Ready:
        """The edits, their factors laid out."""
        dtype = self.kind.dtype if self.stepwise and isinstance(self.kind, Floats) else dtypes.F32
        spans = [(edit.first, edit.first + edit.count) if isinstance(edit, Within) else None for edit in self.edits]
        return Ready(self, [edit.ready(dtype) for edit in self.edits], spans)


Part = Copy | Text | Made


@dataclass(frozen=True)
class OutFile:
    """One file to write, its parts in the order of their places."""

    name: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Ready:
    """A tensor that is about to be changed."""

    made: Made
    applies: Sequence[Apply]
    spans: Sequence[tuple[int, int] | None]

    def change(self, wide: F32Array, raw: NDArray[np.uint8], start: int, scratch: F32Array) -> None:
        """All edits on rows `wide`, which then are `raw`; UnfitError when a number isn't one any more."""
        some = self._of(start, start + len(wide))
        for number, apply in enumerate(some):
            if self.made.stepwise and number:
                self.made.kind.decode(raw, wide)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                apply(wide, start, scratch)
            if self.made.stepwise or number == len(some) - 1:
                self._encode(wide, raw)
        if not some:
            self._encode(wide, raw)

    @property
    def twice(self) -> bool:
        """Whether all rows have to be looked at before one is changed."""
        return any(isinstance(apply, TwoPasses) for apply in self.applies)

    def look(self, wide: F32Array, raw: NDArray[np.uint8], start: int, scratch: F32Array) -> None:
        """Look at rows, which are spoilt, as the next of all."""

        def between(tile: F32Array) -> None:
            if self.made.stepwise:
                self._encode(tile, raw)
                self.made.kind.decode(raw, tile)

        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            look(self._of(start, start + len(wide)), wide, start, scratch, between)

    def _of(self, start: int, stop: int) -> list[Apply]:
        """The edits of any of these rows: one of many experts has one of many."""
        return [
            apply
            for apply, span in zip(self.applies, self.spans, strict=True)
            if span is None or (span[0] < stop and start < span[1])
        ]

    def _encode(self, wide: F32Array, raw: NDArray[np.uint8]) -> None:
        if not self.made.kind.fits(wide):
            raise UnfitError(self.made.name)
        self.made.kind.encode(wide, raw)


class UnfitError(Exception):
    """A tile of a tensor has numbers that its type cannot hold; the base is looked at to say why."""


def explained(made: Made, before: F32Array) -> RefusedError:
    """Why, given the rows of the base."""
    if not np.isfinite(before).all():
        return RefusedError(made.name, "the base has NaN or Inf in a tensor that is changed")
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    return RefusedError(
        made.name,
        f"the sum is over {made.kind.largest:g}, the largest {names.get(made.kind.name, made.kind.name)} number",
        "" if made.kind.name in ("BF16", "F32") else "Write bfloat16 instead (--dtype bf16)",
    )


# ---- Output files made of ranges copied from others and of tensors changed on the way, a tile at a time


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

    def write(self, files: Sequence[OutFile], folder: Path, finished: Callable[[Path], None] = atomic.sync) -> None:
        """Write every file; what is written goes to the disk while the next is computed, and the smallest file comes last."""
        with Opened() as opened, ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(_WORKERS) as pool:
            flushed: list[Future[None]] = []
            for file in sorted(files, key=_bytes, reverse=True):
                target = folder / file.name
                for _ in self._file(file, target, opened, pool):
                    flushed.append(flusher.submit(atomic.sync, target))
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
