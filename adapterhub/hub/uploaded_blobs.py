"""Blobs that were uploaded for a repository, which may use them for a day before a manifest names them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.store.store import Store

from .hub_database import HubDatabase
from .quotas import Quotas
from .uploads import LEASE_SECONDS, USABLE_SECONDS
from .workers import Worker, Workers


class UploadedBlobs:
    """The blobs that were uploaded for repositories, each counted for its namespace until it is a file of it."""

    def __init__(self, database: HubDatabase, store: Store, workers: Workers, quotas: Quotas) -> None:
        self._database, self._store, self._workers, self._quotas = database, store, workers, quotas

    def record(self, name: str, digests: Iterable[Digest]) -> None:
        """Record stored blobs as uploaded for a repository.

        Raises:
            RefusedError: The namespace may not hold that much.
        """
        self.count(name, {digest: self._store.size(digest) or 0 for digest in digests})

    def count(
        self,
        name: str,
        sizes: Mapping[Digest, int],
        finished_uploads: Collection[str] = (),
        *,
        except_uploads: Collection[str] = (),
    ) -> None:
        """Count files as uploaded for a repository, before they become blobs: what is refused is not stored.

        Args:
            name: The repository.
            sizes: Their digests and bytes.
            finished_uploads: The uploads they came from, which no longer count on their own.
            except_uploads: Others that they replace.

        Raises:
            RefusedError: The namespace may not hold that much.
        """
        replaced = [*finished_uploads, *except_uploads]
        self._quotas.check(self._workers.worker(), name, sizes, count=True, except_uploads=replaced)
        # They count as files from here on, so their uploads must not count a second time.
        self._quotas.close(name, finished_uploads)
        # Note blobs that were already stored, too: perhaps nothing else keeps them from a gc.
        for digest, size in sizes.items():
            self._store.retain_if_present(digest, size)
        rows = [(name, digest, time.time()) for digest in sizes]
        sql = (
            "INSERT INTO uploaded (name, digest, time) VALUES (?, ?, ?)"
            " ON CONFLICT (name, digest) DO UPDATE SET time = excluded.time"
        )
        self._database.execute_many(sql, rows)

    def repositories(self, digest: Digest) -> list[str]:
        """Return the repositories a blob was uploaded for in the last day."""
        sql = "SELECT name FROM uploaded WHERE digest = ? AND time >= ?"
        return [name for (name,) in self._database.select(sql, digest, time.time() - USABLE_SECONDS)]

    def has(self, name: str, digest: Digest) -> bool:
        """Return whether a blob was uploaded for a repository in the last day."""
        sql = "SELECT 1 FROM uploaded WHERE name = ? AND digest = ? AND time >= ?"
        return bool(self._database.select(sql, name, digest, time.time() - USABLE_SECONDS))

    def forget(self, name: str, digests: Iterable[Digest]) -> None:
        """Forget uploads of a repository that are files of it now, so that they count no longer than those."""
        rows = [(name, digest) for digest in digests]
        self._database.execute_many("DELETE FROM uploaded WHERE name = ? AND digest = ?", rows)

    def forget_expired(self, worker: Worker) -> None:
        """Forget uploads that can be used no more, once they are gone or files of their namespace: until then, they count.

        After two days a gc has had its time: what is still there is kept for others.
        """
        sql, now = "SELECT name, digest, time FROM uploaded WHERE time < ?", time.time()
        for name, digest, uploaded_at in self._database.select(sql, now - USABLE_SECONDS):
            namespace = name.partition("/")[0]
            is_file = queries.versions(worker.registry.index, prefix=namespace, file=digest)
            if is_file or uploaded_at < now - 2 * LEASE_SECONDS or self._store.size(digest) is None:
                self._database.execute("DELETE FROM uploaded WHERE name = ? AND digest = ?", name, digest)
