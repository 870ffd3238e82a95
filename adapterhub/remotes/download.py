"""Downloads of blobs: hashed while they are received, resumed where they stopped, complete or not at all.

A blob is written to a `.part` file. A note next to it, renewed every few megabytes, records how long the file is and the digest
of that much. If a run is killed, the next one resumes there if the file still has that digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub import user_files
from adapterhub.digest import CHUNK, sha256_bytes
from adapterhub.http.http_errors import TruncatedBodyError
from adapterhub.http.responses import Body
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.store.store import local_errors
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.containers.file_lock import try_lock
from adapterhub_converters.errors import ConflictError, FormatError, IntegrityError, RefusedError, RemoteError

from .protocol import Reader, Source, damaged_error

# Maximum number of bytes to receive again after a kill. A note is written twice as often, since some bytes are not on disk yet.
NOTE_INTERVAL = 8 << 20
PAUSES = (0.5, 1.0, 2.0)  # seconds
_NOTE_SUFFIX = ".json"
_RANGE_START = safe_regex.Pattern(r"bytes (\d{1,18})-")  # of a Content-Range
_CHUNKS_AHEAD = 3  # chunks that may have been received and not hashed and written yet
# Bytes of one write. For large ones Linux takes large pages, which the host of a virtual machine has yet to allocate: 1 GiB
# took 2.6 s of processor time in writes of 1 MiB, and 1.0 s in these.
_WRITE_SIZE = 1 << 15
_MIN_PROGRESS = 1 << 14  # bytes that a connection must deliver, or it counts as failed


class ResumingReader:
    """The bytes of a blob from `start` on, requested again from where the connection broke, as long as enough arrive.

    Attributes:
        used_range: Whether any request began in the middle of the blob.
    """

    def __init__(self, source: Source, blob: Descriptor, start: int = 0, *, pauses: Sequence[float] = PAUSES) -> None:
        self._source, self._blob, self._position, self._pauses = source, blob, start, pauses
        self._stack = ExitStack()
        self._reader: Reader | None = None
        self._failures = self._bytes_of_connection = 0
        self.used_range = False

    def __enter__(self) -> ResumingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._stack.close()

    def readinto(self, buffer: memoryview, /) -> int:
        """Read up to `len(buffer)` bytes; return 0 at the end."""
        while True:
            try:
                if self._reader is None:
                    self.used_range |= self._position > 0
                    self._reader = self._stack.enter_context(self._source.open_blob(self._blob, self._position))
                count = self._reader.readinto(buffer) or 0
            except TruncatedBodyError as error:
                self._stack.close()
                self._reader, self._bytes_of_connection = None, 0
                if self._failures == len(self._pauses):
                    tries = f" ({self._failures + 1} tries)" if self._failures else ""
                    raise TruncatedBodyError(error.where, error.what + tries, "Try again later") from error
                time.sleep(self._pauses[self._failures])
                self._failures += 1
                continue
            self._bytes_of_connection += count
            # A server that sends a few bytes per connection would otherwise be retried forever.
            self._failures = 0 if self._bytes_of_connection >= _MIN_PROGRESS else self._failures
            self._position += count
            return count


@contextmanager
def receive(
    source: Source, blob: Descriptor, files: ConfinedFiles, part: Path, *, pauses: Sequence[float] = PAUSES
) -> Iterator[tuple[Path, BinaryIO]]:
    """Receive a blob into `part`, one of `files`; the caller may move the verified file away.

    Raises:
        IntegrityError: The source has other bytes; none of them stay.
        ConflictError: Another process is receiving the blob there, or others can write to the file.
    """
    with local_errors(part), _open_locked(files, part) as file:
        state, size = _resume_state(files, file, part, blob)
        for is_first_try in (True, False):
            with (
                ResumingReader(source, blob, size, pauses=pauses) as reader,
                _PartWriter(_PartNote(files, part), file, state, size, blob.size) as sink,
            ):
                size = _receive(reader, blob, sink)
            if (size, "sha256:" + state.hexdigest()) == (blob.size, blob.digest):
                break
            _remove(files, _note_path(part))
            file.truncate(0)
            if not is_first_try or not reader.used_range:
                discard_part(files, part)
                problem = f"received {size} bytes of sha256:{state.hexdigest()} instead of {blob.size} of {blob.digest}"
                raise IntegrityError(f"{source.location}: {blob.path or blob.digest}", problem, "They were discarded")
            # Some servers send another range than requested: fetch the complete blob, once.
            file.seek(0)
            state, size = hashlib.sha256(), 0
        yield part, file
        # The caller has moved the file away: the note has served its purpose.
        if not files.exists(part):
            _remove(files, _note_path(part))


@contextmanager
def receive_concurrently(source: Source, blob: Descriptor, files: ConfinedFiles, part: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Do as `receive`, but if another process receives the blob there, use a file of our own, removed afterwards."""
    with ExitStack() as stack:
        try:
            received_file = stack.enter_context(receive(source, blob, files, part))
        except ConflictError:
            own_part = part.with_name(f"{os.urandom(12).hex()}-{part.name}")
            stack.callback(discard_part, files, own_part)
            received_file = stack.enter_context(receive(source, blob, files, own_part))
        yield received_file


