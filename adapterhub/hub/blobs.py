"""A blob as an answer: whole or a range, which the system sends, where the server and the blob allow that.

Else it is read in pieces of 1 MiB in a thread, one piece ahead of the network. Starlette's own FileResponse reads 64 KiB at a
time and moves a third of the bytes a second.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from typing import BinaryIO

from starlette.types import Receive, Scope, Send

from adapterhub.http_server.connections import ZERO_COPY
from adapterhub_converters import linear

from .workers import Workers

_PIECE = 1 << 20  # bytes
_LARGE = 256 << 10  # bytes from which it takes less time not to read a file
_RANGE = linear.Pattern(r"bytes=(\d{0,18})-(\d{0,18})")


class RangeError(Exception):
    """The range begins after the end."""


def parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """The first and the last byte of a Range header; None to send everything, as for several ranges (RFC 9110, 14.2).

    Raises:
        RangeError: No byte is in the range.
    """
    found = _RANGE.fullmatch(text.strip()) if text else None
    if not found or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size - 1
    else:
        start, end = int(found[1]), min(int(found[2] or size - 1), size - 1)
        if found[2] and int(found[2]) < int(found[1]):
            return None
    if start >= size or start > end:
        raise RangeError
    return start, end


class BlobResponse:
    """An ASGI answer with the bytes of a file.

    Args:
        workers: Reads it.
        opened: Opens it, in a thread.
        size: Bytes of the file.
        headers: What to send besides lengths and ranges.
        wanted: The Range header.
        address: Where a client is to get the bytes instead; empty to send them. A HEAD request is answered here in any case:
            an address that is signed for GET is good for nothing else.
    """

    def __init__(
        self,
        workers: Workers,
        opened: Callable[[], BinaryIO],
        size: int,
        headers: Mapping[str, str],
        *,
        wanted: str | None = None,
        address: Callable[[], str] = str,
    ) -> None:
        self._workers, self._opened, self._size, self._address = workers, opened, size, address
        self._headers = {"accept-ranges": "bytes", **headers}
        self._status, self._start, self._length = 200, 0, size
        try:
            found = parse_range(wanted, size)
        except RangeError:
            self._status, self._length = 416, 0
            self._headers["content-range"] = f"bytes */{size}"
        else:
            if found:
                self._status, self._start, self._length = 206, found[0], found[1] - found[0] + 1
                self._headers["content-range"] = f"bytes {found[0]}-{found[1]}/{size}"
        self._headers["content-length"] = str(self._length)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; of a HEAD request the headers only."""
        body = scope["method"] != "HEAD" and self._length > 0
        whole = self._length >= _LARGE and ZERO_COPY in scope.get("extensions", {})
        address, file, piece = await self._workers.read(self._begin, unread=whole) if body else ("", None, b"")
        if address:
            self._headers |= {"location": address, "content-length": "0"}
            self._headers.pop("content-range", "")
            self._status = 302
        headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in self._headers.items()
        ]
        if file is None:
            await send({"type": "http.response.start", "status": self._status, "headers": headers})
            await send({"type": "http.response.body", "body": piece})
            return
        try:
            await send({"type": "http.response.start", "status": self._status, "headers": headers})
            if piece is None:
                await send({"type": ZERO_COPY, "file": file.fileno(), "offset": self._start, "count": self._length})
            else:
                await self._body(file, piece, send)
        finally:
            await asyncio.shield(self._workers.read(file.close))

    def _begin(self, *, unread: bool) -> tuple[str, BinaryIO | None, bytes | None]:
        """Where a client gets the bytes; or the first of them, and the file that has more; None of a file that stays unread."""
        if address := self._address():
            return address, None, b""
        file = self._opened()
        if unread and isinstance(file, io.FileIO):
            return "", file, None
        try:
            _go_to(file, self._start)
            piece = file.read(min(_PIECE, self._length))
        except BaseException:
            file.close()
            raise
        if len(piece) < self._length:
            return "", file, piece
        file.close()
        return "", None, piece

    async def _body(self, file: BinaryIO, piece: bytes, send: Send) -> None:
        left = self._length
        while piece:  # else it is shorter than its index says: the connection is cut, and the client sees that
            left -= len(piece)
            coming = asyncio.ensure_future(self._workers.read(file.read, min(_PIECE, left))) if left else None
            try:
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
            finally:
                if coming:
                    await asyncio.wait([coming])
            piece = coming.result() if coming else b""


def _go_to(file: BinaryIO, start: int) -> None:
    """Have the next byte that is read be that at `start`; a compressed blob is read from its beginning."""
    if file.seekable():
        file.seek(start)
        return
    while start and (piece := file.read(min(_PIECE, start))):
        start -= len(piece)
