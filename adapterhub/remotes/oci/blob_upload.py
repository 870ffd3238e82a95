"""Uploads of blobs to an OCI registry in pieces, so that a broken connection costs one piece.

After a failure, the registry is asked how much it has. Bytes are hashed in another thread while they are sent. A registry
compares the digest only at the end, so nothing has to be read before it is sent.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode, urlsplit

from adapterhub.digest import CHUNK, Digest
from adapterhub.http.http_errors import DeniedError, RetriesExhaustedError, RetryableError
from adapterhub.http.responses import Response
from adapterhub.http.urls import resolve_link
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.download import PAUSES, ResumingReader
from adapterhub.remotes.parallel_transfer import unwrapped
from adapterhub.remotes.protocol import Source, damaged_error
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import IntegrityError, LocalIOError, NotFoundError, RemoteError

from .oci_address import OciAddress
from .registry_client import RegistryClient, check_digest
from .upload_notes import UploadNote, UploadNotes, UploadProgress

PIECE = 8 << 20  # bytes of one PATCH; some registries take none below 5 MiB
# Every piece costs a round trip, and docker-registry flushes its disk: pieces grow as long as one takes less than a second.
MAX_PIECE = 128 << 20
_SMALL = 4 << 20  # bytes; a smaller blob is sent in one PUT
_BYTES = {"Content-Type": "application/octet-stream"}
_RANGE = safe_regex.Pattern(r"(?:bytes=)?0-([0-9]{1,18})")


class Uploader:
    """Uploads of blobs to one repository.

    Attributes:
        piece, largest: Size in bytes of the first PATCH of a blob, and the maximum for any.
        notes: The progress of uploads, for the next run.
    """

    def __init__(
        self,
        client: RegistryClient,
        address: OciAddress,
        notes: UploadNotes,
        *,
        piece: int,
        largest: int,
        pauses: Sequence[float],
    ) -> None:
        self.piece, self.largest, self.notes = piece, max(largest, piece), notes
        self._client, self._address, self._pauses = client, address, pauses

    def has_blob(self, blob: Descriptor, location: str) -> bool:
        """Return whether the repository has a blob, by a HEAD."""
        url = self._address.blob_url(blob.digest)
        try:
            response = self._client.request("HEAD", url, location, good=(200,), scope=self._address.scope(write=True))
        except NotFoundError:
            return False
        size = response.number("content-length")
        return size is None or size == blob.size

    def put_blob(self, blob: Descriptor, source: Source, location: str, *, mount: OciAddress | None = None) -> int:
        """Send a blob, or let the registry mount it from its repository `mount`; return the number of bytes sent.

        An upload that an earlier run began is resumed if the registry still has it.
        """
        if self._in_pieces(blob.size):
            # Small blobs are sent in one request, which cannot be resumed.
            for note in self.notes.notes_for(blob.size, blob.digest):
                sent = self._resume(blob, source, note, location)
                if sent is not None:
                    return sent

        def upload_once() -> int:
            mounted, session = self._start_upload(location, blob, mount)
            if not mounted:
                with OutgoingBlob(source, blob, pauses=self._pauses) as sending, self._new_note(blob.size) as note:
                    self._send_blob(sending, session, note, location)
            return 0 if mounted else blob.size

        return int(self._client.with_retries(upload_once, location))

    def put_unnamed(self, size: int, path: str, source: Source, location: str) -> Digest:
        """Send a blob of `size` bytes, hashed while it is sent; return its digest."""

        def upload_once() -> Digest:
            session = self._start_upload(location)[1]
            with (
                OutgoingBlob(source, Descriptor("", "", size, path), pauses=self._pauses) as sending,
                self._new_note(size) as note,
            ):
                self._send_blob(sending, session, note, location)
                return sending.digest()

        return str(self._client.with_retries(upload_once, location))

    def _resume(self, blob: Descriptor, source: Source, note: UploadNote, location: str) -> int | None:
        """Resume an earlier upload; return how many bytes were sent, None if it cannot be resumed."""
        with note, OutgoingBlob(source, blob, pauses=self._pauses) as sending:
            progress = note.read() if note.is_locked else None
            if progress is None:
                return None
            sending.hash_up_to(progress.sent)
            # The note may be of another blob of the same size: go on only if the bytes sent so far are the same.
            if progress.sent and sending.digest() != progress.of:
                return None
            try:
                url, confirmed = self._upload_status(progress.url, location)
                if not progress.sent <= confirmed <= blob.size:  # the registry lost part of it
                    note.remove()
                    return None
                sending.hash_up_to(confirmed)
                url = self._send_pieces(sending, url, confirmed, note, location)
                self._finish_upload(blob, url, b"", location)
            except (RetriesExhaustedError, DeniedError):
                raise
            except (RetryableError, NotFoundError, RemoteError, IntegrityError):  # a new upload succeeds, or reports why not
                note.remove()
                return None
            note.write(replace(progress, url="", digest=blob.digest))
            return blob.size - confirmed

    def _start_upload(
        self, location: str, blob: Descriptor | None = None, mount: OciAddress | None = None
    ) -> tuple[bool, Response]:
        """Start an upload; return whether the blob was mounted instead, and the answer."""
        query, scope = "", self._address.scope(write=True)
        if blob and mount:
            query = "?" + urlencode({"mount": blob.digest, "from": mount.name})
            scope += f" {mount.scope()}"
        url = f"{self._address.repository_url}/blobs/uploads/{query}"
        response = self._client.request("POST", url, location, good=(201, 202), scope=scope)
        return response.status == 201 and bool(query), response

    def _send_blob(self, sending: OutgoingBlob, session: Response, note: UploadNote, location: str) -> None:
        """Send a complete blob; one without a digest gets that of its bytes."""
        blob = sending.blob
        url = resolve_link(session.url, session.headers.get("location"), location)
        min_piece = session.number("oci-chunk-min-length") or 0
        if not self._in_pieces(blob.size):
            data = read_whole(sending)
            # The last request names the digest: compare before it, so that wrong bytes are never finished.
            _check_sent(sending, location)
            self._finish_upload(blob, url, data, location)
            return
        url = self._send_pieces(sending, url, 0, note, location, min_piece=min(min_piece, self.largest))
        _check_sent(sending, location)
        blob = replace(blob, digest=sending.digest())
        self._finish_upload(blob, url, b"", location)
        note.write(UploadProgress("", blob.size, blob.digest))

    def _in_pieces(self, size: int) -> bool:
        return size > min(self.piece, _SMALL)

    def _new_note(self, size: int) -> UploadNote:
        """Return a note for a new upload; one that takes a single request needs none."""
        return self.notes.new_note() if self._in_pieces(size) else UploadNote(None)

    def _send_pieces(
        self, sending: OutgoingBlob, url: str, offset: int, note: UploadNote, location: str, *, min_piece: int = 0
    ) -> str:
        """Send a blob from `offset` on, recording the progress; return the URL to finish it at."""
        blob, size = sending.blob, max(self.piece, min_piece)
        note.write(UploadProgress(url, blob.size, blob.digest, offset, sending.digest()))
        while offset < blob.size:
            start_time, count = time.monotonic(), min(size, blob.size - offset)
            url = self._send_piece(sending, url, offset, count, location)
            offset += count
            note.write(UploadProgress(url, blob.size, blob.digest, offset, sending.digest()))
            # Pieces double while one takes less than a second, and halve when one takes more than four.
            seconds = time.monotonic() - start_time
            size = (
                min(2 * size, self.largest) if seconds < 1 else max(size // 2, self.piece, min_piece) if seconds > 4 else size
            )
        return url

    def _send_piece(self, sending: OutgoingBlob, url: str, start: int, size: int, location: str) -> str:
        """Send one piece, or the part of it that the registry lacks; return the URL to continue at."""
        sent, failures = 0, 0
        while True:
            headers = {**_BYTES, "Content-Range": f"{start + sent}-{start + size - 1}"}
            body = sending.piece(start + sent, size - sent)
            try:
                scope = self._address.scope(write=True)
                response = self._client.request(
                    "PATCH", url, location, good=(202, 416), scope=scope, headers=headers, body=body, retry=False
                )
                if response.status == 202:
                    return resolve_link(response.url, response.headers.get("location"), location)
                raise RetryableError("the registry refuses the next piece of the upload (HTTP 416)")
            except RetryableError as error:
                if failures == len(self._pauses):
                    raise self._client.final_error(error, location, failures + 1) from error
                self._client.pause(error, failures, location)
                failures += 1
            # Part of the piece may have arrived: ask before sending it again.
            url, confirmed = self._upload_status(url, location)
            if confirmed == start + size:
                return url
            if not start <= confirmed < start + size:
                raise RemoteError(location, "the registry lost part of this upload", "Try again")
            sent = confirmed - start

    def _upload_status(self, url: str, label: str) -> tuple[str, int]:
        """Return the URL to continue an upload at, and how many bytes the registry has."""
        try:
            response = self._client.request("GET", url, label, good=(204,), scope=self._address.scope(write=True))
        except NotFoundError as error:
            # docker-registry 2.8 keeps the offset in the address: after a lost answer, the upload can only start over.
            raise RetryableError("the registry has discarded this upload") from error
        reported = _RANGE.fullmatch(response.headers.get("range", "0-0"))
        if not reported:
            raise RemoteError(label, "the registry does not report how far an upload has come", "Try again")
        location = response.headers.get("location")
        # `0-0` means no bytes as well as one byte; pieces are larger than that.
        return resolve_link(response.url, location, label) if location else url, int(reported[1]) + 1 if int(reported[1]) else 0

    def _finish_upload(self, blob: Descriptor, url: str, data: bytes, location: str) -> None:
        """Finish an upload; if the answer gets lost, check whether the blob is stored.

        Raises:
            RetryableError: It is not stored.
        """
        final = url + ("&" if urlsplit(url).query else "?") + urlencode({"digest": blob.digest})
        scope = self._address.scope(write=True)
        for attempt in range(len(self._pauses) + 1):
            try:
                response = self._client.request(
                    "PUT", final, location, good=(201, 204), scope=scope, headers=_BYTES, body=data, retry=False
                )
            except (RetryableError, NotFoundError) as error:
                if self.has_blob(blob, location):
                    return
                retryable = error if isinstance(error, RetryableError) else RetryableError(error.what)
                if len(data) or attempt == len(self._pauses):
                    raise retryable from error
                self._client.pause(retryable, attempt, location)
            else:
                check_digest(response, blob.digest, location)
                return


def _check_sent(sending: OutgoingBlob, location: str) -> None:
    """Raise an IntegrityError unless the bytes sent have the blob's size and digest; called before an upload is finished."""
    blob, digest = sending.blob, sending.digest()
    if (sending.hashed, digest) != (blob.size, blob.digest or digest):
        raise damaged_error(location, sending.hashed, digest, blob)


