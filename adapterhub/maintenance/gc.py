"""What of a store nothing needs any more, and its removal; never what a version, a base, a push at work or an open read needs.

What is needed comes from the logs alone, all of which must read well: a log or a manifest that doesn't might need anything, so
then nothing is removed. Blobs go in batches under the write lock, and before each batch it is looked again at what moved
meanwhile and what leases say. A push looks under the same lock whether all its blobs are there still before it names them, and
puts back those that went, so that no clock, lease or grace time has to be right for nothing to be lost.

A version's manifest goes before its files, and a version's name long before both: killed anywhere, only blobs that no version
needs are left. A packed blob needs the one it is a difference to, so it goes before that.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub.digest import Digest, is_hex
from adapterhub.index.database import Row
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.store import named_documents
from adapterhub.store.packs.chains import children_first, with_parents
from adapterhub.store.store import BASES, MERGES, REFS, Entry, Store, local_errors
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RefusedError

Progress = Callable[[int, int], None]
_BATCH = 256  # blobs, a few hundredths of a second during which no ref can move
_UNOWNED = 3600.0  # seconds that a temporary file of no known lease is left alone at least


@dataclass
class Swept:
    """What a collection removed, or with `dry_run` would.

    Attributes:
        dropped: Versions that were not to be kept.
        parents: Versions that were not to be kept either, but that something was made from which stays.
        blobs: How many blobs, plain or packed, nothing needed, of `size` bytes on the disk.
        conversions: How many kept conversions nobody used of late, of `conversion_size` bytes.
        leftovers: Files of killed processes, of `leftover_size` bytes.
        waiting: Blobs that nothing needs and that stay for now, of `waiting_size` bytes: too young or let go too lately,
            needed by a push or a read at work or to unpack another that stays, or not ours to remove.
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


def unkept(rows: Iterable[Row], last: int) -> dict[int, Digest]:
    """The versions that are neither among the `last` newest nor have a tag; `rows` are the newest first."""
    return {row.number: row.digest for at, row in enumerate(rows) if at >= last and not row.tags}


@dataclass
class _Log:
    """One name as far as its log was read: its versions, the digests it ever named, and what it let go when.

    A base or a recipe has one version, number 1, whose digest is that of its document.
    """

    seq: int = 0
    head: Digest = ""
    versions: dict[int, Digest] = field(default_factory=dict)
    named: set[Digest] = field(default_factory=set)
    let_go: list[tuple[float, Digest]] = field(default_factory=list)


