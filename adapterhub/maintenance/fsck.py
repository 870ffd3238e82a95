"""Checks that every blob matches its digest, and that logs, registry.db and index.json agree.

Everything is reported and nothing is changed, except by `open_rebuilt`. An error means that promised data is missing or wrong;
a note means harmless leftovers, such as those of a killed push. What versions need follows from the logs; registry.db is only
compared with them. Others may write meanwhile, so an error about a name is checked again under the write lock before it is
reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from adapterhub.digest import Digest, copy_hashing, is_hex
from adapterhub.index import queries
from adapterhub.index.index_database import Index
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.registry import repository_records
from adapterhub.registry.registry import Registry
from adapterhub.store import leases, named_documents, tensor_digests
from adapterhub.store.packs.pack_chains import with_parents
from adapterhub.store.store import BASES, DOCUMENTS, HUB, MERGES, REFS, ByteCounter, Progress, Store, counter, local_errors
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from .findings import GC, REBUILD, REPAIR, REPAIR_MISSING, Finding, Findings
from .index_check import Catalog
from .verify import blob_finding, compare_facts

if TYPE_CHECKING:
    from adapterhub.store.packs.container import PackHead

Predicate = Callable[[Digest], bool]
_REF_PREFIXES = {BASES: "base", MERGES: "merge", HUB: "hub"}


@dataclass(frozen=True)
class Scope:
    """Which blobs an fsck reads: those of one part, stored since a time. The others are trusted if they have the right size.

    Attributes:
        since: Seconds of Unix time.
        part: The number of the part, from 1.
        parts: The number of parts into which the digests divide the blobs; each blob is in one of them.
    """

    since: float = 0.0
    part: int = 1
    parts: int = 1

    def includes(self, digest: Digest, stored: float = float("inf")) -> bool:
        """Return whether a blob is read that was stored at a time, in seconds of Unix time."""
        return stored >= self.since and int(digest[7:23], 16) % self.parts == self.part - 1

    def predicate(self, store: Store) -> Predicate:
        """Return what tells whether a blob is read; one that is not in the store may be in a bucket, and is never too old."""
        # Decided once, before anything is read: what is packed meanwhile becomes no newer.
        stored = {digest: _stored_at(store, digest) for digest in _stored_digests(store)} if self.since else {}
        return lambda digest: self.includes(digest, stored.get(digest, float("inf")))


EVERYTHING = Scope()


def _stored_at(store: Store, digest: Digest) -> float:
    """Return when a blob was stored or packed, in seconds of Unix time; infinity for one that was removed meanwhile."""
    times = []
    for path in (store.blob_path(digest), store.packs.path(digest)):
        with contextlib.suppress(FileNotFoundError):
            times.append(store.files.status(path).st_mtime)
    return max(times, default=float("inf"))


def fsck(registry: Registry, *, scope: Scope | None = EVERYTHING, progress: Progress | None = None) -> Findings:
    """Check a whole registry: all logs and refs, and the bytes of the blobs in `scope`, of none without one.

    `progress` is called with bytes read and total bytes.
    """
    store, index = registry.store, registry.index
    damaged: dict[Digest, Finding] = {}
    is_read = scope.predicate(store) if scope else lambda _: False
    count_bytes = counter(progress, _total_size(store, is_read)) if scope else None
    findings = list(_check_blobs(store, is_read, damaged, count_bytes))
    needed: set[Digest] = set()
    catalog = Catalog(index, store)
    names, unreadable = catalog.names()
    findings += unreadable
    # Name by name, so that a recheck under the write lock never blocks writers for long.
    for name in sorted(names):
        findings += _confirmed_findings(registry, partial(_check_name, catalog, name, needed, damaged, is_read))
    for log in DOCUMENTS:
        for name in store.log.document_names(log):
            findings += _confirmed_findings(registry, partial(_check_document, store, name, log, needed, damaged))
    # A wrong list of tensors would only cause follow-up errors in the comparison with the index.
    has_right_lists = scope is not None and all(finding.code != "wrong-tensors" for finding in findings)
    findings += _confirmed_findings(registry, partial(catalog.inconsistencies, is_read if has_right_lists else None))
    findings += _confirmed_findings(registry, partial(_check_index_file, store, index))
    # Only now has everything that is needed been collected.
    findings += _orphan_findings(store, needed)
    findings += _tensor_list_findings(store, needed)
    findings += _leftover_findings(store)
    findings += [Finding("foreign", "note", str(path), "not the log of a name") for path in store.log.stray_folders()]
    return findings


def _confirmed_findings(registry: Registry, check: Callable[[], Iterable[Finding]]) -> Findings:
    """Return the findings of a check, keeping errors only if they persist under the write lock with all moves finished."""
    first_findings = list(check())
    if all(finding.severity == "note" for finding in first_findings):
        return first_findings
    with registry.write_lock():
        registry.ledger.finish_moves()
        return list(check())


def _check_index_file(store: Store, index: Index) -> Iterator[Finding]:
    """Check that index.json has the same refs as registry.db."""
    with contextlib.suppress(IntegrityError):  # registry.db is unreadable, which `Catalog` reports
        if store.index_file.has_exactly(queries.ref_lines(index)):
            return
    problem = "does not have the refs of registry.db"
    yield Finding("index-behind", "error", str(store.index_file.path), problem, *REBUILD)


def open_rebuilt(path: Path) -> tuple[Registry, Findings]:
    """Open a registry with its index rebuilt from the logs, with a finding for each log that could not be replayed."""
    registry, errors = Registry.open_with_new_index(path)
    return registry, broken_log_findings(errors)


def broken_log_findings(errors: list[AdapterhubError]) -> Findings:
    """Convert the errors of a rebuild into findings."""
    return [Finding("broken-log", "error", error.where, error.what, error.hint, error.code, error.fields) for error in errors]


# ---- blobs


def _stored_digests(store: Store) -> set[Digest]:
    """Return the digests of all blobs, plain and packed."""
    return {f"sha256:{path.name}" for path in store.blobs() if is_hex(path.name)}.union(store.packs.digests())


def _total_size(store: Store, is_read: Predicate) -> int:
    """Return the total size of blobs in bytes, counting packed blobs unpacked."""
    plain = sum(
        store.stored_size(f"sha256:{path.name}")
        for path in store.blobs()
        if is_hex(path.name) and is_read(f"sha256:{path.name}")
    )
    heads = (_head(store, digest) for digest in store.packs.digests() if is_read(digest))
    return plain + sum(head.size for head in heads if head)


def _stored_file_size(store: Store, path: Path) -> int:
    try:
        return store.files.status(path).st_size
    except FileNotFoundError:  # removed in the meantime
        return 0


def _head(store: Store, digest: Digest) -> PackHead | None:
    with contextlib.suppress(AdapterhubError):
        return store.packs.head(digest)
    return None


def _check_blobs(
    store: Store, is_read: Predicate, damaged: dict[Digest, Finding], count_bytes: ByteCounter | None
) -> Iterator[Finding]:
    """Compare plain blobs and packs with their names, recording damaged ones in `damaged` by digest.

    `is_read` tells whose bytes are read.
    """
    for path in store.blobs():
        if not is_hex(path.name) or not store.files.is_file(path):
            yield Finding("foreign", "note", str(path), "not a blob")
            continue
        digest = f"sha256:{path.name}"
        if not is_read(digest):
            continue
        try:
            with local_errors(path), store.files.open(path) as file:
                yield from _check_hash(store, digest, file, damaged, count_bytes)
        except LocalIOError as error:
            if store.files.exists(path):  # otherwise a gc has removed it in the meantime
                damaged[digest] = Finding("unreadable", "error", error.where, error.what, *REPAIR)
                yield damaged[digest]
    yield from _check_packs(store, is_read, damaged, count_bytes)


def _check_hash(
    store: Store, digest: Digest, file: BinaryIO, damaged: dict[Digest, Finding], count_bytes: ByteCounter | None
) -> Iterator[Finding]:
    """Compare the bytes of a plain blob with its name, and its tensors with its list, if it has one."""
    listed = store.tensors.read(digest)
    with local_errors(store.blob_path(digest)):
        if listed is None:
            actual_digest, tensors = copy_hashing(file, None, on_bytes=count_bytes)[0], None
        else:
            actual_digest, tensors = tensor_digests.digests(file, os.fstat(file.fileno()).st_size, count_bytes)
    if actual_digest != digest:
        problem = "its bytes do not have the digest of its name"
        damaged[digest] = Finding("flipped", "error", str(store.blob_path(digest)), problem, *REPAIR)
        yield damaged[digest]
    elif tensors != listed:
        problem, hint = "lists other tensors than the blob has", "Delete that file, then rebuild the index"
        yield Finding("wrong-tensors", "error", str(store.tensors.path(digest)), problem, hint, "delete-and-rebuild")


def _check_packs(
    store: Store, is_read: Predicate, damaged: dict[Digest, Finding], count_bytes: ByteCounter | None
) -> Iterator[Finding]:
    """Open every pack, unpack those of `is_read`, and compare the bytes with their names."""
    packed = set(store.packs.digests())
    for path in store.packs.files():
        digest = f"sha256:{path.name}"
        if digest not in packed:
            yield Finding("foreign", "note", str(path), "not a pack")
            continue
        try:
            with store.open_pack(digest) as file:
                if not is_read(digest) or copy_hashing(file, None, on_bytes=count_bytes)[0] == digest:
                    continue
            problem = "the unpacked bytes do not have the digest of its name"
        except NotFoundError:  # unpacked, or removed by a gc, in the meantime
            continue
        except IntegrityError as error:
            problem = error.what if error.where == str(path) else f"{error.where}: {error.what}"
        finding = Finding("broken-pack", "error", str(path), problem, *REPAIR)
        # With a right plain file, the broken pack costs nothing: the version itself is not damaged.
        if not store.has_plain(digest):
            damaged[digest] = finding
        yield finding


# ---- logs and what they refer to


def _check_name(
    catalog: Catalog, name: str, needed: set[Digest], damaged: dict[Digest, Finding], is_read: Predicate
) -> Iterator[Finding]:
    """Check that the log of a name can be replayed, that its versions are complete, and that registry.db agrees.

    What is in the documents of versions is compared where `is_read` holds for one of their manifests.
    """
    store = catalog.store
    with catalog.replayed_log(name) as log:
        if log.error:
            yield Finding("broken-log", "error", log.error.where, log.error.what, f"No later entry of {name} can be trusted")
        elif later := _later_entry(store, name, log.state.seq):
            missing_entry = str(store.log.path(name, log.state.seq + 1))
            yield Finding("broken-log", "error", missing_entry, f"is missing; {later} follows it")
        is_complete = True
        for row in log.rows:
            manifest = Descriptor(oci_manifest.MANIFEST_TYPE, row.digest, row.manifest_size)
            for finding in _check_version(store, str(row.ref), manifest, needed, damaged, facts=is_read(row.digest)):
                # Wrong facts are a fault of adapter.json: the documents are readable and indexed as they are.
                is_complete &= finding.code == "wrong-facts"
                yield finding
        for number, reason in log.unindexed.items():
            problem = f"is not found by searches: its documents cannot be read ({reason})"
            yield Finding("not-indexed", "note", f"{name}:v{number}", problem)
        if log.error is None:
            has_read = not log.rows or any(is_read(row.digest) for row in log.rows)
            yield from catalog.differences(log, documents=is_complete and has_read)


def _later_entry(store: Store, name: str, seq: int, log: str = REFS) -> str:
    """Return the file name of an entry beyond the last reachable one; empty if there is none."""
    return min((path.name for path in store.log.files_after(name, seq, log=log)), default="")


def _check_version(
    store: Store, ref: str, manifest: Descriptor, needed: set[Digest], damaged: dict[Digest, Finding], *, facts: bool = False
) -> Iterator[Finding]:
    """Check that a version's blobs are present and, with `facts`, that its adapter.json matches its weights."""
    needed.add(manifest.digest)
    finding = blob_finding(store, ref, manifest, damaged)
    if finding:
        yield finding
        return
    if manifest.digest in damaged:
        return  # reported with the blob already
    try:
        content = oci_manifest.parse(store.read_document(manifest.digest), ref)
    except AdapterhubError as error:
        yield Finding("bad-manifest", "error", ref, error.what)
        return
    is_complete = True
    for blob in (content.config, *content.layers):
        needed.add(blob.digest)
        if finding := blob_finding(store, ref, blob, damaged):
            is_complete = False
            yield finding
    if facts and is_complete:
        yield from compare_facts(store, ref, content)


