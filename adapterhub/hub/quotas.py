"""Quotas of a namespace: bytes of its distinct files, and their number.

What counts: the files of its versions, what its repositories keep besides, such as earlier commits, and recent uploads. A
namespace without limits costs nothing. The count is refreshed every few seconds; in between, what this process takes in is
added to it, so that simultaneous uploads cannot slip past each other.

Whatever arrives is a row of hub.db that all processes count, from its first byte: by its size if known, else by what has come.
A client that starts over after a lost connection announces what it has already sent, so the open uploads of a repository are
not counted when files are announced for it. A xorb that became a file is spent: it counts no more, but the spent ones of a
namespace are no larger together than what it may hold.

Documents and logs of repositories are bytes, too, beyond the first MiB of a namespace, and so is what the index has of each
version. Each change writes a document anew, and those before it count as long as a gc may leave them. A second MiB is for small
ones, such as of who may see a repository: they are not refused to a namespace that is full.

What an account uploads for proposals counts in a scope of its own (`proposal_scope`), which has limits like a namespace, with
the files of the account's open proposals. Those count in the namespace too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.version_extract import INDEXED, indexed_bytes
from adapterhub.registry import repository_records
from adapterhub.registry.repository_records import ENTRY_SIZE
from adapterhub.store.store import HUB
from adapterhub_converters.errors import RefusedError

from .accounts.accounts import Namespace
from .hub_database import HubDatabase
from .workers import Worker

_COUNT_TTL = 10.0  # seconds
_MAX_COUNTS, _MAX_COUNTED = 100, 200_000  # namespaces whose count is kept in memory, and their files, of 250 bytes each
_REPLACED_SECONDS = 50 * 3600.0  # for which a replaced document counts: a gc a day, after a day of grace
_FREE_RECORDS = 1 << 20  # bytes of documents and logs of a namespace that do not count
_SMALL_RECORD = 8 << 10  # bytes of a document for which there is a second MiB
_LEFT = "left "  # begins the ids of what failed changes have left in a bucket
_SCOPE = "~"  # what the scopes of proposals begin with: no namespace does
_MAX_PROPOSED_BYTES, _MAX_PROPOSED_FILES = 4 << 30, 2_000  # of an account: its uploads for proposals, and those that are open
_MAX_OPEN = 20_000  # open uploads of a namespace; each new one reads them all. A terabyte through Xet is 16,000


def proposal_scope(account: str, name: str) -> str:
    """Return the name under which uploads of an account count that are for proposals to a repository."""
    return f"{_SCOPE}{account}/{name}"


class Quotas:
    """The quotas of a hub's namespaces; `namespace_settings` returns the limits of one."""

    def __init__(self, database: HubDatabase, namespace_settings: Callable[[str], Namespace]) -> None:
        self._database = database
        self._namespace_settings = namespace_settings
        self._counts: dict[str, tuple[float, dict[Digest, int], dict[str, int]]] = {}
        self._lock = threading.Lock()

    def _settings_of(self, namespace: str) -> Namespace:
        if namespace.startswith(_SCOPE):
            return Namespace(namespace, max_bytes=_MAX_PROPOSED_BYTES, max_files=_MAX_PROPOSED_FILES)
        return self._namespace_settings(namespace)

    def check(
        self,
        worker: Worker,
        name: str,
        files: Mapping[Digest, int],
        *,
        count: bool = False,
        except_uploads: Collection[str] = (),
    ) -> None:
        """Refuse files (digest to bytes) that would exceed the limits of the namespace of `name`.

        Args:
            worker: The worker of this thread.
            name: The repository.
            files: The files; those already counted do not count again.
            count: Count them from now on, because they are stored.
            except_uploads: Open uploads to leave out: their ids, or the repositories they are for.

        Raises:
            RefusedError: The files would be too many or too large.
        """
        limits = self._settings_of(name.partition("/")[0])
        if limits.max_bytes is None and limits.max_files is None:
            return
        with self._lock:
            counted, records = self._count(worker, limits.name)
            new = {digest: size for digest, size in files.items() if digest not in counted}
            _check(limits, counted, new.values(), self._open_bytes(limits, except_uploads), records=records)
            if count:
                counted.update(new)

    def check_sizes(self, worker: Worker, name: str, sizes: Iterable[int]) -> None:
        """Refuse files of which only the sizes are known, if they would be too large even together.

        This is the last point at which a client that goes on through Xet shows our message. How many of the files are new is
        not known yet.
        """
        limits = replace(self._settings_of(name.partition("/")[0]), max_files=None)
        if limits.max_bytes is None:
            return
        with self._lock:
            counted, records = self._count(worker, limits.name)
            _check(limits, counted, sizes, self._open_bytes(limits, [name]), records=records)

    def check_record(self, worker: Worker, name: str, size: int, *, except_uploads: Collection[str] = ()) -> None:
        """Count a document, or an entry of a log, that is about to be written for a repository.

        `except_uploads`: Ids of open uploads to leave out, because they count as files already.

        Raises:
            RefusedError: There is no room for `size` bytes.
        """
        limits = replace(self._settings_of(name.partition("/")[0]), max_files=None)
        if limits.max_bytes is None:
            return
        with self._lock:
            counted, records = self._count(worker, limits.name)
            free = _FREE_RECORDS if size > _SMALL_RECORD else 2 * _FREE_RECORDS
            if sum(records.values()) + self._left_bytes(limits) + size > free:
                _check(limits, counted, [size], self._open_bytes(limits, except_uploads), records=records)
            records[name] = records.get(name, 0) + size

    def has_counted(self, worker: Worker, name: str, digest: Digest, size: int) -> bool:
        """Return whether a file of `size` bytes counts in the namespace of `name`, which has limits, already."""
        limits = self._settings_of(name.partition("/")[0])
        if limits.max_bytes is None and limits.max_files is None:
            return False
        with self._lock:
            return self._count(worker, limits.name)[0].get(digest) == size

    def has_byte_limit(self, name: str) -> bool:
        """Return whether the namespace of `name` has a limit in bytes."""
        return self._settings_of(name.partition("/")[0]).max_bytes is not None

    def open(
        self,
        worker: Worker,
        name: str,
        upload: str,
        size: int,
        *,
        extra: int = 0,
        lifetime: float,
        except_uploads: Collection[str] = (),
    ) -> int | None:
        """Count an open upload.

        Args:
            worker: The worker of this thread.
            name: The repository it is for.
            upload: Its id.
            size: Bytes it has, or will have.
            extra: Further bytes to reserve, as far as there is room.
            lifetime: Seconds after which it no longer counts, unless this is called again.
            except_uploads: Ids of others that it replaces.

        Returns:
            Bytes it is counted as; None without a limit.

        Raises:
            RefusedError: There is no room for `size` bytes.
        """
        limits, now = self._settings_of(name.partition("/")[0]), time.time()
        if limits.max_bytes is None:
            return None
        with self._lock:
            counted, records = self._count(worker, limits.name)
            # In one transaction: two processes must not both take the last free bytes.
            with self._database.transaction():
                previous = self._database.select("SELECT size FROM arriving WHERE id = ?", upload)
                other_bytes = self._open_bytes(limits, [upload, *except_uploads])
                if not previous and self._open_count(limits) >= _MAX_OPEN:
                    problem = f"has {_MAX_OPEN:,} open uploads, which are the most that may be open"
                    raise RefusedError(limits.name, problem, "End one, or wait a day until they expire", code="quota")
                if not previous or size > previous[0][0]:
                    _check(limits, counted, [size], other_bytes, files=False, records=records)
                # Reserve ahead as far as there is room, so that a stream of unknown length does not ask for every piece.
                size = max(size, min(size + extra, limits.max_bytes - _used(counted, records) - other_bytes))
                sql = (
                    "INSERT INTO arriving (id, name, size, until) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
                    " SET size = excluded.size, until = excluded.until"
                )
                self._database.execute(sql, upload, name, size, now + lifetime)
        return size

    def count_left(self, name: str, sizes: Mapping[Digest, int]) -> None:
        """Count what a change that failed has left in the store until a gc has had its time, as far as it does not count."""
        rows = [(f"{_LEFT}{digest}", name, size, time.time() + _REPLACED_SECONDS) for digest, size in sizes.items()]
        sql = (
            "INSERT INTO arriving (id, name, size, until) SELECT ?, ?, ?, ?"
            " WHERE NOT EXISTS (SELECT 1 FROM uploaded WHERE name = ? AND digest = ?) ON CONFLICT (id) DO NOTHING"
        )
        self._database.execute_many(sql, [(*row, name, row[0].removeprefix(_LEFT)) for row in rows])

    def close(self, name: str, uploads: Iterable[str]) -> None:
        """Stop counting uploads of a repository."""
        if self.has_byte_limit(name):
            self._database.execute_many("DELETE FROM arriving WHERE id = ?", [(upload,) for upload in uploads])

    def recount(self, name: str) -> None:
        """Count the files of the namespace of `name` anew at the next question, as some were removed."""
        with self._lock:
            self._counts.pop(name.partition("/")[0], None)

    def rename(self, upload: str, new: str, lifetime: float) -> None:
        """Count an upload under another id from now on; one that counts under that id is the same."""
        with self._database.transaction():
            for name, size in self._database.select("SELECT name, size FROM arriving WHERE id = ?", upload):
                sql = (
                    "INSERT INTO arriving (id, name, size, until) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
                    " SET until = excluded.until"
                )
                self._database.execute(sql, new, name, size, time.time() + lifetime)
                self._database.execute("DELETE FROM arriving WHERE id = ?", upload)

    def mark_spent(self, name: str, uploads: Iterable[str]) -> list[str]:
        """Stop counting uploads of a repository whose bytes are kept, as they may be used again.

        Returns:
            The spent uploads, oldest first, that the caller has to remove: together, they are more than the namespace may hold.
        """
        limits = self._settings_of(name.partition("/")[0])
        if limits.max_bytes is None:
            return []
        with self._database.transaction():
            for upload in uploads:
                self._database.execute("UPDATE arriving SET spent = 1 WHERE id = ?", upload)
            sql = "SELECT id, size FROM arriving WHERE name >= ? AND name < ? AND spent = 1 ORDER BY until DESC"
            room, removable = limits.max_bytes, []
            for number, (ident, size) in enumerate(self._database.select(sql, f"{limits.name}/", f"{limits.name}0")):
                room -= size
                if room < 0 or number >= _MAX_OPEN:
                    removable.append(ident)
            for ident in removable:
                self._database.execute("DELETE FROM arriving WHERE id = ?", ident)
        return removable[::-1]

    def expire(self) -> None:
        """Forget uploads whose lifetime has ended."""
        self._database.execute("DELETE FROM arriving WHERE until < ?", time.time())

    def _left_bytes(self, limits: Namespace) -> int:
        """Return the bytes that failed changes of a namespace have left, so that none of them is free of charge."""
        sql = "SELECT coalesce(sum(size), 0) FROM arriving WHERE name >= ? AND name < ? AND until >= ? AND substr(id, 1, 5) = ?"
        return int(self._database.select(sql, f"{limits.name}/", f"{limits.name}0", time.time(), _LEFT)[0][0])

    def _open_count(self, limits: Namespace) -> int:
        """Return the number of open uploads of a namespace, including those without bytes so far, which take no room."""
        sql = "SELECT count(*) FROM arriving WHERE name >= ? AND name < ? AND until >= ? AND spent = 0"
        return int(self._database.select(sql, f"{limits.name}/", f"{limits.name}0", time.time())[0][0])

    def _open_bytes(self, limits: Namespace, except_uploads: Collection[str]) -> int:
        """Return the bytes of the open uploads of a namespace, and in the scope of an account those of its proposals."""
        # "0" follows "/".
        sql = (
            "SELECT id, name, size FROM arriving WHERE name >= ? AND name < ? AND until >= ? AND spent = 0"
            " UNION ALL SELECT '', '', size FROM proposals WHERE account = ?"
        )
        account = limits.name.removeprefix(_SCOPE) if limits.name.startswith(_SCOPE) else ""
        rows = self._database.select(sql, f"{limits.name}/", f"{limits.name}0", time.time(), account)
        return sum(size for ident, name, size in rows if ident not in except_uploads and name not in except_uploads)

    def _count(self, worker: Worker, namespace: str) -> tuple[dict[Digest, int], dict[str, int]]:
        """Return the files of a namespace, digest to bytes, and the bytes of documents and logs by name."""
        until, counted, records = self._counts.get(namespace, (0.0, {}, {}))
        if until < time.monotonic():
            counted, records = namespace_files(worker, self._database, namespace), namespace_records(worker, namespace)
            now = time.monotonic()
            self._counts = {key: count for key, count in self._counts.items() if count[0] > now}
            if len(self._counts) >= _MAX_COUNTS or sum(len(files) for _, files, _ in self._counts.values()) > _MAX_COUNTED:
                self._counts.clear()
            self._counts[namespace] = now + _COUNT_TTL, counted, records
        return counted, records


