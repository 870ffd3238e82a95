"""Objects in a bucket or a folder, through obstore: read, put, create, list, with every failure in one line.

obstore's own errors quote requests and answers, which may contain keys and signatures: only a status and a code are taken from
them. Its retries of a stream request a range, and trust it; so streams here are without its retries.
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
from urllib.parse import urlsplit

from adapterhub.digest import CHUNK
from adapterhub.http.boundary import is_loopback
from adapterhub.http.bounded import Progress, SlowError
from adapterhub.http.errors import CutError
from adapterhub.remotes.protocol import Reader
from adapterhub.store.store import local_errors
from adapterhub_converters import linear
from adapterhub_converters.containers.atomic import sync
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, LocalIOError, NotFoundError, RemoteError

from .address import BUCKETS, ObjectAddress

RETRIES = 5
_AT_ONCE = 2  # parts of one upload
_AHEAD = 8 << 20  # bytes of one request of a reader
_PATIENCE = 180  # seconds without a byte, and for a whole answer's head
_LONGEST = "10min"  # of a request for a small object, or of one part of a large one
_ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_NOT_ASKED = {"aws_bucket", "aws_bucket_name", "google_bucket", "google_bucket_name", "azure_container_name"}
_MAKE = {
    "s3": "Create it: `aws s3 mb s3://{}`",
    "gs": "Create it: `gcloud storage buckets create gs://{}`",
    "az": "Create it: `az storage container create -n {}`",
}
_LOGIN = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL unless it is Amazon's",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "file": "Ask its owner",
}
_ENTRY, _LOOPBACK = linear.Pattern(r"[0-9]{8,15}\.json"), linear.Pattern(r"127\.\d+\.\d+\.\d+")
_OS_ERROR = linear.Pattern(r": ([^:\n]{1,80}) \(os error \d+\)")
_NO_BUCKET = linear.Pattern(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>|specified bucket does not exist")
_DETAILS = linear.Pattern(
    r"status code: (\d{3})(?:[^<]{0,40}(?:<\?xml[^>]{0,80}>)?\s*<Error>\s*<Code>([A-Za-z0-9.]{1,60})</Code>)?"
)
_MISSING = (": Missing", ": Account must be specified")
_NO_ANSWER = ("error sending request", "Connect", "TimedOut", "operation timed out")


class Unsupported(Exception):  # noqa: N818 - not seen outside this package
    """The store reports that it cannot create exclusively."""


class Bucket:
    """The objects below one prefix or folder.

    Attributes:
        where: Its name in errors.
        endpoint: The server; empty for a folder.
    """

    def __init__(self, address: ObjectAddress, environ: Mapping[str, str], *, retries: int = RETRIES) -> None:
        self.where, self._scheme, self._name = address.store, address.scheme, address.bucket
        self.endpoint = "" if address.scheme == "file" else _endpoint(address, environ)
        self._root = Path(address.root)
        self._open: Callable[..., Any] = lambda tries, longest: _opened(address, environ, tries, longest)
        self._retries = retries
        self._store: Any = None
        self._streaming: Any = None

    def close(self) -> None:
        """Close its connections."""
        self._store = self._streaming = None

    # ---- reading

    def read(self, key: str, limit: int) -> bytes | None:
        """The bytes of an object, None without one; FormatError for more than `limit`."""
        self._check(key)
        with self._errors(key) as obstore:
            try:
                found = obstore.get(self._whole(), key)
            except FileNotFoundError as error:
                self._no_bucket(error)
                return None
            if found.meta["size"] > limit:
                raise FormatError(f"{self.where}/{key}", f"{found.meta['size']} bytes are over the limit of {limit}")
            return bytes(found.bytes())

    def size(self, key: str) -> int | None:
        """The size of an object in bytes, None without one."""
        with self._errors(key) as obstore:
            try:
                return int(obstore.head(self._whole(), key)["size"])
            except FileNotFoundError:
                return None

    @contextmanager
    def stream(self, key: str, size: int, start: int, where: str) -> Iterator[Reader]:
        """The bytes of an object of `size` from `start` on; CutError if they end early, NotFoundError without the object.

        If the server does not support ranges, the bytes before are discarded. A wrong range that the server does not report is
        detected when the digest is compared.
        """
        self._check(key)
        with self._cut(where) as obstore:
            try:
                found, at = self._get(obstore, key, start)
            except FileNotFoundError as error:
                self._no_bucket(error)
                raise NotFoundError(where, "no such blob", "Ask its owner") from error
        if found.meta["size"] != size:
            raise IntegrityError(where, f"the store has {found.meta['size']} bytes of it, not {size}", "Ask its owner")
        reader = _Stream(iter(found.stream(1)), where, lambda: self._cut(where))
        left = start - at
        while left and (n := reader.readinto(memoryview(bytearray(min(left, CHUNK))))):
            left -= n
        yield reader

    def reader(self, key: str) -> BinaryIO:
        """An object opened for reading in any order, in requests of 8 MiB; NotFoundError without it."""
        self._check(key)
        with self._errors(key) as obstore:
            return _Reader(obstore.open_reader(self._whole(), key, buffer_size=_AHEAD), lambda: self._errors(key))

    def objects(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """The keys and sizes of all objects below a prefix, and when they were written, in no order, as a listing has them."""
        with self._errors(prefix) as obstore:
            for page in obstore.list(self._whole(), prefix):
                yield from ((item["path"], item["size"], item["last_modified"].timestamp()) for item in page)

    def signed(self, key: str, seconds: int) -> str:
        """An address at which anybody can GET an object for some seconds; empty for a folder, which has none."""
        if self._scheme == "file":
            return ""
        with self._errors(key) as obstore:
            return str(obstore.sign(self._whole(), "GET", key, timedelta(seconds=seconds)))

    def _check(self, key: str) -> None:
        """RefusedError for a pipe or a device in a folder, whose opening may never end."""
        if self._scheme == "file":
            with suppress(OSError):
                open_regular(self._root / key).close()

    def _get(self, obstore: Any, key: str, start: int) -> tuple[Any, int]:
        """The answer, and the position of its first byte."""
        store = self._streamed()
        if start:
            try:
                found = obstore.get(store, key, options={"range": {"offset": start}})
            except obstore.exceptions.BaseError as error:
                if "NotPartial" not in str(error) and "range" not in str(error).partition("\n")[0]:
                    raise
            else:
                if found.range == (start, found.meta["size"]):
                    return found, start
        return obstore.get(store, key), 0

    def numbers(self, prefix: str, most: int) -> list[int]:
        """The numbers of the objects `prefix/<number>.json` in a listing, which may be out of date: a hint only.

        No more than the first `most` objects are listed, and none whose number is larger.
        """
        with self._errors(prefix) as obstore:
            listed = (item["path"].rpartition("/")[2] for page in obstore.list(self._whole(), prefix) for item in page)
            stems = [*islice(listed, most)]
        return sorted(number for stem in stems if _ENTRY.fullmatch(stem) and (number := int(stem[:-5])) <= most)

    # ---- writing

    def make(self) -> None:
        """Create the folder; buckets are created by their owners."""
        if self._scheme == "file":
            with local_errors(self._root):
                self._root.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Write an object, completely or not at all, in place of the old one."""
        with self._errors(key) as obstore:
            obstore.put(self._whole(), key, data, use_multipart=False)
        self._settle(key)

    def put_pieces(self, key: str, pieces: Iterator[bytearray], size: int) -> None:
        """Write an object from pieces of `size` bytes, the last one shorter. If they raise an exception, there is no object."""
        with self._errors(key) as obstore:
            obstore.put(self._whole(), key, pieces, use_multipart=True, chunk_size=size, max_concurrency=_AT_ONCE)
        self._settle(key)

    def create(self, key: str, data: bytes) -> bool:
        """Create an object; False if it exists and the store checks that. Many stores replace it instead."""
        with self._errors(key) as obstore:
            try:
                obstore.put(self._whole(), key, data, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
            except (obstore.exceptions.NotSupportedError, NotImplementedError) as error:
                raise Unsupported from error
        self._settle(key)
        return True

    def remove(self, key: str) -> None:
        """Remove an object, if it exists."""
        with self._errors(key) as obstore:
            try:
                obstore.delete(self._whole(), key)
            except FileNotFoundError:
                return

    def _settle(self, key: str) -> None:
        """Flush a file to disk; a bucket is the responsibility of the server."""
        if self._scheme != "file":
            return
        path = self._root / key
        with local_errors(path):
            sync(path)
            for folder in path.parents:
                sync(folder)
                if folder == self._root:
                    return

    # ---- obstore

    def _whole(self) -> Any:
        if self._store is None:
            self._store = self._open(self._retries, _LONGEST)
        return self._store

    def _streamed(self) -> Any:
        if self._streaming is None:
            self._streaming = self._open(0, "1day")  # `_Stream` looks after it
        return self._streaming

    @contextmanager
    def _errors(self, key: str) -> Iterator[Any]:
        """obstore, with its exceptions turned into ours."""
        import obstore

        try:
            yield obstore
        except FileNotFoundError as error:
            self._no_bucket(error)
            raise NotFoundError(f"{self.where}/{key}", "no such object") from error
        except obstore.exceptions.BaseError as error:
            raise self._told(error) from error

    @contextmanager
    def _cut(self, where: str) -> Iterator[Any]:
        """Like `_errors`, with a CutError for a failure that another request may not meet."""
        try:
            with self._errors("") as obstore:
                yield obstore
        except RemoteError as error:
            if isinstance(error, _DeniedError):
                raise
            raise CutError(where, error.what, error.hint) from error

    def _no_bucket(self, error: Exception) -> None:
        if self._scheme in BUCKETS and _NO_BUCKET.search(str(error)):
            what = f"no such {BUCKETS[self._scheme]}: {self._name}"
            raise NotFoundError(self.where, what, _MAKE[self._scheme].format(self._name)) from error

    def _told(self, error: Exception) -> AdapterhubError:
        """Our error for an exception of obstore, without its text, which may quote the request."""
        self._no_bucket(error)
        text, kind = str(error), type(error).__name__
        if self._scheme == "file":
            found = _OS_ERROR.search(text)
            return LocalIOError(self.where, found[1].lower() if found else f"the folder cannot be used ({kind})")
        if "169.254.169.254" in text:  # where machines of a cloud have theirs
            return _missing_credentials(self.where, self._scheme)
        found = _DETAILS.search(text)
        words = " ".join(word for word in found.groups() if word) if found else ""
        if kind in ("UnauthenticatedError", "PermissionDeniedError") or words.startswith(("401", "403")):
            return _DeniedError(self.where, f"the store refuses ({words or kind})", _LOGIN[self._scheme])
        if words:
            return RemoteError(self.where, f"the store answers {words}", "Try again later" if words[0] == "5" else "")
        what = f"cannot be used ({kind})"
        if "response body error" in text:
            what = "the answer was cut off"
        elif "builder error" in text:
            hint = f"Use https, or set {_ENVIRONMENT[self._scheme]}ALLOW_HTTP=true"
            return RemoteError(self.where, f"{self.endpoint} is plain HTTP, which is refused", hint)
        elif any(word in text for word in _NO_ANSWER):
            what = f"{self.endpoint} does not answer"
        return RemoteError(self.where, what, "Try again later")


class _DeniedError(RemoteError):
    """A refusal that another request would meet as well."""

    default_code = "access-denied"


class _Reader(io.RawIOBase, BinaryIO):
    """An object, as a file that can be read and sought."""

    def __init__(self, file: Any, errors: Callable[[], AbstractContextManager[Any]]) -> None:
        self._file, self._errors = file, errors

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        with self._errors():
            found = self._file.read(len(buffer))
        buffer[: len(found)] = memoryview(found)
        return len(found)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        with self._errors():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())


