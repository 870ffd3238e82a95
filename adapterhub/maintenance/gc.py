"""Garbage collection: remove the blobs that no version, base, recipe, running push or open read needs.

What is needed follows from the logs alone, all of which must be readable: a damaged log or manifest might need any blob, so in
that case nothing is removed. Blobs are removed in batches under the write lock, and the logs and leases are read again before
each batch. A push checks under the same lock that all its blobs exist before it names them, and stores removed ones again, so
that safety depends on no clock, lease or grace period. What it read of logs and manifests is kept for the next (`gc_marks`).

A version's name is removed long before its manifest, and the manifest before its files: killed at any time, a gc leaves only
blobs that no version needs. A packed blob is removed before the parent that it needs.
"""

from __future__ import annotations

import contextlib
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import field
from functools import partial
from pathlib import Path

from adapterhub.digest import Digest, is_hex
from adapterhub.index import index_file, queries, replay
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.keep_rule import GRACE_HOURS, keep_rule
from adapterhub.ref import Ref
from adapterhub.registry import repository_records
from adapterhub.registry.registry import Registry
from adapterhub.store import named_documents
from adapterhub.store.packs.pack_chains import children_first, with_parents
from adapterhub.store.store import DOCUMENTS, HUB, MERGES, REFS, Store, local_errors
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import gc_marks, retention
from .gc_marks import LogMarks, Marks

Progress = Callable[[int, int], None]
"""Callback that takes the number of blobs done and the number of blobs."""
_BATCH_SIZE = 256  # blobs; removing this many blocks writers for a few hundredths of a second
_UNOWNED_AGE = 3600.0  # seconds that a temporary file without a lease stays at least


@dataclass
class GcResult:
    """What a gc removed, or with `dry_run` would remove.

    Attributes:
        dropped: Versions that need not be kept.
        parents: Versions that need not be kept for their own sake, but are parents of something that stays.
        blobs: Number of unneeded blobs, plain or packed, of `size` bytes on disk.
        conversions: Number of cached conversions that were not used lately, of `conversion_size` bytes.
        leftovers: Number of files left by killed processes, of `leftover_size` bytes.
        packed: Number of blobs that were packed afterwards, which saved `packed_saving` bytes.
        waiting: Number of unneeded blobs that stay for now, of `waiting_size` bytes: too young, needed by a running push or
            read, needed by the pack of a blob that stays, or owned by another user.
    """

    dry_run: bool
    dropped: list[Ref] = field(default_factory=list)
    parents: list[Ref] = field(default_factory=list)
    blobs: int = 0
    size: int = 0
    conversions: int = 0
    conversion_size: int = 0
    leftovers: int = 0
    leftover_size: int = 0
    waiting: int = 0
    waiting_size: int = 0
    packed: int = 0
    packed_saving: int = 0


def gc(
    registry: Registry,
    *,
    grace: float = GRACE_HOURS,
    last: int | None = None,
    ttl: int | None = None,
    dry_run: bool = False,
    withdrawn: bool = False,
    progress: Progress | None = None,
) -> GcResult:
    """Drop the versions that need not be kept; remove what nothing needs, and what killed processes left.

    Args:
        registry: The registry.
        grace: Hours that a blob stays after it was stored or last needed.
        last: Number of newest versions to keep, besides the tagged ones, of names without a setting (`retention.keep`).
        ttl: Keep, of those, each version for so many seconds after its push, and the newest.
        dry_run: Change nothing.
        withdrawn: Drop the withdrawn versions too.
        progress: Called with the number of blobs done and the number of blobs.
    """
    dropped = retention.drop(registry, keep_rule(last, ttl), dry_run=dry_run, withdrawn=withdrawn)
    result = GcResult(dry_run, dropped.refs, dropped.parents)
    store = registry.store
    needs = NeededBlobs(
        store,
        lambda: {name.name: name.seq for name in queries.names(registry.index)},
        grace * 3600,
        dropped.numbers if dry_run else {},
        marks=gc_marks.read(store),
    )

    @contextmanager
    def lock_current_index() -> Iterator[None]:
        with registry.write_lock():
            # The index must have every entry before it is compared with the logs.
            for name in store.log.names():
                replay.catch_up(registry.index, store, name)
            # A writer that was killed here may not have written index.json.
            if store.log.pending_moves() and not store.index_file.has_exactly(queries.ref_lines(registry.index)):
                index_file.write(registry.index, store)
            yield

    _collect(store, needs, lock_current_index, result, grace=grace * 3600, progress=progress)
    if not dry_run:
        needs.keep_marks()
    return result


