"""Checks that every blob has the bytes of its name, and that logs, registry.db and index.json agree.

Everything is reported, nothing is changed, except by `rebuild`. An error means that promised data is missing or wrong; a note
means harmless leftovers, such as those of a killed push. What versions need follows from the logs; registry.db is only compared
with them. Others may write meanwhile: an error about a name is examined again under the write lock before it is reported.
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
from adapterhub.index.database import Index
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import listing
from adapterhub.ref import Ref
from adapterhub.registry import repositories
from adapterhub.registry.registry import Registry
from adapterhub.store import leases, named_documents, tensor_digests
from adapterhub.store.export import linked
from adapterhub.store.packs.chains import with_parents
from adapterhub.store.store import BASES, DOCUMENTS, HUB, MERGES, REFS, More, Progress, Store, counter, local_errors
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, LocalIOError, NotFoundError, RefusedError

from .catalog import Catalog
from .findings import GC, REBUILD, REPAIR, REPAIR_MISSING, Finding, Findings

if TYPE_CHECKING:
    from adapterhub.store.packs.container import Head

_KINDS = {BASES: "base", MERGES: "merge", HUB: "hub"}


def fsck(registry: Registry, *, quick: bool = False, progress: Progress | None = None) -> Findings:
    """Check a whole registry; `quick` trusts the bytes of blobs that have the right size.

    `progress` is called with bytes read and total bytes.
    """
    store, index = registry.store, registry.index
    bad: dict[Digest, Finding] = {}
    findings = list(_blobs(store, bad, None if quick else counter(progress, _size(store)), quick=quick))
    needed: set[Digest] = set()
    catalog = Catalog(index, store)
    names, unreadable = catalog.names()
    findings += unreadable
    for name in sorted(names):
        findings += _twice(registry, partial(_name, catalog, name, needed, bad, quick=quick))
    for log in DOCUMENTS:
        for name in store.log.document_names(log):
            findings += _twice(registry, partial(_named_document, store, name, log, needed, bad))
    lists = not quick and all(finding.code != "wrong-tensors" for finding in findings)
    findings += _twice(registry, partial(catalog.inconsistencies, lists=lists))
    findings += _twice(registry, partial(_index_file, store, index))
    findings += _orphans(store, needed)
    findings += _tensor_lists(store, needed)
    findings += _leftovers(store)
    findings += [Finding("foreign", "note", str(path), "not the log of a name") for path in store.log.strange()]
    return findings


def _twice(registry: Registry, check: Callable[[], Iterable[Finding]]) -> Findings:
    """Return the findings of a check; errors only if they are found under the write lock too, with all moves finished."""
    found = list(check())
    if all(finding.severity == "note" for finding in found):
        return found
    with registry.locked():
        registry.ledger.finish_moves()
        return list(check())


def _index_file(store: Store, index: Index) -> Iterator[Finding]:
    with contextlib.suppress(IntegrityError):
        if store.index_file.has_exactly(queries.ref_lines(index)):
            return
    what = "does not have the refs of registry.db"
    yield Finding("index-behind", "error", str(store.index_file.path), what, *REBUILD)


def verify(registry: Registry, ref: Ref, progress: Progress | None = None) -> Findings:
    """Compare the bytes of a version's blobs with their digests."""
    version = registry.resolve(ref)
    made = registry.oci_manifest(version)
    blobs = (made.config, *made.layers)
    more = counter(progress, sum(blob.size for blob in blobs))
    findings = []
    for blob in blobs:
        problem = _blob(registry.store, str(version.ref), blob, {})
        if problem is None and not _is_right(registry.store, blob.digest, more):
            what = f"its bytes do not have the digest of its name ({version.ref}, {blob.path})"
            problem = Finding("flipped", "error", str(registry.store.blob_path(blob.digest)), what, *REPAIR)
        if problem:
            findings.append(problem)
    return findings or list(_facts(registry.store, str(version.ref), made))


def _facts(store: Store, ref: str, made: Manifest) -> Iterator[Finding]:
    """Compare the adapter.json of a version with the headers of its weights; weights that cannot be read are no finding."""
    if made.adapter_json is not None:
        with contextlib.suppress(NotFoundError, RefusedError, FormatError), linked(store, made.layers) as folder:
            yield from _facts_in(folder, ref)


