"""The loop of the host: one thread that owns the model.

Each turn admits the next requests, reads one chunk of one prompt, and adds one token to every answer. Prompts take turns, so
that a long one delays the others by a chunk and not by its length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.errors import AdapterhubError, RefusedError, StoppedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import model
from .answer import GeneratedAnswer
from .loaded_adapters import Adapters
from .prefixes import Prefixes
from .schedule import Row, Schedule, SlotTable
from .segment_attention import KeysValues
from .streams import Stream, ThreadedHost
from .values import Limits, Request

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostState:
    """What a host is doing at this moment, and has done so far.

    Attributes:
        slots: Slots with an adapter; `pinned` of them are used by a row.
        rows: Requests that are being answered.
        waiting: Requests that wait.
        adapters: Versions in memory.
        prefix_bytes: Bytes of the keys and values of prefixes; `row_bytes` are those of rows.
        cached_tokens: Tokens of all prompts so far that were found among the prefixes.
        answer_tokens: Tokens of all answers so far.
    """

    slots: int
    pinned: int
    rows: int
    waiting: int
    adapters: int
    prefix_bytes: int
    row_bytes: int
    cached_tokens: int
    answer_tokens: int


class Host(ThreadedHost):
    """A base, its adapters, and the thread that answers; all methods may be called from any thread.

    Attributes:
        text: Its tokens as text, and its chat template.
        longest: The largest number of tokens of prompt and answer together.
        precision: The type that it computes in, `float32`.
        exact: Whether an answer is the same, bit for bit, alone and in a batch.
    """

    scores_prompts = True

    def __init__(self, loaded: model.Model, limits: Limits) -> None:
        super().__init__("adapterhub-host")
        self.text, self.exact = loaded.text, loaded.exact
        self.longest = min(loaded.longest or limits.tokens, limits.tokens)
        self.precision = str(loaded.slots.dtype).removeprefix("torch.")
        self._model, self._limits = loaded, limits
        self._adapters = Adapters(loaded, max_bytes=limits.adapters, rank=limits.rank)
        self._slots = SlotTable(limits.slots, lambda slot, adapter: loaded.slots.fill(slot, adapter.factors, adapter.gains))
        self._schedule = Schedule(limits, self._slots, loaded.token_size)
        self._prefixes = Prefixes(limits.prefixes)
        self._arrived: list[Row] = []
        self._answer_tokens = 0

    def load(self, key: str, folder: Path) -> None:
        """Read a version from a PEFT folder that never changes, unless it is in memory.

        Raises:
            RefusedError: It has parts that cannot share a base in a batch, or is for another base. `code` is that of a check.
        """
        self._adapters.load(key, folder)

    def pin(self, keys: frozenset[str]) -> None:
        """Keep these versions in memory, and displace them from slots last."""
        self._adapters.pinned = self._slots.pinned = keys

    def drop(self, key: str) -> None:
        """Forget a version: new requests cannot use it, and running ones keep it until they end."""
        self._adapters.drop(key)

    def submit(self, request: Request, *, beside: Stream | None = None) -> Stream:
        """Submit a request to be answered.

        Args:
            request: The request.
            beside: A stream with which the new one is to be read together.

        Raises:
            ParameterError: A value of the request is not possible.
            NotFoundError: A version of its blend is not loaded.
            RefusedError: Its blend has more versions than there are slots, or one with magnitudes (DoRA).
            FullError: Too many requests wait.
        """
        request.check(longest=self.longest, vocabulary=len(self._model.base.head))
        if len({key for key, _ in request.blend}) > self._limits.slots:
            raise RefusedError("", f"a blend of {len(request.blend)} versions, but there are {self._limits.slots} slots")
        # Acquired before the lock is held, because a forgotten adapter may have to be read from disk.
        parts = self._adapters.acquire(request.blend)
        keys_values = KeysValues(len(request.ids) + request.max_tokens)
        row = Row(request, parts, Stream(beside), GeneratedAnswer(request, self.text), keys_values)
        with self._wake:
            waiting = sum(not waiting_row.stream.is_canceled for waiting_row in [*self._schedule.waiting, *self._arrived])
            try:
                self._check_room(waiting, self._limits.waiting)
            except AdapterhubError:
                self._adapters.release(parts)
                raise
            self._arrived.append(row)
            self._wake.notify()
        return row.stream

    def state(self) -> HostState:
        """Return what the host is doing."""
        rows = list(self._schedule.rows)
        return HostState(
            slots=len(self._slots),
            pinned=self._slots.pinned_count,
            rows=len(rows),
            waiting=len(self._schedule.waiting) + len(self._arrived),
            adapters=len(self._adapters),
            prefix_bytes=self._prefixes.size,
            row_bytes=sum(row.keys_values.size for row in rows),
            cached_tokens=self._prefixes.hits,
            answer_tokens=self._answer_tokens,
        )

    # ---- the thread

    def _work(self) -> None:
        """Answer requests until the host is closed."""
        while True:
            with self._wake:
                while not (self._closed or self._arrived or self._schedule.waiting or self._schedule.rows):
                    self._wake.wait()
                self._schedule.waiting.extend(self._arrived)
                self._arrived.clear()
                closed = self._closed
            for row in [*self._schedule.rows, *self._schedule.waiting]:
                if closed or row.stream.is_canceled:
                    self._end(row, StoppedError("", "the host was closed" if closed else "canceled"))
            if closed:
                return
            with self._ending_on_error(*self._schedule.rows, *self._schedule.waiting):
                self._turn()

    def _turn(self) -> None:
        """Admit requests, read one chunk of one prompt, and add one token to every other answer."""
        for row in self._schedule.admit():
            with self._ending_on_error(row):
                self._start(row)
        reading = next((row for row in self._schedule.rows if not row.prompt_is_read), None)
        if reading:
            with self._ending_on_error(reading):
                self._read(reading)
        answering = [row for row in self._schedule.rows if row.prompt_is_read and row is not reading]
        if answering:
            with self._ending_on_error(*answering):
                self._add_tokens(answering)

    def _start(self, row: Row) -> None:
        """Fill the slots of a row, and restore the cached beginning of its prompt."""
        self._schedule.start(row)
        # The probabilities of a prompt need all its logits, which are not cached.
        if not row.answer.scores_prompt:
            row.read = self._prefixes.restore(row.request.ids, row.parts, row.keys_values)

    def _read(self, row: Row) -> None:
        """Read a chunk of a prompt; the last chunk gives the first token of the answer."""
        chunk = row.request.ids[row.read : row.read + model.CHUNK]
        span = model.Span(chunk, row.keys_values, row.read, row.use, every=row.answer.scores_prompt)
        logits = self._model.run([span]).cpu().numpy()
        pieces = row.answer.prompt_pieces(row.read, row.read + len(chunk), logits)
        row.read += len(chunk)
        # Prompts take turns, a chunk each.
        self._schedule.move_to_end(row)
        if row.prompt_is_read:
            self._prefixes.keep(row.request.ids, row.parts, row.keys_values)
            if not row.request.max_tokens:
                self._end(row)
        for piece in pieces:
            row.stream.put(piece)
        if row.prompt_is_read and row.request.max_tokens:
            self._add(row, logits[-1])

    def _add_tokens(self, rows: list[Row]) -> None:
        """Add a token to every answer."""
        spans = [model.Span([row.token], row.keys_values, row.read, row.use) for row in rows]
        logits = self._model.run(spans).cpu().numpy()
        for row, row_logits in zip(rows, logits, strict=True):
            row.read += 1
            with self._ending_on_error(row):
                self._add(row, row_logits)

    def _add(self, row: Row, logits: NDArray[np.float32]) -> None:
        """Add a token to an answer, and send the piece."""
        piece = row.answer.add(logits)
        row.token = piece.token
        self._answer_tokens += 1
        if piece.finish:
            self._end(row)
        row.stream.put(piece)

    def _end(self, row: Row, error: Exception | None = None) -> None:
        """Remove a row, and free what it holds, before its client learns of it."""
        if row.has_ended:
            return
        row.has_ended = True
        self._schedule.remove(row)
        self._adapters.release(row.parts)
        if error:
            row.stream.put(error)

    @contextmanager
    def _ending_on_error(self, *rows: Row) -> Iterator[None]:
        """End the rows of a failed pass, such as one that exhausts memory; other rows continue."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - any error of torch is for the clients
            _log.warning("%d requests failed: %s", len(rows), error, exc_info=not isinstance(error, AdapterhubError))
            for row in rows:
                self._end(row, error)


@contextmanager
def open_host(path: Path, limits: Limits, **options: Any) -> Iterator[Host]:
    """Load a base, and answer requests within the block, as `open_host` of the package; `options` are those of `model.load`."""
    loaded = model.load(path, slots=limits.slots, rows=limits.rows, **options)
    with Host(loaded, limits).running() as host:
        yield host
