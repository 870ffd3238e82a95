"""Checks that every blob has the bytes of its name, and that logs, registry.db and index.json agree.

Everything is reported, nothing is changed, except by `rebuild`. An error means that promised data is missing or wrong; a note
means harmless leftovers, such as those of a killed push.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from adapterhub.digest import Digest, copy_hashing, is_hex
from adapterhub.index import queries
from adapterhub.index.database import Index
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.manifest.package_files import listing
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store import leases, named_documents, tensor_digests
from adapterhub.store.packs.chains import with_parents
from adapterhub.store.store import BASES, MERGES, More, Progress, Store, counter, local_errors
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, NotFoundError

if TYPE_CHECKING:
    from adapterhub.store.packs.container import Head


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of a check.

    Attributes:
        code: Kind of finding, a stable name.
        severity: `error` if promised data is affected, else `note`.
        where: File or ref.
        what: The problem.
        hint: How to fix it.
        remedy: Stable name of the hint, like the `code` of an error; empty where none is needed.
    """

    code: str
    severity: Literal["error", "note"]
    where: str
    what: str
    hint: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f". {self.hint}" if self.hint else "")


Findings = list[Finding]

# Hint and its stable name.
_GC = ("A gc removes what is old enough", "collect-garbage")
_REPAIR = (
    "Repair it from another registry or the adapter's folder, or delete the file and push the same files again",
    "repair",
)
_REPAIR_MISSING = ("Repair it from another registry or the adapter's folder, or push the same files again", "repair-missing")
_REBUILD = ("Rebuild the index", "rebuild-index")


def fsck(registry: Registry, *, quick: bool = False, progress: Progress | None = None) -> Findings:
    """Check a whole registry; `quick` trusts the bytes of blobs that have the right size.

    `progress` is called with bytes read and total bytes.
    """
    store, index = registry.store, registry.index
    bad: dict[Digest, Finding] = {}
    findings = list(_blobs(store, bad, None if quick else counter(progress, _size(store)), quick=quick))
    findings += _logs(store, index)
    needed: set[Digest] = set()
    for row in queries.versions(index):
        manifest = Descriptor(oci_manifest.MANIFEST_TYPE, row.digest, row.manifest_size)
        findings += _version(store, str(row.ref), manifest, needed, bad)
    for name, number, reason in queries.unindexed(index):
        what = f"is not found by searches: its documents cannot be read ({reason})"
        findings.append(Finding("not-indexed", "note", f"{name}:v{number}", what))
    for log in (BASES, MERGES):
        for name in store.log.document_names(log):
            findings += _named_document(store, name, log, needed, bad)
    findings += _orphans(store, needed)
    findings += _tensor_lists(store, needed)
    if not store.index_file.has_exactly(queries.ref_lines(index)):
        what = "does not have the refs of registry.db"
        findings.append(Finding("index-behind", "error", str(store.index_file.path), what, *_REBUILD))
    findings += _leftovers(store)
    return findings


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
            problem = Finding("flipped", "error", str(registry.store.blob_path(blob.digest)), what, *_REPAIR)
        if problem:
            findings.append(problem)
    return findings


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
        with local_errors(path), store.files.open(path) as file:
            yield from _hashed(store, digest, file, bad, more)
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
        bad[digest] = Finding("flipped", "error", str(store.blob_path(digest)), what, *_REPAIR)
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
        except IntegrityError as error:
            what = error.what if error.where == str(path) else f"{error.where}: {error.what}"
        found = Finding("broken-pack", "error", str(path), what, *_REPAIR)
        if not store.has_plain(digest):
            bad[digest] = found
        yield found


# ---- logs and what they refer to


def _logs(store: Store, index: Index) -> Iterator[Finding]:
    """Check that each log replays from its first entry, and that registry.db has its last."""
    known = {name.name: name for name in queries.names(index)}
    for name in sorted({*store.log.names(), *known}):
        seq, head = 0, ""
        try:
            while found := store.log.entry(name, seq + 1):
                entry, digest = found
                if entry.previous != head:
                    raise IntegrityError(str(store.log.path(name, entry.seq)), "does not follow the entry before it")
                seq, head = entry.seq, digest
        except AdapterhubError as error:
            yield Finding("broken-log", "error", error.where, error.what, f"No later entry of {name} can be trusted")
            continue
        later = [path.name for path in store.log.after(name, seq)]
        if later:
            yield Finding("broken-log", "error", str(store.log.path(name, seq + 1)), f"is missing; {min(later)} follows it")
        elif name in known and (known[name].seq, known[name].head) != (seq, head):
            what = f"the index is at entry {known[name].seq} of {name}, the log at {seq}"
            yield Finding("catalog-behind", "error", str(index.path), what, *_REBUILD)
        elif seq and name not in known:
            yield Finding("catalog-behind", "error", str(index.path), f"the index lacks {name}", *_REBUILD)