def _facts_in(folder: Path, where: str) -> Iterator[Finding]:
    from adapterhub.manifest import describe  # needs numpy

    try:
        describe.true_manifest(folder, where=where)
    except IntegrityError as error:
        shown = error.where.replace(f"{folder}/", f"{where}: ") if str(folder) != where else error.where
        yield Finding(describe.WRONG_FACTS, "error", shown, error.what, error.hint)


def _is_right(store: Store, digest: Digest, more: More | None) -> bool:
    try:
        return store.rehash(digest, more) == digest
    except FormatError:  # an unreadable pack
        return False


def verify_folder(folder: Path, progress: Progress | None = None) -> Findings:
    """Compare the bytes of an adapter's folder with its adapter.json; a file that this does not list is a note."""
    from adapterhub.manifest import describe  # needs numpy

    manifest = AdapterManifest.read(folder)
    if manifest is None:
        raise NotFoundError(str(folder), f"there is no {ADAPTER_JSON} to check its files against", "Pull it, or push it first")
    found = describe.digests(folder, counter(progress, sum(_size_of(folder / path) for path in listing(folder).files)))
    findings = []
    for entry in manifest.files:
        path, digest = entry.path, found.get(entry.path, ("", 0))[0]
        if not digest:
            findings.append(Finding("missing", "error", f"{folder}/{path}", "is missing", "Pull the adapter again"))
        elif digest != entry.digest:
            what = "does not have the digest in adapter.json"
            findings.append(Finding("flipped", "error", f"{folder}/{path}", what, "Pull it again"))
    named = {entry.path for entry in manifest.files} | {ADAPTER_JSON}
    if not findings:
        with contextlib.suppress(NotFoundError, RefusedError, FormatError):
            findings += _facts_in(folder, str(folder))
    findings += [
        Finding("unlisted", "note", f"{folder}/{path}", "not listed in adapter.json") for path in sorted(set(found) - named)
    ]
    return findings


def rebuilt(path: Path) -> tuple[Registry, Findings]:
    """Open a registry with its index rebuilt from the logs; one finding for each log that could not be replayed."""
    registry, errors = Registry.rebuilt(path)
    return registry, broken_logs(errors)


def broken_logs(errors: list[AdapterhubError]) -> Findings:
    """Return the errors of a rebuild as findings."""
    return [Finding("broken-log", "error", error.where, error.what, error.hint, error.code) for error in errors]


# ---- blobs


def _size(store: Store) -> int:
    """Return the bytes of all blobs; of packed ones, when unpacked."""
    plain = sum(store.stored(f"sha256:{path.name}") for path in store.blobs() if is_hex(path.name))
    heads = (_head(store, digest) for digest in store.packs.digests())
    return plain + sum(head.size for head in heads if head)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed just now
        return 0


def _size_in(store: Store, path: Path) -> int:
    try:
        return store.files.status(path).st_size
    except FileNotFoundError:  # removed just now
        return 0


def _head(store: Store, digest: Digest) -> Head | None:
    with contextlib.suppress(AdapterhubError):
        return store.packs.head(digest)
    return None


def _blobs(store: Store, bad: dict[Digest, Finding], more: More | None, *, quick: bool) -> Iterator[Finding]:
    for path in store.blobs():
        if not is_hex(path.name) or not store.files.is_file(path):
            yield Finding("foreign", "note", str(path), "not a blob")
            continue
        digest = f"sha256:{path.name}"
        if quick:
            continue
        try:
            with local_errors(path), store.files.open(path) as file:
                yield from _hashed(store, digest, file, bad, more)
        except LocalIOError as error:
            if store.files.exists(path):  # else a gc has removed it just now
                bad[digest] = Finding("unreadable", "error", error.where, error.what, *REPAIR)
                yield bad[digest]
    yield from _packs(store, bad, more, quick=quick)


def _hashed(store: Store, digest: Digest, file: BinaryIO, bad: dict[Digest, Finding], more: More | None) -> Iterator[Finding]:
    """Compare the bytes of a plain blob with its name, and its tensors with its list, if there is one."""
    listed = store.tensors.read(digest)
    with local_errors(store.blob_path(digest)):
        if listed is None:
            found, tensors = copy_hashing(file, None, more=more)[0], None
        else:
            found, tensors = tensor_digests.digests(file, os.fstat(file.fileno()).st_size, more)
    if found != digest:
        what = "its bytes do not have the digest of its name"
        bad[digest] = Finding("flipped", "error", str(store.blob_path(digest)), what, *REPAIR)
        yield bad[digest]
    elif tensors != listed:
        what, hint = "lists other tensors than the blob has", "Delete that file, then rebuild the index"
        yield Finding("wrong-tensors", "error", str(store.tensors.path(digest)), what, hint, "delete-and-rebuild")


