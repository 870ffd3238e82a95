"""Bytes that come in: hashed as they are received, gone on with where they stopped, whole or not at all.

A blob grows in a `.part` file. Beside it lies a note, renewed every few megabytes: how far the file has come, and the digest of
that much. A run that was killed is gone on with from there, if what lies there still has that digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub.digest import CHUNK
from adapterhub.manifest import Descriptor
from adapterhub.store import local_errors
from adapterhub_converters.errors import ConflictError, IntegrityError

from .remote import CutError, Reader, Source

NOTED = 8 << 20  # bytes; what a killed run sends again at most
PAUSES = (0.5, 1.0, 2.0)  # seconds
_NOTE = ".json"

More = Callable[[int], None]
"""Is told how many bytes more have come; fewer than none when it begins again."""


class Steady:
    """The bytes of a blob from `start` on, asked for again from where they were cut off, as long as some come.

    Attributes:
        ranged: Whether some were asked for by where they begin.
    """

    def __init__(self, source: Source, blob: Descriptor, start: int = 0, *, pauses: Sequence[float] = PAUSES) -> None:
        self._source, self._blob, self._at, self._pauses = source, blob, start, pauses
        self._stack = ExitStack()
        self._reader: Reader | None = None
        self._failed = 0
        self.ranged = False

    def __enter__(self) -> Steady:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill as much of `buffer` as comes; 0 at the end."""
        while True:
            try:
                if self._reader is None:
                    self.ranged |= self._at > 0
                    self._reader = self._stack.enter_context(self._source.open_blob(self._blob, self._at))
                n = self._reader.readinto(buffer) or 0
            except CutError as error:
                self._stack.close()
                self._reader = None
                if self._failed == len(self._pauses):
                    raise CutError(error.where, f"{error.what} ({self._failed + 1} tries)", "Try again later") from error
                time.sleep(self._pauses[self._failed])
                self._failed += 1
                continue
            self._failed = 0 if n else self._failed
            self._at += n
            return n


@contextmanager
def received(
    source: Source, blob: Descriptor, part: Path, more: More | None = None, *, pauses: Sequence[float] = PAUSES
) -> Iterator[tuple[Path, BinaryIO]]:
    """A file with the bytes of `blob`, all of them and right, at `part`; whoever gets it gives it another name, or leaves it.

    Raises:
        IntegrityError: The source has other bytes; nothing of them stays.
        ConflictError: Another process is receiving it there.
    """
    flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with local_errors(part), os.fdopen(os.open(part, flags, 0o644), "r+b", buffering=0) as file:
        if not _locked(file):
            raise ConflictError(str(part), "another process is receiving it", "Wait for that one")
        state, done = _picked_up(file, part, blob)
        if more:
            more(done)
        for first in (True, False):
            with Steady(source, blob, done, pauses=pauses) as reader, _Sink(part, file, state, done) as sink:
                done = _receive(reader, blob, sink, more)
            if (done, "sha256:" + state.hexdigest()) == (blob.size, blob.digest):
                break
            _note_path(part).unlink(missing_ok=True)
            file.truncate(0)
            if not first or not reader.ranged:
                forget(part)
                what = f"{done} bytes of sha256:{state.hexdigest()} came instead of {blob.size} of {blob.digest}"
                raise IntegrityError(f"{source.where}: {blob.path or blob.digest}", what, "Nothing of it was kept")
            if more:  # there are servers that give another range than they were asked for: all of it, once
                more(-done)
            file.seek(0)
            state, done = hashlib.sha256(), 0
        yield part, file
        if not part.exists():
            _note_path(part).unlink(missing_ok=True)


def _receive(reader: Steady, blob: Descriptor, sink: _Sink, more: More | None) -> int:
    """Receive what is missing; how many bytes there are then."""
    buffers = [memoryview(bytearray(min(CHUNK, max(blob.size, 1)))) for _ in range(2)]
    at = sink.done
    while at < blob.size and (n := reader.readinto(buffers[0][: min(CHUNK, blob.size - at)])):
        sink.put(buffers[0][:n])
        buffers.reverse()
        at += n
        if more:
            more(n)
    return at


class _Sink:
    """Takes bytes, which are hashed and written while the next ones are received; notes how far it is, at its end as well."""

    def __init__(self, part: Path, file: BinaryIO, state: Any, done: int) -> None:
        self.done = self._noted = done
        self._part, self._file, self._state = part, file, state
        self._pool: ThreadPoolExecutor | None = None
        self._pending: tuple[Future[Any], ...] = ()
        self._coming = 0

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
            if self.done > self._noted:
                _note(self._part, self.done, self._state)
        finally:
            if self._pool:
                self._pool.shutdown()

    def put(self, data: memoryview) -> None:
        """Begin with some more; what was put before is done when this returns, and its buffer free again."""
        self._settle()
        if self.done - self._noted >= NOTED:
            _note(self._part, self.done, self._state)
            self._noted = self.done
        if self._pool is None and len(data) == CHUNK:
            self._pool = ThreadPoolExecutor(2)
        if self._pool:
            self._pending = self._pool.submit(self._state.update, data), self._pool.submit(_write, self._file, data)
            self._coming = len(data)
        else:
            self._state.update(data)
            _write(self._file, data)
            self.done += len(data)

    def _settle(self) -> None:
        pending, self._pending = self._pending, ()
        coming, self._coming = self._coming, 0
        wait(pending)
        try:
            for job in pending:
                job.result()
        except BaseException:
            self._noted = 2**63  # the hash may be ahead of the file: the note that is there says what is right
            raise
        self.done += coming


def forget(part: Path) -> None:
    """Remove a part and its note."""
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)


def _picked_up(file: BinaryIO, part: Path, blob: Descriptor) -> tuple[Any, int]:
    """The state of the hash of what an earlier run left, and how many bytes that is; the file ends there."""
    state, size = hashlib.sha256(), 0
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        note = json.loads(_note_path(part).read_bytes()[:4096])
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


def _note(part: Path, size: int, state: Any) -> None:
    path = _note_path(part)
    text = json.dumps({"blob": f"sha256:{part.stem}", "size": size, "digest": state.hexdigest()})
    with contextlib.suppress(OSError):  # without it, more is sent again
        new = path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, path)


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + _NOTE)


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _locked(file: BinaryIO) -> bool:
    """Whether the file is ours; where there are no locks it is."""
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
    """Read `count` bytes that are not wanted."""
    buffer = memoryview(bytearray(min(CHUNK, max(count, 1))))
    while count and (n := reader.readinto(buffer[: min(len(buffer), count)])):
        count -= n