def int_or(text: str, otherwise: int = 0) -> int:
    """Return `text` as a number, or `otherwise`."""
    return int(text) if text.isdecimal() else otherwise


def _version(store: Store, ref: str, found: Descriptor, needed: set[Digest], bad: dict[Digest, Finding]) -> Iterator[Finding]:
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
    for blob in (made.config, *made.layers):
        needed.add(blob.digest)
        if problem := _blob(store, ref, blob, bad):
            yield problem


def _named_document(store: Store, name: str, log: str, needed: set[Digest], bad: dict[Digest, Finding]) -> Iterator[Finding]:
    """Check that the log of a base or a recipe replays, and that its document exists, with the adapters of a recipe."""
    ref = f"{'base' if log == BASES else 'merge'}:{name}"
    try:
        state = named_documents.current(store, name, log=log)
    except AdapterhubError as error:
        yield Finding("broken-log", "error", error.where, error.what, f"No later entry of {ref} can be trusted")
        return
    seq = state.entry.seq if state.entry else 0
    later = [path.name for path in store.log.after(name, seq, log=log)]
    if later:
        where = str(store.log.path(name, seq + 1, log=log))
        yield Finding("broken-log", "error", where, f"is missing; {min(later)} follows it")
    if state.there and state.entry:
        needed.add(state.entry.digest)
        found = _blob(store, ref, Descriptor("application/json", state.entry.digest, state.entry.size, "its document"), bad)
        if found:
            again = dataclasses.replace(found, hint=f"Add the base {name} again", remedy="add-base")
            yield again if found.code == "missing" and log == BASES else found
        elif log == MERGES:
            yield from _recipe(store, ref, state.entry.digest, needed, bad)


def _recipe(store: Store, ref: str, document: Digest, needed: set[Digest], bad: dict[Digest, Finding]) -> Iterator[Finding]:
    """Check that the adapters of a recipe are in this registry, unless they have a URL."""
    try:
        named = named_documents.adapters(store, document)
    except AdapterhubError as error:
        yield Finding("damaged", "error", ref, f"its document cannot be read: {error.what}", *_REPAIR)
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
        return Finding("missing", "error", ref, f"{what}: blob {blob.digest} is {lacking}", *_REPAIR_MISSING)
    if blob.digest not in bad and size != blob.size:
        return Finding("truncated", "error", str(path), f"{size} bytes instead of {blob.size} ({ref}, {what})", *_REPAIR)
    if blob.digest in bad:
        return Finding("damaged", "error", ref, f"{what} is damaged: {path.name[:12]}", *_REPAIR)
    return None


# ---- leftovers


def _orphans(store: Store, needed: set[Digest]) -> Iterator[Finding]:
    needed = with_parents(needed, store.packs.parents())
    unused = [path for path in (*store.blobs(), *store.packs.files()) if f"sha256:{path.name}" not in needed]
    if unused:
        size = sum(store.files.status(path).st_size for path in unused)
        what = f"{len(unused)} blobs of {size} bytes belong to no version or base: removed ones, or those of a killed push"
        yield Finding("orphans", "note", str(store.root / "blobs"), what, *_GC)


def _tensor_lists(store: Store, needed: set[Digest]) -> Iterator[Finding]:
    for path in store.tensors.files():
        if not is_hex(path.name):
            yield Finding("foreign", "note", str(path), "not a list of tensors")
    if gone := store.stray_lists(needed):
        what = f"{len(gone)} lists of the tensors of removed blobs"
        yield Finding("leftovers", "note", str(store.tensors.folder), what, *_GC)
    if broken := [of for of in store.tensors.digests() if store.tensors.read(of) is None and store.stored(of)]:
        what = f"{len(broken)} incomplete lists of tensors; they are made again when a search needs them"
        yield Finding("unlisted", "note", str(store.tensors.folder), what)


def _leftovers(store: Store) -> Iterator[Finding]:
    for folder, what in (("tmp", "temporary files of killed commands"), ("pending", "unfinished moves")):
        count = len(store.files.listed(store.root / folder))
        if count:
            yield Finding("leftovers", "note", str(store.root / folder), f"{count} {what}", *_GC)
    if count := len(leases.dead(store.files)):
        yield Finding("leftovers", "note", str(store.root / "leases"), f"{count} leases of killed commands", *_GC)
