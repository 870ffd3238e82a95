"""A form with files as it arrives (RFC 7578): its parts in order, of which a window of bytes is in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

from adapterhub_converters import safe_regex
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

_KIND = safe_regex.Pattern(r"(?i)multipart/form-data *; *boundary=\"?([A-Za-z0-9'()+_,./:=?-]{1,70})\"?")
_NAME = safe_regex.Pattern(r"; *name=\"([^\"]{0,200})\"")
_FILENAME = safe_regex.Pattern(r"; *filename=\"([^\"]{0,1000})\"")
_MAX_HEADERS = 8192  # bytes of the headers of a part


@dataclass(frozen=True, slots=True)
class Part:
    """A field of a form, or a file with its name; None for a field."""

    name: str
    filename: str | None


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a form with files. FormatError for a body of another type."""
    match = _KIND.fullmatch(content_type.strip())
    if match is None:
        raise FormatError("form", "is not a form with files")
    return str(match[1]).encode()


class MultipartReader:
    """Reads the parts of a body: `next_part`, then all of its `data`, until there is none."""

    def __init__(self, body: AsyncIterator[bytes], boundary: bytes) -> None:
        # The first delimiter has no line break before it.
        self._body, self._delimiter, self._buffer = body, b"\r\n--" + boundary, b"\r\n"

    async def _fill(self) -> None:
        async for piece in self._body:
            self._buffer += piece
            return
        raise FormatError("form", "ends before its end")

    async def next_part(self) -> Part | None:
        """Return the next part; None after the last."""
        size = len(self._delimiter) + 2
        while len(self._buffer) < size:
            await self._fill()
        end = self._buffer[size - 2 : size]
        if not self._buffer.startswith(self._delimiter) or end not in (b"\r\n", b"--"):
            raise FormatError("form", "has no part where one should begin")
        if end == b"--":
            return None
        self._buffer = self._buffer[size:]
        while (at := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _MAX_HEADERS:
                raise FormatError("form", f"a part has more than {_MAX_HEADERS:,} bytes of headers")
            await self._fill()
        headers, self._buffer = self._buffer[: at + 2][:_MAX_HEADERS].decode("utf-8", "replace"), self._buffer[at + 2 :]
        # What is left begins with a line break, as a delimiter does, so that an empty part ends at once.
        name, filename = _NAME.search(headers), _FILENAME.search(headers)
        return Part(str(name[1]) if name else "", str(filename[1]) if filename else None)

    async def data(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the part that was begun last."""
        to_skip = 2  # the line break that ends the headers
        while True:
            at = self._buffer.find(self._delimiter)
            end = at if at >= 0 else max(len(self._buffer) - len(self._delimiter) + 1, 0)
            data, self._buffer = self._buffer[:end], self._buffer[end:]
            skipped = min(to_skip, len(data))
            to_skip -= skipped
            if data[skipped:]:
                yield data[skipped:]
            if at >= 0:
                return
            await self._fill()
