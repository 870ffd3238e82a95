"""The object ids git and git-lfs would give to files; clients compare them with their local copies.

A small file is known by the sha1 of its blob object. A large one is stored in git as a pointer (`docs/spec.md` of git-lfs) and
known by the sha256 of its bytes.
"""

from __future__ import annotations

import hashlib

from adapterhub.digest import CHUNK, Digest
from adapterhub.store.store import Store
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.lazy_dataclass import dataclass

from .lru_cache import LRUCache

REGULAR_LIMIT = 8 << 20
"""Size in bytes from which a file is uploaded separately: inside a commit, 100 MB take 6 times as long and 10 times
the memory.
"""
_MAX_OIDS = 32 << 20  # bytes of object ids kept in memory


def is_lfs(path: str, size: int) -> bool:
    """Return whether clients see a file as one of git-lfs: weights, and anything large."""
    return is_weights(path) or size >= REGULAR_LIMIT


@dataclass(frozen=True, slots=True)
class GitFile:
    """A file of a commit, as git knows it.

    Attributes:
        oid: The sha1 of the blob object, which for a large file is the pointer.
        lfs: The sha256 of a large file, 64 digits; empty for a small one.
        pointer: Bytes of a large file's pointer.
    """

    path: str
    digest: Digest
    size: int
    oid: str
    lfs: str = ""
    pointer: int = 0

    @property
    def etag(self) -> str:
        """The id under which clients cache the file."""
        return self.lfs or self.oid


class GitObjectIds:
    """The object ids of a store's small files; each file is read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._oids: LRUCache[str] = LRUCache(_MAX_OIDS)

    def file(self, path: str, digest: Digest, size: int) -> GitFile:
        """Return a file as git knows it. A small one is read, unless its object id is known."""
        if is_lfs(path, size):
            sha256 = digest.removeprefix("sha256:")
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
            return GitFile(path, digest, size, blob_oid(pointer), sha256, len(pointer))
        return GitFile(path, digest, size, self._oids.get(digest, lambda: self._read(digest, size)))

    def _read(self, digest: Digest, size: int) -> str:
        state = new_object_hash(size)
        with self._store.open_blob(digest) as file:
            while piece := file.read(CHUNK):
                state.update(piece)
        return state.hexdigest()


def blob_oid(data: bytes) -> str:
    """Return the object id of a git blob with these bytes."""
    state = new_object_hash(len(data))
    state.update(data)
    return state.hexdigest()


def new_object_hash(size: int) -> hashlib._Hash:
    """Return the hash that a git blob of `size` bytes is known by, before its first byte."""
    # git's hash, not a security measure: FIPS builds of OpenSSL refuse sha1 otherwise.
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
