"""Downloads of blobs: hashed while they are received, resumed where they stopped, complete or not at all.

A blob is written to a `.part` file. A note next to it, renewed every few megabytes, records how long the file is and the digest
of that much. After a run that was killed, the next one resumes there if the file still has that digest.
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
from adapterhub.http.client import Body
from adapterhub.http.errors import CutError
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.store.store import local_errors
from adapterhub_converters import linear
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.inside import Inside
from adapterhub_converters.errors import ConflictError, FormatError, IntegrityError, RefusedError, RemoteError

from .protocol import Reader, Source, damaged

# Bytes that are received again at most after a kill. A note is written twice as often: some bytes are not on the disk yet.
NOTED = 8 << 20
PAUSES = (0.5, 1.0, 2.0)  # seconds
_NOTE = ".json"
_FIRST = linear.Pattern(r"bytes (\d{1,18})-")  # of a Content-Range
_AHEAD = 3  # chunks that may have been received and not hashed and written yet
# Bytes of one write. For large ones Linux takes large pages, which the host of a virtual machine has yet to allocate: 1 GiB
# took 2.6 s of processor time in writes of 1 MiB, and 1.0 s in these.
_WRITE = 1 << 15
_ENOUGH = 1 << 14  # bytes that a connection has to bring, or it counts as one that failed


class Steady:
    """The bytes of a blob from `start` on, requested again from where the connection broke, as long as enough arrive.

    Attributes:
        ranged: Whether a request began in the middle of the blob.
    """

    def __init__(self, source: Source, blob: Descriptor, start: int = 0, *, pauses: Sequence[float] = PAUSES) -> None:
        self._source, self._blob, self._at, self._pauses = source, blob, start, pauses
        self._stack = ExitStack()
        self._reader: Reader | None = None
        self._failed = self._brought = 0
        self.ranged = False

    def __enter__(self) -> Steady:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._stack.close()

    def readinto(self, buffer: memoryview, /) -> int:
        """Read up to `len(buffer)` bytes; 0 at the end."""
        while True:
            try:
                if self._reader is None:
                    self.ranged |= self._at > 0
                    self._reader = self._stack.enter_context(self._source.open_blob(self._blob, self._at))
                n = self._reader.readinto(buffer) or 0
            except CutError as error:
                self._stack.close()
                self._reader, self._brought = None, 0
                if self._failed == len(self._pauses):
                    tries = f" ({self._failed + 1} tries)" if self._failed else ""
                    raise CutError(error.where, error.what + tries, "Try again later") from error
                time.sleep(self._pauses[self._failed])
                self._failed += 1
                continue
            self._brought += n
            self._failed = 0 if self._brought >= _ENOUGH else self._failed
            self._at += n
            return n


@contextmanager
def received(
    source: Source, blob: Descriptor, files: Inside, part: Path, *, pauses: Sequence[float] = PAUSES
) -> Iterator[tuple[Path, BinaryIO]]:
    """Receive a blob into `part`, one of `files`; the caller may move the verified file away.

    Raises:
        IntegrityError: The source has other bytes; none of them stay.
        ConflictError: Another process is receiving it there, or others can write to the file.
    """
    with local_errors(part), _claimed(files, part) as file:
        state, done = _picked_up(files, file, part, blob)
        for first in (True, False):
            with (
                Steady(source, blob, done, pauses=pauses) as reader,
                _Sink(_Note(files, part), file, state, done, blob.size) as sink,
            ):
                done = _receive(reader, blob, sink)
            if (done, "sha256:" + state.hexdigest()) == (blob.size, blob.digest):
                break
            _remove(files, _note_path(part))
            file.truncate(0)
            if not first or not reader.ranged:
                forget(files, part)
                what = f"received {done} bytes of sha256:{state.hexdigest()} instead of {blob.size} of {blob.digest}"
                raise IntegrityError(f"{source.where}: {blob.path or blob.digest}", what, "They were discarded")
            file.seek(0)  # some servers send another range than requested: fetch all of it, once
            state, done = hashlib.sha256(), 0
        yield part, file
        if not files.exists(part):
            _remove(files, _note_path(part))


@contextmanager
def received_concurrently(source: Source, blob: Descriptor, files: Inside, part: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Like `received`; while another process receives the blob there, into a file of our own, removed in the end."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(received(source, blob, files, part))
        except ConflictError:
            own = part.with_name(f"{os.urandom(12).hex()}-{part.name}")
            stack.callback(forget, files, own)
            found = stack.enter_context(received(source, blob, files, own))
        yield found


def _receive(reader: Steady, blob: Descriptor, sink: _Sink) -> int:
    """Receive the missing bytes; return how many there are then."""
    at = sink.done
    while at < blob.size and (n := reader.readinto(sink.room()[: min(CHUNK, blob.size - at)])):
        sink.put(n)
        at += n
    return at


class _Sink:
    """Hashes and writes bytes while the next ones are received, and records the progress, at its end as well.

    One thread hashes and one writes, each in order. The writing thread writes the notes too, so that a note never counts a byte
    that is not written yet.
    """

    def __init__(self, note: _Note, file: BinaryIO, state: Any, done: int, size: int) -> None:
        self.done = self._noted = done
        self._note, self._file, self._state = note, file, state
        several = size - done > CHUNK
        self._pools = (ThreadPoolExecutor(1), ThreadPoolExecutor(1)) if several else None
        length = min(CHUNK, max(size - done, 1))
        self._free: list[tuple[memoryview, tuple[Future[Any], ...]]] = [
            (memoryview(bytearray(length)), _NO_JOBS) for _ in range(_AHEAD if several else 1)
        ]
        self._broken = False

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for _buffer, jobs in self._free:
                _wait(jobs)
            if self.done > self._noted:
                self._note.write(self.done, self._state.hexdigest())
        except BaseException:
            if kind is None:  # else the first error is the one to report
                raise
        finally:
            for pool in self._pools or ():
                pool.shutdown()

    def room(self) -> memoryview:
        """A buffer to fill for `put`."""
        buffer, jobs = self._free[0]
        _wait(jobs)
        self._free[0] = buffer, _NO_JOBS
        return buffer

    def put(self, count: int) -> None:
        """Hash and write the first `count` bytes of the buffer that `room` returned."""
        buffer, _ = self._free.pop(0)
        data = buffer[:count]
        self.done += count
        if self._pools:
            hashing, writing = self._pools
            jobs: tuple[Future[Any], ...] = hashing.submit(self._state.update, data), writing.submit(self._write, data)
            if self.done - self._noted >= NOTED // 2:
                self._noted = self.done
                digest = hashing.submit(self._state.hexdigest)
                jobs = (*jobs, writing.submit(self._noting, self.done, digest))
        else:
            self._state.update(data)
            self._write(data)
            jobs = _NO_JOBS
        self._free.append((buffer, jobs))

    def _write(self, data: memoryview) -> None:
        if self._broken:
            return
        try:
            while data:
                data = data[self._file.write(data[:_WRITE]) :]
        except BaseException:
            self._broken = True
            raise

    def _noting(self, done: int, digest: Future[str]) -> None:
        if not self._broken:
            self._note.write(done, digest.result())


_NO_JOBS: tuple[Future[Any], ...] = ()


def _wait(jobs: Iterable[Future[Any]]) -> None:
    for job in jobs:
        job.result()


def forget(files: Inside, part: Path) -> None:
    """Remove a `.part` file and its note."""
    _remove(files, part)
    _remove(files, _note_path(part))


def _remove(files: Inside, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        files.remove(path)


def _picked_up(files: Inside, file: BinaryIO, part: Path, blob: Descriptor) -> tuple[Any, int]:
    """The hash and the number of the bytes of an earlier run; the file is cut there."""
    state, size = hashlib.sha256(), 0
    with contextlib.suppress(OSError, FormatError, KeyError, RefusedError):
        note = json_file.parse_object(files.read(_note_path(part), 4096), str(part))
        wanted, digest = note["size"], note["digest"]
        if note["blob"] == blob.digest and type(wanted) is int and 0 < wanted <= blob.size:
            buffer = memoryview(bytearray(CHUNK))
            while size < wanted and (n := file.readinto(buffer[: min(CHUNK, wanted - size)])):  # type: ignore[attr-defined]
                state.update(buffer[:n])
                size += n
            if (size, state.hexdigest()) == (wanted, digest):
                file.truncate(size)
                return state, size
    file.seek(0)
    file.truncate(0)
    return hashlib.sha256(), 0


class _Note:
    """The note next to a `.part` file."""

    def __init__(self, files: Inside, part: Path) -> None:
        self._files, self._part = files, part

    def write(self, size: int, digest: str) -> None:
        """Record how long the file is, and the digest of that much."""
        text = json.dumps({"blob": f"sha256:{self._part.stem}", "size": size, "digest": digest})
        path = _note_path(self._part)
        new = path.with_name(f"{os.urandom(12).hex()}-{path.name}")
        with contextlib.suppress(OSError):  # without a note, more is received again
            with self._files.create(new) as file:
                file.write(text.encode())
            self._files.move(new, path)


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + _NOTE)


@contextmanager
def _claimed(files: Inside, part: Path) -> Iterator[BinaryIO]:
    """Open the file and lock it.

    Raises:
        ConflictError: Another process has the lock; or others can write to the file, and so change it after it was verified.
    """
    while True:
        with files.resume(part) as file:
            if not user_files.is_only_mine(os.fstat(file.fileno())):
                raise ConflictError(str(part), "others can write to it", "Remove it")
            if not _locked(file):
                raise ConflictError(str(part), "another process is receiving it", "Wait for that process", code="in-use")
            # Between the two, the last owner may have moved the file to its final name: what is locked is then a finished blob.
            if files.is_at(file, part):
                yield file
                return


def _locked(file: BinaryIO) -> bool:
    """Lock a file; False if another process has the lock, True on systems without locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def pass_over(reader: Reader, count: int) -> None:
    """Read and discard `count` bytes."""
    buffer = memoryview(bytearray(min(CHUNK, max(count, 1))))
    while count and (n := reader.readinto(buffer[: min(len(buffer), count)])):
        count -= n