class NeededBlobs:
    """The set of needed blobs; `update`, under the write lock, brings it up to date.

    Args:
        store: The store with the logs.
        indexed_seqs: Returns the number of the last entry that the index has of each log.
        grace: Seconds that a blob stays after it was released.
        droppable: Numbers of the versions to drop, by name.
        entry_time: Returns when an entry was written, given the time in it and its file; by default, the time of the file.
        marks: What an earlier gc has read of this store.

    Attributes:
        spared: Blobs that no version needs, but a running process does, or a user who undoes a recent removal.
        parents: The parent of each packed blob that is a delta.
    """

    def __init__(
        self,
        store: Store,
        indexed_seqs: Callable[[], dict[str, int]],
        grace: float,
        droppable: dict[str, list[int]],
        *,
        entry_time: Callable[[str, Path], float] | None = None,
        marks: Marks | None = None,
    ) -> None:
        self._store = store
        self._entry_time = entry_time or (lambda _time, path: store.files.status(path).st_mtime)
        self._indexed_seqs = indexed_seqs  # the last entry of each log in the index
        self._grace = grace
        self._since = time.time() - grace
        self._droppable = droppable
        self._marks = marks or Marks()
        self._begun_logs: set[tuple[str, str]] = set()  # whose marks are known to be of the logs that there are
        self._times: dict[tuple[str, str, int], float] = {}  # of entries that released something
        self._recipes: dict[Digest, set[Digest]] = {}
        self._needed: set[Digest] = set()
        self.spared: set[Digest] = set()
        self.parents: dict[Digest, Digest] = {}

    def update(self) -> set[Digest]:
        """Return the blobs that are needed now.

        Raises:
            IntegrityError: A log or a document that may need blobs is damaged.
            RefusedError: The store has something that only a newer adapterhub understands.
        """
        # A newer adapterhub may keep references where this one does not look.
        for path in self._store.unknown_folders():
            problem = "unknown to this adapterhub, and may refer to any of the blobs; nothing was removed"
            raise RefusedError(str(path), problem, "Upgrade adapterhub, or move that folder elsewhere", code="newer-version")
        indexed_seqs = self._indexed_seqs()
        # Names of the index too: a log that has vanished must stop the gc.
        names = [(REFS, name) for name in sorted({*self._store.log.names(), *indexed_seqs})]
        documents = [(kind, name) for kind in DOCUMENTS for name in self._store.log.document_names(kind)]
        for kind, name in (*names, *documents):
            self._read_log(kind, name, indexed_seqs.get(name, 0) if kind == REFS else 0)
        self._marks.logs = {log: self._marks.logs[log] for log in (*names, *documents)}
        needed, spared = self._needed_by_versions()
        for kind, name in documents:
            log = self._marks.logs[kind, name]
            needed.update(log.versions.values())
            released = self._recently_released(kind, name)
            spared.update(released)
            if kind in (MERGES, HUB):
                needed.update(*(self._needed_by_document(kind, digest, name) for digest in log.versions.values()))
                for digest in released:
                    with contextlib.suppress(AdapterhubError):  # an unreadable one needs nothing
                        spared |= self._needed_by_document(kind, digest, name)
        leased = self._store.leased_digests()
        spared |= leased
        # A lease on a manifest, such as that of an open read, covers the blobs of its version.
        for digest in leased & self.manifests():
            spared |= self._needed_by_removed_version(digest)
        self._needed = needed = self._with_parents(needed, spared)
        return needed

    def keep_marks(self) -> None:
        """Keep what was read for the next gc."""
        gc_marks.write(self._store, self._marks, self._needed)

    def _recently_released(self, kind: str, name: str) -> list[Digest]:
        """Return the digests that a log released within the grace period."""
        recent = []
        for seq, time_, digest in self._marks.logs[kind, name].released:
            key = (kind, name, seq)
            if key not in self._times:
                self._times[key] = self._entry_time(time_, self._store.log.path(name, seq, log=kind))
            if self._times[key] > self._since:
                recent.append(digest)
        return recent

    def _name_logs(self) -> list[tuple[str, LogMarks]]:
        return [(name, log) for (kind, name), log in self._marks.logs.items() if kind == REFS]

    def _needed_by_versions(self) -> tuple[set[Digest], set[Digest]]:
        """Return the blobs that versions need, and those that recently dropped or removed versions would need."""
        needed: set[Digest] = set()
        spared: set[Digest] = set()
        for name, log in self._name_logs():
            for number, digest in log.versions.items():
                if number not in self._droppable.get(name, ()):
                    needed |= self._needed_by_version(digest, f"{name}:v{number}")
                elif self._grace:  # in a dry run, which has not dropped it: with a grace period its blobs would stay
                    spared |= self._needed_by_removed_version(digest)
            for digest in self._recently_released(REFS, name):
                spared |= self._needed_by_removed_version(digest)
        return needed, spared

    def _with_parents(self, needed: set[Digest], spared: set[Digest]) -> set[Digest]:
        """Add the parents that packs need, and return the needed and the spared blobs together."""
        heads = self._store.packs.heads()
        self.parents = {digest: parent for digest, parent in heads.items() if parent}
        needed = with_parents(needed, self.parents)
        for digest in needed:
            if digest in heads and heads[digest] is None and not self._store.has_plain(digest):
                # Without its head, the parent of this pack is unknown and could be any blob.
                raise _damage_error(str(self._store.packs.path(digest)), "cannot be read, so that its parent is unknown")
        self.spared = with_parents(spared, self.parents) - needed
        return needed | self.spared

    def manifests(self) -> set[Digest]:
        """Return every digest that a log of a name has ever named."""
        return set().union(*(log.named for _, log in self._name_logs()))

    def _read_log(self, kind: str, name: str, indexed_seq: int) -> None:
        """Read the entries of a log that its marks lack."""
        entry_at = partial(self._store.log.entry, name, log=kind)
        log, is_first_read = self._marks.logs.get((kind, name), LogMarks()), (kind, name) not in self._begun_logs
        if is_first_read and log.seq and ((last := entry_at(log.seq)) is None or last[1] != log.head):
            log = LogMarks()  # the marks are of another log
        apply = log.apply if kind == REFS else log.apply_to_document
        while next_entry := entry_at(log.seq + 1):
            entry, digest = next_entry
            path = self._store.log.path(name, entry.seq, log=kind)
            if entry.previous != log.head:
                raise _damage_error(str(path), "does not follow the entry before it")
            apply(entry)
            log.seq, log.head = entry.seq, digest
        # A log that ends before the index does, or has a gap, may lack entries that need blobs.
        if log.seq < indexed_seq or (is_first_read and self._store.log.has_entry_after(name, log.seq, log=kind)):
            path = self._store.log.path(name, log.seq + 1, log=kind)
            raise _damage_error(str(path), "is missing, although there are later ones")
        self._marks.logs[kind, name] = log
        self._begun_logs.add((kind, name))

    def _needed_by_version(self, digest: Digest, ref: str) -> set[Digest]:
        """Return the digests of a version's manifest, config and layers."""
        if digest not in self._marks.blobs:
            try:
                manifest = oci_manifest.parse(self._store.read_document(digest), ref)
            except AdapterhubError as error:
                raise _damage_error(ref, "its manifest cannot be read, so that the blobs it needs are unknown") from error
            self._marks.blobs[digest] = {digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}
        return self._marks.blobs[digest]

    def _needed_by_document(self, kind: str, document: Digest, name: str) -> set[Digest]:
        """Return the blobs that a recipe or a repository needs besides its document."""
        return self._needed_by_recipe(document, name) if kind == MERGES else self._needed_by_repository(document, name)

    def _needed_by_repository(self, document: Digest, name: str) -> set[Digest]:
        if document not in self._marks.blobs:
            try:
                self._marks.blobs[document] = repository_records.required_blobs(self._store, document)
            except AdapterhubError as error:
                raise _damage_error(
                    name, "what a hub keeps of it cannot be read, so that the blobs it needs are unknown"
                ) from error
        return self._marks.blobs[document]

    def _needed_by_recipe(self, document: Digest, name: str) -> set[Digest]:
        """Return the blobs that a recipe's adapters need, as far as they are in this registry."""
        if document not in self._recipes:
            try:
                adapters = named_documents.adapters(self._store, document)
            except AdapterhubError as error:
                problem = "its recipe cannot be read, so that the adapters it needs are unknown"
                raise _damage_error(f"merge:{name}", problem) from error
            present = [digest for digest in adapters if self._store.size(digest) is not None]
            self._recipes[document] = set().union(*(self._needed_by_version(digest, f"merge:{name}") for digest in present))
        return self._recipes[document]

    def _needed_by_removed_version(self, digest: Digest) -> set[Digest]:
        """Return the blobs that a removed version would need; an unreadable manifest needs only itself."""
        try:
            return self._needed_by_version(digest, digest)
        except IntegrityError:
            return {digest}


