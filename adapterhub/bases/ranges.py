"""Files of a base behind HTTP, of which only what is needed is fetched, by ranges of bytes.

A server answers a range with 206 and tells which bytes of how many these are; without that the answer is an error. The file
must not change between two ranges: its size and its ETag stay those of the first answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from adapterhub.http.client import PAUSES, Answer, Body, Client
from adapterhub.http.errors import AgainError
from adapterhub_converters import linear
from adapterhub_converters.bases import Ranged
from adapterhub_converters.errors import FormatError, NotFoundError, RemoteError

from .hub_address import Hub

MAX_DIGESTED = 20_000_000  # bytes of a tokenizer.json that is fetched for its digest alone
_FIRST = 1 << 16  # bytes of the first request: the whole header of most shards
_FIRST_GGUF, _AHEAD_GGUF = 1 << 20, 1 << 22  # its header holds the vocabulary and is read piece by piece
_WORKERS = 8
_CONTENT_RANGE = linear.Pattern(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
MAX_SKIPPED = 1 << 27  # bytes read to reach those behind them, of a server without ranges
_TIMEOUT = 15.0  # seconds without a byte
_DOWNLOAD = "Download it, and name the file"

T = TypeVar("T")
U = TypeVar("U")


class ForbiddenError(RemoteError):
    """A 403; object stores answer it for files that do not exist, too."""

    default_code = "access-denied"


class TooLargeError(FormatError):
    """A file that should be small is not."""

    default_code = "too-large"


@dataclass
class RangeClient(Client):
    """The HTTP client for one base: ranges, small files, and the errors of a Hugging Face Hub.

    Attributes:
        at_hub: Whether its server is a hub, which may ask for a token.
        fetched: Bytes of all bodies so far.
    """

    timeout: float = _TIMEOUT
    at_hub: bool = False
    fetched: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(cls, hub: Hub, pauses: Sequence[float] = PAUSES) -> RangeClient:
        """A client of a hub, which alone gets its token."""
        token = hub.checked_token()
        known = {"": f"Bearer {token}"} if token else {}
        return cls(hub.endpoint, pauses=pauses, proxy=hub.proxy, known=known, at_hub=True)

    def get(self, url: str, where: str, *, n: int, start: int | None = None) -> Answer:
        """The `n` bytes from `start` on, or, without a `start`, the whole file if it has no more than `n` bytes.

        A server without ranges answers 200: then the body has everything up to `start + n`.

        Raises:
            NotFoundError: The server has no such file.
            TooLargeError: The whole file has more than `n` bytes.
            RemoteError: It refused, failed, did not answer, or gave an invalid answer. `where` is in the message, and never
                the address of a redirect, which may be signed.
        """
        headers = {} if start is None else {"Range": f"bytes={start}-{start + n - 1}"}

        def once() -> Answer:
            with self.stream(url, where, headers=headers, good=(200, 206, 416), retry=False) as found:
                if start is None and found.status != 200:
                    raise RemoteError(where, f"HTTP {found.status} for a request of the whole file")
                answer = Answer(found.status, found.headers, b"", found.url)
                wanted = _wanted(found, answer, n, start, where)
                try:
                    body = found.read(wanted, self.timeout) if wanted else b""
                finally:
                    with self._counting:
                        self.fetched += found.taken
                if start is None and len(body) > n:
                    raise TooLargeError(where, f"more than the {n} bytes of a small file")
                return dataclasses.replace(answer, body=body)

        return self.tried(once, where)

    def _refusal(self, answer: Answer, where: str) -> Exception:
        found = super()._refusal(answer, where)
        if isinstance(found, AgainError):
            return found
        status, code, at_hub = (
            answer.status,
            answer.headers.get("x-error-code", ""),
            self.at_hub and self._at_home(answer.url, where),
        )
        anonymous = at_hub and not self.known
        takes = "Set HF_TOKEN to a token that may read it" if at_hub else ""
        if code == "GatedRepo":
            return gated(where, f"HTTP {status}: a gated model", anonymous=anonymous)
        if status in (404, 410):
            kind = {"RepoNotFound": "model", "RevisionNotFound": "revision"}.get(code, "file")
            return NotFoundError(where, f"no such {kind} (HTTP {status})", "A private one needs HF_TOKEN" if anonymous else "")
        if status == 401:
            what = "the token was refused" if at_hub and self.known else "login required"
            missing = ", or there is no such model" if at_hub else ""
            return RemoteError(where, f"HTTP 401: {what}{missing}", takes)
        return ForbiddenError(where, "HTTP 403: forbidden", takes) if status == 403 else found


def gated(where: str, what: str, *, anonymous: bool) -> RemoteError:
    """Return the error for a model whose owner grants access."""
    return RemoteError(where, what, f"Ask for access on its page{' and set HF_TOKEN' if anonymous else ''}", code="gated-model")


def _wanted(found: Body, answer: Answer, n: int, start: int | None, where: str) -> int:
    """The number of bytes of a body to read."""
    length = answer.number("content-length")
    if found.status == 416:
        return 0
    if start is None:
        if length is None and answer.headers.get("transfer-encoding", "").lower() != "chunked":
            raise RemoteError(where, "the server does not send the length of the file", _DOWNLOAD)
        if length is not None and length > n:
            raise TooLargeError(where, f"{length} bytes, more than the {n} of a small file")
        return n + 1  # the one more shows that there are too many
    if found.status == 206:
        return n
    if start + n > MAX_SKIPPED and start:
        what = f"the server supports no ranges, and {start + n} bytes would have to be read for {n} at their end"
        raise RemoteError(where, what, _DOWNLOAD)
    return start + n


# --- the files


@dataclass(frozen=True, slots=True)
class Known:
    """Size in bytes and digest of a file in a listing; None where it has none."""

    size: int | None
    sha256: str | None


class WebFiles:
    """The files of a folder behind HTTP (`bases.Files`).

    Args:
        address: Name to URL.
        label: Name to the name in errors.
        listing: All files, where a server lists them; otherwise each is requested.
        needed: Names for which a refusal (403) is an error; any other refused file counts as missing, with a note.
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
        """The name in errors."""
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
        self.notes.append(f"{self.label(name)}: HTTP 403, treated as missing")

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
        listed = self._listing[name].size if self._listing else None
        if listed is not None and listed != file.size:
            raise RemoteError(self.label(name), f"{file.size} bytes, but {listed} in the listing")
        return file

    def sha256(self, name: str) -> str | None:
        """The digest in the listing, or computed if the file is small enough."""
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
        """Up to eight at once."""
        if len(items) < 2:
            return [do(item) for item in items]
        pool = ThreadPoolExecutor(min(_WORKERS, len(items)))
        try:
            return list(pool.map(do, items))
        finally:
            pool.shutdown(cancel_futures=True)


