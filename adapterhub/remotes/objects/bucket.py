"""Objects in a bucket or a folder, through obstore: read, put, create, list, with every failure in one line.

obstore's own errors quote requests and answers, which may contain keys and signatures: only a status and a code are taken from
them. When obstore retries a stream, it requests a range and trusts the answer; so streams are opened without its retries here.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub.digest import CHUNK
from adapterhub.http.bounded_responses import Progress, SlowError
from adapterhub.http.http_errors import TruncatedBodyError
from adapterhub.remotes.protocol import Reader
from adapterhub.store.store import local_errors
from adapterhub_converters import safe_regex
from adapterhub_converters.containers.atomic import sync_to_disk
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, LocalIOError, NotFoundError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from .object_address import BUCKET_WORDS, ObjectAddress
from .store_settings import (
    ENVIRONMENT_PREFIXES,
    IDLE_TIMEOUT,
    LOGIN_HINTS,
    StoreDeniedError,
    endpoint_of,
    missing_credentials,
    open_store,
)

RETRIES = 5
_MAX_CONCURRENT_PARTS = 2  # parts of one upload
_READ_AHEAD = 8 << 20  # bytes of one request of a reader
_REQUEST_TIMEOUT = "10min"  # of a request for a small object, or of one part of a large one
_CREATE_HINTS = {
    "s3": "Create it: `aws s3 mb s3://{}`",
    "gs": "Create it: `gcloud storage buckets create gs://{}`",
    "az": "Create it: `az storage container create -n {}`",
}
_ENTRY_NAME = safe_regex.Pattern(r"[0-9]{8,15}\.json")
_OS_ERROR = safe_regex.Pattern(r": ([^:\n]{1,80}) \(os error \d+\)")
_NO_BUCKET = safe_regex.Pattern(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>|specified bucket does not exist")
_DETAILS = safe_regex.Pattern(
    r"status code: (\d{3})(?:[^<]{0,40}(?:<\?xml[^>]{0,80}>)?\s*<Error>\s*<Code>([A-Za-z0-9.]{1,60})</Code>)?"
)
_NO_ANSWER = ("error sending request", "Connect", "TimedOut", "operation timed out")


class ExclusiveCreateUnsupported(Exception):  # noqa: N818 - not seen outside this package
    """The store reports that it cannot create exclusively."""


@dataclass(slots=True)
class BucketCounts:
    """How many requests were made, and how many failed after all retries."""

    requests: int = 0
    failures: int = 0


class Bucket:
    """The objects below one prefix or folder.

    Attributes:
        counts: The requests so far; an object that is missing is no failure.
        location: Its name in errors.
        endpoint: The server; empty for a folder.
    """

    def __init__(self, address: ObjectAddress, environ: Mapping[str, str], *, retries: int = RETRIES) -> None:
        self.location, self._scheme, self._name = address.store, address.scheme, address.bucket
        self.endpoint = "" if address.scheme == "file" else endpoint_of(address, environ)
        self._root = Path(address.root)
        self._open: Callable[..., Any] = lambda tries, longest: open_store(address, environ, tries, longest)
        self._retries = retries
        self._store: Any = None
        self._streaming: Any = None
        self.counts = BucketCounts()

    def close(self) -> None:
        """Close the connections."""
        self._store = self._streaming = None

    # ---- reading

    def read(self, key: str, limit: int) -> bytes | None:
        """Return the bytes of an object, None without one; FormatError for more than `limit`."""
        self._check_regular(key)
        with self._errors(key) as obstore:
            try:
                answer = obstore.get(self._object_store(), key)
            except FileNotFoundError as error:
                self._raise_if_no_bucket(error)
                return None
            # Compare the size before reading: the store decides how large its objects are.
            if answer.meta["size"] > limit:
                raise FormatError(f"{self.location}/{key}", f"{answer.meta['size']} bytes are over the limit of {limit}")
            return bytes(answer.bytes())

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, None without one."""
        with self._errors(key) as obstore:
            try:
                return int(obstore.head(self._object_store(), key)["size"])
            except FileNotFoundError:
                return None

    @contextmanager
    def stream(self, key: str, size: int, start: int, location: str) -> Iterator[Reader]:
        """Open an object of `size` bytes for reading from `start` on.

        If the server does not support ranges, the bytes before are discarded. A wrong range that the server does not report is
        detected when the digest is compared.

        Raises:
            TruncatedBodyError: The bytes end early.
            NotFoundError: There is no such object.
        """
        self._check_regular(key)
        with self._retryable_errors(location) as obstore:
            try:
                answer, answer_start = self._open_answer(obstore, key, start)
            except FileNotFoundError as error:
                self._raise_if_no_bucket(error)
                raise NotFoundError(location, "no such blob", "Ask its owner") from error
        if answer.meta["size"] != size:
            raise IntegrityError(location, f"the store has {answer.meta['size']} bytes of it, not {size}", "Ask its owner")
        reader = _ChunkReader(iter(answer.stream(1)), location, lambda: self._retryable_errors(location, 0))
        bytes_to_skip = start - answer_start
        while bytes_to_skip and (count := reader.readinto(memoryview(bytearray(min(bytes_to_skip, CHUNK))))):
            bytes_to_skip -= count
        yield reader

    def open_seekable(self, key: str) -> BinaryIO:
        """Open an object for reading in any order, in requests of 8 MiB; NotFoundError without it."""
        self._check_regular(key)
        with self._errors(key) as obstore:
            return _SeekableObject(
                obstore.open_reader(self._object_store(), key, buffer_size=_READ_AHEAD), lambda: self._errors(key, 0)
            )

    def objects(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Yield key, size and time of writing of all objects below a prefix, unordered, as a listing has them."""
        with self._errors(prefix) as obstore:
            for page in obstore.list(self._object_store(), prefix):
                yield from ((item["path"], item["size"], item["last_modified"].timestamp()) for item in page)

    def signed_url(self, key: str, seconds: int) -> str:
        """Return an address at which anybody can GET an object for some seconds; empty for a folder, which has none."""
        if self._scheme == "file":
            return ""
        with self._errors(key) as obstore:
            return str(obstore.sign(self._object_store(), "GET", key, timedelta(seconds=seconds)))

    def _check_regular(self, key: str) -> None:
        """Raise a RefusedError for a pipe or a device in a folder, since opening it may never end."""
        if self._scheme == "file":
            with suppress(OSError):
                open_regular(self._root / key).close()

    def _open_answer(self, obstore: Any, key: str, start: int) -> tuple[Any, int]:
        """Return the answer, and the position of its first byte."""
        store = self._stream_store()
        if start:
            try:
                answer = obstore.get(store, key, options={"range": {"offset": start}})
            except obstore.exceptions.BaseError as error:
                # Without a range, the answer starts at 0; the caller skips the bytes before `start`.
                if "NotPartial" not in str(error) and "range" not in str(error).partition("\n")[0]:
                    raise
            else:
                if answer.range == (start, answer.meta["size"]):
                    return answer, start
        return obstore.get(store, key), 0

    def numbers(self, prefix: str, limit: int) -> list[int]:
        """Return the numbers of the objects `prefix/<number>.json` in a listing, which may be out of date: only a hint.

        At most the first `limit` objects are listed, and no number above `limit` is returned.
        """
        with self._errors(prefix) as obstore:
            names = (item["path"].rpartition("/")[2] for page in obstore.list(self._object_store(), prefix) for item in page)
            stems = [*islice(names, limit)]
        return sorted(number for stem in stems if _ENTRY_NAME.fullmatch(stem) and (number := int(stem[:-5])) <= limit)

    # ---- writing

    def create_folder(self) -> None:
        """Create the folder; buckets are created by their owners."""
        if self._scheme == "file":
            with local_errors(self._root):
                self._root.mkdir(parents=True, exist_ok=True)

    def put_object(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Write an object in place of the old one, completely or not at all."""
        with self._errors(key) as obstore:
            obstore.put(self._object_store(), key, data, use_multipart=False)
        self._sync(key)

    def put_pieces(self, key: str, pieces: Iterator[bytearray], size: int) -> None:
        """Write an object from pieces of `size` bytes, the last one shorter; if they raise an exception, there is no object."""
        failures: list[AdapterhubError] = []

        def read_pieces() -> Iterator[bytearray]:
            try:
                yield from pieces
            except AdapterhubError as error:
                failures.append(error)
                raise

        try:
            with self._errors(key) as obstore:
                obstore.put(
                    self._object_store(),
                    key,
                    read_pieces(),
                    use_multipart=True,
                    chunk_size=size,
                    max_concurrency=_MAX_CONCURRENT_PARTS,
                )
        except AdapterhubError:
            # The pieces are the reason, even if the store then fails to abort the upload.
            if failures:
                raise failures[0] from None
            raise
        self._sync(key)

    def create_object(self, key: str, data: bytes) -> bool:
        """Create an object; return False if it exists and the store checks that. Many stores replace it instead."""
        with self._errors(key) as obstore:
            try:
                # With `If-None-Match: *`, or the store's own condition.
                obstore.put(self._object_store(), key, data, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
            except (obstore.exceptions.NotSupportedError, NotImplementedError) as error:
                raise ExclusiveCreateUnsupported from error
        self._sync(key)
        return True

    def remove(self, key: str) -> None:
        """Remove an object, if it exists."""
        with self._errors(key) as obstore:
            try:
                obstore.delete(self._object_store(), key)
            except FileNotFoundError:
                return

    def _sync(self, key: str) -> None:
        """Flush a file to disk; for a bucket, that is the server's responsibility."""
        if self._scheme != "file":
            return
        path = self._root / key
        with local_errors(path):
            sync_to_disk(path)
            for folder in path.parents:
                sync_to_disk(folder)
                if folder == self._root:
                    return

    # ---- obstore

    def _object_store(self) -> Any:
        if self._store is None:
            self._store = self._open(self._retries, _REQUEST_TIMEOUT)
        return self._store

    def _stream_store(self) -> Any:
        if self._streaming is None:
            # No timeout for the whole answer: `_ChunkReader` stops one that is too slow.
            self._streaming = self._open(0, "1day")
        return self._streaming

    @contextmanager
    def _errors(self, key: str, requests: int = 1) -> Iterator[Any]:
        """Provide obstore, with its exceptions turned into ours, and count requests."""
        import obstore

        self.counts.requests += requests
        try:
            yield obstore
        except FileNotFoundError as error:
            self._raise_if_no_bucket(error)
            raise NotFoundError(f"{self.location}/{key}", "no such object") from error
        except obstore.exceptions.BaseError as error:
            self.counts.failures += 1
            raise self._error_for(error) from error

    @contextmanager
    def _retryable_errors(self, location: str, requests: int = 1) -> Iterator[Any]:
        """Provide obstore as `_errors` does, with a TruncatedBodyError for a failure that another request may not meet."""
        try:
            with self._errors("", requests) as obstore:
                yield obstore
        except RemoteError as error:
            if isinstance(error, StoreDeniedError):
                raise
            raise TruncatedBodyError(location, error.what, error.hint) from error

    def _raise_if_no_bucket(self, error: Exception) -> None:
        if self._scheme in BUCKET_WORDS and _NO_BUCKET.search(str(error)):
            problem = f"no such {BUCKET_WORDS[self._scheme]}: {self._name}"
            raise NotFoundError(self.location, problem, _CREATE_HINTS[self._scheme].format(self._name)) from error

    def _error_for(self, error: Exception) -> AdapterhubError:
        """Return our error for an exception of obstore, without its text, which may quote the request."""
        self._raise_if_no_bucket(error)
        text, error_type = str(error), type(error).__name__
        if self._scheme == "file":
            match = _OS_ERROR.search(text)
            return LocalIOError(self.location, match[1].lower() if match else f"the folder cannot be used ({error_type})")
        # Without other credentials, obstore asks the metadata service of a cloud's machines at this address.
        if "169.254.169.254" in text:
            return missing_credentials(self.location, self._scheme)
        match = _DETAILS.search(text)
        words = " ".join(word for word in match.groups() if word) if match else ""
        if error_type in ("UnauthenticatedError", "PermissionDeniedError") or words.startswith(("401", "403")):
            return StoreDeniedError(self.location, f"the store refuses ({words or error_type})", LOGIN_HINTS[self._scheme])
        if words:
            return RemoteError(self.location, f"the store answers {words}", "Try again later" if words[0] == "5" else "")
        problem = f"cannot be used ({error_type})"
        if "response body error" in text:
            problem = "the answer was cut off"
        elif "builder error" in text:
            hint = f"Use https, or set {ENVIRONMENT_PREFIXES[self._scheme]}ALLOW_HTTP=true"
            return RemoteError(self.location, f"{self.endpoint} is plain HTTP, which is refused", hint)
        elif any(word in text for word in _NO_ANSWER):
            problem = f"{self.endpoint} does not answer"
        return RemoteError(self.location, problem, "Try again later")


class _SeekableObject(io.RawIOBase, BinaryIO):
    """An object as a seekable file."""

    def __init__(self, file: Any, errors: Callable[[], AbstractContextManager[Any]]) -> None:
        self._file, self._errors = file, errors

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        with self._errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = memoryview(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        with self._errors():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())


class _ChunkReader:
    """The chunks of an answer, as they arrive, as an unbuffered file."""

    def __init__(self, chunks: Iterator[Any], location: str, errors: Callable[[], Any]) -> None:
        self._chunks, self._label, self._errors = chunks, location, errors
        self._rest_of_chunk = memoryview(b"")
        self._progress = Progress(IDLE_TIMEOUT)

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes of a chunk; return 0 at the end."""
        while not self._rest_of_chunk:
            start_time = time.monotonic()
            with self._errors():
                chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest_of_chunk = memoryview(chunk)
            try:
                self._progress.add(time.monotonic() - start_time, len(self._rest_of_chunk))
            except SlowError as error:
                raise RemoteError(self._label, str(error), "Try again later") from error
        count = min(len(buffer), len(self._rest_of_chunk))
        buffer[:count] = self._rest_of_chunk[:count]
        self._rest_of_chunk = self._rest_of_chunk[count:]
        return count
