"""The files of a base behind HTTP, of which only the needed byte ranges are fetched.

A server answers a range request with 206 and states the range and the size of the file; anything else is an error. The file
must not change between two requests: its size and its ETag have to stay those of the first answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from adapterhub.http.client import PAUSES, Client
from adapterhub.http.http_errors import RetryableError
from adapterhub.http.responses import Body, Response
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import FormatError, NotFoundError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from .hub_address import Hub

if TYPE_CHECKING:
    from adapterhub_converters.bases import RangedFile

MAX_DIGESTED = 20_000_000  # bytes of a tokenizer.json that is fetched only for its digest
_FIRST_REQUEST = 1 << 16  # bytes; enough for the header of most shards
_FIRST_REQUEST_GGUF, _READ_AHEAD_GGUF = 1 << 20, 1 << 22  # bytes; a GGUF header has the vocabulary and is read in pieces
_WORKERS = 8
_CONTENT_RANGE = safe_regex.Pattern(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
MAX_SKIPPED = 1 << 27  # bytes read and discarded to reach later ones, on a server without ranges
_TIMEOUT = 15.0  # seconds without a single byte
_DOWNLOAD_HINT = "Download it, and name the file"

T = TypeVar("T")
U = TypeVar("U")


class ForbiddenError(RemoteError):
    """A 403, with which object stores also answer for files that do not exist."""

    default_code = "access-denied"


class TooLargeError(FormatError):
    """A file that is larger than it should be."""

    default_code = "too-large"


@dataclass
class RangeClient(Client):
    """The HTTP client for one base: ranges, small files, and the errors of a Hugging Face Hub.

    Attributes:
        at_hub: Whether its server is a hub, which may ask for a token.
        fetched: The bytes of all bodies so far.
    """

    timeout: float = _TIMEOUT
    at_hub: bool = False
    fetched: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def for_hub(cls, hub: Hub, pauses: Sequence[float] = PAUSES) -> RangeClient:
        """Return a client for a hub, which alone gets its token."""
        token = hub.checked_token()
        authorization_by_scope = {"": f"Bearer {token}"} if token else {}
        return cls(hub.endpoint, pauses=pauses, proxy=hub.proxy, authorizations=authorization_by_scope, at_hub=True)

    def get(self, url: str, location: str, *, n: int, start: int | None = None) -> Response:
        """Return the `n` bytes from `start`, or without a `start` the complete file if it has no more than `n` bytes.

        A server without ranges answers 200: then the body has everything up to `start + n`.

        Raises:
            NotFoundError: The server has no such file.
            TooLargeError: The complete file has more than `n` bytes.
            RemoteError: It refused, failed, did not answer, or gave an invalid answer. The message names `location`, and never
                the address of a redirect, which may be signed.
        """
        headers = {} if start is None else {"Range": f"bytes={start}-{start + n - 1}"}

        def request() -> Response:
            with self.stream(url, location, headers=headers, good=(200, 206, 416), retry=False) as body_stream:
                if start is None and body_stream.status != 200:
                    raise RemoteError(location, f"HTTP {body_stream.status} for a request of the whole file")
                response = Response(body_stream.status, body_stream.headers, b"", body_stream.url)
                count = _bytes_to_read(body_stream, response, n, start, location)
                try:
                    body = body_stream.read(count, self.timeout) if count else b""
                finally:
                    # Several files are read at once, each on its own thread.
                    with self._counting:
                        self.fetched += body_stream.bytes_read
                if start is None and len(body) > n:
                    raise TooLargeError(location, f"more than the {n} bytes of a small file")
                return dataclasses.replace(response, body=body)

        return self.with_retries(request, location)

    def _refusal(self, response: Response, location: str) -> Exception:
        error = super()._refusal(response, location)
        if isinstance(error, RetryableError):
            return error
        status, code, at_hub = (
            response.status,
            response.headers.get("x-error-code", ""),
            self.at_hub and self._is_own_origin(response.url, location),
        )
        anonymous = at_hub and not self.authorizations
        hint = "Set HF_TOKEN to a token that may read it" if at_hub else ""
        if code == "GatedRepo":
            return gated_error(location, f"HTTP {status}: a gated model", anonymous=anonymous)
        if status in (404, 410):
            kind = {"RepoNotFound": "model", "RevisionNotFound": "revision"}.get(code, "file")
            return NotFoundError(
                location, f"no such {kind} (HTTP {status})", "A private one needs HF_TOKEN" if anonymous else ""
            )
        if status == 401:
            problem = "the token was refused" if at_hub and self.authorizations else "login required"
            missing = ", or there is no such model" if at_hub else ""
            return RemoteError(location, f"HTTP 401: {problem}{missing}", hint)
        return ForbiddenError(location, "HTTP 403: forbidden", hint) if status == 403 else error


def gated_error(location: str, problem: str, *, anonymous: bool) -> RemoteError:
    """Return the error for a model whose owner grants access."""
    return RemoteError(
        location, problem, f"Ask for access on its page{' and set HF_TOKEN' if anonymous else ''}", code="gated-model"
    )


def _bytes_to_read(body_stream: Body, response: Response, n: int, start: int | None, location: str) -> int:
    """Return the number of bytes of a body to read."""
    length = response.number("content-length")
    if body_stream.status == 416:
        return 0
    if start is None:
        if length is None and response.headers.get("transfer-encoding", "").lower() != "chunked":
            raise RemoteError(location, "the server does not send the length of the file", _DOWNLOAD_HINT)
        if length is not None and length > n:
            raise TooLargeError(location, f"{length} bytes, more than the {n} of a small file")
        return n + 1  # one more byte would show that the file is too large
    if body_stream.status == 206:
        return n
    if start + n > MAX_SKIPPED and start:
        problem = f"the server supports no ranges, and {start + n} bytes would have to be read for {n} at their end"
        raise RemoteError(location, problem, _DOWNLOAD_HINT)
    return start + n


# --- the files


@dataclass(frozen=True, slots=True)
class ListedFile:
    """The size in bytes and digest of a file in a listing; None if the listing does not have them."""

    size: int | None
    sha256: str | None


class WebFiles:
    """The files of a folder behind HTTP (`bases.Files`).

    Args:
        address: Returns the URL of a file by its name.
        label: Returns the name for messages of a file by its name.
        listing: All files, if a server lists them; otherwise each is requested.
        needed: Names for which a refusal (403) is an error; any other refused file counts as missing, with a note.
    """

    def __init__(
        self,
        client: RangeClient,
        address: Callable[[str], str],
        label: Callable[[str], str],
        *,
        listing: Mapping[str, ListedFile] | None = None,
        needed: Collection[str] = (),
    ) -> None:
        self.local: Path | None = None
        self.notes: list[str] = []
        self._client, self._address, self._label = client, address, label
        self._listing, self._needed = listing, needed
        self._open: dict[str, WebFile | None] = {}

    def label(self, name: str) -> str:
        """Return the name for messages."""
        return self._label(name)

    def read_whole(self, name: str, limit: int) -> bytes | None:
        """Return the bytes of a small file, fetched in one request; None if it is missing."""
        if not self._may_exist(name):
            return None
        try:
            return self._client.get(self._address(name), self.label(name), n=limit).body
        except NotFoundError:
            return None
        except ForbiddenError as error:
            self._note_or_raise(name, error)
            return None

    def _may_exist(self, name: str) -> bool:
        return self._listing is None or name in self._listing

    def _note_or_raise(self, name: str, error: ForbiddenError) -> None:
        if name in self._needed:
            raise error
        self.notes.append(f"{self.label(name)}: HTTP 403, treated as missing")

    def open_ranged(self, name: str) -> RangedFile | None:
        """Return a reader of byte ranges, or None if the file is missing; the first request brings the size."""
        from adapterhub_converters.bases import RangedFile  # numpy, which the start of a hub does without

        if name not in self._open:
            self._open[name] = self._begin(name) if self._may_exist(name) else None
        file = self._open[name]
        return None if file is None else RangedFile(file.size, file.read_at, self.label(name))

    def _begin(self, name: str) -> WebFile | None:
        gguf = name.endswith(".gguf")
        try:
            file = WebFile(
                self._client,
                self._address(name),
                self.label(name),
                first=_FIRST_REQUEST_GGUF if gguf else _FIRST_REQUEST,
                ahead=_READ_AHEAD_GGUF if gguf else 0,
            )
        except NotFoundError:
            return None
        except ForbiddenError as error:
            self._note_or_raise(name, error)
            return None
        listed = self._listing[name].size if self._listing else None
        if listed is not None and listed != file.size:
            raise RemoteError(self.label(name), f"{file.size} bytes, but {listed} in the listing")
        return file

    def sha256(self, name: str) -> str | None:
        """Return the digest in the listing, or computed if the file is small enough."""
        listed = self._listing.get(name) if self._listing is not None else None
        if listed and listed.sha256:
            return listed.sha256
        is_small = listed is None or listed.size is None or listed.size <= MAX_DIGESTED
        try:
            raw = self.read_whole(name, MAX_DIGESTED) if is_small else None
        except TooLargeError:
            is_small, raw = False, None
        if not is_small:
            self.notes.append(f"{name} has more than {MAX_DIGESTED} bytes and was not fetched for its digest")
        return None if raw is None else "sha256:" + hashlib.sha256(raw).hexdigest()

    def map_items(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Apply a function to all items, up to eight at once."""
        if len(items) < 2:
            return [function(item) for item in items]
        pool = ThreadPoolExecutor(min(_WORKERS, len(items)))
        try:
            return list(pool.map(function, items))
        finally:
            # After an error, requests that have not started are dropped.
            pool.shutdown(cancel_futures=True)