def _packs(store: Store, bad: dict[Digest, Finding], more: More | None, *, quick: bool) -> Iterator[Finding]:
    packed = set(store.packs.digests())
    for path in store.packs.files():
        digest = f"sha256:{path.name}"
        if digest not in packed:
            yield Finding("foreign", "note", str(path), "not a pack")
            continue
        try:
            with store.open_pack(digest) as file:
                if quick or copy_hashing(file, None, more=more)[0] == digest:
                    continue
            what = "the unpacked bytes do not have the digest of its name"
        except NotFoundError:  # unpacked, or removed by a gc, just now
            continue
        except IntegrityError as error:
            what = error.what if error.where == str(path) else f"{error.where}: {error.what}"
        found = Finding("broken-pack", "error", str(path), what, *REPAIR)
        if not store.has_plain(digest):
            bad[digest] = found
        yield found


# ---- logs and what they refer to


def _name(catalog: Catalog, name: str, needed: set[Digest], bad: dict[Digest, Finding], *, quick: bool) -> Iterator[Finding]:
    """Check that the log of a name replays, that its versions are whole, and that registry.db has the same."""
    store = catalog.store
    with catalog.replayed(name) as log:
        if log.error:
            yield Finding("broken-log", "error", log.error.where, log.error.what, f"No later entry of {name} can be trusted")
        elif later := _later(store, name, log.state.seq):
            where = str(store.log.path(name, log.state.seq + 1))
            yield Finding("broken-log", "error", where, f"is missing; {later} follows it")
        whole = True
        for row in log.rows:
            manifest = Descriptor(oci_manifest.MANIFEST_TYPE, row.digest, row.manifest_size)
            for finding in _version(store, str(row.ref), manifest, needed, bad, facts=not quick):
                whole &= finding.code == "wrong-facts"
                yield finding
        for number, reason in log.unindexed.items():
            what = f"is not found by searches: its documents cannot be read ({reason})"
            yield Finding("not-indexed", "note", f"{name}:v{number}", what)
        if log.error is None:
            yield from catalog.differences(log, documents=whole and not quick)


def _later(store: Store, name: str, seq: int, log: str = REFS) -> str:
    """Return the file of an entry after the last that can be reached; empty if there is none."""
    return min((path.name for path in store.log.after(name, seq, log=log)), default="")


def _version(
    store: Store, ref: str, found: Descriptor, needed: set[Digest], bad: dict[Digest, Finding], *, facts: bool = False
) -> Iterator[Finding]:
    """Check that a version's blobs are here, and with `facts` that its adapter.json is true of its weights."""
    needed.add(found.digest)
    problem = _blob(store, ref, found, bad)
    if problem:
        yield problem
        return
    if found.digest in bad:
        return
    try:
        made = oci_manifest.parse(store.read_document(found.digest), ref)
    except AdapterhubError as error:
        yield Finding("bad-manifest", "error", ref, error.what)
        return
    whole = True
    for blob in (made.config, *made.layers):
        needed.add(blob.digest)
        if problem := _blob(store, ref, blob, bad):
            whole = False
            yield problem
    if facts and whole:
        yield from _facts(store, ref, made)


def _named_document(store: Store, name: str, log: str, needed: set[Digest], bad: dict[Digest, Finding]) -> Iterator[Finding]:
    """Check that the log of a base or a recipe replays, and that its document exists, with the adapters of a recipe."""
    ref = f"{_KINDS[log]}:{name}"
    try:
        state = named_documents.current(store, name, log=log)
    except AdapterhubError as error:
        yield Finding("broken-log", "error", error.where, error.what, f"No later entry of {ref} can be trusted")
        return
    seq = state.entry.seq if state.entry else 0
    if later := _later(store, name, seq, log):
        yield Finding("broken-log", "error", str(store.log.path(name, seq + 1, log=log)), f"is missing; {later} follows it")
    if state.there and state.entry:
        needed.add(state.entry.digest)
        found = _blob(store, ref, Descriptor("application/json", state.entry.digest, state.entry.size, "its document"), bad)
        if found:
            again = dataclasses.replace(found, hint=f"Add the base {name} again", remedy="add-base")
            yield again if found.code == "missing" and log == BASES else found
        elif log == MERGES:
            yield from _recipe(store, ref, state.entry.digest, needed, bad)
        elif log == HUB:
            yield from _repository(store, ref, state.entry.digest, needed)


