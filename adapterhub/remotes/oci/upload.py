"""Uploads of blobs in pieces, so that a broken connection costs one piece: the registry is asked how much it has.

Bytes are hashed in another thread while they are sent. A registry compares the digest only at the end, so nothing has to be
read before it is sent.
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
from adapterhub.http.client import Answer
from adapterhub.http.errors import AgainError, DeniedError, GivenUpError
from adapterhub.http.urls import resolved
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.download import PAUSES, Steady
from adapterhub.remotes.parallel import unwatched
from adapterhub.remotes.protocol import Source, damaged
from adapterhub_converters import linear
from adapterhub_converters.errors import IntegrityError, LocalIOError, NotFoundError, RemoteError

from .address import Address
from .client import RegistryClient, check_digest
from .upload_notes import Begun, Note, Uploads

PIECE = 8 << 20  # bytes of one PATCH; some registries take none below 5 MiB
# Every piece costs an answer, and docker-registry flushes its disk: pieces grow as long as one takes less than a second.
LARGEST = 128 << 20
_SMALL = 4 << 20  # bytes; a smaller blob is sent in one PUT
_BYTES = {"Content-Type": "application/octet-stream"}
_RANGE = linear.Pattern(r"(?:bytes=)?0-([0-9]{1,18})")


class Uploader:
    """Uploads of blobs to one repository.

    Attributes:
        piece, largest: Bytes of the first PATCH of a blob, and of any.
        notes: How far uploads have come, for the next run.
    """

    def __init__(
        self, client: RegistryClient, address: Address, notes: Uploads, *, piece: int, largest: int, pauses: Sequence[float]
    ) -> None:
        self.piece, self.largest, self.notes = piece, max(largest, piece), notes
        self._client, self._address, self._pauses = client, address, pauses

    def has(self, blob: Descriptor, where: str) -> bool:
        """Tell whether the repository has a blob, by a HEAD."""
        url = self._address.blob_url(blob.digest)
        try:
            answer = self._client.ask("HEAD", url, where, good=(200,), scope=self._address.scope(write=True))
        except NotFoundError:
            return False
        size = answer.number("content-length")
        return size is None or size == blob.size

    def put(self, blob: Descriptor, source: Source, where: str, *, mount: Address | None = None) -> int:
        """Send a blob, or have the registry mount it from its repository `mount`; return the number of bytes sent.

        An upload that an earlier run began is resumed if the registry still has it.
        """
        if self._in_pieces(blob.size):
            for note in self.notes.of(blob.size, blob.digest):
                sent = self._go_on(blob, source, note, where)
                if sent is not None:
                    return sent

        def once() -> int:
            mounted, session = self._begin(where, blob, mount)
            if not mounted:
                with Sending(source, blob, pauses=self._pauses) as sending, self._note(blob.size) as note:
                    self._send(sending, session, note, where)
            return 0 if mounted else blob.size

        return int(self._client.tried(once, where))

    def put_unnamed(self, size: int, path: str, source: Source, where: str) -> Digest:
        """Send a blob of `size` bytes, hashed while it is sent; return its digest."""

        def once() -> Digest:
            session = self._begin(where)[1]
            with Sending(source, Descriptor("", "", size, path), pauses=self._pauses) as sending, self._note(size) as note:
                self._send(sending, session, note, where)
                return sending.digest()

        return str(self._client.tried(once, where))

    def _go_on(self, blob: Descriptor, source: Source, note: Note, where: str) -> int | None:
        """Resume an earlier upload; return how many bytes were sent, None if it cannot be resumed."""
        with note, Sending(source, blob, pauses=self._pauses) as sending:
            begun = note.read() if note.ours else None
            if begun is None:
                return None
            sending.pass_to(begun.sent)
            if begun.sent and sending.digest() != begun.of:
                return None
            try:
                url, there = self._status(begun.url, where)
                if not begun.sent <= there <= blob.size:  # the registry lost part of it
                    note.drop()
                    return None
                sending.pass_to(there)
                url = self._pieces(sending, url, there, note, where)
                self._finish(blob, url, b"", where)
            except (GivenUpError, DeniedError):
                raise
            except (AgainError, NotFoundError, RemoteError, IntegrityError):  # a new upload succeeds, or reports why not
                note.drop()
                return None
            note.write(replace(begun, url="", digest=blob.digest))
            return blob.size - there

    def _begin(self, where: str, blob: Descriptor | None = None, mount: Address | None = None) -> tuple[bool, Answer]:
        """Begin an upload; return whether the blob was mounted instead, and the answer."""
        query, scope = "", self._address.scope(write=True)
        if blob and mount:
            query = "?" + urlencode({"mount": blob.digest, "from": mount.name})
            scope += f" {mount.scope()}"
        url = f"{self._address.root}/blobs/uploads/{query}"
        answer = self._client.ask("POST", url, where, good=(201, 202), scope=scope)
        return answer.status == 201 and bool(query), answer

    def _send(self, sending: Sending, session: Answer, note: Note, where: str) -> None:
        """Send a whole blob; one without a digest gets that of its bytes."""
        blob = sending.blob
        url = resolved(session.url, session.headers.get("location"), where)
        least = session.number("oci-chunk-min-length") or 0
        if not self._in_pieces(blob.size):
            data = whole(sending)
            _check(sending, where)
            self._finish(blob, url, data, where)
            return
        url = self._pieces(sending, url, 0, note, where, least=min(least, self.largest))
        _check(sending, where)
        blob = replace(blob, digest=sending.digest())
        self._finish(blob, url, b"", where)
        note.write(Begun("", blob.size, blob.digest))

    def _in_pieces(self, size: int) -> bool:
        return size > min(self.piece, _SMALL)

    def _note(self, size: int) -> Note:
        """A note for a new upload; one that takes one request needs none."""
        return self.notes.new() if self._in_pieces(size) else Note(None)

    def _pieces(self, sending: Sending, url: str, at: int, note: Note, where: str, *, least: int = 0) -> str:
        """Send a blob from `at` on, and record the progress; return the URL to finish it at."""
        blob, size = sending.blob, max(self.piece, least)
        note.write(Begun(url, blob.size, blob.digest, at, sending.digest()))
        while at < blob.size:
            began, n = time.monotonic(), min(size, blob.size - at)
            url = self._patch(sending, url, at, n, where)
            at += n
            note.write(Begun(url, blob.size, blob.digest, at, sending.digest()))
            seconds = time.monotonic() - began
            size = min(2 * size, self.largest) if seconds < 1 else max(size // 2, self.piece, least) if seconds > 4 else size
        return url

    def _patch(self, sending: Sending, url: str, start: int, size: int, where: str) -> str:
        """Send one piece, or the part of it that the registry lacks; return the URL to continue at."""
        done, failed = 0, 0
        while True:
            headers = {**_BYTES, "Content-Range": f"{start + done}-{start + size - 1}"}
            body = sending.piece(start + done, size - done)
            try:
                scope = self._address.scope(write=True)
                answer = self._client.ask(
                    "PATCH", url, where, good=(202, 416), scope=scope, headers=headers, body=body, retry=False
                )
                if answer.status == 202:
                    return resolved(answer.url, answer.headers.get("location"), where)
                raise AgainError("the registry refuses the next piece of the upload (HTTP 416)")
            except AgainError as error:
                if failed == len(self._pauses):
                    raise self._client.given_up(error, where, failed + 1) from error
                self._client.pause(error, failed, where)
                failed += 1
            url, there = self._status(url, where)
            if there == start + size:
                return url
            if not start <= there < start + size:
                raise RemoteError(where, "the registry lost part of this upload", "Try again")
            done = there - start

    def _status(self, url: str, where: str) -> tuple[str, int]:
        """The URL to continue an upload at, and how many bytes the registry has."""
        try:
            answer = self._client.ask("GET", url, where, good=(204,), scope=self._address.scope(write=True))
        except NotFoundError as error:
            # docker-registry 2.8 keeps the offset in the address: of an answer that got lost it can only begin again.
            raise AgainError("the registry has discarded this upload") from error
        reported = _RANGE.fullmatch(answer.headers.get("range", "0-0"))
        if not reported:
            raise RemoteError(where, "the registry does not report how far an upload has come", "Try again")
        location = answer.headers.get("location")
        # `0-0` stands for no bytes as well as for one; pieces are larger than that.
        return resolved(answer.url, location, where) if location else url, int(reported[1]) + 1 if int(reported[1]) else 0

    def _finish(self, blob: Descriptor, url: str, data: bytes, where: str) -> None:
        """Finish an upload. If the answer gets lost, check whether the blob is stored; AgainError if it is not."""
        final = url + ("&" if urlsplit(url).query else "?") + urlencode({"digest": blob.digest})
        scope = self._address.scope(write=True)
        for number in range(len(self._pauses) + 1):
            try:
                answer = self._client.ask(
                    "PUT", final, where, good=(201, 204), scope=scope, headers=_BYTES, body=data, retry=False
                )
            except (AgainError, NotFoundError) as error:
                if self.has(blob, where):
                    return
                again = error if isinstance(error, AgainError) else AgainError(error.what)
                if len(data) or number == len(self._pauses):
                    raise again from error
                self._client.pause(again, number, where)
            else:
                check_digest(answer, blob.digest, where)
                return


def _check(sending: Sending, where: str) -> None:
    """Check the bytes that were sent, before an upload is finished."""
    blob, digest = sending.blob, sending.digest()
    if (sending.hashed, digest) != (blob.size, blob.digest or digest):
        raise damaged(where, sending.hashed, digest, blob)


# ---- the bytes


_AHEAD = 3  # chunks that may have been read and not hashed yet


class Sending:
    """One blob of a source that is being sent; a context manager.

    Attributes:
        hashed: The number of bytes, from the first on, that `digest` covers.
    """

    def __init__(self, source: Source, blob: Descriptor, *, pauses: Sequence[float] = PAUSES) -> None:
        self.blob, self.hashed = blob, 0
        self._source, self._pauses = source, pauses
        self._state = hashlib.sha256()
        self._stack = ExitStack()
        self._reader: Steady | None = None
        self._at = 0
        self._hasher = ThreadPoolExecutor(1) if blob.size > CHUNK else None
        self._buffers = [
            memoryview(bytearray(min(CHUNK, max(blob.size, 1)))) for _ in range(_AHEAD if blob.size > CHUNK else 1)
        ]
        self._pending: list[Future[None] | None] = [None] * len(self._buffers)

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *_: object) -> None:
        if self._hasher:
            self._hasher.shutdown()
        self._stack.close()

    def piece(self, start: int, size: int) -> Piece:
        """The body of the next request: `size` bytes from `start` on, which is at most where reading has come to."""
        return Piece(self, start, size)

    def pass_to(self, start: int) -> None:
        """Hash the bytes before `start`, which need not be sent, without reporting progress."""
        watched, self._source = self._source, unwatched(self._source)
        try:
            for _ in self.read(self.hashed, start - self.hashed):
                pass
        finally:
            self._source = watched
            self._let_go()

    def digest(self) -> Digest:
        """The digest of the first `hashed` bytes."""
        for job in filter(None, self._pending):
            job.result()
        return f"sha256:{self._state.hexdigest()}"

    def read(self, start: int, size: int) -> Iterator[memoryview]:
        """`size` bytes from `start` on; each piece is valid until the next but one is requested."""
        if self._reader is None or self._at != start:
            self._let_go()
            self._reader = self._stack.enter_context(Steady(self._source, self.blob, start, pauses=self._pauses))
            self._at = start
        while size:
            buffer = self._next()
            try:
                n = self._reader.readinto(buffer[: min(CHUNK, size)])
            except OSError as error:
                raise LocalIOError(self._where, error.strerror or str(error)) from error
            if not n:
                what = f"ended after {self._at} of {self.blob.size} bytes"
                raise IntegrityError(self._where, what, "Nothing was stored", code="source-damaged")
            self._hash(buffer[:n])
            self._at += n
            size -= n
            yield buffer[:n]

    def _let_go(self) -> None:
        self._stack.close()
        self._reader = None

    @property
    def _where(self) -> str:
        return f"{self._source.where}: {self.blob.path or self.blob.digest}"

    def _next(self) -> memoryview:
        """The buffer that was used longest ago, after it has been hashed."""
        buffer, job = self._buffers.pop(0), self._pending.pop(0)
        if job:
            job.result()
        self._buffers.append(buffer)
        self._pending.append(None)
        return buffer

    def _hash(self, data: memoryview) -> None:
        """Hash the part of `data`, which was just read, that has not been hashed yet."""
        new = data[max(self.hashed - self._at, 0) :]
        if not new:
            return
        self.hashed += len(new)
        if self._hasher:
            self._pending[-1] = self._hasher.submit(self._state.update, new)
        else:
            self._state.update(new)


class Piece:
    """The body of a request, read again from its start when it is sent again."""

    def __init__(self, of: Sending, start: int, size: int) -> None:
        self._of, self._start, self._size = of, start, size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        return self._of.read(self._start, self._size)


def whole(sending: Sending) -> Any:
    """A whole small blob in memory."""
    return b"".join(bytes(part) for part in sending.read(0, sending.blob.size))  # each is in the same memory
