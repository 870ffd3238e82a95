"""Adapters into a base: a Hugging Face folder in, a Hugging Face folder out, one tile of one tensor at a time.

The output has the same shards with the same headers, so an untouched tensor is a range of bytes copied inside the
kernel, and a touched one is read, changed and written in tiles of a million elements. Memory is a few tiles a
worker, whatever the size of the model. Plain LoRA comes out bit for bit as from peft's `merge_and_unload`
(`edits.py` has its order of rounding, `product.py` the order of its sums).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.errors import LocalIOError, RefusedError
from adapterhub_converters.files import staging
from adapterhub_converters.files.safetensors_file import TensorInfo, byte_view

from .companions import companions, copy_companions
from .edits import Apply, Edit
from .files import copy_range, read_at, write_at
from .plan import Shard, Weighted, plan
from .rounding import LARGEST, fits, narrow, widen

F32Array = NDArray[np.float32]

TILE = 1 << 20  # elements; below 64 Ki the calls cost more than the work, above 4 Mi the caches stop helping
SAMPLE = 1 << 16  # elements a tensor's change is measured on
_COPY = 64 << 20  # bytes copied in one job
_WORKERS = 2

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class Change:
    """What a tensor went through, measured on its middle rows (65,536 elements).

    `relative` is the delta's norm over the weight's. `kept` is how much of the delta survived the rounding to the
    base's dtype (its projection on itself): near 1, or near 0 when steps of the dtype swallow it. Both None when the
    rows measured did not change.
    """

    relative: float | None
    kept: float | None


@dataclass(frozen=True)
class FuseReport:
    """What a merge did; sizes in bytes.

    Attributes:
        out: The new folder.
        touched: Tensor name to its change.
        tensors: How many tensors the base has.
        size: Of all weights.
        touched_size: Of the tensors changed.
        copied: Other files that came along.
        skipped: Files that did not, each with the reason.
        notes: One line each.
    """

    out: Path
    touched: Mapping[str, Change]
    tensors: int
    size: int
    touched_size: int
    copied: tuple[str, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]


def fuse(adapters: Weighted, base: Path, out: Path, *, progress: Progress | None = None) -> FuseReport:
    """Merge adapters, each times its weight, into the base folder `base` and write the result as `out`.

    Raises:
        RefusedError: The result would not be base plus adapters; nothing was written.
        OutputExistsError: `out` is there already.
        LocalIOError: The disk is full or cannot be written; nothing was left behind.
    """
    steps = plan(adapters, base)
    take, skipped = companions(base, {shard.path.name for shard in steps.shards})
    infos = {name: info for shard in steps.shards for name, info in shard.tensors.items()}
    size = sum(info.size for info in infos.values())
    with staging.whole(out) as folder:
        copy_companions(base, folder, take)
        changes = _Run(steps.edits, progress, size).shards(steps.shards, folder)
    return FuseReport(
        out=out,
        touched=changes,
        tensors=len(infos),
        size=size,
        touched_size=sum(infos[name].size for name in steps.edits),
        copied=take,
        skipped=skipped,
        notes=steps.notes,
    )


class _Run:
    """One merge under way: a pool of workers, each with its own buffers."""

    def __init__(self, edits: Mapping[str, tuple[Edit, ...]], progress: Progress | None, size: int) -> None:
        self._edits = edits
        self._progress = progress or (lambda done, size: None)
        self._size = size
        self._done = 0
        self._changes: dict[str, Change] = {}
        self._local = threading.local()

    def shards(self, shards: tuple[Shard, ...], folder: Path) -> dict[str, Change]:
        """Write every shard; what a finished one still has in memory goes to the disk while the next is computed."""
        with ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(_WORKERS) as pool:
            flushed = [flusher.submit(staging.sync, self._shard(shard, folder, pool)) for shard in shards]
            for future in flushed:
                future.result()
        return self._changes

    def _shard(self, shard: Shard, folder: Path, pool: ThreadPoolExecutor) -> Path:
        target = folder / shard.path.name
        try:
            source = os.open(shard.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise LocalIOError(str(shard.path), error.strerror or str(error)) from error
        try:
            sink = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                self._drain(self._jobs(shard, source, sink), pool)
            finally:
                os.close(sink)
        finally:
            os.close(source)
        return target

    def _drain(self, jobs: Iterator[Callable[[], int]], pool: ThreadPoolExecutor) -> None:
        """Run the jobs a few ahead of their results, so that at most a few tensors' factors are laid out at once."""
        waiting: deque[Future[int]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > 2 * _WORKERS:
                    self._advance(waiting.popleft().result())
            while waiting:
                self._advance(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled():
                    future.exception()  # wait: the files are about to be closed

    def _advance(self, size: int) -> None:
        self._done += size
        self._progress(self._done, self._size)

    def _jobs(self, shard: Shard, source: int, sink: int) -> Iterator[Callable[[], int]]:
        """In file order: runs of untouched bytes, and tiles of touched tensors."""
        start, end = 0, shard.data_start
        for info in shard.tensors.values():
            if info.name in self._edits:
                yield from _copies(source, sink, start, end, shard.data_start)
                yield from self._tiles(info, source, sink)
                start = info.offset + info.size
            end = info.offset + info.size
        yield from _copies(source, sink, start, end, shard.data_start)

    def _tiles(self, info: TensorInfo, source: int, sink: int) -> Iterator[Callable[[], int]]:
        edits = self._edits[info.name]
        tensor = _Tensor.of(info, [edit.ready(dtypes.NUMPY[info.dtype]) for edit in edits])
        whole = any(edit.whole for edit in edits)
        step = tensor.rows if whole else max(2, TILE // max(1, tensor.columns) // 2 * 2)
        self._changes[info.name] = tensor.measured(source, whole=whole)
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            yield lambda start=start, stop=stop: self._tile(tensor, start, stop, source, sink)  # type: ignore[misc]

    def _tile(self, tensor: _Tensor, start: int, stop: int, source: int, sink: int) -> int:
        raw = tensor.read(source, start, stop, self._buffer("raw", tensor.dtype, (stop - start) * tensor.columns))
        wide = self._buffer("wide", dtypes.F32, raw.size).reshape(raw.shape)
        scratch = self._buffer("scratch", dtypes.F32, raw.size + tensor.columns)
        tensor.change(raw, wide, start, scratch)
        data = byte_view(raw)
        write_at(sink, data, tensor.offset(start))
        return len(data)

    def _buffer(self, use: str, dtype: np.dtype, size: int) -> np.ndarray:
        """This worker's memory for `use`, grown when it has to be."""
        held = getattr(self._local, use, None)
        if held is None or held.nbytes < size * dtype.itemsize:
            held = np.empty(size * dtype.itemsize, np.uint8)
            setattr(self._local, use, held)
        return held[: size * dtype.itemsize].view(dtype)


@dataclass(frozen=True)
class _Tensor:
    """A touched tensor seen as `rows` of `columns`, and the edits made ready for it."""

    info: TensorInfo
    dtype: np.dtype
    rows: int
    columns: int
    edits: list[Apply]

    @classmethod
    def of(cls, info: TensorInfo, edits: list[Apply]) -> _Tensor:
        dtype = dtypes.NUMPY[info.dtype]
        rows = info.shape[0] if info.shape else 1
        return cls(info, dtype, rows, info.size // dtype.itemsize // max(1, rows), edits)

    def offset(self, row: int) -> int:
        """Where a row starts in the file."""
        return self.info.offset + row * self.columns * self.dtype.itemsize

    def read(self, source: int, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Rows of the base in its own dtype."""
        raw = buffer.reshape(stop - start, self.columns)
        read_at(source, byte_view(raw), self.offset(start))
        return raw

    def change(self, raw: np.ndarray, wide: F32Array, start: int, scratch: F32Array) -> None:
        """All edits on rows `raw`, in place; rounded to the base's dtype after each, as peft does."""
        for apply in self.edits:
            widen(raw, wide)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                apply(wide, start, scratch)
            self._check(raw, wide)
            narrow(wide, raw)

    def _check(self, raw: np.ndarray, wide: F32Array) -> None:
        if fits(wide, self.dtype):
            return
        if not np.isfinite(raw.astype(np.float32)).all():
            raise RefusedError(self.info.name, "the base has NaN or Inf in a tensor that the adapter changes")
        raise RefusedError(
            self.info.name,
            f"the sum is over {LARGEST[self.dtype]:g}, the largest {self.dtype.name} number",
            "Convert the base to bfloat16 first" if self.dtype == dtypes.F16 else "",
        )

    def measured(self, source: int, *, whole: bool) -> Change:
        """The change on the middle rows: without rounding, and as it comes out."""
        count = self.rows if whole else min(self.rows, max(2, SAMPLE // max(1, self.columns) // 2 * 2))
        start = (self.rows - count) // 4 * 2
        raw = self.read(source, start, start + count, np.empty(count * self.columns, self.dtype))
        before, exact, after = raw.astype(np.float32), raw.astype(np.float32), np.empty(raw.shape, np.float32)
        scratch = np.empty(raw.size + self.columns, np.float32)
        with np.errstate(all="ignore"):
            for apply in self.edits:
                apply(exact, start, scratch)
            self.change(raw, after, start, scratch)
            widen(raw, after)
            delta = exact - before
            square = float(np.vdot(delta, delta))
            if not square:
                return Change(None, None)
            norm = float(np.vdot(before, before))
            return Change((square / norm) ** 0.5 if norm else None, float(np.vdot(after - before, delta)) / square)


def _copies(source: int, sink: int, start: int, end: int, data_start: int) -> Iterator[Callable[[], int]]:
    for at in range(start, end, _COPY):
        size = min(_COPY, end - at)

        def copy(at: int = at, size: int = size) -> int:
            copy_range(source, sink, at, size)
            return size - max(0, min(data_start - at, size))  # the header is no tensor

        yield copy
