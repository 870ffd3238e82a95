"""The storage of a hub in one folder: registry.db, the store and hub.db. Several processes on one machine can serve it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from adapterhub.digest import Digest, is_hex
from adapterhub.hub.hub_database import FILE as TABLES
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.registry.registry import Registry
from adapterhub.store.leases import ABANDONED, Lease
from adapterhub.store.store import FOLDER, Store
from adapterhub.store.store_files import StoreFiles, local_errors

from .folder_store import FileState, FolderStore

if TYPE_CHECKING:
    from adapterhub.remotes.objects.bucket import Bucket


class Storage:
    """The storage of a hub.

    Attributes:
        root: The folder.
        database: The tables of the hub.
    """

    def __init__(self, root: Path, database: HubDatabase) -> None:
        self.root = root
        self.database = database

    @classmethod
    def open(cls, root: Path) -> Storage:
        """Open the hub in a folder; create its registry if missing."""
        Registry.init(root).close()
        return cls(root, HubDatabase(root))

    def store(self) -> Store:
        """Return the store, for one thread, or for several that only read and add blobs."""
        return FolderStore(self.root / FOLDER)

    def registry(self) -> Registry:
        """Return the registry, for one thread."""
        return Registry.open(self.root, self.store())

    def refresh(self, registry: Registry) -> None:
        """Bring a registry up to date with what others have done to it."""
        registry.refresh()

    def check(self) -> None:
        """Raise AdapterhubError or OSError unless the store can be written to, and this adapterhub can read the index."""
        self.registry().close()
        # Write for real: a disk may be full or mounted read-only.
        with self._files().temporary() as (_, file):
            file.write(b"x")

    @property
    def bucket(self) -> Bucket | None:
        """The bucket that the processes of a hub share; None without one."""
        return None

    def queue_lengths(self) -> dict[str, int]:
        """Return how much is still to be done, by the kind of work."""
        sql = "SELECT (SELECT COUNT(*) FROM deliveries WHERE state = 'waiting'), (SELECT COUNT(*) FROM moves)"
        ((deliveries, renames),) = self.database.select(sql)
        return {"webhook deliveries": deliveries, "renames": renames}

    def copy_tables(self, folder: Path) -> None:
        """Write the tables of the hub, as of one moment, to a hub.db in a folder."""
        self.database.copy(folder / TABLES)

    def digests(self) -> set[Digest]:
        """Return the digests of all blobs, needed or not."""
        store = self.store()
        return {*(f"sha256:{path.name}" for path in store.blobs() if is_hex(path.name)), *store.packs.digests()}

    def retain(self, lease: Lease, digest: Digest) -> None:
        """Protect a blob from a gc while it is read; `lease` is one of the store."""
        lease.note(digest)

    def open_blob(self, digest: Digest) -> BinaryIO:
        """Open a blob to be sent; the caller closes it."""
        return self.store().open_stream(digest)

    def address(self, digest: Digest, size: int) -> str:
        """Return an address where a client can get a blob without the hub, for some minutes; empty if it cannot."""
        return ""

    def keep_temporary(self, name: str, path: Path, file: BinaryIO) -> bool:
        """Keep a complete file of tmp/ for a day, under a unique name, for every process of the hub; False if it was there."""
        files = self._files()
        final = files.root / "tmp" / name
        with local_errors(final):
            if files.exists(final):
                files.touch(final)
                return False
            file.close()
            files.move(path, final)
        return True

    def remove_temporary(self, name: str) -> None:
        """Remove such a file, if it is there."""
        path = self._files().root / "tmp" / name
        with local_errors(path), suppress(FileNotFoundError):
            self._files().remove(path)

    def open_temporary(self, name: str) -> BinaryIO | None:
        """Open such a file, which the caller closes; None without it."""
        path = self._files().root / "tmp" / name
        with local_errors(path), suppress(FileNotFoundError):
            return self._files().open(path)
        return None

    def take_back(self, store: Store, blobs: dict[Digest, FileState]) -> list[Digest] | None:
        """Remove the blobs that a failed change has stored (`folder_store`); return them, None if only a gc removes any."""
        return store.take_back(blobs) if isinstance(store, FolderStore) else None

    def _files(self) -> StoreFiles:
        return self.store().files

    def remove_stale(self) -> None:
        """Restore or remove what killed processes left: blobs set aside, leases, and files not written to for a day."""
        store = self.store()
        files = store.files
        store.restore_set_aside()
        for path in store.leftovers(ABANDONED):
            # Another process may be faster; and a folder is not ours to remove.
            with local_errors(path), suppress(FileNotFoundError, IsADirectoryError):
                files.remove(path)

    def close(self) -> None:
        """Close everything but the registries of the threads."""
        self.database.close()
