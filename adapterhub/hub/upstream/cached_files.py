"""The cached files and documents of the upstream's models, in a folder of their own, up to a limit in bytes.

    files/<key>        whole files, each verified before it gets this name
    parts/<key>        the first bytes of files that are being fetched, locked by the process that fetches
    documents/<hash>   documents of models, and the commits that branches were at

A key names the content and its size: `sha256-<hex>-<size>` for a file in git-lfs, `git-<sha1>-<size>` for any other, so that a
file of several models or revisions is kept once, and one that a model lists with a wrong size is not taken for it. The least
recently used file is removed first. Several processes may share the folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adapterhub.hub.git_objects import GitFile
from adapterhub.store.store_files import StoreFiles, local_errors
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.file_lock import try_lock
from adapterhub_converters.errors import ConflictError, FormatError, RefusedError

_FILES, _PARTS, _DOCUMENTS = "files", "parts", "documents"
MAX_DOCUMENT = 32 << 20  # bytes
_MAX_POINTER = 4096  # bytes of a document that tells the commit of a revision


def key_of(file: GitFile) -> str:
    """Return the name of a file's content.

    Raises:
        RefusedError: The upstream names no digest, so that its bytes could not be verified.
    """
    if file.lfs:
        return f"sha256-{file.lfs}-{file.size}"
    if file.oid:
        return f"git-{file.oid}-{file.size}"
    raise RefusedError(file.path, "the upstream names no digest of it, so it cannot be verified")


class CachedFiles:
    """The files that are kept.

    Args:
        root: Their folder, created if missing.
        max_bytes: Limit for everything in it.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        with local_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            self._files = StoreFiles(root)
            for folder in ("tmp", _FILES, _PARTS, _DOCUMENTS):
                self._files.make_dir(root / folder)
            self._files.sweep()
        self._root = root

    # ---- whole files

    def open_whole(self, key: str) -> BinaryIO | None:
        """Open a whole file, which the caller closes; None if it is not here."""
        path = self._root / _FILES / key
        with local_errors(path), suppress(FileNotFoundError):
            file = self._files.open(path)
            with suppress(OSError):
                self._files.touch(path)  # the time of last use, by which `make_room` chooses
            return file
        return None

    def has_whole(self, key: str) -> bool:
        """Return whether a whole file is here."""
        with local_errors(self._root):
            return self._files.is_file(self._root / _FILES / key)

    # ---- parts

    @contextmanager
    def part(self, key: str) -> Iterator[BinaryIO]:
        """Open the part of a file, new or as a killed process left it, locked and at its beginning; it stays if it is not kept.

        Raises:
            ConflictError: Another process is fetching the file.
        """
        path = self._root / _PARTS / key
        with local_errors(path):
            while True:
                with self._files.resume(path) as file:
                    if not try_lock(file.fileno()):
                        raise ConflictError(key, "another process of the hub is fetching it", code="in-use")
                    # Whoever held the lock may have made it a whole file, or removed it, before it was locked here.
                    if self._files.still_has_name(file, path):
                        yield file
                        return

    def open_part(self, key: str) -> BinaryIO | None:
        """Open a part, or the whole file that it has become, for reading; None if neither is here."""
        for folder in (_PARTS, _FILES):
            path = self._root / folder / key
            with local_errors(path), suppress(FileNotFoundError):
                return self._files.open(path)
        return None

    def keep(self, key: str, file: BinaryIO) -> None:
        """Make an open part, whose bytes have been verified, a whole file."""
        final = self._root / _FILES / key
        with local_errors(final):
            os.fsync(file.fileno())
            self._files.move(self._root / _PARTS / key, final)
            self._files.sync(final.parent)

    def discard(self, key: str) -> None:
        """Remove a part."""
        path = self._root / _PARTS / key
        with local_errors(path), suppress(FileNotFoundError):
            self._files.remove(path)

    # ---- documents

    def read_document(self, name: str) -> tuple[bytes, float] | None:
        """Return a document and the time at which it was written, in seconds since 1970; None if it is not here."""
        path = self._document(name)
        with local_errors(path), suppress(FileNotFoundError):
            written_at = self._files.status(path).st_mtime
            return self._files.read(path, MAX_DOCUMENT), written_at
        return None

    def write_document(self, name: str, data: bytes) -> None:
        """Write a document, at once or not at all."""
        with local_errors(self._document(name)):
            self._files.replace(self._document(name), data)

    def revisions(self, limit: int) -> list[tuple[str, str]]:
        """Return the models and revisions whose commits are kept, those renewed last first."""
        entries = [entry for entry in self._entries() if entry[2].parent.name == _DOCUMENTS and entry[1] <= _MAX_POINTER]
        revisions = []
        for _, _, path in sorted(entries, reverse=True)[:limit]:
            with local_errors(path), suppress(FileNotFoundError, FormatError):
                pointer = json_file.parse_object(self._files.read(path, _MAX_POINTER), path.name)
                if isinstance(pointer.get("name"), str) and isinstance(pointer.get("revision"), str):
                    revisions.append((pointer["name"], pointer["revision"]))
        return revisions

    def _document(self, name: str) -> Path:
        return self._root / _DOCUMENTS / hashlib.sha256(name.encode()).hexdigest()

    # ---- the limit

    def total(self) -> int:
        """Return the bytes of everything that is kept."""
        return sum(size for _, size, _ in self._entries())

    def make_room(self, size: int) -> bool:
        """Remove what was used least recently until `size` more bytes fit; return False if they cannot.

        Parts that a process is fetching stay.
        """
        entries = self._entries()
        total = sum(entry_size for _, entry_size, _ in entries)
        for _, entry_size, path in sorted(entries):
            if total + size <= self.max_bytes:
                break
            if self._remove_unused(path):
                total -= entry_size
        return total + size <= self.max_bytes

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Return the times of last use, sizes and paths of everything."""
        entries = []
        for folder in (_FILES, _PARTS, _DOCUMENTS):
            with local_errors(self._root):
                for path in self._files.list_folder(self._root / folder):
                    with suppress(FileNotFoundError):
                        status = self._files.status(path)
                        entries.append((status.st_mtime, status.st_size, path))
        return entries

    def _remove_unused(self, path: Path) -> bool:
        """Remove a file unless it is a part that somebody is fetching."""
        with local_errors(path), suppress(FileNotFoundError):
            if path.parent.name == _PARTS:
                with self._files.open(path) as file:
                    if not try_lock(file.fileno()):
                        return False
                    self._files.remove(path)
            else:
                self._files.remove(path)
        return True
