"""Uploads of blobs: notes of unfinished ones, so that a push that was killed can be resumed, and the bytes to send.

A note is a file with the URL that takes the rest, and how many bytes, of which digest, the registry has confirmed. The note of
a finished upload stays until a manifest names the blob: until then the registry has more than its tags show. Only the user can
read notes, because the URL of an upload may be enough to write to it.

Bytes are hashed in another thread while they are sent. A registry compares the digest only at the end, so nothing has to be
read before it is sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapterhub.digest import CHUNK, Digest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.download import PAUSES, Steady
from adapterhub.remotes.parallel import unwatched
from adapterhub.remotes.protocol import Source
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import FormatError, IntegrityError, LocalIOError, RefusedError

_FORGOTTEN = 7 * 24 * 3600  # seconds after which registries discard uploads


@dataclass(frozen=True)
class Begun:
    """An upload of a blob of `size` bytes, whose `digest` may not be known yet; the `sent` ones have the digest `of`."""

    url: str
    size: int
    digest: str = ""
    sent: int = 0
    of: str = ""

    def can_be(self, digest: str) -> bool:
        """Tell whether a blob without a known digest may be that of `digest`."""
        return not self.digest and bool(self.sent) and bool(digest)


class Uploads:
    """The notes of uploads to one repository; without a folder for them, there are none."""

    def __init__(self, folder: Path | None, repository: str) -> None:
        self._folder = folder / hashlib.sha256(repository.encode()).hexdigest()[:32] if folder else None

    @property
    def kept(self) -> bool:
        """Tell whether notes can be stored at all."""
        return self._folder is not None

    def any(self) -> bool:
        """Tell whether there are notes, also of finished uploads."""
        return bool(self._files())

    def of(self, size: int, digest: str) -> list[Note]:
        """The notes that may be of a blob of this size and digest, the most advanced first."""
        found = [(note, begun) for note in map(Note, self._files()) if (begun := note.read()) and begun.url]
        found = [pair for pair in found if pair[1].size == size and (pair[1].digest == digest or pair[1].can_be(digest))]
        return [note for note, _ in sorted(found, key=lambda pair: -pair[1].sent)]

    def new(self) -> Note:
        """A note for a new upload."""
        if self._folder is None:
            return Note(None)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Note(self._folder / f"{os.urandom(12).hex()}.json")

    def clear(self) -> None:
        """Remove all notes, after a manifest names the blobs."""
        for path in self._files("*"):
            with Note(path) as note:
                if note.ours:
                    note.drop()
        if self._folder:
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _files(self, kind: str = "*.json") -> list[Path]:
        if self._folder is None:
            return []
        self._sweep(self._folder.parent)
        return sorted(self._folder.glob(kind))

    def _sweep(self, folder: Path) -> None:
        for old in folder.glob("*/"):
            with contextlib.suppress(OSError):
                if old.stat().st_mtime < time.time() - _FORGOTTEN:  # a note is replaced often
                    shutil.rmtree(old, ignore_errors=True)


class Note:
    """The file of one upload, locked while it is in use."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._handle = path, -1
        self.ours = False

    def __enter__(self) -> Note:
        if self._handle >= 0 or self._path is None:
            return self
        with contextlib.suppress(OSError):
            lock = self._path.with_suffix(".lock")
            self._handle = os.open(lock, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
            # Between the two, the last owner may have dropped the note: what is locked is then a file without a name.
            self.ours = _locked(self._handle) and os.path.samestat(os.fstat(self._handle), lock.lstat())
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self.ours = -1, False

    def read(self) -> Begun | None:
        """The upload; None without a valid note."""
        if self._path is None:
            return None
        with contextlib.suppress(OSError, FormatError, TypeError, ValueError, RefusedError):
            with open_regular(self._path, follow=False) as file:
                document = json_file.parse_object(file.read(1 << 16), str(self._path))
            begun = Begun(**{key: document[key] for key in Begun.__dataclass_fields__ if key in document})
            kinds = {key: type(value) for key, value in asdict(begun).items()}
            if kinds == {"url": str, "size": int, "digest": str, "sent": int, "of": str} and 0 <= begun.sent <= begun.size:
                return begun
        return None

    def write(self, begun: Begun) -> None:
        """Record the progress; if that fails, more is sent again."""
        if self._path is None or not self.ours:
            return
        with contextlib.suppress(OSError):
            new = self._path.with_suffix(".new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
                json.dump(asdict(begun), file)
            os.replace(new, self._path)

    def drop(self) -> None:
        """Remove the note."""
        if self._path:
            for suffix in (".json", ".new", ".lock"):
                self._path.with_suffix(suffix).unlink(missing_ok=True)


def _locked(handle: int) -> bool:
    """Lock a file; False if another process has the lock, True on systems without locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


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
        self._beside = ThreadPoolExecutor(1) if blob.size > CHUNK else None
        self._buffers = [
            memoryview(bytearray(min(CHUNK, max(blob.size, 1)))) for _ in range(_AHEAD if blob.size > CHUNK else 1)
        ]
        self._pending: list[Future[None] | None] = [None] * len(self._buffers)

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *_: object) -> None:
        if self._beside:
            self._beside.shutdown()
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
        if self._beside:
            self._pending[-1] = self._beside.submit(self._state.update, new)
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
