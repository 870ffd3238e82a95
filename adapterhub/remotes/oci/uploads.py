"""Uploads that were begun and not finished, on this disk, so that a push that was killed can be gone on with.

A file for each: where the registry takes the rest, and how many bytes of which digest it has said it has. A file of one that
was finished stays until a manifest names the blob: then the registry is known to have more than its tags say. Only this user
can read them: the address of an upload may be enough to write to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FORGOTTEN = 7 * 24 * 3600  # seconds after which registries themselves throw uploads away


@dataclass(frozen=True)
class Begun:
    """An upload of a blob of `size` bytes, whose `digest` may not be known yet; there are `sent` of them, of digest `of`."""

    url: str
    size: int
    digest: str = ""
    sent: int = 0
    of: str = ""

    def can_be(self, digest: str) -> bool:
        """Whether its bytes, of which only the first are known, may turn out to be those of `digest`."""
        return not self.digest and bool(self.sent) and bool(digest)


class Uploads:
    """Those to one repository; with no folder to keep them in, none are known."""

    def __init__(self, folder: Path | None, repository: str) -> None:
        self._folder = folder / hashlib.sha256(repository.encode()).hexdigest()[:32] if folder else None

    @property
    def kept(self) -> bool:
        """Whether they can be kept at all."""
        return self._folder is not None

    def any(self) -> bool:
        """Whether there are some, finished ones too."""
        return bool(self._files())

    def of(self, size: int, digest: str) -> list[Note]:
        """Those that may be of a blob of this size and digest, the one that has come furthest first."""
        found = [(note, begun) for note in map(Note, self._files()) if (begun := note.read()) and begun.url]
        found = [pair for pair in found if pair[1].size == size and (pair[1].digest == digest or pair[1].can_be(digest))]
        return [note for note, _ in sorted(found, key=lambda pair: -pair[1].sent)]

    def new(self) -> Note:
        """A note of an upload that begins."""
        if self._folder is None:
            return Note(None)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Note(self._folder / f"{os.urandom(12).hex()}.json")

    def clear(self) -> None:
        """Forget them all: a manifest names what there is."""
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
                if old.stat().st_mtime < time.time() - _FORGOTTEN:  # a note is replaced all the time
                    shutil.rmtree(old, ignore_errors=True)


class Note:
    """One upload's file, locked while somebody is at work on it."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._handle = path, -1
        self.ours = False

    def __enter__(self) -> Note:
        if self._handle >= 0 or self._path is None:
            return self
        with contextlib.suppress(OSError):
            lock = self._path.with_suffix(".lock")
            self._handle = os.open(lock, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
            self.ours = _locked(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self.ours = -1, False

    def read(self) -> Begun | None:
        """What it says; None for nothing that makes sense."""
        if self._path is None:
            return None
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            document: dict[str, Any] = json.loads(self._path.read_bytes()[: 1 << 16])
            begun = Begun(**{key: document[key] for key in Begun.__dataclass_fields__ if key in document})
            kinds = {key: type(value) for key, value in asdict(begun).items()}
            if kinds == {"url": str, "size": int, "digest": str, "sent": int, "of": str} and 0 <= begun.sent <= begun.size:
                return begun
        return None

    def write(self, begun: Begun) -> None:
        """Say how far it is. Where that cannot be written, more is sent again."""
        if self._path is None or not self.ours:
            return
        with contextlib.suppress(OSError):
            new = self._path.with_suffix(".new")
            with os.fdopen(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
                json.dump(asdict(begun), file)
            os.replace(new, self._path)

    def drop(self) -> None:
        """Forget it."""
        if self._path:
            for suffix in (".json", ".new", ".lock"):
                self._path.with_suffix(suffix).unlink(missing_ok=True)


def _locked(handle: int) -> bool:
    """Whether it is ours; where there are no locks it is."""
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