class WebFile:
    """One file, whose beginning is kept once read, because headers are read forward in pieces."""

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
        """`n` bytes from `offset` on; fewer only at the end of the file."""
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
        # Each request starts at byte 0: twice as much each time, so that a long header takes few of them.
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
            what = "HTTP 416 (range not satisfiable) for bytes inside the file" if answer.status == 416 else unknown
            raise RemoteError(self._where, what, _DOWNLOAD)
        self._same(size, answer)
        self._ranges = False
        if len(answer.body) < min(size, start + n):
            raise RemoteError(self._where, f"{len(answer.body)} bytes received instead of {min(size, start + n)}", "Try again")
        # `read_at` and `_extend` expect the bytes from `start` on.
        return answer.body[start : start + n]

    def _part(self, answer: Answer, start: int, n: int) -> bytes:
        text = answer.headers.get("content-range", "")
        found = _CONTENT_RANGE.fullmatch(text)
        if not found:
            raise RemoteError(self._where, f"a part of a file with an invalid Content-Range ({text[:60]!r})")
        first, last, size = map(int, found.groups())
        self._same(size, answer)
        if (first, last) != (start, min(start + n, size) - 1):
            raise RemoteError(self._where, f"bytes {first} to {last} of {size} received, {start} to {start + n - 1} requested")
        length = answer.number("content-length")
        if length not in (None, last - first + 1) or len(answer.body) != last - first + 1:
            have = len(answer.body) if length is None else length
            raise RemoteError(self._where, f"{have} bytes received for bytes {first} to {last}")
        return answer.body

    def _same(self, size: int, answer: Answer) -> None:
        etag = answer.headers.get("etag")
        if self._size is None:
            self._size, self._etag = size, etag
        elif (size, etag) != (self._size, self._etag):
            raise RemoteError(self._where, "changed while it was read", "Try again", code="changed-meanwhile")
