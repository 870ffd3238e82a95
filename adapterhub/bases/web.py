"""The files of a base behind HTTP, of which only what is asked for is fetched.

A server answers a range with 206 and says which bytes of how many these are; one that does not is not believed. The file must
not change between two ranges: its size and its ETag stay what they were at the first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from adapterhub.http.client import Answer
from adapterhub_converters.bases import Ranged
from adapterhub_converters.errors import NotFoundError, RemoteError

from .client import MAX_SKIPPED, ForbiddenError, RangeClient, TooLargeError

MAX_DIGESTED = 20_000_000  # bytes of a tokenizer.json that is fetched for its digest alone
_FIRST = 1 << 16  # bytes of the first request: the whole header of most shards
_FIRST_GGUF, _AHEAD_GGUF = 1 << 20, 1 << 22  # its header holds the vocabulary and is read piece by piece
_WORKERS = 8
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Known:
    """What a listing says of a file: `size` in bytes and the digest of its bytes, None where it doesn't say."""

    size: int | None
    sha256: str | None


class WebFiles:
    """Files beside each other at addresses.

    Args:
        address: Name to URL; the empty name is not asked for.
        label: Name to what errors call it.
        listing: All files there are, where something lists them; otherwise each is asked for.
        needed: Names that a refusal (403) is an error for; of others it counts as not there, and that is noted.
    """

    def __init__(
        self,
        client: RangeClient,
        address: Callable[[str], str],
        label: Callable[[str], str],
        *,
        listing: Mapping[str, Known] | None = None,
        needed: Collection[str] = (),
    ) -> None:
        self.local: Path | None = None
        self.notes: list[str] = []
        self._client, self._address, self._label = client, address, label
        self._listing, self._needed = listing, needed
        self._open: dict[str, WebFile | None] = {}

    def label(self, name: str) -> str:
        """As the user wrote it."""
        return self._label(name)

    def whole(self, name: str, limit: int) -> bytes | None:
        """In one request."""
        if not self._there(name):
            return None
        try:
            return self._client.get(self._address(name), self.label(name), n=limit).body
        except NotFoundError:
            return None
        except ForbiddenError as error:
            self._refused(name, error)
            return None

    def _there(self, name: str) -> bool:
        return self._listing is None or name in self._listing

    def _refused(self, name: str, error: ForbiddenError) -> None:
        if name in self._needed:
            raise error
        self.notes.append(f"{self.label(name)}: HTTP 403, taken as not there")

    def ranged(self, name: str) -> Ranged | None:
        """By ranges; the first request brings the size."""
        if name not in self._open:
            self._open[name] = self._begin(name) if self._there(name) else None
        file = self._open[name]
        return None if file is None else Ranged(file.size, file.read_at, self.label(name))

    def _begin(self, name: str) -> WebFile | None:
        gguf = name.endswith(".gguf")
        try:
            file = WebFile(
                self._client,
                self._address(name),
                self.label(name),
                first=_FIRST_GGUF if gguf else _FIRST,
                ahead=_AHEAD_GGUF if gguf else 0,
            )
        except NotFoundError:
            return None
        except ForbiddenError as error:
            self._refused(name, error)
            return None
        said = self._listing[name].size if self._listing else None
        if said is not None and said != file.size:
            raise RemoteError(self.label(name), f"{file.size} bytes, where the listing says {said}")
        return file

    def sha256(self, name: str) -> str | None:
        """What the listing says, else computed from a file that is not too large for that."""
        known = self._listing.get(name) if self._listing is not None else None
        if known and known.sha256:
            return known.sha256
        small = known is None or known.size is None or known.size <= MAX_DIGESTED
        try:
            raw = self.whole(name, MAX_DIGESTED) if small else None
        except TooLargeError:
            small, raw = False, None
        if not small:
            self.notes.append(f"{name} has more than {MAX_DIGESTED} bytes and was not fetched for its digest")
        return None if raw is None else "sha256:" + hashlib.sha256(raw).hexdigest()

    def each(self, do: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Several at once."""
        if len(items) < 2:
            return [do(item) for item in items]
        pool = ThreadPoolExecutor(min(_WORKERS, len(items)))
        try:
            return list(pool.map(do, items))
        finally:
            pool.shutdown(cancel_futures=True)


class WebFile:
    """One file: what of its beginning was read is kept, as headers are read forwards in pieces."""

    def __init__(self, client: RangeClient, url: str, where: str, *, first: int, ahead: int) -> None:
        self._client, self._url, self._where, self._ahead = client, url, where, ahead
        self._size: int | None = None
        self._etag: str | None = None
        self._ranges = True
        self._prefix = bytearray(self._fetch(0, first))

    @property
    def size(self) -> int:
        """In bytes."""
        return self._size or 0

    def read_at(self, offset: int, n: int) -> bytes:
        """Fewer than `n` bytes only at the end of the file."""
        end = min(offset + n, self.size)
        if offset > len(self._prefix) and self._ranges:
            return self._fetch(offset, end - offset) if end > offset else b""
        if end > len(self._prefix):
            self._extend(end)
        return bytes(self._prefix[offset:end])

    def _extend(self, end: int) -> None:
        have = len(self._prefix)
        if self._ranges:
            end = min(max(end, have + min(have, self._ahead)), self.size)
            self._prefix += self._fetch(have, end - have)
        if len(self._prefix) >= end:
            return
        # Everything before it comes along: twice as much each time, so that a long header takes few requests.
        if end > MAX_SKIPPED:
            what = f"the server supports no ranges, and {end} bytes would have to be read for a few at their end"
            raise RemoteError(self._where, what, "Download it, and name the file")
        self._prefix = bytearray(self._fetch(0, min(max(end, 2 * have), self.size)))

    def _fetch(self, start: int, n: int) -> bytes:
        answer = self._client.get(self._url, self._where, start=start, n=n)
        if answer.status == 416 and start == 0 and answer.headers.get("content-range") == "bytes */0":
            self._same(0, answer)
            return b""
        if answer.status == 206:
            return self._part(answer, start, n)
        size = answer.number("content-length")
        if answer.status != 200 or size is None:
            unknown = "the server does not send the length of the file"
            raise RemoteError(self._where, "HTTP 416 for bytes that it has" if answer.status == 416 else unknown)
        self._same(size, answer)
        self._ranges = False
        if len(answer.body) < min(size, start + n):
            raise RemoteError(self._where, f"{len(answer.body)} bytes came instead of {min(size, start + n)}")
        # `read_at` and `_extend` want what begins at `start`.
        return answer.body[start : start + n]

    def _part(self, answer: Answer, start: int, n: int) -> bytes:
        said = answer.headers.get("content-range", "")
        found = _CONTENT_RANGE.fullmatch(said)
        if not found:
            raise RemoteError(self._where, f"a part of a file ({said[:60]!r}) that does not say which of how many bytes it is")
        first, last, size = map(int, found.groups())
        self._same(size, answer)
        if (first, last) != (start, min(start + n, size) - 1):
            raise RemoteError(self._where, f"bytes {first} to {last} of {size} came, asked for were {start} to {start + n - 1}")
        length = answer.number("content-length")
        if length not in (None, last - first + 1) or len(answer.body) != last - first + 1:
            have = len(answer.body) if length is None else length
            raise RemoteError(self._where, f"{have} bytes came as bytes {first} to {last}")
        return answer.body

    def _same(self, size: int, answer: Answer) -> None:
        etag = answer.headers.get("etag")
        if self._size is None:
            self._size, self._etag = size, etag
        elif (size, etag) != (self._size, self._etag):
            raise RemoteError(self._where, "changed while it was read", "Try again")