def _check_document(
    store: Store, name: str, log: str, needed: set[Digest], damaged: dict[Digest, Finding]
) -> Iterator[Finding]:
    """Check that the log of a base, a recipe or a hub repository can be replayed and that its document exists.

    The adapters of a recipe and the blobs of a repository are checked too.
    """
    ref = f"{_REF_PREFIXES[log]}:{name}"
    try:
        state = named_documents.current(store, name, log=log)
    except AdapterhubError as error:
        yield Finding("broken-log", "error", error.where, error.what, f"No later entry of {ref} can be trusted")
        return
    seq = state.entry.seq if state.entry else 0
    if later := _later_entry(store, name, seq, log):
        yield Finding("broken-log", "error", str(store.log.path(name, seq + 1, log=log)), f"is missing; {later} follows it")
    if state.exists and state.entry:
        needed.add(state.entry.digest)
        finding = blob_finding(
            store, ref, Descriptor("application/json", state.entry.digest, state.entry.size, "its document"), damaged
        )
        if finding:
            with_base_hint = dataclasses.replace(finding, hint=f"Add the base {name} again", remedy="add-base")
            yield with_base_hint if finding.code == "missing" and log == BASES else finding
        elif log == MERGES:
            yield from _check_recipe(store, ref, state.entry.digest, needed, damaged)
        elif log == HUB:
            yield from _check_repository(store, ref, state.entry.digest, needed)