class Needs:
    """Which blobs are needed; `update` under the write lock brings it up to date.

    `spared` are those that no version needs, but somebody at work, or whoever would undo what was done not long ago. `parents`
    are what packs are differences to.
    """

    def __init__(self, store: Store, known: Callable[[], dict[str, int]], grace: float, unkept: dict[str, list[int]]) -> None:
        self._store = store
        self._known = known  # how far each log goes, as the catalog remembers
        self._grace = grace
        self._since = time.time() - grace
        self._unkept = unkept
        self._logs: dict[str, _Log] = {}
        self._shelved: dict[tuple[str, str], _Log] = {}
        self._recipes: dict[Digest, set[Digest]] = {}
        self._blobs: dict[Digest, set[Digest]] = {}
        self.spared: set[Digest] = set()
        self.parents: dict[Digest, Digest] = {}

    def update(self) -> set[Digest]:
        """The blobs that are needed now; IntegrityError or RefusedError where that cannot be known."""
        for path in self._store.unknown():
            what = "is not known to this adapterhub and may need any of the blobs; nothing was removed"
            raise RefusedError(str(path), what, "Upgrade adapterhub, or move that folder elsewhere")
        known = self._known()
        for name in sorted({*self._store.names(), *known}):
            self._read(name, known.get(name, 0))
        for kind in (BASES, MERGES):
            for name in self._store.shelved(kind):
                self._read_shelved(kind, name)
        needed, spared = self._of_versions()
        for (kind, name), log in self._shelved.items():
            needed.update(log.versions.values())
            spared.update(digest for when, digest in log.let_go if when > self._since)
            if kind == MERGES:
                needed.update(*(self._of_recipe(digest, name) for digest in log.versions.values()))
                for digest in [digest for when, digest in log.let_go if when > self._since]:
                    with contextlib.suppress(AdapterhubError):  # what cannot be read any more needs nothing
                        spared |= self._of_recipe(digest, name)
        leased = self._store.leased()
        spared |= leased
        for digest in leased & self.manifests():
            spared |= self._of_gone(digest)
        return self._with_parents(needed, spared)

    def _of_versions(self) -> tuple[set[Digest], set[Digest]]:
        """What versions need, and what those would that were let go not long ago."""
        needed: set[Digest] = set()
        spared: set[Digest] = set()
        for name, log in self._logs.items():
            for number, digest in log.versions.items():
                if number not in self._unkept.get(name, ()):
                    needed |= self._of(digest, f"{name}:v{number}")
                elif self._grace:  # a dry run: it would have been dropped just now
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
            if digest in heads and heads[digest] is None and not self._store.blob_path(digest).exists():
                what = "cannot be read, so it isn't known what it is a difference to; nothing was removed"
                raise IntegrityError(str(self._store.packs.path(digest)), what, "Run `adapterhub fsck`")
        self.spared = with_parents(spared, self.parents) - needed
        return needed | self.spared

    def manifests(self) -> set[Digest]:
        """Every digest that a log ever named."""
        return set().union(*(log.named for log in self._logs.values()))

    def _read(self, name: str, known: int) -> None:
        """Go on where the log of a name was left."""
        log = self._logs.get(name, _Log())
        for entry, when in self._entries(name, log, known, REFS):
            if entry.op == "push":
                log.versions[entry.number] = entry.digest
                log.named.add(entry.digest)
            gone = list(log.versions) if entry.op == "delete" else entry.numbers if entry.op == "drop" else ()
            log.let_go += [(when, log.versions.pop(number)) for number in gone if number in log.versions]
        self._logs[name] = log

    def _read_shelved(self, kind: str, name: str) -> None:
        """The same of a base or a recipe, whose document goes when the name is freed or another takes its place."""
        log = self._shelved.get((kind, name), _Log())
        for entry, when in self._entries(name, log, 0, kind):
            log.let_go += [(when, digest) for digest in log.versions.values()]
            log.versions = {1: entry.digest} if entry.op == "push" else {}
        self._shelved[kind, name] = log

    def _entries(self, name: str, log: _Log, known: int, kind: str) -> Iterator[tuple[Entry, float]]:
        """The entries that `log` lacks, with the times when they were written."""
        first = log.seq == 0
        while found := self._store.entry(name, log.seq + 1, log=kind):
            entry, digest = found
            path = self._store.entry_path(name, entry.seq, log=kind)
            if entry.previous != log.head:
                raise IntegrityError(
                    str(path), "does not follow the entry before it; nothing was removed", "Run `adapterhub fsck`"
                )
            log.seq, log.head = entry.seq, digest
            yield entry, path.stat().st_mtime
        if log.seq < known or (first and self._store.has_entry_after(name, log.seq, log=kind)):
            path = self._store.entry_path(name, log.seq + 1, log=kind)
            raise IntegrityError(
                str(path), "is missing, though later ones are known; nothing was removed", "Run `adapterhub fsck`"
            )

    def _of(self, digest: Digest, where: str) -> set[Digest]:
        if digest not in self._blobs:
            try:
                made = oci_manifest.parse(self._store.read_document(digest), where)
            except AdapterhubError as error:
                what = "its manifest cannot be read, so it isn't known what it needs; nothing was removed"
                raise IntegrityError(where, what, "Run `adapterhub fsck`") from error
            self._blobs[digest] = {digest, made.config.digest, *(layer.digest for layer in made.layers)}
        return self._blobs[digest]

    def _of_recipe(self, document: Digest, name: str) -> set[Digest]:
        """What the adapters of a recipe need, as far as they are here."""
        if document not in self._recipes:
            try:
                named = named_documents.adapters(self._store, document)
            except AdapterhubError as error:
                what = "its recipe cannot be read, so it isn't known what it needs; nothing was removed"
                raise IntegrityError(f"merge:{name}", what, "Run `adapterhub fsck`") from error
            there = [digest for digest in named if self._store.size(digest) is not None]
            self._recipes[document] = set().union(*(self._of(digest, f"merge:{name}") for digest in there))
        return self._recipes[document]

    def _of_gone(self, digest: Digest) -> set[Digest]:
        """The same of a version that was let go: what cannot be read any more needs nothing."""
        try:
            return self._of(digest, digest)
        except IntegrityError:
            return {digest}


