"""Output files of a merge: described as copied byte ranges, literal bytes and tensors edited on the way, then written.

A range is copied inside the kernel; an edited tensor is read, changed and written in tiles of a million elements. Memory is a
few tiles a worker, whatever the size of the model.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.safetensors_file import byte_view
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .edits import Apply, Edit, TwoPasses, Within, look_before_change
from .tensor_files import OpenFiles, TensorSource, copy_range, write_at
from .tensor_types import Floats, Kind

F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

TILE = 1 << 18
"""Elements of a tile: it and its delta, in float32, fit in a second-level cache, where all but the product is twice as fast."""
_JOB = 1 << 20  # elements of the tiles of one job
_COPY = 64 << 20  # bytes copied in one job
_FLUSH = 128 << 20  # bytes after which the output so far is flushed to the disk, while more is computed
_WORKERS = 2

Progress = Callable[[int, int], None]
"""Called with the number of bytes done and of all bytes."""


class Packing(Protocol):
    """A way of storing a tensor other than as rows of bytes."""

    @property
    def size(self) -> int:
        """The number of bytes of the tensor."""

    def step(self, columns: int) -> int:
        """Return the even number of rows that a tile's height must be a multiple of."""

    def round_trip(self, rows: F32Array) -> F32Array:
        """Return rows packed and unpacked again."""

    def writer(self, sink: int) -> Callable[[F32Array, int], int]:
        """Return a function that writes a tile, given the number of its first element, and returns the bytes written."""


@dataclass(frozen=True)
class Copy:
    """`size` bytes of a file from `offset` on, copied to byte `at`; `counted` of them belong to tensors."""

    path: Path
    offset: int
    size: int
    at: int
    counted: int


@dataclass(frozen=True)
class LiteralBytes:
    """Bytes that are not a tensor."""

    data: bytes
    at: int


