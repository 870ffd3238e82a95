"""How much a namespace may hold: bytes of its distinct files, and their number.

Counted are the files of its versions, what its repositories keep besides, such as earlier commits, and what was uploaded for
them lately. A namespace without limits costs nothing. The count is made anew every few seconds; in between, what this process
takes in is added to it, so that uploads at the same time do not pass each other.

An open upload is a row of hub.db, which all processes count: as its size if that is known, else as what has arrived. A client
that starts again after it was cut off announces what it has sent before, so the open uploads of a repository are not counted
when files are announced for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.index import queries
from adapterhub.registry import repositories
from adapterhub.store.store import HUB
from adapterhub_converters.errors import RefusedError

from .database import HubDatabase
from .people.accounts import Namespace
from .workers import Worker

_FRESH = 10.0  # seconds
_MOST = 100  # namespaces whose count is held
_MOST_OPEN = 20_000  # uploads of a namespace, all of which are read for each; a terabyte by Xet is 16,000


class Quotas:
    """The quotas of a hub's namespaces; `settled` tells what holds in one."""

    def __init__(self, database: HubDatabase, settled: Callable[[str], Namespace]) -> None:
        self._database = database
        self._settled = settled
        self._held: dict[str, tuple[float, dict[Digest, int]]] = {}
        self._lock = threading.Lock()

    def check(
        self, worker: Worker, name: str, files: Mapping[Digest, int], *, take: bool = False, but: Collection[str] = ()
    ) -> None:
        """Refuse files, bytes by digest, that would be too many for the namespace of `name`, or too large.

        Args:
            worker: That of this thread.
            name: The repository.
            files: Those of them that are here already count once.
            take: Count them from now on, as they are here.
            but: Open uploads that are not counted: their ids, or the repositories that they are for.

        Raises:
            RefusedError: They would.
        """
        limits = self._settled(name.partition("/")[0])
        if limits.max_bytes is None and limits.max_files is None:
            return
        with self._lock:
            held = self._count(worker, limits.name)
            new = {digest: size for digest, size in files.items() if digest not in held}
            _check(limits, held, new.values(), self._arriving(limits, but))
            if take:
                held.update(new)

    def check_sizes(self, worker: Worker, name: str, sizes: Iterable[int]) -> None:
        """Refuse files of which only the sizes are known yet, if all of them were too large together.

        It is the last place at which a client that goes on by Xet shows our words. How many are new, nobody knows yet.
        """
        limits = replace(self._settled(name.partition("/")[0]), max_files=None)
        if limits.max_bytes is None:
            return
        with self._lock:
            _check(limits, self._count(worker, limits.name), sizes, self._arriving(limits, [name]))

    def limits(self, name: str) -> bool:
        """Whether the namespace of `name` has a limit of bytes."""
        return self._settled(name.partition("/")[0]).max_bytes is not None

    def open(self, worker: Worker, name: str, upload: str, size: int, *, more: int = 0, lifetime: float) -> int | None:
        """Count an upload that is open.

        Args:
            worker: That of this thread.
            name: The repository that it is for.
            upload: Its id.
            size: Bytes that it has, or will have.
            more: Bytes that may follow, counted as far as there is room.
            lifetime: Seconds after which it is no longer counted, unless this is called again.

        Returns:
            Bytes that it is counted as; None without a limit.

        Raises:
            RefusedError: There is no room for `size` bytes.
        """
        limits, now = self._settled(name.partition("/")[0]), time.time()
        if limits.max_bytes is None:
            return None
        with self._lock:
            held = self._count(worker, limits.name)
            with self._database.transaction():
                before = self._database.select("SELECT size FROM arriving WHERE id = ?", upload)
                others = self._arriving(limits, [upload])
                if not before and self._opened(limits) >= _MOST_OPEN:
                    what = f"has {_MOST_OPEN:,} open uploads, which are the most that may be open"
                    raise RefusedError(limits.name, what, "End one, or wait a day until they expire", code="quota")
                if not before or size > before[0][0]:
                    _check(limits, held, [size], others, files=False)
                size = max(size, min(size + more, limits.max_bytes - sum(held.values()) - others))
                sql = (
                    "INSERT INTO arriving VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
                    " SET size = excluded.size, until = excluded.until"
                )
                self._database.execute(sql, upload, name, size, now + lifetime)
        return size

    def close(self, name: str, uploads: Iterable[str]) -> None:
        """Stop counting uploads for a repository."""
        if self.limits(name):
            self._database.execute_many("DELETE FROM arriving WHERE id = ?", [(upload,) for upload in uploads])

    def expire(self) -> None:
        """Forget uploads whose lifetime has ended."""
        self._database.execute("DELETE FROM arriving WHERE until < ?", time.time())

    def _opened(self, limits: Namespace) -> int:
        """The number of uploads that are open in a namespace, of which those of no bytes take no room."""
        sql = "SELECT count(*) FROM arriving WHERE name >= ? AND name < ? AND until >= ?"
        return int(self._database.select(sql, f"{limits.name}/", f"{limits.name}0", time.time())[0][0])

    def _arriving(self, limits: Namespace, but: Collection[str]) -> int:
        """The bytes of the uploads that are open in a namespace."""
        sql = "SELECT id, name, size FROM arriving WHERE name >= ? AND name < ? AND until >= ?"  # 0 is what follows /
        rows = self._database.select(sql, f"{limits.name}/", f"{limits.name}0", time.time())
        return sum(size for ident, name, size in rows if ident not in but and name not in but)

    def _count(self, worker: Worker, namespace: str) -> dict[Digest, int]:
        until, held = self._held.get(namespace, (0.0, {}))
        if until < time.monotonic():
            held = usage(worker, self._database, namespace)
            if len(self._held) >= _MOST:
                self._held.clear()
            self._held[namespace] = time.monotonic() + _FRESH, held
        return held