def _check_repository(store: Store, ref: str, document: Digest, needed: set[Digest]) -> Iterator[Finding]:
    """Check that the commits and manifests that a hub keeps, and their blobs, are present."""
    try:
        blobs = repository_records.required_blobs(store, document)
    except AdapterhubError as error:
        yield Finding("damaged", "error", ref, f"its document cannot be read: {error.what}", *REPAIR)
        return
    needed |= blobs
    for digest in sorted(blobs):
        if store.size(digest) is None:
            yield Finding("missing", "error", ref, f"blob {digest} is missing", *REPAIR_MISSING)


def _check_recipe(
    store: Store, ref: str, document: Digest, needed: set[Digest], damaged: dict[Digest, Finding]
) -> Iterator[Finding]:
    """Check that the adapters of a recipe are in this registry, unless they have a URL."""
    try:
        sources = named_documents.adapters(store, document)
    except AdapterhubError as error:
        yield Finding("damaged", "error", ref, f"its document cannot be read: {error.what}", *REPAIR)
        return
    for digest, source in sources.items():
        size = store.size(digest)
        if size is not None:
            yield from _check_version(
                store, f"{ref}, {source}", Descriptor(oci_manifest.MANIFEST_TYPE, digest, size), needed, damaged
            )
        elif "://" not in source:
            problem = f"{source}: adapter {digest} is missing"
            yield Finding("missing", "error", ref, problem, "Push or copy that adapter here again")