def namespace_files(worker: Worker, database: HubDatabase, namespace: str) -> dict[Digest, int]:
    """Return the distinct files of a namespace, including recent uploads: digest to bytes."""
    uploaded = {digest for (digest,) in database.select(_UPLOADED, f"{namespace}/", f"{namespace}0")}
    return _files(worker, namespace, worker.registry.store.log.names(HUB, namespace), uploaded)


def namespace_records(worker: Worker, namespace: str) -> dict[str, int]:
    """Return the bytes of the documents and logs of a namespace's repositories, removed ones too: name to bytes."""
    store, log = worker.registry.store, worker.registry.store.log
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - _REPLACED_SECONDS))
    sizes: dict[str, int] = {}
    with worker.registry.index.snapshot():
        # From the index as it is: `ledger.current` would wait for its lock, which who asks for room may hold.
        moves = {state.name: state.seq for state in queries.names(worker.registry.index, namespace)}
        for name in {*log.names(HUB, namespace), *moves}:
            document = worker.repositories.document(name)
            repository = worker.repositories.get(name)
            digests = {*(repository.commits.values() if repository else ()), *queries.digests(worker.registry.index, name)}
            entries = (document.entry.seq if document.entry else 0) + moves.get(name, 0)
            sizes[name] = entries * ENTRY_SIZE + sum(store.size(digest) or 0 for digest in digests)
            sizes[name] += worker.repositories.written_bytes(name, since)
        for name, path, size in queries.sizes_of(worker.registry.index, namespace, INDEXED):
            sizes[name] = sizes.get(name, 0) + indexed_bytes(path, size)
    return sizes