def usage(worker: Worker, database: HubDatabase, namespace: str) -> dict[Digest, int]:
    """The distinct files of a namespace, those that were uploaded lately among them: digest to bytes."""
    uploaded = {digest for (digest,) in database.select(_UPLOADED, f"{namespace}/", f"{namespace}0")}
    return _files(worker, namespace, worker.registry.store.log.names(HUB, namespace), uploaded)


def files(worker: Worker, name: str) -> dict[Digest, int]:
    """The distinct files of a repository: digest to bytes."""
    return _files(worker, name, [name])


def _files(worker: Worker, prefix: str, names: Iterable[str], more: Collection[Digest] = ()) -> dict[Digest, int]:
    """The files of the versions of a name or a namespace, those that repositories keep besides, and `more`."""
    held, others, store = queries.files(worker.registry.index, prefix), set(more), worker.registry.store
    for name in names:
        if found := worker.repositories.get(name):
            others |= repositories.needs(store, sha256_bytes(found.dump())) - set(found.commits.values())
    sizes = {digest: store.size(digest) for digest in others - held.keys()}
    return {**held, **{digest: size for digest, size in sizes.items() if size is not None}}


_UPLOADED = "SELECT DISTINCT digest FROM uploaded WHERE name >= ? AND name < ?"  # 0 is what follows /


def _check(limits: Namespace, held: Mapping[Digest, int], new: Iterable[int], arriving: int, *, files: bool = True) -> None:
    sizes = list(new)
    if not sizes:
        return
    used, more = sum(held.values()) + arriving, sum(sizes)
    if limits.max_bytes is not None and used + more > limits.max_bytes:
        uploads = f" ({arriving:,} of them in uploads that are open)" if arriving else ""
        what = f"may hold {limits.max_bytes:,} bytes, holds {used:,}{uploads}, and {more:,} more were to come"
        raise RefusedError(limits.name, what, "Remove versions, or ask for a larger quota", code="quota")
    if files and limits.max_files is not None and len(held) + len(sizes) > limits.max_files:
        what = f"may hold {limits.max_files:,} files, holds {len(held):,}, and {len(sizes):,} more were to come"
        raise RefusedError(limits.name, what, "Remove versions, or ask for a larger quota", code="quota")