class _Stream:
    """The chunks of an answer, as they come, as an unbuffered file."""

    def __init__(self, chunks: Iterator[Any], where: str, errors: Callable[[], Any]) -> None:
        self._chunks, self._where, self._errors = chunks, where, errors
        self._left = memoryview(b"")
        self._progress = Progress(_PATIENCE)

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes of a chunk; 0 at the end."""
        while not self._left:
            began = time.monotonic()
            with self._errors():
                found = next(self._chunks, None)
            if found is None:
                return 0
            self._left = memoryview(found)
            try:
                self._progress.add(time.monotonic() - began, len(self._left))
            except SlowError as error:
                raise RemoteError(self._where, str(error), "Try again later") from error
        n = min(len(buffer), len(self._left))
        buffer[:n] = self._left[:n]
        self._left = self._left[n:]
        return n


def _opened(address: ObjectAddress, environ: Mapping[str, str], retries: int, longest: str) -> Any:
    from obstore import exceptions, store

    if address.scheme == "file":
        if not Path(address.root).is_dir():
            raise NotFoundError(address.store, "no such folder", "A push creates it", code="no-such-file")
        return store.LocalStore(address.root)
    prefix = _ENVIRONMENT[address.scheme]
    config = {key.lower(): value for key, value in environ.items() if key.startswith(prefix) and value}
    config = {key: value for key, value in config.items() if key not in _NOT_ASKED}
    client: dict[str, Any] = {"connect_timeout": "10s", "read_timeout": f"{_PATIENCE}s", "timeout": longest}
    if bundle := config.pop("aws_ca_bundle", ""):
        client["root_certificate"] = _certificates(bundle, "AWS_CA_BUNDLE")
    if is_loopback(urlsplit(_endpoint(address, environ)).hostname or ""):
        client["allow_http"] = True
    options = {
        "prefix": address.root or None,
        "client_options": client,
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(minutes=3)},
    }
    kind: Any = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[address.scheme]
    while True:
        try:
            return kind(address.bucket, config=config, **options)
        except exceptions.UnknownConfigurationKeyError as error:  # for other programs
            unknown = str(error).partition("key: '")[2].partition("'")[0]
            if config.pop(unknown, None) is None:
                raise RemoteError(address.store, "obstore does not know a setting of the environment", "Unset it") from error
        except exceptions.BaseError as error:
            if any(words in str(error).partition("\n")[0] for words in _MISSING):
                raise _missing_credentials(address.store, address.scheme) from error
            what = f"the settings in {prefix}… cannot be used"
            raise RemoteError(address.store, what, _LOGIN[address.scheme]) from error


def _missing_credentials(where: str, scheme: str) -> _DeniedError:
    return _DeniedError(where, "credentials are missing", _LOGIN[scheme])


def _endpoint(address: ObjectAddress, environ: Mapping[str, str]) -> str:
    names = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"), "gs": ("GOOGLE_BASE_URL",)}
    found = next((environ[name] for name in names.get(address.scheme, ("AZURE_ENDPOINT",)) if environ.get(name)), "")
    parts = urlsplit(found)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else f"the server of {address.scheme}://"


def _certificates(path: str, variable: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LocalIOError(path, error.strerror or str(error), f"{variable} names it") from error