@dataclass(frozen=True)
class EditedTensor:
    """A tensor that is edited on the way and written to byte `at` as `kind`.

    Attributes:
        stepwise: Round after every edit, as peft does when it merges one adapter after another.
        packing: Store the numbers of `kind` this way, at places that the packing knows.
    """

    name: str
    source: TensorSource
    kind: Kind
    at: int
    edits: tuple[Edit, ...]
    stepwise: bool = False
    packing: Packing | None = None

    @property
    def size(self) -> int:
        """The number of bytes in the output."""
        if self.packing:
            return self.packing.size
        return self.source.rows * self.kind.row_size(self.source.columns)

    def prepare(self) -> PreparedTensor:
        """Return the tensor with the factors of its edits prepared."""
        dtype = self.kind.dtype if self.stepwise and isinstance(self.kind, Floats) else dtypes.F32
        spans = [(edit.first, edit.first + edit.count) if isinstance(edit, Within) else None for edit in self.edits]
        return PreparedTensor(self, [edit.ready(dtype) for edit in self.edits], spans)

    @property
    def tile_rows(self) -> int:
        """The number of rows of a tile: whole dozens if there are that many, as products are fastest."""
        rows, columns = TILE // self.source.columns, self.source.columns
        least = self.packing.step(columns) if self.packing else 12 if rows >= 12 else 2
        return max(least, rows // least * least)


Part = Copy | LiteralBytes | EditedTensor


@dataclass(frozen=True)
class OutFile:
    """A file to write; its parts are in the order of their places."""

    name: str
    parts: Sequence[Part]

    @property
    def size(self) -> int:
        """The number of bytes of the file."""
        return sum(len(part.data) if isinstance(part, LiteralBytes) else part.size for part in self.parts)


@dataclass(frozen=True)
class PreparedTensor:
    """A tensor with its edits prepared; `spans` are the rows that each edit changes, None for all."""

    tensor: EditedTensor
    applies: Sequence[Apply]
    spans: Sequence[tuple[int, int] | None]

    def change(self, wide: F32Array, raw: Bytes, start: int, scratch: F32Array) -> None:
        """Apply all edits to the rows `wide` and encode them into `raw`.

        Raises:
            UnfitError: A number does not fit the type.
        """
        applies = self._touching(start, start + len(wide))
        for number, apply in enumerate(applies):
            # peft adds the next adapter to the weights that the last merge has rounded.
            if self.tensor.stepwise and number:
                self.tensor.kind.decode(raw, wide)
            # Numbers that overflow are not warned of: `fits` refuses them with the name of the tensor.
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                apply(wide, start, scratch)
            if self.tensor.stepwise or number == len(applies) - 1:
                self._encode(wide, raw, start)
        if not applies:
            self._encode(wide, raw, start)

    @property
    def takes_two_passes(self) -> bool:
        """Whether an edit must see all rows before any is changed."""
        return any(isinstance(apply, TwoPasses) for apply in self.applies)

    def look(self, wide: F32Array, raw: Bytes, start: int, scratch: F32Array) -> None:
        """Show rows to an edit that takes two passes; overwrites them."""

        def round_tile(tile: F32Array) -> None:
            if self.tensor.stepwise:
                self._encode(tile, raw, start)
                self.tensor.kind.decode(raw, tile)

        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            look_before_change(self._touching(start, start + len(wide)), wide, start, scratch, round_tile)

    def _touching(self, start: int, stop: int) -> list[Apply]:
        """Return the edits that change any of these rows; a stack of experts has edits of single experts."""
        return [
            apply
            for apply, span in zip(self.applies, self.spans, strict=True)
            if span is None or (span[0] < stop and start < span[1])
        ]

    def _encode(self, wide: F32Array, raw: Bytes, start: int) -> None:
        """Encode rows into `raw`; UnfitError if a number does not fit."""
        if not self.tensor.kind.fits(wide):
            raise UnfitError(self.tensor.name)
        self.tensor.kind.encode(wide, raw, start)


class UnfitError(Exception):
    """A tile of a tensor has numbers that its type cannot hold; `unfit_error` finds the reason in the base."""


def unfit_error(tensor: EditedTensor, base_rows: F32Array) -> RefusedError:
    """Return the error for a tile that does not fit, given its rows in the base."""
    if not np.isfinite(base_rows).all():
        return RefusedError(tensor.name, "the base has NaN or Inf in a tensor that is changed", code="non-finite")
    name = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}.get(tensor.kind.name, tensor.kind.name)
    reason = f"the sum is over {tensor.kind.largest:g}, the largest {name} number"
    if tensor.kind.name in ("BF16", "F32"):
        return RefusedError(tensor.name, reason)
    return RefusedError(tensor.name, reason, "Write bfloat16 instead", code="sum-too-large")


