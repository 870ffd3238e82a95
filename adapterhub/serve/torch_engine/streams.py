"""Streams that carry answers from the host's thread to the threads of the clients."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, Self

from adapterhub_converters.errors import StoppedError

from .values import FullError, Piece, Request, Texts

Item = tuple[int, Piece | Exception]


class Stream:
    """The pieces of an answer as they arrive, for one thread to iterate over; an error of the host is raised there.

    Args:
        beside: Another stream, to be read together with this one by `read_together`.
    """

    def __init__(self, beside: Stream | None = None) -> None:
        self.number: int = beside.number + 1 if beside else 0
        self.queue: SimpleQueue[Item] = beside.queue if beside else SimpleQueue()
        self.is_canceled = False

    def put(self, item: Piece | Exception) -> None:
        """Add a piece, or the error that ends the stream."""
        self.queue.put((self.number, item))

    def cancel(self) -> None:
        """Tell the host to drop the request; from any thread, at any time."""
        self.is_canceled = True

    def __iter__(self) -> Iterator[Piece]:
        return (piece for _, piece in read_together([self]))


def read_together(streams: Sequence[Stream]) -> Iterator[tuple[int, Piece]]:
    """Yield the pieces of streams that share a queue as they arrive, each with the stream's index."""
    first, unfinished = streams[0].number, len(streams)
    while unfinished:
        number, item = streams[0].queue.get()
        if isinstance(item, Exception):
            raise item
        unfinished -= item.finish is not None
        yield number - first, item


class ThreadedHost(ABC):
    """A host that answers in its own thread.

    `_wake` guards what other threads hand over, and is notified of it.
    """

    def __init__(self, name: str) -> None:
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    @abstractmethod
    def _work(self) -> None:
        """Answer requests until `_closed`."""

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Answer requests within the block; requests that remain at its end get an error."""
        self._thread.start()
        try:
            yield self
        finally:
            with self._wake:
                self._closed = True
                self._wake.notify()
            self._thread.join()

    def _check_room(self, waiting: int, max_waiting: int) -> None:
        """Refuse a request if the host is closed or `max_waiting` requests are waiting; called with `_wake` held."""
        if self._closed:
            raise StoppedError("", "the host is closed")
        if waiting >= max_waiting:
            raise FullError("", f"{waiting} requests wait already", "Try again later")


class AnsweringHost(Protocol):
    """A base that answers requests, from any thread."""

    @property
    def text(self) -> Texts:
        """The base's tokens as text."""

    @property
    def longest(self) -> int:
        """The largest number of tokens of prompt and answer together."""

    @property
    def precision(self) -> str:
        """The type that it computes in, or of the base's weights."""

    @property
    def scores_prompts(self) -> bool:
        """Whether it can compute the probabilities of a prompt's tokens."""

    def load(self, key: str, folder: Path) -> None:
        """Load a version into memory; RefusedError if it cannot be used."""

    def pin(self, keys: frozenset[str]) -> None:
        """Keep these versions in memory, and displace them last."""

    def drop(self, key: str) -> None:
        """Forget a version, after the last request that uses it."""

    def submit(self, request: Request, *, beside: Stream | None = None) -> Stream:
        """Submit a request to be answered."""
