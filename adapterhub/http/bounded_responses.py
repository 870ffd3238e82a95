"""Responses read by http.client within limits: on the size of the head, on everything around chunks, and on time.

http.client accepts any number of `100 Continue`, of trailers, and of chunk extensions, and its timeout is for a single read
from the socket, so that a byte now and then keeps it waiting forever. Here it reads through `_Wire`, which counts bytes and has
a deadline; three of its own methods are replaced: `_read_status`, `_read_next_chunk_size`, `_read_and_discard_trailer`.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

MAX_HEAD = 1 << 17  # bytes of status line and headers, including informational responses
MAX_INFORMATIONAL = 8  # `1xx` responses before the final one
MAX_CHUNK_OVERHEAD = 1 << 16  # bytes of all chunk extensions, and of all trailers
MIN_RATE = 1000  # bytes per second of waiting for a body of any length
_MAX_SIZE_LINE = 1 << 12
_HEX = frozenset(b"0123456789abcdefABCDEF")


class NonsenseError(http.client.HTTPException):
    """A response no server sends in good faith; a retry would get the same."""


class SlowError(OSError):
    """Bytes arrive, but so few that the response would take forever."""


class Progress:
    """The minimum speed of a body of any length, in bytes per second of waiting for it."""

    def __init__(self, patience: float, min_rate: int = MIN_RATE) -> None:
        self._patience, self._min_rate, self._waited, self._received = patience, min_rate, 0.0, 0

    def add(self, waited: float, size: int) -> None:
        """Count the bytes of one read and its seconds. SlowError if they stay below the rate for as long as `patience`."""
        self._waited += waited
        self._received += size
        if self._waited >= self._patience:
            if self._received < self._min_rate * self._waited:
                raise SlowError(f"the server sends less than {self._min_rate // 1000} kB a second")
            self._waited, self._received = 0.0, 0


class _Wire(io.RawIOBase):
    """The bytes of one response: its head within a size and a time, its body at a minimum speed."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._raw = connected, connected.makefile("rb", buffering=0)
        self._patience: float = connected.gettimeout() or 0.0
        self._deadline: float | None = time.monotonic() + self._patience
        self._late_message = f"no answer in time: its headers take longer than {self._patience:g} seconds"
        self._head_left: int | None = MAX_HEAD  # bytes left for the head
        self._received = 0
        self._progress: Progress | None = None

    def head_is_read(self, patience: float) -> None:
        """Switch from the head to the body, which only needs the minimum speed; `patience` is the timeout of one read."""
        self._head_left, self._deadline, self._patience, self._received = None, None, patience, 0
        self._progress = Progress(patience)
        self._socket.settimeout(patience)

    def require_rate(self, min_rate: int, patience: float) -> None:
        """Demand so many bytes per second of waiting for the rest of the body, counted over `patience` seconds of it."""
        self._progress = Progress(patience, min_rate)

    def hurry(self, deadline: float, message: str) -> None:
        """Make all reads fail at a time of `time.monotonic`, with a SlowError of this text."""
        self._deadline, self._late_message, self._progress = deadline, message, None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        began = time.monotonic()
        if self._deadline is not None:
            if began >= self._deadline:
                raise SlowError(self._late_message)
            self._socket.settimeout(min(self._patience, self._deadline - began))
        try:
            count: int = self._raw.readinto(buffer) or 0
        except TimeoutError:
            # After some bytes, the server is too slow; before the first one, a retry may help.
            if self._deadline is not None and self._received and time.monotonic() >= self._deadline:
                raise SlowError(self._late_message) from None
            raise
        if self._head_left is not None:
            if not count and self._received:  # http.client would take the truncated headers for complete ones
                raise http.client.IncompleteRead(b"")
            self._head_left -= count
            if self._head_left < 0:
                raise NonsenseError(f"its headers are longer than {MAX_HEAD >> 10} kB")
        self._received += count
        if self._progress:
            self._progress.add(time.monotonic() - began, count)
        return count


class BoundedResponse(http.client.HTTPResponse):
    """A response whose head must arrive within the timeout its socket has at creation."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.wire = _Wire(sock)
        # http.client has opened a reader of its own, which would bypass the limits.
        self.fp.close()
        self.fp = io.BufferedReader(self.wire)
        self._extensions = 0

    def _read_status(self) -> tuple[str, int, str]:
        """Return the first status that is not informational (RFC 9110, section 15.2)."""
        for _ in range(MAX_INFORMATIONAL + 1):
            status: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 <= status[1] < 200 or status[1] == http.client.SWITCHING_PROTOCOLS:
                return status
            http.client.parse_headers(self.fp)
        raise NonsenseError(f"more than {MAX_INFORMATIONAL} informational answers (1xx) before the one that was asked for")

    def _read_next_chunk_size(self) -> int:
        # http.client's own method takes any length, and ignores what follows the digits.
        line = self.fp.readline(_MAX_SIZE_LINE + 1)
        if len(line) > _MAX_SIZE_LINE:
            raise NonsenseError(f"a chunk of it begins with more than {_MAX_SIZE_LINE} bytes")
        digits, _, extension = line.partition(b";")
        self._extensions += len(extension)
        if self._extensions > MAX_CHUNK_OVERHEAD:
            raise NonsenseError(f"the extensions of its chunks are longer than {MAX_CHUNK_OVERHEAD >> 10} kB")
        digits = digits.strip()
        if not line.endswith(b"\n"):
            raise http.client.IncompleteRead(b"")
        if not 0 < len(digits) <= 16 or not _HEX.issuperset(digits):
            raise NonsenseError("a chunk of it has no valid size")
        return int(digits, 16)

    def _read_and_discard_trailer(self) -> None:
        # http.client reads trailers until they end, however many there are.
        remaining = MAX_CHUNK_OVERHEAD
        while (line := self.fp.readline(remaining + 1)) not in (b"\r\n", b"\n", b""):
            remaining -= len(line)
            if remaining < 0:
                raise NonsenseError(f"its trailers are longer than {MAX_CHUNK_OVERHEAD >> 10} kB")
