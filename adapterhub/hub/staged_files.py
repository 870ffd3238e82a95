"""Small files of a commit: in tmp/, and counted, from their first byte; removed, with their count, unless they are accepted."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.store.store import Store
from adapterhub.store.store_files import local_errors, write_all

from .quotas import Quotas
from .uploaded_blobs import UploadedBlobs
from .workers import Workers

_ROOM_STEP = 8 << 20  # bytes by which they are counted in advance
_LIFETIME = 24 * 3600.0  # seconds for which they count, as the files of a killed process stay that long in tmp/


class StagedFiles:
    """The files that one request brings for a repository; `close` it in any case.

    Attributes:
        upload: The id under which they count while they are here.
        paths: Where they are, by digest.
    """

    def __init__(self, store: Store, workers: Workers, quotas: Quotas, uploaded: UploadedBlobs, name: str) -> None:
        self._store, self._workers, self._quotas, self._uploaded, self._name = store, workers, quotas, uploaded, name
        self._adopted: dict[Digest, int] = {}
        self._sizes: dict[Digest, int] = {}
        self._size = 0
        self._room: int | None = 0
        self.upload = secrets.token_hex(16)
        self.paths: dict[Digest, Path] = {}

    def add(self, data: bytes) -> tuple[Digest, int]:
        """Keep a file until it is accepted or refused; return its digest and size.

        Raises:
            RefusedError: The namespace may not hold that much.
        """
        digest, size = sha256_bytes(data), len(data)
        worker = self._workers.worker()
        is_here = self._quotas.has_counted(worker, self._name, digest, size) and self._store.retain_if_present(digest, size)
        if is_here or digest in self.paths:
            return digest, size
        self._size += size
        if self._room is not None and self._size > self._room:
            self._room = self._quotas.open(worker, self._name, self.upload, self._size, extra=_ROOM_STEP, lifetime=_LIFETIME)
        path = self._store.root / "tmp" / f"{self.upload}-{len(self.paths)}.staged"
        with local_errors(path), self._store.files.create(path) as file:
            self.paths[digest], self._sizes[digest] = path, size
            write_all(file, data)
        return digest, size

    def adopt(self, digests: Iterable[Digest]) -> None:
        """Turn the files with these digests, as far as they are here, into blobs, which count as uploaded until `accept`.

        A commit that is tried again finds them among the blobs.
        """
        arrived = {digest: self._sizes[digest] for digest in digests if digest in self.paths}
        self._uploaded.count(self._name, arrived, [self.upload])
        self._adopted |= arrived
        for digest, size in arrived.items():
            path = self.paths[digest]
            if not self._store.retain_if_present(digest, size):
                with local_errors(path), self._store.files.resume(path) as file:
                    self._store.adopt(path, file, digest)
                del self.paths[digest]
        self._store.sync_blobs()

    def accept(self) -> None:
        """Count the blobs no longer on their own: a commit has them."""
        self._uploaded.forget(self._name, self._adopted)
        self._adopted.clear()

    def close(self) -> None:
        """Remove what was not accepted, and stop counting it."""
        for path in self.paths.values():
            with local_errors(path), suppress(FileNotFoundError):
                self._store.files.remove(path)
        # Counted before they are blobs, which they have not become, or no longer are.
        self._uploaded.forget(self._name, [digest for digest in self._adopted if self._store.size(digest) is None])
        self._quotas.close(self._name, [self.upload])