def _damage_error(location: str, problem: str) -> IntegrityError:
    return IntegrityError(location, f"{problem}; nothing was removed", "Check the registry", code="check-registry")


def _collect(
    store: Store,
    needs: NeededBlobs,
    locked: Callable[[], AbstractContextManager[None]],
    result: GcResult,
    *,
    grace: float,
    progress: Progress | None = None,
) -> None:
    """Remove what has not been needed for `grace` seconds, and record it in `result`."""
    with locked():
        if not result.dry_run:
            store.restore_set_aside()
        needed = needs.update()
        # At least an hour, even without a grace period: a process may be writing a file that has no lease.
        _remove_leftovers(store, needed, result, max(grace, _UNOWNED_AGE))
    remove_conversions(store, result, max(grace, _UNOWNED_AGE))
    manifests = needs.manifests()
    plain = {f"sha256:{path.name}" for path in store.blobs() if is_hex(path.name) and path.is_file()}
    present = plain | set(store.packs.digests())
    # A pack must go before the parent that it needs to be unpacked.
    unneeded = children_first(present - needed, needs.parents)
    # Manifests first: a version without its manifest is gone, one without a file would be damaged.
    unneeded.sort(key=lambda digest: digest not in manifests)
    removed: set[Digest] = set()
    for start in range(0, len(unneeded), _BATCH_SIZE):
        # The write lock is released between batches, so that pushes need not wait for the whole gc.
        with locked():
            needed = needs.update()
            children = Counter(parent for digest, parent in needs.parents.items() if digest not in removed)
            for digest in unneeded[start : start + _BATCH_SIZE]:
                if digest not in needed and _remove_blob(store, digest, result, grace, has_child=children[digest] > 0):
                    removed.add(digest)
                    children[needs.parents.get(digest, "")] -= 1
        if progress:
            progress(min(start + _BATCH_SIZE, len(unneeded)), len(unneeded))
    for path in (*store.blobs(), *store.packs.files()):
        if f"sha256:{path.name}" in needs.spared:
            with contextlib.suppress(FileNotFoundError):  # another process packed, unpacked or removed it in the meantime
                result.waiting_size += store.files.status(path).st_size
                result.waiting += 1
    # Makes the removals durable.
    if result.blobs and not result.dry_run:
        store.sync_blobs()


