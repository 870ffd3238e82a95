"""A hub of several processes on any machines: tables and log in PostgreSQL, blobs in a bucket.

    registry.db     the index, of this process and others on the same machine
    mirror/         a store of copies (`bucket_blobs`, `shared_log`); files `seen` and `database` tell of what

Each process has its own index, which replays the log, so that a search costs the database nothing. Before each request it asks
the database for new entries, so that a client finds every move it was told about. The folder holds only copies; without it,
everything is built again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO

from adapterhub.digest import Digest, is_hex
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.index.index_database import FILE
from adapterhub.maintenance.gc import GcResult, remove_conversions
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.keep_rule import GRACE_HOURS
from adapterhub.registry.registry import Registry
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub.remotes.objects.object_address import ObjectAddress
from adapterhub.store.leases import Lease
from adapterhub.store.store import FOLDER, HUB
from adapterhub.store.store_files import write_all
from adapterhub_converters.errors import FormatError, IntegrityError, RefusedError

from .bucket_blobs import BucketBlobs, CommandStore, SharedStore, blob_key
from .folder_storage import Storage
from .migration import copy_tables
from .postgres import LogRow, PostgresDatabase
from .shared_log import LogMirror, copy_entries

_MIRROR, _DATABASE = "mirror", "database"
_MIN_REDIRECT = 256 << 10  # blobs up to this size are sent by the hub: another request would take the client longer
TEMPORARY = "tmp"
"""The prefix of parts of uploads in the bucket."""
_MAX_TEMPORARY = 128 << 20  # bytes
_THREADS = 32  # documents fetched at a time
_LIFETIME = 600  # seconds for which a signed address is valid


class SharedRegistry(Registry):
    """The registry of a hub on several machines, opened for one command: closing it closes the storage too."""

    storage: SharedStorage

    def refresh(self) -> None:
        """Bring the index up to date with the log in the database."""
        self.storage.refresh(self)

    def close(self) -> None:
        """Close the index, and the connections to the database and the bucket."""
        super().close()
        self.storage.close()


class SharedStorage(Storage):
    """The storage of one process among several.

    Args:
        root: A folder for copies, which processes on one machine may share.
        database: The database; this storage closes it.
        bucket: The bucket with the blobs.
        cache: Limit in bytes of blobs copied here.
        proxy: Send all blobs through the hub.
    """

    database: PostgresDatabase

    def __init__(self, root: Path, database: PostgresDatabase, bucket: Bucket, *, cache: int, proxy: bool = False) -> None:
        super().__init__(root, database)
        self._proxy = proxy
        self._blobs = BucketBlobs(bucket, database, cache)
        self._log = LogMirror(root / _MIRROR, database, bucket)
        self._reading = self.store()
        self._trimmed = False
        self._open()

    def _open(self) -> None:
        if (self.root / FOLDER).exists():
            problem = "has a registry of its own, and a hub with a database keeps only copies in its folder"
            raise RefusedError(str(self.root), problem, "Name another folder; `hub migrate` takes adapters along")
        self._blobs.bucket.create_folder()
        self._reading.create()
        files, mark = self._reading.files, self._reading.root / _DATABASE
        # The mark ties the folder to one database: copies of another hub would be served as this one's.
        if not files.exists(mark):
            files.replace(mark, self.database.identity.encode())
        if files.read(mark, 100).decode() != self.database.identity:
            problem = f"has copies of another hub than that of {self.database.location}"
            raise RefusedError(str(self.root), problem, "Remove the folder, or name another one")
        self._log.open()
        is_new, names, repositories = not (self.root / FILE).exists(), set[str](), set[str]()
        # Mirror all logs before there is an index: building one from complete logs takes a tenth of the time.
        for rows in self._log.pages():
            names |= self._mirror_rows(rows)
            repositories |= _repositories(rows)
        with Registry.init(self.root, self.store()) as registry, registry.write_lock():
            registry.ledger.catch_up(*([], []) if is_new else (sorted(names), sorted(repositories)))
        self._log.save()
        while copy_entries(self.database, self._blobs.bucket):
            pass

    @property
    def bucket(self) -> Bucket:
        """The bucket with the blobs."""
        return self._blobs.bucket

    def store(self, *, of_command: bool = False) -> SharedStore:
        """Return the store, for one thread, or for several that only read and add blobs."""
        return (CommandStore if of_command else SharedStore)(self.root / _MIRROR, self._blobs, self._log)

    def registry(self) -> Registry:
        """Return the registry, for one thread."""
        return Registry.open(self.root, self.store())

    def check(self) -> None:
        """Raise AdapterhubError unless the bucket can be written to, and this adapterhub can read the index."""
        self.registry().close()
        self._blobs.bucket.put_object(f"{TEMPORARY}/check", b"x")  # one key, which gc removes two days after the last check

    def queue_lengths(self) -> dict[str, int]:
        """Return how much is still to be done, by the kind of work."""
        return {**super().queue_lengths(), "log entries without a copy": self.database.count_without_copy()}

    def copy_tables(self, folder: Path) -> None:
        """Write the tables of the hub, as of one moment, to a hub.db in a folder."""
        with self.database.snapshot(), closing(HubDatabase(folder)) as copy:
            copy_tables(self.database, copy)

    def digests(self) -> set[Digest]:
        """Return the digests of all blobs in the bucket, needed or not."""
        names = (key.rpartition("/")[2] for key, *_ in self._blobs.bucket.objects("blobs/sha256"))
        return {f"sha256:{name}" for name in names if is_hex(name)}

    def retain(self, lease: Lease, digest: Digest) -> None:
        """Protect a blob from a gc for the next hour."""
        self._blobs.rely(digest)

    def refresh(self, registry: Registry) -> None:
        """Bring the mirror and a registry up to date with the log."""
        if not self._log.has_news():
            return
        # One thread updates the mirror; the others find it up to date.
        with self._log.refresh_lock:
            for rows in self._log.pages():
                names = self._mirror_rows(rows)
                with registry.write_lock():
                    registry.ledger.catch_up(sorted(names), sorted(_repositories(rows)))
                self._log.save()

    def _mirror_rows(self, rows: list[LogRow]) -> set[str]:
        """Mirror entries and fetch the documents that the index reads, many at a time; return the names of adapters."""
        entries = self._log.mirror(rows)
        pushed = {entry.digest for entry in entries if entry.op == "push"}
        if pushed:
            with ThreadPoolExecutor(min(_THREADS, len(pushed))) as pool:
                list(pool.map(self._fetch_documents, pushed))
        return {entry.name for entry in entries}

    def _fetch_documents(self, digest: Digest) -> None:
        store = self._reading
        with suppress(FormatError, IntegrityError):  # the index will report what is wrong with the version
            manifest = oci_manifest.parse(store.read_document(digest), digest)
            for layer in filter(None, (manifest.adapter_json, manifest.card)):
                store.has_plain(layer.digest)

    def open_blob(self, digest: Digest) -> BinaryIO:
        """Open a blob to be sent: the local copy, or a stream from the bucket."""
        size = self._reading.size(digest)
        if size is None or size <= _MIN_REDIRECT or self._reading.is_here(digest):
            return self._reading.open_stream(digest)
        return self._blobs.bucket.open_seekable(blob_key(digest))

    def address(self, digest: Digest, size: int) -> str:
        """Return an address where a client can get a blob from the bucket, for ten minutes; empty for a small one."""
        return "" if self._proxy or size <= _MIN_REDIRECT else self._blobs.bucket.signed_url(blob_key(digest), _LIFETIME)

    def keep_temporary(self, name: str, path: Path, file: BinaryIO) -> bool:
        """Keep a file in the bucket, for `bucket_gc` to remove later, and a copy here; return False if that was here."""
        file.seek(0)
        self._blobs.bucket.put_object(f"{TEMPORARY}/{name}", file.read())
        return super().keep_temporary(name, path, file)

    def remove_temporary(self, name: str) -> None:
        """Remove such a file from the bucket, and its copy here."""
        self._blobs.bucket.remove(f"{TEMPORARY}/{name}")
        super().remove_temporary(name)

    def open_temporary(self, name: str) -> BinaryIO | None:
        """Open such a file of any process of the hub; None without it."""
        if (file := super().open_temporary(name)) is None and (
            data := self._blobs.bucket.read(f"{TEMPORARY}/{name}", _MAX_TEMPORARY)
        ):
            with self._files().temporary() as (path, copy):
                write_all(copy, data)
                super().keep_temporary(name, path, copy)
            file = super().open_temporary(name)
        return file

    def remove_stale(self) -> None:
        """Remove what killed processes left, conversions older than a day, and once, copies that exceed the cache.

        This process must do it: no gc looks at the folders of other machines.
        """
        super().remove_stale()
        remove_conversions(self._reading, GcResult(dry_run=False), GRACE_HOURS * 3600)
        if not self._trimmed:
            self._trimmed = True
            self._reading.trim()

    def close(self) -> None:
        """Close the connections."""
        super().close()
        self._blobs.bucket.close()


def open_shared(settings: HubSettings) -> SharedStorage:
    """Open the storage of a hub's settings; missing tables are created, but the bucket must exist."""
    bucket = open_bucket(settings.blobs, settings.environ)
    database = PostgresDatabase(settings.database)
    try:
        return SharedStorage(settings.registry, database, bucket, cache=settings.cache, proxy=settings.proxy_blobs)
    except BaseException:
        database.close()
        raise


def open_shared_registry(settings: HubSettings) -> SharedRegistry:
    """Open the registry of a hub's settings as of now; later moves of others are not in its index."""
    storage = open_shared(settings)
    try:
        registry = SharedRegistry.open(storage.root, storage.store(of_command=True))
    except BaseException:
        storage.close()
        raise
    registry.storage = storage
    return registry


def open_bucket(address: str, environ: Mapping[str, str]) -> Bucket:
    """Return the bucket at an address such as `s3://bucket/prefix`."""
    return Bucket(ObjectAddress.parse(f"{address.rstrip('/')}/any/name"), environ)


def _repositories(rows: Iterable[LogRow]) -> set[str]:
    """Return the names of the repositories whose records moved."""
    return {row.name for row in rows if row.log == HUB}