def _repository(store: Store, ref: str, document: Digest, needed: set[Digest]) -> Iterator[Finding]:
    """Check that the commits and manifests that a hub keeps, and their blobs, are here."""
    try:
        blobs = repositories.needs(store, document)
    except AdapterhubError as error:
        yield Finding("damaged", "error", ref, f"its document cannot be read: {error.what}", *REPAIR)
        return
    needed |= blobs
    for digest in sorted(blobs):
        if store.size(digest) is None:
            yield Finding("missing", "error", ref, f"blob {digest} is missing", *REPAIR_MISSING)


def _recipe(store: Store, ref: str, document: Digest, needed: set[Digest], bad: dict[Digest, Finding]) -> Iterator[Finding]:
    """Check that the adapters of a recipe are in this registry, unless they have a URL."""
    try:
        named = named_documents.adapters(store, document)
    except AdapterhubError as error:
        yield Finding("damaged", "error", ref, f"its document cannot be read: {error.what}", *REPAIR)
        return
    for digest, where in named.items():
        size = store.size(digest)
        if size is not None:
            yield from _version(store, f"{ref}, {where}", Descriptor(oci_manifest.MANIFEST_TYPE, digest, size), needed, bad)
        elif "://" not in where:
            what = f"{where}: adapter {digest} is missing"
            yield Finding("missing", "error", ref, what, "Push or copy that adapter here again")


def _blob(store: Store, ref: str, blob: Descriptor, bad: dict[Digest, Finding]) -> Finding | None:
    """Check a blob that `ref` needs; None if it is right, or reported already."""
    what = blob.path or ("its manifest" if blob.media_type == oci_manifest.MANIFEST_TYPE else "its config")
    path = store.blob_path(blob.digest)
    size = store.size(blob.digest)
    if size is None and blob.digest not in bad:
        lacking = "packed, and cannot be unpacked" if store.has_pack(blob.digest) else "missing"
        return Finding("missing", "error", ref, f"{what}: blob {blob.digest} is {lacking}", *REPAIR_MISSING)
    if blob.digest not in bad and size != blob.size:
        return Finding("truncated", "error", str(path), f"{size} bytes instead of {blob.size} ({ref}, {what})", *REPAIR)
    if blob.digest in bad:
        return Finding("damaged", "error", ref, f"{what} is damaged: {path.name[:12]}", *REPAIR)
    return None


# ---- leftovers


def _orphans(store: Store, needed: set[Digest]) -> Iterator[Finding]:
    needed = with_parents(needed, store.packs.parents())
    unused = [path for path in (*store.blobs(), *store.packs.files()) if f"sha256:{path.name}" not in needed]
    if unused:
        size = sum(_size_in(store, path) for path in unused)
        what = f"{len(unused)} blobs of {size} bytes belong to no version or base: removed ones, or those of a killed push"
        yield Finding("orphans", "note", str(store.root / "blobs"), what, *GC)


def _tensor_lists(store: Store, needed: set[Digest]) -> Iterator[Finding]:
    for path in store.tensors.files():
        if not is_hex(path.name):
            yield Finding("foreign", "note", str(path), "not a list of tensors")
    if gone := store.stray_lists(needed):
        what = f"{len(gone)} lists of the tensors of removed blobs"
        yield Finding("leftovers", "note", str(store.tensors.folder), what, *GC)
    if broken := [of for of in store.tensors.digests() if store.tensors.read(of) is None and store.stored(of)]:
        what = f"{len(broken)} incomplete lists of tensors; they are made again when a search needs them"
        yield Finding("unlisted", "note", str(store.tensors.folder), what)


def _leftovers(store: Store) -> Iterator[Finding]:
    for folder, what in (("tmp", "temporary files of killed commands"), ("pending", "unfinished moves")):
        count = len(store.files.listed(store.root / folder))
        if count:
            yield Finding("leftovers", "note", str(store.root / folder), f"{count} {what}", *GC)
    if count := len(leases.dead(store.files)):
        yield Finding("leftovers", "note", str(store.root / "leases"), f"{count} leases of killed commands", *GC)