class WebFile:
    """One file, whose start is kept once read, because headers are read forward in pieces."""

    def __init__(self, client: RangeClient, url: str, location: str, *, first: int, ahead: int) -> None:
        self._client, self._url, self._where, self._ahead = client, url, location, ahead
        self._size: int | None = None
        self._etag: str | None = None
        self._ranges = True
        self._prefix = bytearray(self._fetch(0, first))

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._size or 0

    def read_at(self, offset: int, n: int) -> bytes:
        """Return `n` bytes from `offset`; fewer only at the end of the file."""
        end = min(offset + n, self.size)
        if offset > len(self._prefix) and self._ranges:
            return self._fetch(offset, end - offset) if end > offset else b""
        if end > len(self._prefix):
            self._extend(end)
        return bytes(self._prefix[offset:end])

    def _extend(self, end: int) -> None:
        prefix_length = len(self._prefix)
        if self._ranges:
            end = min(max(end, prefix_length + min(prefix_length, self._ahead)), self.size)
            self._prefix += self._fetch(prefix_length, end - prefix_length)
        if len(self._prefix) >= end:
            return
        # Each request starts at byte 0, so the length doubles each time: a long header then takes few requests.
        if end > MAX_SKIPPED:
            problem = f"the server supports no ranges, and {end} bytes would have to be read for a few at their end"
            raise RemoteError(self._where, problem, "Download it, and name the file")
        self._prefix = bytearray(self._fetch(0, min(max(end, 2 * prefix_length), self.size)))

    def _fetch(self, start: int, n: int) -> bytes:
        response = self._client.get(self._url, self._where, start=start, n=n)
        if response.status == 416 and start == 0 and response.headers.get("content-range") == "bytes */0":
            self._check_unchanged(0, response)
            return b""
        if response.status == 206:
            return self._checked_part(response, start, n)
        size = response.number("content-length")
        if response.status != 200 or size is None:
            missing_length = "the server does not send the length of the file"
            problem = "HTTP 416 (range not satisfiable) for bytes inside the file" if response.status == 416 else missing_length
            raise RemoteError(self._where, problem, _DOWNLOAD_HINT)
        self._check_unchanged(size, response)
        self._ranges = False
        if len(response.body) < min(size, start + n):
            problem = f"{len(response.body)} bytes received instead of {min(size, start + n)}"
            raise RemoteError(self._where, problem, "Try again")
        # `read_at` and `_extend` expect the bytes that begin at `start`.
        return response.body[start : start + n]

    def _checked_part(self, response: Response, start: int, n: int) -> bytes:
        text = response.headers.get("content-range", "")
        match = _CONTENT_RANGE.fullmatch(text)
        if not match:
            raise RemoteError(self._where, f"a part of a file with an invalid Content-Range ({text[:60]!r})")
        first, last, size = map(int, match.groups())
        self._check_unchanged(size, response)
        if (first, last) != (start, min(start + n, size) - 1):
            raise RemoteError(self._where, f"bytes {first} to {last} of {size} received, {start} to {start + n - 1} requested")
        length = response.number("content-length")
        if length not in (None, last - first + 1) or len(response.body) != last - first + 1:
            received = len(response.body) if length is None else length
            raise RemoteError(self._where, f"{received} bytes received for bytes {first} to {last}")
        return response.body

    def _check_unchanged(self, size: int, response: Response) -> None:
        etag = response.headers.get("etag")
        if self._size is None:
            self._size, self._etag = size, etag
        elif (size, etag) != (self._size, self._etag):
            raise RemoteError(self._where, "changed while it was read", "Try again", code="changed-meanwhile")
