"""Garbage collection: removes the blobs that no version, base, recipe, running push or open read needs.

What is needed comes from the logs alone, all of which must be readable: a damaged log or manifest might need any blob, so then
nothing is removed. Blobs are removed in batches under the write lock, and before each batch, logs and leases are read again. A
push checks under the same lock that all its blobs exist before it names them, and stores removed ones again, so that safety
depends on no clock, lease or grace period.

A version's manifest is removed before its files, and a version's name long before both: killed at any time, a gc leaves only
blobs that no version needs. A packed blob is removed before the parent that it needs.
"""

from __future__ import annotations

import contextlib
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub.digest import Digest, is_hex
from adapterhub.index import index_file, queries, replay
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry import repositories
from adapterhub.registry.registry import Registry
from adapterhub.store import named_documents
from adapterhub.store.packs.chains import children_first, with_parents
from adapterhub.store.store import DOCUMENTS, HUB, MERGES, REFS, Entry, Store, local_errors
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RefusedError

from . import retention

Progress = Callable[[int, int], None]
"""Called with blobs done and the number of blobs."""
GRACE = 24.0
"""Hours that a blob stays after no version needs it any more."""
_BATCH = 256  # blobs: a few hundredths of a second in which no ref can move
_UNOWNED = 3600.0  # seconds that a temporary file without a lease stays at least


