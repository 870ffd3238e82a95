"""A blob as a response: all of it or a range, sent by the operating system where the server and the blob allow that.

Otherwise a thread reads pieces of 1 MiB, one piece ahead of the network. Starlette's own FileResponse reads 64 KiB at a time
and reaches a third of the throughput.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from typing import BinaryIO

from starlette.types import Receive, Scope, Send

from adapterhub.http_server.client_connections import ZERO_COPY
from adapterhub_converters import safe_regex

from .workers import Workers

_PIECE_SIZE = 1 << 20  # bytes
_ZERO_COPY_MIN = 256 << 10  # bytes from which zero-copy is faster than reading the file
_RANGE = safe_regex.Pattern(r"bytes=(\d{0,18})-(\d{0,18})")


class RangeError(Exception):
    """The range begins after the end of the file."""


def parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """Return the first and last byte of a Range header; None to send everything, as for several ranges (RFC 9110, 14.2).

    Raises:
        RangeError: The range has no byte of the file.
    """
    match = _RANGE.fullmatch(text.strip()) if text else None
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, size - int(match[2])), size - 1
    else:
        start, end = int(match[1]), min(int(match[2] or size - 1), size - 1)
        if match[2] and int(match[2]) < int(match[1]):
            return None
    if start >= size or start > end:
        raise RangeError
    return start, end


class BlobResponse:
    """An ASGI response with the bytes of a file.

    Args:
        workers: Threads that read it.
        open_blob: Opens the file, in a thread.
        size: Size of the file in bytes.
        headers: Headers besides lengths and ranges.
        range_header: The request's Range header.
        address: Returns where the client is to get the bytes instead; empty to send them from here. A HEAD request is always
            answered here: an address signed for GET is good for nothing else.
    """

    def __init__(
        self,
        workers: Workers,
        open_blob: Callable[[], BinaryIO],
        size: int,
        headers: Mapping[str, str],
        *,
        range_header: str | None = None,
        address: Callable[[], str] = str,
    ) -> None:
        self._workers, self._open_blob, self._size, self._address = workers, open_blob, size, address
        self._headers = {"accept-ranges": "bytes", **headers}
        self._status, self._start, self._length = 200, 0, size
        try:
            byte_range = parse_range(range_header, size)
        except RangeError:
            self._status, self._length = 416, 0
            self._headers["content-range"] = f"bytes */{size}"
        else:
            if byte_range:
                self._status, self._start, self._length = 206, byte_range[0], byte_range[1] - byte_range[0] + 1
                self._headers["content-range"] = f"bytes {byte_range[0]}-{byte_range[1]}/{size}"
        self._headers["content-length"] = str(self._length)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; for a HEAD request only its headers."""
        # Open nothing for a response without a body.
        body = scope["method"] != "HEAD" and self._length > 0
        zero_copy = self._length >= _ZERO_COPY_MIN and ZERO_COPY in scope.get("extensions", {})
        address, file, piece = await self._workers.read(self._begin, unread=zero_copy) if body else ("", None, b"")
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
                await self._send_body(file, piece, send)
        finally:
            # Shielded: a client that disconnects cancels this task, and the file must still be closed.
            await asyncio.shield(self._workers.read(file.close))

    def _begin(self, *, unread: bool) -> tuple[str, BinaryIO | None, bytes | None]:
        """Return a redirect address, the file with more to send, and the first piece.

        The file is None if the first piece is all of it; the piece is None if the file stays unread, to be sent without
        copying.
        """
        if address := self._address():
            return address, None, b""
        file = self._open_blob()
        if unread and isinstance(file, io.FileIO):
            return "", file, None
        try:
            _skip_to(file, self._start)
            piece = file.read(min(_PIECE_SIZE, self._length))
        except BaseException:
            file.close()
            raise
        if len(piece) < self._length:
            return "", file, piece
        file.close()
        return "", None, piece

    async def _send_body(self, file: BinaryIO, piece: bytes, send: Send) -> None:
        remaining = self._length
        while piece:  # an empty piece: the file is shorter than indexed. Cutting the connection tells the client
            remaining -= len(piece)
            # Read ahead while the network is busy with this piece.
            next_piece = (
                asyncio.ensure_future(self._workers.read(file.read, min(_PIECE_SIZE, remaining))) if remaining else None
            )
            try:
                await send({"type": "http.response.body", "body": piece, "more_body": remaining > 0})
            finally:
                if next_piece:
                    # The thread still uses the file, so it must not be closed before that read ends.
                    await asyncio.wait([next_piece])
            piece = next_piece.result() if next_piece else b""


def _skip_to(file: BinaryIO, start: int) -> None:
    """Advance to byte `start`. A compressed blob cannot seek, so it is read from its beginning."""
    if file.seekable():
        file.seek(start)
        return
    while start and (piece := file.read(min(_PIECE_SIZE, start))):
        start -= len(piece)
