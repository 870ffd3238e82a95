"""Responses of servers: complete ones, and those whose body of checked length is still to be read."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from .connection_pools import FAILURES, error_for
from .http_errors import RetryableError, TruncatedBodyError

if TYPE_CHECKING:
    from urllib3 import HTTPResponse

TIMEOUT = 60.0  # seconds; a registry hashes what it has received before it responds
SMALL_BODY = 1 << 16  # bytes of a response that only reports success or failure
_MIN_RATE = 50_000  # bytes per second of a small body, once the timeout is over
_TOO_SLOW = f"the server sends less than {_MIN_RATE // 1000} kB a second"
_PIECE = 1 << 16


@dataclass(frozen=True)
class Response:
    """A complete response: status, headers by lower-case name, body, and the URL it came from after redirects."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    def number(self, header: str) -> int | None:
        """Return a header that is a plain number; None if it is absent or not one."""
        text = self.headers.get(header, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


class Body:
    """A response whose body is still to be read, at once with `read` or piece by piece with `readinto`.

    Attributes:
        length: In bytes; None if the server does not say.
        bytes_read: Bytes read so far.
    """

    def __init__(self, response: HTTPResponse, url: str, location: str) -> None:
        self.status, self.url, self.length, self.bytes_read = response.status, url, response.length_remaining, 0
        # Several headers of one name are joined.
        self.headers = {key.lower(): response.headers[key] for key in response.headers}
        self.challenges: list[str] = response.headers.getlist("WWW-Authenticate")
        self._response, self._label = response, location
        # http.client fills our buffer directly; urllib3's `readinto` first makes bytes of each piece, which takes a quarter
        # longer.
        self._raw: Any = response._original_response

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` with what arrives; return 0 at the end. TruncatedBodyError if the end comes too early."""
        try:
            count: int = self._raw.readinto(buffer) or 0
        except FAILURES as error:
            translated = error_for(error, self._label)
            raise (
                TruncatedBodyError(self._label, translated.reason) if isinstance(translated, RetryableError) else translated
            ) from error
        if not count and len(buffer) and self.length is not None and self.bytes_read < self.length:
            raise TruncatedBodyError(
                self._label, f"the connection ended {self.length - self.bytes_read} bytes too early", "Try again"
            )
        self.bytes_read += count
        return count

    def read(self, limit: int, timeout: float = TIMEOUT) -> bytes:
        """Return the body, or its first `limit` bytes.

        Raises:
            RetryableError: It ended too early.
            RemoteError: It arrives too slowly.
        """
        data, began = bytearray(), time.monotonic()
        try:
            while len(data) < limit:
                self._raw.wire.hurry(began + timeout + len(data) / _MIN_RATE, _TOO_SLOW)
                # One extra read finds the end of the body, so that the connection can be kept.
                if not (piece := self._response.read1(min(_PIECE, limit - len(data)))):
                    break
                data += piece
                self.bytes_read += len(piece)
        except FAILURES as error:
            raise error_for(error, self._label) from error
        return bytes(data)

    def require_rate(self, min_rate: int, patience: float) -> None:
        """Make reads raise RemoteError below `min_rate` bytes per second of waiting, counted over `patience` seconds of it."""
        self._raw.wire.require_rate(min_rate, patience)

    def check_identity(self) -> None:
        """Raise RemoteError if the server has compressed the body."""
        if self.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise RemoteError(self._label, "the server sends it compressed though it was asked not to")

    def close(self) -> None:
        """Keep the connection if the body was read to its end; otherwise close it."""
        if self._raw.isclosed():
            self._response.release_conn()
        else:
            self._response.close()


def discard_body(response: Body, timeout: float) -> None:
    """Read the rest of a response whose body is not needed, so that its connection can be kept."""
    with contextlib.suppress(RetryableError, RemoteError):
        response.read(SMALL_BODY, timeout)


def retry_after_seconds(text: str | None) -> float | None:
    """Return the pause `Retry-After` asks for, as a number or a date (RFC 9110, section 10.2.3); None without a valid one."""
    if not text:
        return None
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None
