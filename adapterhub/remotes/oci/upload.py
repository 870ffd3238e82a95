"""Uploads of blobs: the bytes, hashed in another thread while they are sent, and notes of uploads that can be resumed.

A registry compares the digest only at the end, so nothing has to be read before it is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from adapterhub.digest import CHUNK, Digest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.download import PAUSES, Steady
from adapterhub.remotes.parallel import unwatched
from adapterhub.remotes.protocol import Source
from adapterhub_converters.errors import IntegrityError, LocalIOError

_AHEAD = 3  # chunks that may have been read and not hashed yet


class Sending:
    """One blob of a source that is being sent; a context manager.

    Attributes:
        hashed: The number of bytes, from the first on, that `digest` covers.
    """

    def __init__(self, source: Source, blob: Descriptor, *, pauses: Sequence[float] = PAUSES) -> None:
        self.blob, self.hashed = blob, 0
        self._source, self._pauses = source, pauses
        self._state = hashlib.sha256()
        self._stack = ExitStack()
        self._reader: Steady | None = None
        self._at = 0
        self._beside = ThreadPoolExecutor(1) if blob.size > CHUNK else None
        self._buffers = [
            memoryview(bytearray(min(CHUNK, max(blob.size, 1)))) for _ in range(_AHEAD if blob.size > CHUNK else 1)
        ]
        self._pending: list[Future[None] | None] = [None] * len(self._buffers)

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *_: object) -> None:
        if self._beside:
            self._beside.shutdown()
        self._stack.close()

    def piece(self, start: int, size: int) -> Piece:
        """The body of the next request: `size` bytes from `start` on, which is at most where reading has come to."""
        return Piece(self, start, size)

    def pass_to(self, start: int) -> None:
        """Hash the bytes before `start`, which need not be sent, without reporting progress."""
        watched, self._source = self._source, unwatched(self._source)
        try:
            for _ in self.read(self.hashed, start - self.hashed):
                pass
        finally:
            self._source = watched
            self._let_go()

    def digest(self) -> Digest:
        """The digest of the first `hashed` bytes."""
        for job in filter(None, self._pending):
            job.result()
        return f"sha256:{self._state.hexdigest()}"

    def read(self, start: int, size: int) -> Iterator[memoryview]:
        """`size` bytes from `start` on; each piece is valid until the next but one is requested."""
        if self._reader is None or self._at != start:
            self._let_go()
            self._reader = self._stack.enter_context(Steady(self._source, self.blob, start, pauses=self._pauses))
            self._at = start
        while size:
            buffer = self._next()
            try:
                n = self._reader.readinto(buffer[: min(CHUNK, size)])
            except OSError as error:
                raise LocalIOError(self._where, error.strerror or str(error)) from error
            if not n:
                what = f"ended after {self._at} of {self.blob.size} bytes"
                raise IntegrityError(self._where, what, "Nothing was stored", code="source-damaged")
            self._hash(buffer[:n])
            self._at += n
            size -= n
            yield buffer[:n]

    def _let_go(self) -> None:
        self._stack.close()
        self._reader = None

    @property
    def _where(self) -> str:
        return f"{self._source.where}: {self.blob.path or self.blob.digest}"

    def _next(self) -> memoryview:
        """The buffer that was used longest ago, after it has been hashed."""
        buffer, job = self._buffers.pop(0), self._pending.pop(0)
        if job:
            job.result()
        self._buffers.append(buffer)
        self._pending.append(None)
        return buffer

    def _hash(self, data: memoryview) -> None:
        """Hash the part of `data`, which was just read, that has not been hashed yet."""
        new = data[max(self.hashed - self._at, 0) :]
        if not new:
            return
        self.hashed += len(new)
        if self._beside:
            self._pending[-1] = self._beside.submit(self._state.update, new)
        else:
            self._state.update(new)


class Piece:
    """The body of a request, read again from its start when it is sent again."""

    def __init__(self, of: Sending, start: int, size: int) -> None:
        self._of, self._start, self._size = of, start, size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        return self._of.read(self._start, self._size)


def whole(sending: Sending) -> Any:
    """A whole small blob in memory."""
    return b"".join(bytes(part) for part in sending.read(0, sending.blob.size))  # each is in the same memory
