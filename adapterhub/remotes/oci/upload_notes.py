"""Notes of unfinished uploads of blobs, so that a push that was killed can be resumed.

A note is a file with the URL that takes the rest, and how many bytes, with which digest, the registry has confirmed. The note
of a finished upload stays until a manifest names the blob: until then the registry has more than its tags show. Only the user
can read notes, because the URL of an upload may be enough to write to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.file_lock import try_lock
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

_DISCARDED_AFTER = 7 * 24 * 3600  # seconds after which registries discard uploads


@dataclass(frozen=True)
class UploadProgress:
    """The progress of an upload of `size` bytes.

    Its fields are the keys of a note's JSON.

    Attributes:
        url: Takes the rest of the bytes; empty once the upload is finished.
        size: Size of the blob in bytes.
        digest: The blob's digest; empty while it is not known.
        sent: Number of bytes that the registry has confirmed.
        of: The digest of these bytes.
    """

    url: str
    size: int
    digest: str = ""
    sent: int = 0
    of: str = ""

    def may_have_digest(self, digest: str) -> bool:
        """Return whether an upload without a known digest may be that of `digest`."""
        return not self.digest and bool(self.sent) and bool(digest)


class UploadNotes:
    """The notes of uploads to one repository; always empty without a folder for them."""

    def __init__(self, folder: Path | None, repository: str) -> None:
        self._folder = folder / hashlib.sha256(repository.encode()).hexdigest()[:32] if folder else None

    @property
    def can_store(self) -> bool:
        """Whether notes can be stored at all."""
        return self._folder is not None

    def has_notes(self) -> bool:
        """Return whether there are notes, including those of finished uploads."""
        return bool(self._note_files())

    def notes_for(self, size: int, digest: str) -> list[UploadNote]:
        """Return the notes that may be of a blob of this size and digest, the most advanced first."""
        candidates = [
            (note, progress) for note in map(UploadNote, self._note_files()) if (progress := note.read()) and progress.url
        ]
        candidates = [
            pair
            for pair in candidates
            if pair[1].size == size and (pair[1].digest == digest or pair[1].may_have_digest(digest))
        ]
        return [note for note, _ in sorted(candidates, key=lambda pair: -pair[1].sent)]

    def new_note(self) -> UploadNote:
        """Return a note for a new upload."""
        if self._folder is None:
            return UploadNote(None)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return UploadNote(self._folder / f"{os.urandom(12).hex()}.json")

    def remove_all(self) -> None:
        """Remove all notes, after a manifest names the blobs."""
        for path in self._note_files("*"):
            with UploadNote(path) as note:
                # Another process may be resuming this upload.
                if note.is_locked:
                    note.remove()
        if self._folder:
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _note_files(self, pattern: str = "*.json") -> list[Path]:
        if self._folder is None:
            return []
        self._remove_old(self._folder.parent)
        return sorted(self._folder.glob(pattern))

    def _remove_old(self, folder: Path) -> None:
        for old_folder in folder.glob("*/"):
            with contextlib.suppress(OSError):
                # Replacing a note, which happens with every piece, updates the time of its folder.
                if old_folder.stat().st_mtime < time.time() - _DISCARDED_AFTER:
                    shutil.rmtree(old_folder, ignore_errors=True)


class UploadNote:
    """The file of one upload, locked while it is in use."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._handle = path, -1
        self.is_locked = False

    def __enter__(self) -> UploadNote:
        if self._handle >= 0 or self._path is None:
            return self
        with contextlib.suppress(OSError):
            lock = self._path.with_suffix(".lock")
            self._handle = os.open(lock, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
            # The last owner may have removed the note between these two lines: then the lock is on a file without a name.
            self.is_locked = try_lock(self._handle) and os.path.samestat(os.fstat(self._handle), lock.lstat())
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self.is_locked = -1, False

    def read(self) -> UploadProgress | None:
        """Return the progress of the upload; None without a valid note."""
        if self._path is None:
            return None
        # A damaged note is worth no more than a missing one.
        with contextlib.suppress(OSError, FormatError, TypeError, ValueError, RefusedError):
            with open_regular(self._path, follow=False) as file:
                document = json_file.parse_object(file.read(1 << 16), str(self._path))
            progress = UploadProgress(**{key: document[key] for key in UploadProgress.__dataclass_fields__ if key in document})
            types = {key: type(value) for key, value in asdict(progress).items()}
            if (
                types == {"url": str, "size": int, "digest": str, "sent": int, "of": str}
                and 0 <= progress.sent <= progress.size
            ):
                return progress
        return None

    def write(self, progress: UploadProgress) -> None:
        """Record the progress; if that fails, more bytes are sent again."""
        if self._path is None or not self.is_locked:
            return
        with contextlib.suppress(OSError):
            new_path = self._path.with_suffix(".new")
            # Write aside and replace, so that a crash leaves the old note.
            new_path.unlink(missing_ok=True)
            with os.fdopen(os.open(new_path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
                json.dump(asdict(progress), file)
            os.replace(new_path, self._path)

    def remove(self) -> None:
        """Remove the note."""
        if self._path:
            for suffix in (".json", ".new", ".lock"):
                self._path.with_suffix(suffix).unlink(missing_ok=True)
