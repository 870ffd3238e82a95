"""Garbage collection of a bucket: removes the blobs that no version, base, recipe, repository or upload needs.

What is needed comes from the log, as in the store of one folder (`maintenance.gc`), and from the table of uploads. What stands
for the leases of such a store is the table of notes: a process notes a blob before it relies on the bucket having it, and again
after an hour (`blobs`). So what a move names was noted shortly before, and a gc removes nothing that was noted within its grace
period, which is longer. Who would note a blob that is being removed waits, and then finds that it is gone.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterhub.digest import Digest, is_hex
from adapterhub.index import queries
from adapterhub.maintenance import retention
from adapterhub.maintenance.gc import GRACE, Needs, Progress, Swept
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Entry
from adapterhub_converters.errors import ParameterError, RefusedError

from .blobs import RELIED, blob_key
from .log import LOGS, parse_copy
from .shared import TEMPORARY, SharedStorage

LEAST = 2 * RELIED / 3600
"""Hours of the shortest grace period."""
_PARTS = 2 * 24 * 3600.0  # seconds that a part of an upload stays: twice as long as it can be used
_BATCH, _AT_ONCE = 64, 8  # blobs: a second or two in which who would note one of them waits


def collect(
    storage: SharedStorage,
    *,
    grace: float = GRACE,
    last: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Swept:
    """Drop the versions that need not be kept, and remove from the bucket what nothing needs, and parts of uploads.

    Args:
        storage: Of this process, which need not serve.
        grace: Hours that a blob stays after it was stored, noted or let go.
        last: Number of newest versions to keep, besides the tagged ones, of names without a setting.
        dry_run: Change nothing.
        progress: Called with blobs done and the number of blobs.

    Raises:
        RefusedError: The bucket has moves that the database lacks.
        IntegrityError: What a version needs cannot be determined.
    """
    if grace < LEAST:
        raise ParameterError("grace", f"{grace:g} h is too short for uploads in progress", f"Set at least {LEAST:g}")
    with storage.registry() as registry:
        _check_log(storage, registry)
        dropped = retention.drop(registry, last, dry_run=dry_run)
        swept = Swept(dry_run, dropped.refs, dropped.parents)
        needs = _Needed(storage, registry, grace, dropped.numbers if dry_run else {})
        _sweep(storage, needs, swept, grace, progress)
    _remove_parts(storage, swept)
    return swept


def _remove_parts(storage: SharedStorage, swept: Swept) -> None:
    """Remove parts of uploads that no client can go on with any more."""
    for key, size, modified in storage.bucket.objects(TEMPORARY):
        if modified < time.time() - _PARTS:
            if not swept.dry_run:
                storage.bucket.remove(key)
            swept.leftovers += 1
            swept.leftover_size += size


class _Needed:
    """What is needed as the log and the uploads are when `update` is called."""

    def __init__(self, storage: SharedStorage, registry: Registry, grace: float, unkept: dict[str, list[int]]) -> None:
        self._storage, self._registry = storage, registry
        self._by_logs = Needs(registry.store, self._known, grace * 3600, unkept, written=_written)

    def _known(self) -> dict[str, int]:
        return {name.name: name.seq for name in queries.names(self._registry.index)}

    def update(self) -> tuple[set[Digest], set[Digest]]:
        """Return the blobs that are needed, and those of them that only the grace period keeps."""
        self._storage.refresh(self._registry)
        with self._registry.locked():
            stay = self._by_logs.update()
        uploaded = {digest for (digest,) in self._storage.database.select("SELECT digest FROM uploaded")}
        return stay | uploaded, self._by_logs.spared - uploaded


def _written(entry: Entry, _path: Path) -> float:
    """When an entry was written; the file in the mirror tells when it came here."""
    try:
        return datetime.datetime.fromisoformat(entry.time).timestamp()
    except ValueError:
        return time.time()


def _check_log(storage: SharedStorage, registry: Registry) -> None:
    """Refuse a database that is not that of the bucket, as a new one in place of one that was lost: it needs nothing."""
    copies = (parse_copy(key) for log in LOGS for key, *_ in storage.bucket.objects(log))
    newest: dict[tuple[str, str], int] = {}
    for copy in filter(None, copies):
        log, name, seq = copy
        newest[log, name] = max(seq, newest.get((log, name), 0))
    storage.refresh(registry)
    for (log, name), seq in newest.items():
        if registry.store.log.entry(name, seq, log=log) is None:
            what = f"has entry {seq} of {log}/{name}, which the database lacks; nothing was removed"
            raise RefusedError(storage.bucket.where, what, "Restore the database from a backup, or recover an empty one")


def _sweep(storage: SharedStorage, needs: _Needed, swept: Swept, grace: float, progress: Progress | None) -> None:
    stay, spared = needs.update()
    noted, since = storage.database.held(grace), time.time() - grace * 3600
    sizes: dict[Digest, int] = {}
    for key, size, modified in storage.bucket.objects("blobs/sha256"):
        name = key.rpartition("/")[2]
        digest = f"sha256:{name}"
        if not is_hex(name) or (digest in stay and digest not in spared):
            continue
        if digest in spared or digest in noted or modified > since:
            swept.waiting += 1
            swept.waiting_size += size
        else:
            sizes[digest] = size
    unneeded = sorted(sizes)
    for at in range(0, len(unneeded), _BATCH):
        batch = unneeded[at : at + _BATCH]
        for digest in batch if swept.dry_run else _remove(storage, batch, needs, grace):
            swept.blobs += 1
            swept.size += sizes[digest]
        if progress:
            progress(min(at + _BATCH, len(unneeded)), len(unneeded))


def _remove(storage: SharedStorage, batch: Sequence[Digest], needs: _Needed, grace: float) -> list[Digest]:
    """Remove those of some blobs that are still unneeded, and return them."""
    stay, _ = needs.update()
    left = [digest for digest in batch if digest not in stay]
    with storage.database.let_go(left, grace) as gone, ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda digest: storage.bucket.remove(blob_key(digest)), gone))
    return gone
