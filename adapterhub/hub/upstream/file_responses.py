"""Files of the upstream as responses, while they arrive: after the download that keeps them, or past the cache."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack
from typing import BinaryIO

from starlette.types import Receive, Scope, Send

from adapterhub.http.responses import Body
from adapterhub.hub.blob_response import BlobResponse
from adapterhub.hub.git_objects import GitFile
from adapterhub.hub.workers import Workers
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, RemoteError

from .cached_files import CachedFiles
from .fills import HELD_BACK, Fill, new_hash

_log = logging.getLogger("adapterhub.hub")
_PIECE_SIZE = 1 << 20  # bytes of a file
_PASSED_SIZE = 1 << 16  # bytes of the network, of which a read waits for all


def _no_blob() -> BinaryIO:
    raise AssertionError("the subclass sends its own bytes")


class FillResponse(BlobResponse):
    """The bytes of a file as a download brings them; the connection is cut if that fails."""

    def __init__(
        self, workers: Workers, cached: CachedFiles, fill: Fill, headers: Mapping[str, str], range_header: str | None
    ) -> None:
        super().__init__(workers, _no_blob, fill.file.size, headers, range_header=range_header)
        self._cached, self._fill = cached, fill

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        file = await self._workers.read(self._cached.open_part, self._fill.key)
        if file is None:
            raise RemoteError(self._fill.file.path, "its download has ended")
        try:
            await send({"type": "http.response.start", "status": self._status, "headers": _raw(self._headers)})
            position, end = self._start, self._start + self._length
            while position < end:
                await self._fill.wait_beyond(position)
                count = min(self._fill.readable, end) - position
                piece = await self._workers.read(_read_at, file, position, min(count, _PIECE_SIZE)) if count > 0 else b""
                if not piece:  # the download has failed: a connection that is cut tells the client
                    return
                position += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": position < end})
        finally:
            await asyncio.shield(self._workers.read(file.close))


class PassedResponse(BlobResponse):
    """The bytes of a file as the upstream sends them, none of them kept. The end of a whole file is sent once it is verified.

    Args:
        workers: Threads of the hub.
        file: The file.
        headers: Headers besides lengths and ranges.
        range_header: The request's Range header.
        pool: Threads that wait for the upstream, as long as it is not too slow (`open_range`).
        open_body: Opens the body with the bytes from the first to the last, both included.
    """

    def __init__(
        self,
        workers: Workers,
        file: GitFile,
        headers: Mapping[str, str],
        range_header: str | None,
        *,
        pool: Executor,
        open_body: Callable[[int, int], AbstractContextManager[Body]],
    ) -> None:
        super().__init__(workers, _no_blob, file.size, headers, range_header=range_header)
        self._pool, self._open_body = pool, open_body
        self._state, self._digest = new_hash(file), file.lfs or file.oid

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        stack = ExitStack()
        loop, buffer = asyncio.get_running_loop(), memoryview(bytearray(_PASSED_SIZE))
        try:
            opening = self._open_body(self._start, self._start + self._length - 1)
            body = await loop.run_in_executor(self._pool, stack.enter_context, opening)
            await send({"type": "http.response.start", "status": self._status, "headers": _raw(self._headers)})
            remaining, held = self._length, b""
            while remaining:
                try:
                    count = await loop.run_in_executor(self._pool, body.readinto, buffer[: min(remaining, _PASSED_SIZE)])
                except AdapterhubError as error:
                    _log.warning("the upstream stopped sending: %s", printable(str(error)))
                    return
                remaining -= count
                sendable, held = self._split(held + buffer[:count], is_last=remaining == 0, received=buffer[:count])
                # No more bytes, or wrong ones: a connection that is cut tells the client.
                if not count or (not remaining and held):
                    return
                if sendable:
                    await send({"type": "http.response.body", "body": sendable, "more_body": remaining > 0})
        finally:
            await asyncio.shield(loop.run_in_executor(self._pool, stack.close))

    def _split(self, data: bytes, *, received: memoryview, is_last: bool) -> tuple[bytes, bytes]:
        """Return the bytes that may be sent, and those held back: of a whole file the last ones, until all are right."""
        if self._length < self._size:  # nobody can verify a part of a file
            return data, b""
        self._state.update(received)
        if is_last:
            return (data, b"") if self._state.hexdigest() == self._digest else (b"", data)
        return data[:-HELD_BACK], data[-HELD_BACK:]


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)