def _receive(reader: ResumingReader, blob: Descriptor, sink: _PartWriter) -> int:
    """Receive the missing bytes; return how many there are then."""
    position = sink.size
    while position < blob.size and (count := reader.readinto(sink.next_buffer()[: min(CHUNK, blob.size - position)])):
        sink.consume(count)
        position += count
    return position


class _PartWriter:
    """A writer that hashes and writes bytes while the next ones are received, and records the progress.

    One thread hashes and one writes, each in order. The writing thread writes the notes too, so that a note never counts a byte
    that is not written yet.
    """

    def __init__(self, note: _PartNote, file: BinaryIO, state: Any, size_so_far: int, size: int) -> None:
        self.size = self._noted_size = size_so_far
        self._note, self._file, self._state = note, file, state
        in_threads = size - size_so_far > CHUNK
        self._pools = (ThreadPoolExecutor(1), ThreadPoolExecutor(1)) if in_threads else None
        length = min(CHUNK, max(size - size_so_far, 1))
        self._buffers: list[tuple[memoryview, tuple[Future[Any], ...]]] = [
            (memoryview(bytearray(length)), _NO_JOBS) for _ in range(_CHUNKS_AHEAD if in_threads else 1)
        ]
        self._broken = False

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            for _buffer, jobs in self._buffers:
                _wait(jobs)
            if self.size > self._noted_size:
                self._note.write(self.size, self._state.hexdigest())
        except BaseException:
            if error_type is None:  # otherwise, report the first error
                raise
        finally:
            for pool in self._pools or ():
                pool.shutdown()

    def next_buffer(self) -> memoryview:
        """Return a buffer to fill for `consume`."""
        buffer, jobs = self._buffers[0]
        _wait(jobs)
        self._buffers[0] = buffer, _NO_JOBS
        return buffer

    def consume(self, count: int) -> None:
        """Hash and write the first `count` bytes of the buffer that `next_buffer` returned."""
        buffer, _ = self._buffers.pop(0)
        data = buffer[:count]
        self.size += count
        if self._pools:
            hashing, writing = self._pools
            jobs: tuple[Future[Any], ...] = hashing.submit(self._state.update, data), writing.submit(self._write, data)
            if self.size - self._noted_size >= NOTE_INTERVAL // 2:
                self._noted_size = self.size
                digest = hashing.submit(self._state.hexdigest)
                jobs = (*jobs, writing.submit(self._write_note, self.size, digest))
        else:
            self._state.update(data)
            self._write(data)
            jobs = _NO_JOBS
        self._buffers.append((buffer, jobs))

    def _write(self, data: memoryview) -> None:
        # After a failed write, later chunks would leave a gap that the note does not know of.
        if self._broken:
            return
        try:
            while data:
                data = data[self._file.write(data[:_WRITE_SIZE]) :]
        except BaseException:
            self._broken = True
            raise

    def _write_note(self, size: int, digest: Future[str]) -> None:
        if not self._broken:
            self._note.write(size, digest.result())


_NO_JOBS: tuple[Future[Any], ...] = ()


def _wait(jobs: Iterable[Future[Any]]) -> None:
    for job in jobs:
        job.result()


def discard_part(files: ConfinedFiles, part: Path) -> None:
    """Remove a `.part` file and its note."""
    _remove(files, part)
    _remove(files, _note_path(part))