class OutputWriter:
    """A writer of files with a pool of workers, each with its own buffers."""

    def __init__(self, progress: Progress | None, size: int) -> None:
        self._progress = progress or (lambda _count, size: None)
        self._size = size
        self._done = 0
        self._local = threading.local()

    def write(
        self, files: Sequence[OutFile], folder: Path, opened: OpenFiles, finished: Callable[[Path], None] = atomic.sync_to_disk
    ) -> None:
        """Write every file, the smallest last; call `finished` with its path once it is complete.

        Output is flushed to the disk while more is computed, so that little is left to flush at the end.
        """
        with opened, ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(_WORKERS) as pool:
            flushed: list[Future[None]] = []
            # The largest first: the flush of a small file at the end is short.
            for file in sorted(files, key=lambda file: file.size, reverse=True):
                target = folder / file.name
                for _ in self._write_file(file, target, opened, pool):
                    flushed.append(flusher.submit(atomic.sync_to_disk, target))
                flushed.append(flusher.submit(finished, target))
            for future in flushed:
                future.result()

    def _write_file(self, file: OutFile, target: Path, opened: OpenFiles, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Write one file; yield whenever there is enough to flush."""
        # O_BINARY keeps Windows from translating line ends.
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        sink = os.open(target, flags, 0o666)
        due = _FLUSH
        try:
            for size in self._results((job for part in file.parts for job in self._jobs(part, opened, sink)), pool):
                self.skip(size)
                due -= size
                if due <= 0:
                    due = _FLUSH
                    yield
        finally:
            os.close(sink)

    def skip(self, size: int) -> None:
        """Count `size` bytes as done without writing them."""
        self._done += size
        self._progress(self._done, self._size)

    def _results(self, jobs: Iterator[Callable[[], int]], pool: ThreadPoolExecutor) -> Iterator[int]:
        """Run the jobs a few ahead of their results, so that the factors of few tensors are in memory at once."""
        waiting: deque[Future[int]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > 2 * _WORKERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Wait for jobs that run already: the files are about to be closed.
            wait([future for future in waiting if not future.cancel()])

    def _jobs(self, part: Part, opened: OpenFiles, sink: int) -> Iterator[Callable[[], int]]:
        """Yield the jobs that write a part; each returns the bytes of tensors that it wrote."""
        if isinstance(part, LiteralBytes):
            write_at(sink, memoryview(part.data), part.at)
        elif isinstance(part, Copy):
            yield from _copies(part, opened.fd(part.path), sink)
        elif part.source.columns:  # a matrix without columns has nothing to write
            yield from self._tiles(part, opened, sink)

    def _tiles(self, tensor: EditedTensor, opened: OpenFiles, sink: int) -> Iterator[Callable[[], int]]:
        """Yield the jobs that write a tensor, each a few tiles."""
        ready = tensor.prepare()
        # To the last row before the first job: workers change tiles in any order.
        self.look(ready, opened)
        rows, columns, step = tensor.source.rows, tensor.source.columns, tensor.tile_rows
        write_packed = tensor.packing.writer(sink) if tensor.packing else None

        def write_tiles(starts: range) -> int:
            size = 0
            for start in starts:
                wide, raw = self._read(ready, start, min(start + step, rows), opened, ready.change)
                if write_packed:
                    tensor.kind.decode(raw, wide)
                    size += write_packed(wide, start * columns)
                else:
                    write_at(sink, byte_view(raw), tensor.at + start * raw.shape[1])
                    size += raw.nbytes
            return size

        rows_of_job = step * max(1, _JOB // (step * columns))
        for start in range(0, rows, rows_of_job):
            yield partial(write_tiles, range(start, min(start + rows_of_job, rows), step))

    def look(self, ready: PreparedTensor, opened: OpenFiles) -> None:
        """Read all rows of a tensor for its edits that take two passes, if it has any."""
        if ready.takes_two_passes:
            rows, step = ready.tensor.source.rows, ready.tensor.tile_rows
            for start in range(0, rows, step):
                self._read(ready, start, min(start + step, rows), opened, ready.look)

    def _read(
        self,
        ready: PreparedTensor,
        start: int,
        stop: int,
        opened: OpenFiles,
        visit: Callable[[F32Array, Bytes, int, F32Array], None],
    ) -> tuple[F32Array, Bytes]:
        """Read rows and call `visit` with them; return them as numbers and as stored, in this thread's buffers."""
        tensor = ready.tensor
        columns, width = tensor.source.columns, tensor.kind.row_size(tensor.source.columns)
        wide = self.buffer("wide", 4 * (stop - start) * columns).view(np.float32).reshape(stop - start, columns)
        tensor.source.read(opened, start, stop, wide, self.buffer)
        raw = self.buffer("out", (stop - start) * width).reshape(stop - start, width)
        try:
            visit(wide, raw, start, self.buffer("scratch", 4 * (wide.size + columns)).view(np.float32))
        except UnfitError as unfit:
            # The edits overwrote the rows: read the base's again to tell whose fault it is.
            tensor.source.read(opened, start, stop, wide, self.buffer)
            raise unfit_error(tensor, wide) from unfit
        return wide, raw

    def buffer(self, use: str, size: int) -> Bytes:
        """Return this thread's memory for a use, grown as needed."""
        memory = getattr(self._local, use, None)
        if memory is None or memory.nbytes < size:
            memory = np.empty(size, np.uint8)
            setattr(self._local, use, memory)
        return memory[:size]


def _copies(part: Copy, source: int, sink: int) -> Iterator[Callable[[], int]]:
    """Yield the jobs that copy a range, in pieces."""
    uncounted = part.size - part.counted
    for piece_start in range(0, part.size, _COPY):
        size = min(_COPY, part.size - piece_start)

        def copy(piece_start: int = piece_start, size: int = size) -> int:
            copy_range(source, sink, part.offset + piece_start, size, part.at + piece_start)
            return size - max(0, min(uncounted - piece_start, size))  # a header is not a tensor

        yield copy
