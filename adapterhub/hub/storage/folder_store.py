"""The store of a hub in one folder, in which a change that fails takes back the blobs that it has stored.

They are collected in the context of the change, whichever of its threads stores them, until a log names them. One that somebody
else relies on by then stays: whoever finds a blob stored lists it in a lease and renews its time, and looks again after that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from adapterhub.digest import Digest
from adapterhub.store.leases import FOLDER as LEASES
from adapterhub.store.ref_log import REFS, Entry, RefLog
from adapterhub.store.store import Store
from adapterhub.store.store_files import ASIDE, local_errors

FileState = tuple[int, int]
"""The inode of a file, and its time in nanoseconds."""
_COLLECTED: ContextVar[dict[Digest, FileState] | None] = ContextVar("_COLLECTED", default=None)
_HEAD_START = 10  # seconds between the time of a new blob and now: more than a clock of a file system may be coarse


@contextmanager
def collecting_new_blobs() -> Iterator[dict[Digest, FileState]]:
    """Collect the blobs that the block stores before a log names them, with the states of their files."""
    blobs: dict[Digest, FileState] = {}
    token = _COLLECTED.set(blobs)
    try:
        yield blobs
    finally:
        _COLLECTED.reset(token)


def collected_blobs() -> dict[Digest, FileState] | None:
    """Return those that this change has stored so far; None if they are not collected."""
    return _COLLECTED.get()


class _FolderLog(RefLog):
    """The logs; an entry names what was stored before it."""

    def append(self, entry: Entry, *, log: str = REFS) -> bool:
        """Commit an entry; return False if another writer took its number first."""
        try:
            return super().append(entry, log=log)
        finally:
            # Whatever went wrong: an entry that has its name may be read, although its folder could not be flushed.
            if (blobs := _COLLECTED.get()) and self._may_have(entry, log):
                blobs.clear()

    def _may_have(self, entry: Entry, log: str) -> bool:
        try:
            return self._files.exists(self.path(entry.name, entry.seq, log=log))
        except OSError:
            return True


class FolderStore(Store):
    """The store of a hub in one folder."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.log = _FolderLog(self.files)

    def commit_blob(self, path: Path, file: BinaryIO, digest: Digest) -> None:
        """Turn a complete file in tmp/ into a blob."""
        if (blobs := _COLLECTED.get()) is None:
            super().commit_blob(path, file, digest)
            return
        # Set and read before the blob has its name: whoever finds it sets a later time, however coarse the clock is.
        earlier = int(time.time()) - _HEAD_START
        os.utime(file.fileno() if os.utime in os.supports_fd else path, (earlier, earlier))
        state = state_of(os.fstat(file.fileno()))
        super().commit_blob(path, file, digest)
        blobs[digest] = state

    def retain_if_present(self, digest: Digest, size: int) -> bool:
        """Return whether the blob is stored, and protect it from a gc and from a change that fails."""
        # Looked for again: it may have been taken back before its time was renewed.
        return super().retain_if_present(digest, size) and self.has_blob(digest, size)

    def take_back(self, blobs: dict[Digest, FileState]) -> list[Digest]:
        """Remove the blobs that a failed change has stored and nobody else relies on; return them."""
        removed = []
        for digest, state in blobs.items():
            path = self.blob_path(digest)
            aside = self.root / "tmp" / f"{ASIDE}{path.name}"
            with local_errors(path), suppress(FileNotFoundError):
                if self._is_relied_on(path, digest, state):
                    continue
                # Aside first: whoever found it before has listed it or renewed its time, and whoever looks now stores it anew.
                self.files.move(path, aside)
                if self._is_relied_on(aside, digest, state):
                    self.files.move(aside, path)
                    continue
                self.files.remove(aside)
                removed.append(digest)
        return removed

    def _is_relied_on(self, path: Path, digest: Digest, state: FileState) -> bool:
        """Return whether somebody else has stored a blob too, has renewed the time of its file, or lists it in a lease."""
        if state_of(self.files.status(path)) != state:
            return True
        own, line = self.files.lease.id if self.files.lease else "", f"{digest}\n".encode()
        with local_errors(self.root / LEASES):
            for lease in self.files.list_folder(self.root / LEASES):
                with suppress(FileNotFoundError):
                    if lease.stem != own and line in self._content(lease):
                        return True
        return False

    def _content(self, path: Path) -> bytes:
        with self.files.open(path) as file:
            return file.read()


def state_of(status: os.stat_result) -> FileState:
    """Return the state of a file."""
    return status.st_ino, status.st_mtime_ns
