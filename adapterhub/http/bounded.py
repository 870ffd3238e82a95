"""An answer as http.client reads it, within bounds: of its head, of what is around its chunks, and of the time it may take.

http.client takes any number of `100 Continue`, of trailers, and of chunk extensions, and its timeout is for one read from the
socket, so that a byte now and then keeps it waiting forever. What it reads comes through `_Wire` here, which counts and has a
deadline; three of its own methods are replaced: `_read_status`, `_read_next_chunk_size`, `_read_and_discard_trailer`.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

MAX_HEAD = 1 << 17  # bytes of a status line and headers, informational answers included
MAX_INFORMATIONAL = 8  # `1xx` before the answer itself
MAX_AROUND = 1 << 16  # bytes of all chunk extensions, and of all trailers
SLOWEST = 1000  # bytes a second of a body of any length, of the time that is spent waiting for it
_MAX_SIZE_LINE = 1 << 12
_HEX = frozenset(b"0123456789abcdefABCDEF")


class NonsenseError(http.client.HTTPException):
    """An answer that no server gives in good faith; another try would meet it again."""


class SlowError(OSError):
    """Bytes came, but so few that the answer would take forever."""


class Progress:
    """What a body of any length has to do: bring SLOWEST bytes a second of the time that is spent waiting for it."""

    def __init__(self, patience: float) -> None:
        self._patience, self._waited, self._got = patience, 0.0, 0

    def add(self, waited: float, got: int) -> None:
        """Count the bytes of one read and its seconds; SlowError if they were too few for as long as `patience`."""
        self._waited += waited
        self._got += got
        if self._waited >= self._patience:
            if self._got < SLOWEST * self._waited:
                raise SlowError(f"the server sends less than {SLOWEST // 1000} kB a second")
            self._waited, self._got = 0.0, 0


class _Wire(io.RawIOBase):
    """The bytes of one answer: those of its head up to a number and a time, of its body as fast as is told."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._raw = connected, connected.makefile("rb", buffering=0)
        self._patience: float = connected.gettimeout() or 0.0
        self._until: float | None = time.monotonic() + self._patience
        self._late = f"no answer in time: its headers take longer than {self._patience:g} seconds"
        self._head: int | None = MAX_HEAD  # bytes left for it
        self._got = 0
        self._progress: Progress | None = None

    def head_is_read(self, patience: float) -> None:
        """Read the body from here on, which need only come at SLOWEST; `patience` is the timeout of one read."""
        self._head, self._until, self._patience, self._got = None, None, patience, 0
        self._progress = Progress(patience)
        self._socket.settimeout(patience)

    def hurry(self, until: float, late: str) -> None:
        """Have all reads end at a time of `time.monotonic`, with a SlowError of this text."""
        self._until, self._late, self._progress = until, late, None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        began = time.monotonic()
        if self._until is not None:
            if began >= self._until:
                raise SlowError(self._late)
            self._socket.settimeout(min(self._patience, self._until - began))
        try:
            n: int = self._raw.readinto(buffer) or 0
        except TimeoutError:
            if self._until is not None and self._got and time.monotonic() >= self._until:
                raise SlowError(self._late) from None
            raise
        if self._head is not None:
            if not n and self._got:  # http.client would take half of the headers for all of them
                raise http.client.IncompleteRead(b"")
            self._head -= n
            if self._head < 0:
                raise NonsenseError(f"its headers are longer than {MAX_HEAD >> 10} kB")
        self._got += n
        if self._progress:
            self._progress.add(time.monotonic() - began, n)
        return n


class BoundedResponse(http.client.HTTPResponse):
    """An answer whose head must come within the timeout that its socket has when it is made."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.wire = _Wire(sock)
        self.fp.close()
        self.fp = io.BufferedReader(self.wire)
        self._extensions = 0

    def _read_status(self) -> tuple[str, int, str]:
        """The status that is not an informational one (RFC 9110, section 15.2)."""
        for _ in range(MAX_INFORMATIONAL + 1):
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 <= found[1] < 200 or found[1] == http.client.SWITCHING_PROTOCOLS:
                return found
            http.client.parse_headers(self.fp)
        raise NonsenseError(f"more than {MAX_INFORMATIONAL} informational answers (1xx) before the one that was asked for")

    def _read_next_chunk_size(self) -> int:
        line = self.fp.readline(_MAX_SIZE_LINE + 1)
        if len(line) > _MAX_SIZE_LINE:
            raise NonsenseError(f"a chunk of it begins with more than {_MAX_SIZE_LINE} bytes")
        digits, _, extension = line.partition(b";")
        self._extensions += len(extension)
        if self._extensions > MAX_AROUND:
            raise NonsenseError(f"the extensions of its chunks are longer than {MAX_AROUND >> 10} kB")
        digits = digits.strip()
        if not line.endswith(b"\n"):
            raise http.client.IncompleteRead(b"")
        if not 0 < len(digits) <= 16 or not _HEX.issuperset(digits):
            raise NonsenseError("a chunk of it has no valid size")
        return int(digits, 16)

    def _read_and_discard_trailer(self) -> None:
        left = MAX_AROUND
        while (line := self.fp.readline(left + 1)) not in (b"\r\n", b"\n", b""):
            left -= len(line)
            if left < 0:
                raise NonsenseError(f"its trailers are longer than {MAX_AROUND >> 10} kB")
