"""Garbage collection of a bucket: removes blobs that no version, base, recipe, repository or upload needs.

What is needed follows from the log, as in the store of one folder (`maintenance.gc`), and from the table of uploads. The table
of noted blobs takes the place of a folder store's leases: a process notes a blob before it relies on the bucket having it, and
again after an hour (`bucket_blobs`). So everything a move names was noted shortly before, and a gc removes nothing noted within
its grace period, which is longer. A process that notes a blob while it is being removed waits, and then finds it gone.

Like that of a folder, a gc reads only the entries and manifests that the last one on this machine has not read (`gc_marks`).
The keys in the bucket are listed each time, a thousand per request: only that shows blobs that no log has ever named, and moves
that a restored database lacks.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterhub.digest import Digest, is_hex
from adapterhub.index import queries
from adapterhub.maintenance import gc_marks, retention
from adapterhub.maintenance.gc import GcResult, NeededBlobs, Progress
from adapterhub.manifest.keep_rule import GRACE_HOURS, keep_rule
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import ParameterError, RefusedError

from .bucket_blobs import RELIANCE_SECONDS, blob_key
from .shared_log import LOGS, parse_copy
from .shared_storage import TEMPORARY, SharedStorage

MIN_GRACE = 2 * RELIANCE_SECONDS / 3600
"""The shortest grace period, in hours."""
_PART_LIFETIME = 2 * 24 * 3600.0  # seconds for which an upload, or a part of one, stays: twice as long as it can be used
_BATCH, _AT_ONCE = 64, 8  # blobs per batch: others that note one of them wait for a second or two


def collect(
    storage: SharedStorage,
    *,
    grace: float = GRACE_HOURS,
    last: int | None = None,
    ttl: int | None = None,
    dry_run: bool = False,
    withdrawn: bool = False,
    progress: Progress | None = None,
) -> GcResult:
    """Drop versions that need not be kept, and remove unneeded blobs and parts of uploads from the bucket.

    Args:
        storage: The storage of this process, which need not be serving.
        grace: Hours for which a blob stays after it was stored, noted or dropped.
        last: How many of the newest versions to keep, besides tagged ones, for names without a setting.
        ttl: Keep, of those, each version for so many seconds after its push, and the newest.
        dry_run: Change nothing.
        withdrawn: Drop the withdrawn versions too.
        progress: Called with blobs done and the number of blobs.

    Raises:
        RefusedError: The bucket has moves that the database lacks.
        IntegrityError: What a version needs cannot be determined.
    """
    if grace < MIN_GRACE:
        raise ParameterError("grace", f"{grace:g} h is too short for uploads in progress", f"Set at least {MIN_GRACE:g}")
    with storage.registry() as registry:
        _check_log(storage, registry)
        dropped = retention.drop(registry, keep_rule(last, ttl), dry_run=dry_run, withdrawn=withdrawn)
        swept = GcResult(dry_run, dropped.refs, dropped.parents)
        needs = _NeededBlobs(storage, registry, grace, dropped.numbers if dry_run else {})
        _sweep(storage, needs, swept, grace, progress)
        if not dry_run:
            needs.keep_marks()
    _remove_parts(storage, swept)
    return swept


def _remove_parts(storage: SharedStorage, swept: GcResult) -> None:
    """Remove parts of uploads that no client can continue any more."""
    for key, size, modified in storage.bucket.objects(TEMPORARY):
        if modified < time.time() - _PART_LIFETIME:
            if not swept.dry_run:
                storage.bucket.remove(key)
            swept.leftovers += 1
            swept.leftover_size += size


class _NeededBlobs:
    """The blobs needed by the log and the uploads, as of the last `update`."""

    def __init__(self, storage: SharedStorage, registry: Registry, grace: float, unkept: dict[str, list[int]]) -> None:
        self._storage, self._registry = storage, registry
        self._by_logs = NeededBlobs(
            registry.store,
            self._known_positions,
            grace * 3600,
            unkept,
            entry_time=_written_at,
            marks=gc_marks.read(registry.store),
        )

    def _known_positions(self) -> dict[str, int]:
        return {name.name: name.seq for name in queries.names(self._registry.index)}

    def keep_marks(self) -> None:
        """Keep what was read, beside the mirror, for the next gc of this machine."""
        self._by_logs.keep_marks()

    def update(self) -> tuple[set[Digest], set[Digest]]:
        """Return the needed blobs, and those of them that only the grace period keeps."""
        self._storage.refresh(self._registry)
        with self._registry.write_lock():
            stay = self._by_logs.update()
        sql, since = "SELECT digest FROM uploaded WHERE time >= ?", time.time() - _PART_LIFETIME
        uploaded = {digest for (digest,) in self._storage.database.select(sql, since)}
        return stay | uploaded, self._by_logs.spared - uploaded


def _written_at(entry_time: str, _path: Path) -> float:
    """Return when an entry was written; the mirror's file only tells when it arrived here."""
    try:
        return datetime.datetime.fromisoformat(entry_time).timestamp()
    except ValueError:
        return time.time()


def _check_log(storage: SharedStorage, registry: Registry) -> None:
    """Refuse a database without the bucket's entries, such as a new one in place of a lost one: nothing would seem needed."""
    copies = (parse_copy(key) for log in LOGS for key, *_ in storage.bucket.objects(log))
    newest: dict[tuple[str, str], int] = {}
    for copy in filter(None, copies):
        log, name, seq = copy
        newest[log, name] = max(seq, newest.get((log, name), 0))
    storage.refresh(registry)
    for (log, name), seq in newest.items():
        if registry.store.log.entry(name, seq, log=log) is None:
            problem = f"has entry {seq} of {log}/{name}, which the database lacks; nothing was removed"
            raise RefusedError(storage.bucket.location, problem, "Restore the database from a backup, or recover an empty one")


def _sweep(storage: SharedStorage, needs: _NeededBlobs, swept: GcResult, grace: float, progress: Progress | None) -> None:
    stay, spared = needs.update()
    noted, spared_since = storage.database.noted_blobs(grace), time.time() - grace * 3600
    sizes: dict[Digest, int] = {}
    for key, size, modified in storage.bucket.objects("blobs/sha256"):
        name = key.rpartition("/")[2]
        digest = f"sha256:{name}"
        if not is_hex(name) or (digest in stay and digest not in spared):
            continue
        if digest in spared or digest in noted or modified > spared_since:
            swept.waiting += 1
            swept.waiting_size += size
        else:
            sizes[digest] = size
    unneeded = sorted(sizes)
    for start in range(0, len(unneeded), _BATCH):
        batch = unneeded[start : start + _BATCH]
        for digest in batch if swept.dry_run else _remove(storage, batch, needs, grace):
            swept.blobs += 1
            swept.size += sizes[digest]
        if progress:
            progress(min(start + _BATCH, len(unneeded)), len(unneeded))


def _remove(storage: SharedStorage, batch: Sequence[Digest], needs: _NeededBlobs, grace: float) -> list[Digest]:
    """Remove those blobs of a batch that are still unneeded, and return them."""
    # Look again right before removing: a push may have named one of these blobs since the sweep began.
    stay, _ = needs.update()
    unneeded = [digest for digest in batch if digest not in stay]
    with storage.database.lock_unnoted(unneeded, grace) as removed, ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda digest: storage.bucket.remove(blob_key(digest)), removed))
    return removed