def seek(body: Body, blob: Descriptor, start: int, where: str) -> None:
    """Check that a body has a blob from byte `start` on, which was requested; skip what comes before, if it has the whole blob.

    Raises:
        RemoteError: It has another range.
        IntegrityError: It has another length.
    """
    left = blob.size
    if body.status == 206:
        left -= start
        begins = _FIRST.match(body.headers.get("content-range", ""))
        if not start or not begins or int(begins[1]) != start:
            raise RemoteError(where, "the server sends another range than requested")
    elif start:
        pass_over(body, start)
    if body.length is not None and body.length != left:
        raise IntegrityError(where, f"the server has {body.length} bytes of it, not {left}", "Ask its owner")


def read_blob(source: Source, blob: Descriptor, pauses: Sequence[float] = PAUSES) -> bytes:
    """All bytes of a small blob, verified."""
    data, buffer = bytearray(), memoryview(bytearray(min(CHUNK, blob.size + 1)))
    with Steady(source, blob, pauses=pauses) as reader:
        while len(data) <= blob.size and (n := reader.readinto(buffer)):
            data += buffer[:n]
    whole = bytes(data)
    digest = sha256_bytes(whole)
    if (len(whole), digest) != (blob.size, blob.digest):
        raise damaged(f"{source.where}: {blob.path or blob.digest}", len(whole), digest, blob)
    return whole