@dataclass
class Swept:
    """What a gc removed, or with `dry_run` would remove.

    Attributes:
        dropped: Versions that need not be kept.
        parents: Versions that need not be kept either, but from which something that stays was made.
        blobs: Number of blobs, plain or packed, that nothing needed, of `size` bytes on the disk.
        conversions: Number of cached conversions that were not used lately, of `conversion_size` bytes.
        leftovers: Files of killed processes, of `leftover_size` bytes.
        waiting: Blobs that nothing needs and that stay for now, of `waiting_size` bytes: too young, needed by a running push or
            read or by the pack of another that stays, or owned by another user.
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


def gc(
    registry: Registry,
    *,
    grace: float = GRACE,
    last: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Swept:
    """Drop the versions that need not be kept; remove what nothing needs, and what killed processes left.

    Args:
        registry: The registry.
        grace: Hours that a blob stays after it was stored or let go.
        last: Number of newest versions to keep, besides the tagged ones, of names without a setting (`retention.keep`).
        dry_run: Change nothing.
        progress: Called with blobs done and the number of blobs.
    """
    dropped = retention.drop(registry, last, dry_run=dry_run)
    swept = Swept(dry_run, dropped.refs, dropped.parents)
    store = registry.store
    needs = Needs(
        store,
        lambda: {name.name: name.seq for name in queries.names(registry.index)},
        grace * 3600,
        dropped.numbers if dry_run else {},
    )

    @contextmanager
    def locked() -> Iterator[None]:
        with registry.locked():
            for name in store.log.names():
                replay.catch_up(registry.index, store, name)
            # A writer killed here may not have written index.json.
            if store.log.pending_moves() and not store.index_file.has_exactly(queries.ref_lines(registry.index)):
                index_file.write(registry.index, store)
            yield

    _collect(store, needs, locked, swept, grace=grace * 3600, progress=progress)
    return swept


@dataclass
class _Log:
    """The state of a name's log: its versions, all digests it has named, and what it let go at which time.

    `removed` are the versions that the last removal of the name took, which may be restored.
    A base or a recipe has one version, number 1, whose digest is that of its document.
    """

    seq: int = 0
    head: Digest = ""
    versions: dict[int, Digest] = field(default_factory=dict)
    removed: dict[int, Digest] = field(default_factory=dict)
    named: set[Digest] = field(default_factory=set)
    let_go: list[tuple[float, Digest]] = field(default_factory=list)


class Needs:
    """The blobs that are needed; `update`, under the write lock, brings it up to date.

    Args:
        store: Has the logs.
        known: Returns the number of the last entry that the index has of each log.
        grace: Seconds that a blob stays after it was let go.
        unkept: Versions that are to be dropped, by name.
        written: Tells when an entry was written, of the entry and its file; by default, the time of the file.

    Attributes:
        spared: Blobs that no version needs, but a running process, or a user who undoes a recent removal.
        parents: Packed blobs to the parents they are differences to.
    """

    def __init__(
        self,
        store: Store,
        known: Callable[[], dict[str, int]],
        grace: float,
        unkept: dict[str, list[int]],
        written: Callable[[Entry, Path], float] | None = None,
    ) -> None:
        self._store = store
        self._written = written or (lambda _entry, path: store.files.status(path).st_mtime)
        self._known = known  # the last entry of each log in the index
        self._grace = grace
        self._since = time.time() - grace
        self._unkept = unkept
        self._logs: dict[str, _Log] = {}
        self._documents: dict[tuple[str, str], _Log] = {}
        self._recipes: dict[Digest, set[Digest]] = {}
        self._blobs: dict[Digest, set[Digest]] = {}
        self.spared: set[Digest] = set()
        self.parents: dict[Digest, Digest] = {}

    def update(self) -> set[Digest]:
        """Return the blobs that are needed now; IntegrityError or RefusedError where that cannot be determined."""
        for path in self._store.unknown():
            what = "unknown to this adapterhub, and may refer to any of the blobs; nothing was removed"
            raise RefusedError(str(path), what, "Upgrade adapterhub, or move that folder elsewhere", code="newer-version")
        known = self._known()
        for name in sorted({*self._store.log.names(), *known}):
            self._read(name, known.get(name, 0))
        for kind in DOCUMENTS:
            for name in self._store.log.document_names(kind):
                self._read_document_log(kind, name)
        needed, spared = self._of_versions()
        for (kind, name), log in self._documents.items():
            needed.update(log.versions.values())
            spared.update(digest for when, digest in log.let_go if when > self._since)
            if kind in (MERGES, HUB):
                needed.update(*(self._of_document(kind, digest, name) for digest in log.versions.values()))
                for digest in [digest for when, digest in log.let_go if when > self._since]:
                    with contextlib.suppress(AdapterhubError):  # an unreadable one needs nothing
                        spared |= self._of_document(kind, digest, name)
        leased = self._store.leased()
        spared |= leased
        for digest in leased & self.manifests():
            spared |= self._of_gone(digest)
        return self._with_parents(needed, spared)

    def _of_versions(self) -> tuple[set[Digest], set[Digest]]:
        """Return what versions need, and what recently dropped or removed versions would need."""
        needed: set[Digest] = set()
        spared: set[Digest] = set()
        for name, log in self._logs.items():
            for number, digest in log.versions.items():
                if number not in self._unkept.get(name, ()):
                    needed |= self._of(digest, f"{name}:v{number}")
                elif self._grace:  # in a dry run: it would just have been dropped
                    spared |= self._of_gone(digest)
            for when, digest in log.let_go:
                if when > self._since:
                    spared |= self._of_gone(digest)
        return needed, spared

    def _with_parents(self, needed: set[Digest], spared: set[Digest]) -> set[Digest]:
        heads = self._store.packs.heads()
        self.parents = {digest: parent for digest, parent in heads.items() if parent}
        needed = with_parents(needed, self.parents)
        for digest in needed:
            if digest in heads and heads[digest] is None and not self._store.has_plain(digest):
                raise _damaged(str(self._store.packs.path(digest)), "cannot be read, so that its parent is unknown")
        self.spared = with_parents(spared, self.parents) - needed
        return needed | self.spared

    def manifests(self) -> set[Digest]:
        """Return every digest that a log has ever named."""
        return set().union(*(log.named for log in self._logs.values()))

    def _read(self, name: str, known: int) -> None:
        """Read the log of a name from where it was left."""
        log = self._logs.get(name, _Log())
        for entry, when in self._entries(name, log, known, REFS):
            if entry.op == "push":
                log.versions[entry.number] = entry.digest
                log.named.add(entry.digest)
            elif entry.op == "delete":
                log.removed = dict(log.versions)
            elif entry.op == "restore":
                log.versions = {number: digest for number, digest in log.removed.items() if number in entry.numbers}
            gone = list(log.versions) if entry.op == "delete" else entry.numbers if entry.op == "drop" else ()
            log.let_go += [(when, log.versions.pop(number)) for number in gone if number in log.versions]
        self._logs[name] = log

    def _read_document_log(self, kind: str, name: str) -> None:
        """Read the log of a base or a recipe, whose document is let go when the name is freed or replaced."""
        log = self._documents.get((kind, name), _Log())
        for entry, when in self._entries(name, log, 0, kind):
            log.let_go += [(when, digest) for digest in log.versions.values()]
            log.versions = {1: entry.digest} if entry.op == "push" else {}
        self._documents[kind, name] = log

    def _entries(self, name: str, log: _Log, known: int, kind: str) -> Iterator[tuple[Entry, float]]:
        """Yield the entries that `log` lacks, with the times they were written at."""
        first = log.seq == 0
        while found := self._store.log.entry(name, log.seq + 1, log=kind):
            entry, digest = found
            path = self._store.log.path(name, entry.seq, log=kind)
            if entry.previous != log.head:
                raise _damaged(str(path), "does not follow the entry before it")
            log.seq, log.head = entry.seq, digest
            yield entry, self._written(entry, path)
        if log.seq < known or (first and self._store.log.has_entry_after(name, log.seq, log=kind)):
            path = self._store.log.path(name, log.seq + 1, log=kind)
            raise _damaged(str(path), "is missing, although there are later ones")

    def _of(self, digest: Digest, where: str) -> set[Digest]:
        if digest not in self._blobs:
            try:
                made = oci_manifest.parse(self._store.read_document(digest), where)
            except AdapterhubError as error:
                raise _damaged(where, "its manifest cannot be read, so that the blobs it needs are unknown") from error
            self._blobs[digest] = {digest, made.config.digest, *(layer.digest for layer in made.layers)}
        return self._blobs[digest]

    def _of_document(self, kind: str, document: Digest, name: str) -> set[Digest]:
        """Return what a recipe or a repository needs besides its document."""
        return self._of_recipe(document, name) if kind == MERGES else self._of_repository(document, name)

    def _of_repository(self, document: Digest, name: str) -> set[Digest]:
        if document not in self._blobs:
            try:
                self._blobs[document] = repositories.needs(self._store, document)
            except AdapterhubError as error:
                raise _damaged(name, "what a hub keeps of it cannot be read, so that the blobs it needs are unknown") from error
        return self._blobs[document]

    def _of_recipe(self, document: Digest, name: str) -> set[Digest]:
        """Return what the adapters of a recipe need, those that are in this registry."""
        if document not in self._recipes:
            try:
                named = named_documents.adapters(self._store, document)
            except AdapterhubError as error:
                what = "its recipe cannot be read, so that the adapters it needs are unknown"
                raise _damaged(f"merge:{name}", what) from error
            there = [digest for digest in named if self._store.size(digest) is not None]
            self._recipes[document] = set().union(*(self._of(digest, f"merge:{name}") for digest in there))
        return self._recipes[document]

    def _of_gone(self, digest: Digest) -> set[Digest]:
        """Return what a removed version would need; an unreadable one needs nothing."""
        try:
            return self._of(digest, digest)
        except IntegrityError:
            return {digest}


def _damaged(where: str, what: str) -> IntegrityError:
    return IntegrityError(where, f"{what}; nothing was removed", "Check the registry", code="check-registry")


def _collect(
    store: Store,
    needs: Needs,
    locked: Callable[[], AbstractContextManager[None]],
    swept: Swept,
    *,
    grace: float,
    progress: Progress | None = None,
) -> None:
    """Remove what has not been needed for `grace` seconds, and record it in `swept`."""
    with locked():
        needed = needs.update()
        _remove_leftovers(store, needed, swept, max(grace, _UNOWNED))
    remove_conversions(store, swept, max(grace, _UNOWNED))
    manifests = needs.manifests()
    plain = {f"sha256:{path.name}" for path in store.blobs() if is_hex(path.name) and path.is_file()}
    there = plain | set(store.packs.digests())
    unneeded = children_first(there - needed, needs.parents)
    unneeded.sort(key=lambda digest: digest not in manifests)
    gone: set[Digest] = set()
    for at in range(0, len(unneeded), _BATCH):
        with locked():
            needed = needs.update()
            children = Counter(parent for digest, parent in needs.parents.items() if digest not in gone)
            for digest in unneeded[at : at + _BATCH]:
                if digest not in needed and _remove_blob(store, digest, swept, grace, held=children[digest] > 0):
                    gone.add(digest)
                    children[needs.parents.get(digest, "")] -= 1
        if progress:
            progress(min(at + _BATCH, len(unneeded)), len(unneeded))
    for path in (*store.blobs(), *store.packs.files()):
        if f"sha256:{path.name}" in needs.spared:
            with contextlib.suppress(FileNotFoundError):  # another process packed, unpacked or removed it meanwhile
                swept.waiting_size += store.files.status(path).st_size
                swept.waiting += 1
    if swept.blobs and not swept.dry_run:
        store.sync_blobs()


def _remove_blob(store: Store, digest: Digest, swept: Swept, grace: float, *, held: bool) -> bool:
    """Remove a blob, plain and packed, unless it is young or `held`; return True if it has no pack any more."""
    packed = _remove_file(store, store.packs.path(digest), swept, grace, held=held)
    plain = _remove_file(store, store.blob_path(digest), swept, grace, held=held)
    if packed and plain and not swept.dry_run:
        with local_errors(store.tensors.folder), contextlib.suppress(FileNotFoundError, PermissionError):
            store.files.remove(store.tensors.path(digest))
    return packed


def _remove_file(store: Store, path: Path, swept: Swept, grace: float, *, held: bool) -> bool:
    """Remove a file unless it is young or `held`; return True if it is gone, or would be."""
    with local_errors(path):
        try:
            status = store.files.status(path)
            stays = held or status.st_mtime > time.time() - grace
            if not stays and not swept.dry_run:
                store.files.remove(path)
        except FileNotFoundError:
            return True  # another gc was first
        except PermissionError:  # another user's, in a folder with the sticky bit, or open on Windows
            stays = True
    if stays:
        swept.waiting += 1
        swept.waiting_size += status.st_size
    else:
        swept.blobs += 1
        swept.size += status.st_size
    return not stays


def remove_conversions(store: Store, swept: Swept, age: float) -> None:
    """Remove cached conversions that were not used for `age` seconds; using one renews it first."""
    for folder in store.conversions():
        # Another gc was first; or the folder is nested so deep that it is no conversion, and stays.
        with contextlib.suppress(OSError, RecursionError):
            if store.files.status(folder).st_mtime > time.time() - age:
                continue
            size = sum(status.st_size for _, status in walk(folder) if not stat.S_ISDIR(status.st_mode))
            if not swept.dry_run:
                store.files.remove_tree(folder)
            swept.conversions += 1
            swept.conversion_size += size


def _remove_leftovers(store: Store, needed: set[Digest], swept: Swept, age: float) -> None:
    """Remove files of killed processes; under the write lock, after a replay, when no move is unfinished."""
    with local_errors(store.root):
        strays = (*store.stray_lists(needed), *store.stray_signatures(needed))
        for path in (*store.leftovers(age), *store.files.listed(store.root / "pending"), *strays):
            try:
                size = store.files.status(path).st_size
                if not swept.dry_run:
                    store.files.remove(path)
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                continue
            swept.leftovers += 1
            swept.leftover_size += size
