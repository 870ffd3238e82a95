"""A hub of several processes on any machines: tables and log in PostgreSQL, blobs in a bucket.

    registry.db     the index, by this process and those beside it
    mirror/         a store with copies (`blobs`, `log`); `seen` and `database` tell of what

Each process has an index of its own, which replays the log, so that a search costs the database nothing. Before each request it
asks the database for entries that it has not seen, so that a client finds each move that it was told of. The folder has
nothing of its own; without it, all of it is made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from adapterhub.digest import Digest
from adapterhub.hub.settings import HubSettings
from adapterhub.index.database import FILE
from adapterhub.maintenance.gc import GRACE, Swept, remove_conversions
from adapterhub.manifest import oci_manifest
from adapterhub.registry.registry import Registry
from adapterhub.remotes.objects.address import ObjectAddress
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub.store.store import FOLDER
from adapterhub_converters.errors import FormatError, IntegrityError, RefusedError

from .blobs import Blobs, SharedStore, blob_key
from .folder import Storage
from .log import Log, copy_entries
from .postgres import LogRow, PostgresDatabase

_MIRROR, _DATABASE = "mirror", "database"
_SMALL = 256 << 10  # bytes of a blob that is sent by the hub: another request would take its client longer
TEMPORARY = "tmp"
"""Below it are parts of uploads in the bucket."""
_MAX_KEPT = 128 << 20  # bytes
_AT_ONCE = 32  # documents that are fetched at a time
_LIFETIME = 600  # seconds that an address is good for


class SharedStorage(Storage):
    """The storage of one process among several.

    Args:
        root: A folder for copies, which it may share with other processes of the machine.
        database: Of this storage now, which closes it.
        bucket: Has the blobs.
        cache: Bytes of blobs to keep here.
        proxy: Send all blobs through the hub.
    """

    database: PostgresDatabase

    def __init__(self, root: Path, database: PostgresDatabase, bucket: Bucket, *, cache: int, proxy: bool = False) -> None:
        super().__init__(root, database)
        self._proxy = proxy
        self._blobs = Blobs(bucket, database, cache)
        self._log = Log(root / _MIRROR, database, bucket)
        self._reading = self.store()
        self._trimmed = False
        self._open()

    def _open(self) -> None:
        if (self.root / FOLDER).exists():
            what = "has a registry of its own, and a hub with a database keeps only copies in its folder"
            raise RefusedError(str(self.root), what, "Name another folder; `hub migrate` takes adapters along")
        self._blobs.bucket.make()
        self._reading.create()
        files, mark = self._reading.files, self._reading.root / _DATABASE
        if not files.exists(mark):
            files.replace(mark, self.database.identity.encode())
        if files.read(mark, 100).decode() != self.database.identity:
            what = f"has copies of another hub than that of {self.database.where}"
            raise RefusedError(str(self.root), what, "Remove the folder, or name another one")
        self._log.open()
        fresh, names = not (self.root / FILE).exists(), set()
        # Before there is an index: to make one of whole logs takes a tenth of the time.
        for rows in self._log.pages():
            names |= self._take(rows)
        with Registry.init(self.root, self.store()) as registry, registry.locked():
            registry.ledger.catch_up(() if fresh else sorted(names))
        self._log.save()
        while copy_entries(self.database, self._blobs.bucket):
            pass

    @property
    def bucket(self) -> Bucket:
        """The bucket, which has the blobs."""
        return self._blobs.bucket

    def store(self) -> SharedStore:
        """The store, for one thread, or for reading and adding of blobs in many."""
        return SharedStore(self.root / _MIRROR, self._blobs, self._log)

    def registry(self) -> Registry:
        """The registry, for one thread."""
        return Registry.open(self.root, self.store())

    def refresh(self, registry: Registry) -> None:
        """Bring the mirror and a registry up to the log."""
        if not self._log.has_news():
            return
        with self._log.turn:
            for rows in self._log.pages():
                names = self._take(rows)
                with registry.locked():
                    registry.ledger.catch_up(sorted(names))
                self._log.save()

    def _take(self, rows: list[LogRow]) -> set[str]:
        """Mirror entries and fetch what the index reads of their versions, many at a time; return the names of adapters."""
        entries = self._log.mirror(rows)
        pushed = {entry.digest for entry in entries if entry.op == "push"}
        if pushed:
            with ThreadPoolExecutor(min(_AT_ONCE, len(pushed))) as pool:
                list(pool.map(self._fetch_documents, pushed))
        return {entry.name for entry in entries}

    def _fetch_documents(self, digest: Digest) -> None:
        store = self._reading
        with suppress(FormatError, IntegrityError):  # the index says of a version what is wrong with it
            made = oci_manifest.parse(store.read_document(digest), digest)
            for layer in filter(None, (made.adapter_json, made.card)):
                store.has_plain(layer.digest)

    def opened(self, digest: Digest) -> BinaryIO:
        """A blob that is to be sent: the copy, or what the bucket has."""
        size = self._reading.size(digest)
        if size is None or size <= _SMALL or self._reading.is_here(digest):
            return self._reading.opened(digest)
        return self._blobs.bucket.reader(blob_key(digest))

    def address(self, digest: Digest, size: int) -> str:
        """Where a client can get a blob of the bucket for ten minutes; empty for a small one."""
        return "" if self._proxy or size <= _SMALL else self._blobs.bucket.signed(blob_key(digest), _LIFETIME)

    def keep(self, name: str, data: bytes) -> bool:
        """Keep a file in the bucket, which `collection` removes some day later, and a copy here; False if that was here."""
        self._blobs.bucket.put(f"{TEMPORARY}/{name}", data)
        return super().keep(name, data)

    def kept(self, name: str) -> BinaryIO | None:
        """Open a file that any process of the hub kept; None without it."""
        if (found := super().kept(name)) is None and (data := self._blobs.bucket.read(f"{TEMPORARY}/{name}", _MAX_KEPT)):
            super().keep(name, data)
            found = super().kept(name)
        return found

    def remove_stale(self) -> None:
        """Remove what killed processes left, conversions of over a day ago, and once, copies that do not fit the cache.

        Where each process has a folder of its own, no gc looks at it.
        """
        super().remove_stale()
        remove_conversions(self._reading, Swept(dry_run=False), GRACE * 3600)
        if not self._trimmed:
            self._trimmed = True
            self._reading.trim()

    def close(self) -> None:
        """Close the connections."""
        super().close()
        self._blobs.bucket.close()


def open_shared(settings: HubSettings) -> SharedStorage:
    """Open the storage of a hub's settings; the tables are made if they are missing, and the bucket must exist."""
    bucket = open_bucket(settings.blobs, settings.environ)
    database = PostgresDatabase(settings.database)
    try:
        return SharedStorage(settings.registry, database, bucket, cache=settings.cache, proxy=settings.proxy_blobs)
    except BaseException:
        database.close()
        raise


def open_bucket(address: str, environ: Mapping[str, str]) -> Bucket:
    """The bucket, or a part of it, at an address like `s3://bucket/prefix`."""
    return Bucket(ObjectAddress.parse(f"{address.rstrip('/')}/any/name"), environ)
