"""The names that git, and git-lfs, would give to files: clients compare them with what they have.

A small file's name is the sha1 of its blob object; a large one is in git as a pointer (git-lfs' `docs/spec.md`), and known by
the sha256 of its bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from adapterhub.digest import CHUNK, Digest
from adapterhub.store.store import Store
from adapterhub_converters.adapter_files import is_weights

REGULAR_LIMIT = 8 << 20
"""Bytes from which a file is uploaded on its own: within a commit, 100 MB take six times as long and ten times the memory."""
_MOST = 100_000  # names that are remembered


def is_lfs(path: str, size: int) -> bool:
    """Return True for a file that clients see as one of git-lfs: weights, and all that is large."""
    return is_weights(path) or size >= REGULAR_LIMIT


@dataclass(frozen=True, slots=True)
class GitFile:
    """A file of a commit, as git knows it.

    Attributes:
        oid: The sha1 of the blob object, of the pointer for a large file.
        lfs: The sha256 of a large file, 64 digits; empty for a small one.
        pointer: Bytes of the pointer of a large file.
    """

    path: str
    digest: Digest
    size: int
    oid: str
    lfs: str = ""
    pointer: int = 0

    @property
    def etag(self) -> str:
        """What clients keep it under."""
        return self.lfs or self.oid


class GitNames:
    """Names of the small files of a store; each is read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._oids: dict[Digest, str] = {}

    def file(self, path: str, digest: Digest, size: int) -> GitFile:
        """A file as git knows it; a small one is read unless that was done before."""
        if is_lfs(path, size):
            sha256 = digest.removeprefix("sha256:")
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
            return GitFile(path, digest, size, blob_oid(pointer), sha256, len(pointer))
        oid = self._oids.get(digest)
        if oid is None:
            if len(self._oids) >= _MOST:
                self._oids.clear()
            oid = self._oids[digest] = self._read(digest, size)
        return GitFile(path, digest, size, oid)

    def _read(self, digest: Digest, size: int) -> str:
        state = _start(size)
        with self._store.open_blob(digest) as file:
            while piece := file.read(CHUNK):
                state.update(piece)
        return state.hexdigest()


def blob_oid(data: bytes) -> str:
    """The name of a blob object with these bytes."""
    state = _start(len(data))
    state.update(data)
    return state.hexdigest()


def _start(size: int) -> hashlib._Hash:
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