# ---- the bytes


_CHUNKS_AHEAD = 3  # chunks that may have been read and not hashed yet


class OutgoingBlob:
    """A blob of a source while it is sent; a context manager.

    Attributes:
        hashed: The number of bytes, from the first on, that `digest` covers.
    """

    def __init__(self, source: Source, blob: Descriptor, *, pauses: Sequence[float] = PAUSES) -> None:
        self.blob, self.hashed = blob, 0
        self._source, self._pauses = source, pauses
        self._state = hashlib.sha256()
        self._stack = ExitStack()
        self._reader: ResumingReader | None = None
        self._position = 0
        self._hasher = ThreadPoolExecutor(1) if blob.size > CHUNK else None
        self._buffers = [
            memoryview(bytearray(min(CHUNK, max(blob.size, 1)))) for _ in range(_CHUNKS_AHEAD if blob.size > CHUNK else 1)
        ]
        self._pending: list[Future[None] | None] = [None] * len(self._buffers)

    def __enter__(self) -> OutgoingBlob:
        return self

    def __exit__(self, *_: object) -> None:
        if self._hasher:
            self._hasher.shutdown()
        self._stack.close()

    def piece(self, start: int, size: int) -> RequestBody:
        """Return the body of the next request: `size` bytes from `start` on, which is no further than has been read."""
        return RequestBody(self, start, size)

    def hash_up_to(self, start: int) -> None:
        """Hash the bytes before `start`, which need not be sent, without reporting progress."""
        watched, self._source = self._source, unwrapped(self._source)
        try:
            for _ in self.read(self.hashed, start - self.hashed):
                pass
        finally:
            self._source = watched
            self._close_reader()

    def digest(self) -> Digest:
        """Return the digest of the first `hashed` bytes."""
        for job in filter(None, self._pending):
            job.result()
        return f"sha256:{self._state.hexdigest()}"

    def read(self, start: int, size: int) -> Iterator[memoryview]:
        """Yield `size` bytes from `start` on; each chunk is valid until the next but one is requested."""
        if self._reader is None or self._position != start:
            self._close_reader()
            self._reader = self._stack.enter_context(ResumingReader(self._source, self.blob, start, pauses=self._pauses))
            self._position = start
        while size:
            buffer = self._next_buffer()
            try:
                count = self._reader.readinto(buffer[: min(CHUNK, size)])
            except OSError as error:
                raise LocalIOError(self._label, error.strerror or str(error)) from error
            if not count:
                problem = f"ended after {self._position} of {self.blob.size} bytes"
                raise IntegrityError(self._label, problem, "Nothing was stored", code="source-damaged")
            self._hash_new(buffer[:count])
            self._position += count
            size -= count
            yield buffer[:count]

    def _close_reader(self) -> None:
        self._stack.close()
        self._reader = None

    @property
    def _label(self) -> str:
        return f"{self._source.location}: {self.blob.path or self.blob.digest}"

    def _next_buffer(self) -> memoryview:
        """Return the buffer that was used longest ago, after it has been hashed."""
        # The hasher may still read the buffer.
        buffer, job = self._buffers.pop(0), self._pending.pop(0)
        if job:
            job.result()
        self._buffers.append(buffer)
        self._pending.append(None)
        return buffer

    def _hash_new(self, data: memoryview) -> None:
        """Hash the part of `data`, which was just read, that has not been hashed yet."""
        unhashed = data[max(self.hashed - self._position, 0) :]
        if not unhashed:
            return
        self.hashed += len(unhashed)
        if self._hasher:
            self._pending[-1] = self._hasher.submit(self._state.update, unhashed)
        else:
            self._state.update(unhashed)


class RequestBody:
    """The body of a request, read again from its start when it is sent again."""

    def __init__(self, sending: OutgoingBlob, start: int, size: int) -> None:
        self._sending, self._start, self._size = sending, start, size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        return self._sending.read(self._start, self._size)


def read_whole(sending: OutgoingBlob) -> Any:
    """Return a small blob as bytes."""
    return b"".join(bytes(part) for part in sending.read(0, sending.blob.size))  # copied: the buffer is reused