def repository_files(worker: Worker, name: str) -> dict[Digest, int]:
    """Return the distinct files of a repository: digest to bytes."""
    return _files(worker, name, [name])


def _files(worker: Worker, prefix: str, names: Iterable[str], extra: Collection[Digest] = ()) -> dict[Digest, int]:
    """Return the files of a name's or namespace's versions, what its repositories keep besides, and `more`: digest to bytes."""
    version_files, other_digests, store = queries.files(worker.registry.index, prefix), set(extra), worker.registry.store
    for name in names:
        if repository := worker.repositories.get(name):
            other_digests |= repository_records.needed_blobs(store, repository) - set(repository.commits.values())
    sizes = {digest: store.size(digest) for digest in other_digests - version_files.keys()}
    return {**version_files, **{digest: size for digest, size in sizes.items() if size is not None}}


_UPLOADED = "SELECT DISTINCT digest FROM uploaded WHERE name >= ? AND name < ?"  # "0" follows "/"


def _used(counted: Mapping[Digest, int], records: Mapping[str, int]) -> int:
    return sum(counted.values()) + max(sum(records.values()) - _FREE_RECORDS, 0)


def _check(
    limits: Namespace,
    counted: Mapping[Digest, int],
    new: Iterable[int],
    arriving: int,
    *,
    records: Mapping[str, int],
    files: bool = True,
) -> None:
    sizes = list(new)
    if not sizes:
        return
    used, added = _used(counted, records) + arriving, sum(sizes)
    hint = "Remove versions, or ask for a larger quota"
    if limits.name.startswith(_SCOPE):
        hint = "Withdraw a proposal, or wait two days until uploads for others are forgotten"
        limits = replace(limits, name=f"proposals of {limits.name.removeprefix(_SCOPE)}")
    if limits.max_bytes is not None and used + added > limits.max_bytes:
        uploads = f" ({arriving:,} of them in uploads that are open)" if arriving else ""
        problem = f"may hold {limits.max_bytes:,} bytes, holds {used:,}{uploads}, and {added:,} more were to come"
        raise RefusedError(limits.name, problem, hint, code="quota")
    if files and limits.max_files is not None and len(counted) + len(sizes) > limits.max_files:
        problem = f"may hold {limits.max_files:,} files, holds {len(counted):,}, and {len(sizes):,} more were to come"
        raise RefusedError(limits.name, problem, hint, code="quota")