# ---- leftovers


def _orphan_findings(store: Store, needed: set[Digest]) -> Iterator[Finding]:
    """Report blobs and packs that no log needs."""
    needed = with_parents(needed, store.packs.parents())
    unused = [path for path in (*store.blobs(), *store.packs.files()) if f"sha256:{path.name}" not in needed]
    if unused:
        size = sum(_stored_file_size(store, path) for path in unused)
        problem = (
            f"{len(unused)} blobs of {size} bytes belong to no version or base: they were removed, or left by a killed push"
        )
        yield Finding("orphans", "note", str(store.root / "blobs"), problem, *GC)


def _tensor_list_findings(store: Store, needed: set[Digest]) -> Iterator[Finding]:
    """Report stray, foreign and incomplete lists of tensors."""
    for path in store.tensors.files():
        if not is_hex(path.name):
            yield Finding("foreign", "note", str(path), "not a list of tensors")
    if stray_lists := store.stray_lists(needed):
        problem = f"{len(stray_lists)} lists of the tensors of removed blobs"
        yield Finding("leftovers", "note", str(store.tensors.folder), problem, *GC)
    if incomplete := [
        digest for digest in store.tensors.digests() if store.tensors.read(digest) is None and store.stored_size(digest)
    ]:
        problem = f"{len(incomplete)} incomplete lists of tensors; they are made again when a search needs them"
        yield Finding("unlisted", "note", str(store.tensors.folder), problem)


def _leftover_findings(store: Store) -> Iterator[Finding]:
    """Report what killed processes left behind."""
    for folder, kind in (("tmp", "temporary files of killed commands"), ("pending", "unfinished moves")):
        count = len(store.files.list_folder(store.root / folder))
        if count:
            yield Finding("leftovers", "note", str(store.root / folder), f"{count} {kind}", *GC)
    if count := len(leases.dead_leases(store.files)):
        yield Finding("leftovers", "note", str(store.root / "leases"), f"{count} leases of killed commands", *GC)