def collect(
    store: Store,
    needs: Needs,
    locked: Callable[[], AbstractContextManager[None]],
    swept: Swept,
    *,
    grace: float,
    progress: Progress | None = None,
) -> None:
    """Remove what isn't needed and has been so for `grace` seconds; `swept` says what became of it."""
    with locked():
        needed = needs.update()
        _remove_leftovers(store, needed, swept, max(grace, _UNOWNED))
    _remove_conversions(store, swept, max(grace, _UNOWNED))
    manifests = needs.manifests()
    there = {f"sha256:{path.name}" for path in store.blobs() if is_hex(path.name)} | set(store.packs.digests())
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
            swept.waiting += 1
            swept.waiting_size += path.stat().st_size
    if swept.blobs and not swept.dry_run:
        store.sync_blobs()


def _remove_blob(store: Store, digest: Digest, swept: Swept, grace: float, *, held: bool) -> bool:
    """Remove a blob, plain or packed or both, unless it is young or `held`; whether no pack of it is left."""
    packed = _remove_file(store.packs.path(digest), swept, grace, held=held)
    plain = _remove_file(store.blob_path(digest), swept, grace, held=held)
    if packed and plain and not swept.dry_run:
        with local_errors(store.tensors.folder), contextlib.suppress(FileNotFoundError, PermissionError):
            store.tensors.path(digest).unlink()  # what was said of it
    return packed


def _remove_file(path: Path, swept: Swept, grace: float, *, held: bool) -> bool:
    """Remove a file unless it is young or `held`; whether it is gone, or would be."""
    with local_errors(path):
        try:
            status = path.stat()
            stays = held or status.st_mtime > time.time() - grace
            if not stays and not swept.dry_run:
                path.unlink()
        except FileNotFoundError:
            return True  # another gc was first
        except PermissionError:  # another user's in a folder with the sticky bit, or open on Windows
            stays = True
    if stays:
        swept.waiting += 1
        swept.waiting_size += status.st_size
    else:
        swept.blobs += 1
        swept.size += status.st_size
    return not stays


def _remove_conversions(store: Store, swept: Swept, age: float) -> None:
    """Conversions that `pull --as` kept and nobody has used for `age` seconds; whoever uses one makes it young first."""
    for folder in store.conversions():
        with contextlib.suppress(OSError):  # another gc was first
            if folder.stat().st_mtime > time.time() - age:
                continue
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if not swept.dry_run:
                shutil.rmtree(folder)
            swept.conversions += 1
            swept.conversion_size += size


def _remove_leftovers(store: Store, needed: set[Digest], swept: Swept, age: float) -> None:
    """Under the write lock, after the logs were replayed: then a move that seems unfinished isn't."""
    with local_errors(store.root):
        for path in (*store.leftovers(age), *sorted((store.root / "pending").iterdir()), *store.stray_lists(needed)):
            try:
                size = path.stat().st_size
                if not swept.dry_run:
                    path.unlink()
            except (FileNotFoundError, PermissionError):
                continue
            swept.leftovers += 1
            swept.leftover_size += size