def _remove(files: ConfinedFiles, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        files.remove(path)


def _resume_state(files: ConfinedFiles, file: BinaryIO, part: Path, blob: Descriptor) -> tuple[Any, int]:
    """Return the hash and the number of the bytes that an earlier run received; the file is truncated to them."""
    state, size = hashlib.sha256(), 0
    with contextlib.suppress(OSError, FormatError, KeyError, RefusedError):
        note = json_file.parse_object(files.read(_note_path(part), 4096), str(part))
        noted_size, digest = note["size"], note["digest"]
        # The note is only a hint: the bytes are hashed again, and used only if they have the recorded digest.
        if note["blob"] == blob.digest and type(noted_size) is int and 0 < noted_size <= blob.size:
            buffer = memoryview(bytearray(CHUNK))
            while size < noted_size and (count := file.readinto(buffer[: min(CHUNK, noted_size - size)])):  # type: ignore[attr-defined]
                state.update(buffer[:count])
                size += count
            if (size, state.hexdigest()) == (noted_size, digest):
                file.truncate(size)
                return state, size
    file.seek(0)
    file.truncate(0)
    return hashlib.sha256(), 0


class _PartNote:
    """The note next to a `.part` file."""

    def __init__(self, files: ConfinedFiles, part: Path) -> None:
        self._files, self._part = files, part

    def write(self, size: int, digest: str) -> None:
        """Record the length of the file, and the digest of that much."""
        text = json.dumps({"blob": f"sha256:{self._part.stem}", "size": size, "digest": digest})
        path = _note_path(self._part)
        new_path = path.with_name(f"{os.urandom(12).hex()}-{path.name}")
        with contextlib.suppress(OSError):  # without a note, more bytes are received again
            with self._files.create(new_path) as file:
                file.write(text.encode())
            self._files.move(new_path, path)


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + _NOTE_SUFFIX)


@contextmanager
def _open_locked(files: ConfinedFiles, part: Path) -> Iterator[BinaryIO]:
    """Open the file and lock it.

    Raises:
        ConflictError: Another process has the lock; or others can write to the file, and so change it after it was verified.
    """
    while True:
        with files.resume(part) as file:
            if not user_files.is_only_mine(os.fstat(file.fileno())):
                raise ConflictError(str(part), "others can write to it", "Remove it")
            if not try_lock(file.fileno()):
                raise ConflictError(str(part), "another process is receiving it", "Wait for that process", code="in-use")
            # The last owner may have moved the file to its final name between opening and locking: then the lock is on a
            # finished blob.
            if files.still_has_name(file, part):
                yield file
                return


def skip_bytes(reader: Reader, count: int) -> None:
    """Read and discard `count` bytes."""
    buffer = memoryview(bytearray(min(CHUNK, max(count, 1))))
    while count and (read_count := reader.readinto(buffer[: min(len(buffer), count)])):
        count -= read_count


def check_range(body: Body, blob: Descriptor, start: int, location: str) -> None:
    """Check that a body has the requested range of a blob; if it has the complete blob, skip the bytes before `start`.

    Raises:
        RemoteError: The body has another range.
        IntegrityError: It has another length.
    """
    expected_length = blob.size
    if body.status == 206:
        expected_length -= start
        range_start = _RANGE_START.match(body.headers.get("content-range", ""))
        # Nobody asked for a range if `start` is 0, and another range would be written to the wrong place.
        if not start or not range_start or int(range_start[1]) != start:
            raise RemoteError(location, "the server sends another range than requested")
    elif start:
        skip_bytes(body, start)
    if body.length is not None and body.length != expected_length:
        raise IntegrityError(location, f"the server has {body.length} bytes of it, not {expected_length}", "Ask its owner")


def read_blob(source: Source, blob: Descriptor, location: str = "", *, pauses: Sequence[float] = PAUSES) -> bytes:
    """Return the verified bytes of a small blob, whose size the caller has limited; errors name `location`, or the source."""
    data, buffer = bytearray(), memoryview(bytearray(min(CHUNK, blob.size + 1)))
    with ResumingReader(source, blob, pauses=pauses) as reader:
        # At most one buffer beyond the expected size: a hostile source could go on forever.
        while len(data) <= blob.size and (count := reader.readinto(buffer)):
            data += buffer[:count]
    content = bytes(data)
    digest = sha256_bytes(content)
    if (len(content), digest) != (blob.size, blob.digest):
        raise damaged_error(f"{location or source.location}: {blob.path or blob.digest}", len(content), digest, blob)
    return content