def _remove_blob(store: Store, digest: Digest, result: GcResult, grace: float, *, has_child: bool) -> bool:
    """Remove a blob, plain and packed, unless it is young or `has_child`; return whether it has no pack any more.

    `has_child`: The pack of another blob is a delta to this one.
    """
    # The pack first: whether it is gone decides whether its parent may go.
    pack_gone = _remove_file(store, store.packs.path(digest), result, grace, has_child=has_child)
    plain_gone = _remove_file(store, store.blob_path(digest), result, grace, has_child=has_child)
    if pack_gone and plain_gone and not result.dry_run:
        with local_errors(store.tensors.folder), contextlib.suppress(FileNotFoundError, PermissionError):
            store.files.remove(store.tensors.path(digest))
    return pack_gone


def _remove_file(store: Store, path: Path, result: GcResult, grace: float, *, has_child: bool) -> bool:
    """Remove a file unless it is young or `has_child`; return whether it is gone, or would be."""
    with local_errors(path):
        try:
            status = store.files.status(path)
            stays = has_child or status.st_mtime > time.time() - grace
            if not stays and not result.dry_run:
                store.files.remove(path)
        except FileNotFoundError:
            return True  # another gc was first
        except PermissionError:  # another user's, in a folder with the sticky bit, or open on Windows
            stays = True
    if stays:
        result.waiting += 1
        result.waiting_size += status.st_size
    else:
        result.blobs += 1
        result.size += status.st_size
    return not stays


def remove_conversions(store: Store, result: GcResult, age: float) -> None:
    """Remove cached conversions that were not used for `age` seconds; using a conversion renews it first."""
    for folder in store.conversions():
        # Another gc was first, or the folder is nested too deeply to be a conversion, and stays.
        with contextlib.suppress(OSError, RecursionError):
            if store.files.status(folder).st_mtime > time.time() - age:
                continue
            size = sum(status.st_size for _, status in walk(folder) if not stat.S_ISDIR(status.st_mode))
            if not result.dry_run:
                store.files.remove_tree(folder)
            result.conversions += 1
            result.conversion_size += size


def _remove_leftovers(store: Store, needed: set[Digest], result: GcResult, age: float) -> None:
    """Remove files of killed processes; under the write lock, after a replay, when no move is unfinished."""
    with local_errors(store.root):
        strays = (*store.stray_lists(needed), *store.stray_signatures(needed))
        for path in (*store.leftovers(age), *store.files.list_folder(store.root / "pending"), *strays):
            try:
                size = store.files.status(path).st_size
                if not result.dry_run:
                    store.files.remove(path)
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                continue
            result.leftovers += 1
            result.leftover_size += size
