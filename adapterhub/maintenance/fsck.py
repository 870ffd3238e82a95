"""Checks that a store's bytes are what their names say, and that log, catalog and index agree.

Everything is reported, nothing is changed. An error means that something promised is not there or not right; a note
means leftovers that harm nothing, as a killed push leaves them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterhub.digest import Digest, copy_hashing, is_hex
from adapterhub.index.database import Catalog
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.manifest.package_files import listing
from adapterhub.store import leases, named_documents, tensor_digests
from adapterhub.store.packs.chains import with_parents
from adapterhub.store.store import BASES, MERGES, More, Progress, Store, local_errors, open_regular, told
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, NotFoundError

if TYPE_CHECKING:
    from adapterhub.store.packs.container import Head

_GC = "`adapterhub gc` removes what is old enough"
_REPAIR = "`adapterhub fsck --repair --from` another registry or the adapter's folder"
_AGAIN = f"{_REPAIR}, or delete that file and push the same files again"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found, as an error or a note: what kind, where, what, and how to fix it."""

    code: str
    severity: Literal["error", "note"]
    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f". {self.hint}" if self.hint else "")


Findings = list[Finding]


def fsck(store: Store, catalog: Catalog, *, quick: bool = False, progress: Progress | None = None) -> Findings:
    """What is wrong with a registry's store and catalog; `quick` trusts the bytes of blobs that have the right size.

    `progress` is told bytes read and bytes in all.
    """
    bad: dict[Digest, Finding] = {}
    findings = list(_blobs(store, bad, None if quick else told(progress, _size(store)), quick=quick))
    findings += _logs(store, catalog)
    needed: set[Digest] = set()
    for row in catalog.rows():
        findings += _version(
            store, str(row.ref), Descriptor(oci_manifest.MANIFEST_TYPE, row.digest, row.manifest_size), needed, bad
        )
    for log in (BASES, MERGES):
        for name in store.shelved(log):
            findings += _shelved(store, name, log, needed, bad)
    findings += _orphans(store, needed)
    findings += _lists(store, catalog, needed)
    if not store.index_is(catalog.index()):
        findings.append(
            Finding("index-behind", "error", str(store.root / "index.json"), "does not say what the catalog says", _REBUILD)
        )
    findings += _leftovers(store)
    return findings


_UNLIST = "Delete that file, then run `adapterhub fsck --rebuild-index`"
_REBUILD = "Run `adapterhub fsck --rebuild-index`"


def _size(store: Store) -> int:
    """Bytes of all blobs, of packed ones as they are unpacked."""
    plain = sum(_size_of(path) for path in store.blobs())
    heads = (_head(store, digest) for digest in store.packs.digests())
    return plain + sum(head.size for head in heads if head)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it went just now
        return 0


def _head(store: Store, digest: Digest) -> Head | None:
    with contextlib.suppress(AdapterhubError):
        return store.packs.head(digest)
    return None


def _blobs(store: Store, bad: dict[Digest, Finding], more: More | None, *, quick: bool) -> Iterator[Finding]:
    for path in store.blobs():
        if not is_hex(path.name) or path.is_symlink() or not path.is_file():
            yield Finding("foreign", "note", str(path), "not a blob")
            continue
        digest = f"sha256:{path.name}"
        if quick:
            continue
        with open_regular(path) as file:
            yield from _hashed(store, digest, file, bad, more)
    yield from _packs(store, bad, more, quick=quick)


def _hashed(store: Store, digest: Digest, file: Any, bad: dict[Digest, Finding], more: More | None) -> Iterator[Finding]:
    """The bytes of a plain blob against its name, and its tensors against what is said of them."""
    said = store.tensors.read(digest)
    with local_errors(store.blob_path(digest)):
        size = os.fstat(file.fileno()).st_size
        found, there = (
            tensor_digests.digests(file, size, more) if said is not None else (copy_hashing(file, None, more=more)[0], None)
        )
    if found != digest:
        bad[digest] = Finding("flipped", "error", str(store.blob_path(digest)), "its bytes are not those of its name", _AGAIN)
        yield bad[digest]
    elif there != said:
        yield Finding(
            "wrong-tensors", "error", str(store.tensors.path(digest)), "does not say what tensors the blob has", _UNLIST
        )


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
            what = "what it unpacks to is not what its name says"
        except IntegrityError as error:
            what = error.what if error.where == str(path) else f"{error.where}: {error.what}"
        found = Finding("broken-pack", "error", str(path), what, _AGAIN)
        if not store.blob_path(digest).exists():
            bad[digest] = found
        yield found


def _logs(store: Store, catalog: Catalog) -> Iterator[Finding]:
    """Each log replays from its first entry, and the catalog knows its last."""
    known = {name.name: name for name in catalog.names()}
    for name in sorted({*store.names(), *known}):
        seq, head = 0, ""
        try:
            while found := store.entry(name, seq + 1):
                entry, digest = found
                if entry.previous != head:
                    raise IntegrityError(str(store.entry_path(name, entry.seq)), "does not follow the entry before it")
                seq, head = entry.seq, digest
        except AdapterhubError as error:
            yield Finding("broken-log", "error", error.where, error.what, f"Nothing of {name} after it can be trusted")
            continue
        later = [path.name for path in (store.root / "refs" / name).glob("*.json") if int_or(path.stem) > seq]
        if later:
            yield Finding("broken-log", "error", str(store.entry_path(name, seq + 1)), f"is missing; {min(later)} follows it")
        elif name in known and (known[name].seq, known[name].head) != (seq, head):
            what = f"the catalog is at entry {known[name].seq} of {name}, the log at {seq}"
            yield Finding("catalog-behind", "error", str(catalog.path), what, _REBUILD)
        elif seq and name not in known:
            yield Finding("catalog-behind", "error", str(catalog.path), f"the catalog lacks {name}", _REBUILD)


def int_or(text: str, otherwise: int = 0) -> int:
    """The number that `text` is, or `otherwise`."""
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


def _shelved(store: Store, name: str, log: str, needed: set[Digest], bad: dict[Digest, Finding]) -> Iterator[Finding]:
    """The log of a base or a recipe replays, and the document it points to is there, with the adapters of a recipe."""
    ref = f"{'base' if log == BASES else 'merge'}:{name}"
    try:
        state = named_documents.current(store, name, log=log)
    except AdapterhubError as error:
        yield Finding("broken-log", "error", error.where, error.what, f"Nothing of {ref} after it can be trusted")
        return
    seq = state.entry.seq if state.entry else 0
    later = [path.name for path in (store.root / log / name).glob("*.json") if int_or(path.stem) > seq]
    if later:
        where = str(store.entry_path(name, seq + 1, log=log))
        yield Finding("broken-log", "error", where, f"is missing; {min(later)} follows it")
    if state.there and state.entry:
        needed.add(state.entry.digest)
        found = _blob(store, ref, Descriptor("application/json", state.entry.digest, state.entry.size, "its document"), bad)
        if found:
            again = f"Add it again: `adapterhub base add {name} … --force`"
            yield dataclasses.replace(found, hint=again) if found.code == "missing" and log == BASES else found
        elif log == MERGES:
            yield from _recipe(store, ref, state.entry.digest, needed, bad)


def _recipe(store: Store, ref: str, document: Digest, needed: set[Digest], bad: dict[Digest, Finding]) -> Iterator[Finding]:
    """The adapters that a recipe needs are here, unless they have an address elsewhere."""
    try:
        named = named_documents.adapters(store, document)
    except AdapterhubError as error:
        yield Finding("damaged", "error", ref, f"its document cannot be read: {error.what}", _AGAIN)
        return
    for digest, where in named.items():
        size = store.size(digest)
        if size is not None:
            yield from _version(store, f"{ref}, {where}", Descriptor(oci_manifest.MANIFEST_TYPE, digest, size), needed, bad)
        elif "://" not in where:
            what = f"{where}: adapter {digest} is missing"
            yield Finding("missing", "error", ref, what, "Push or copy that adapter here again")


def _blob(store: Store, ref: str, blob: Descriptor, bad: dict[Digest, Finding]) -> Finding | None:
    """What is wrong with a blob that `ref` needs, unless that has been said."""
    what = blob.path or ("its manifest" if blob.media_type == oci_manifest.MANIFEST_TYPE else "its config")
    path = store.blob_path(blob.digest)
    size = store.size(blob.digest)
    if size is None and blob.digest not in bad:
        lacking = "packed, and cannot be unpacked" if store.packs.path(blob.digest).exists() else "missing"
        again = f"{_REPAIR}, or push the same files again"
        return Finding("missing", "error", ref, f"{what}: blob {blob.digest} is {lacking}", again)
    if blob.digest not in bad and size != blob.size:
        return Finding("truncated", "error", str(path), f"{size} bytes instead of {blob.size} ({ref}, {what})", _AGAIN)
    if blob.digest in bad:
        return Finding("damaged", "error", ref, f"{what} is damaged: {path.name[:12]}", _AGAIN)
    return None


def _orphans(store: Store, needed: set[Digest]) -> Iterator[Finding]:
    needed = with_parents(needed, store.packs.parents())
    unused = [path for path in (*store.blobs(), *store.packs.files()) if f"sha256:{path.name}" not in needed]
    if unused:
        size = sum(path.stat().st_size for path in unused)
        what = f"{len(unused)} blobs of {size} bytes belong to no version or base: deleted ones, or of a push that did not end"
        yield Finding("orphans", "note", str(store.root / "blobs"), what, _GC)


def _lists(store: Store, catalog: Catalog, needed: set[Digest]) -> Iterator[Finding]:
    """What is said of the tensors of weights: a list that is lost, half or of nothing harms nothing, and is made anew."""
    for path in store.tensors.files():
        if not is_hex(path.name):
            yield Finding("foreign", "note", str(path), "not a list of tensors")
    if gone := store.stray_lists(needed):
        what = f"{len(gone)} lists of the tensors of blobs that have gone"
        yield Finding("leftovers", "note", str(store.tensors.folder), what, _GC)
    unlisted = set(catalog.unlisted())
    unlisted |= {of for of in store.tensors.digests() if store.tensors.read(of) is None and store.stored(of)}
    if unlisted:
        what = f"of {len(unlisted)} files of weights no list says what tensors they have, so that `find` cannot see them"
        yield Finding("unlisted", "note", str(store.tensors.folder), what, "`adapterhub fsck --rebuild-index` lists them")


def _leftovers(store: Store) -> Iterator[Finding]:
    for folder, what in (("tmp", "temporary files of a command that did not end"), ("pending", "moves not finished yet")):
        count = sum(1 for _ in (store.root / folder).iterdir())
        if count:
            yield Finding("leftovers", "note", str(store.root / folder), f"{count} {what}", _GC)
    if count := len(leases.dead(store.root / "leases")):
        yield Finding("leftovers", "note", str(store.root / "leases"), f"{count} leases of commands that did not end", _GC)


def verify(store: Store, layers: Sequence[Descriptor], ref: str, progress: Progress | None = None) -> list[Finding]:
    """The bytes of a version's blobs against their digests."""
    more = told(progress, sum(layer.size for layer in layers))
    findings = []
    for layer in layers:
        path = store.blob_path(layer.digest)
        problem = _blob(store, ref, layer, {})
        if problem is None and not _right(store, layer.digest, more):
            problem = Finding(
                "flipped", "error", str(path), f"its bytes are not those of its name ({ref}, {layer.path})", _AGAIN
            )
        if problem:
            findings.append(problem)
    return findings


def _right(store: Store, digest: Digest, more: More | None) -> bool:
    try:
        return store.rehash(digest, more) == digest
    except FormatError:  # a pack that cannot be read
        return False


def verify_folder(folder: Path, progress: Progress | None = None) -> list[Finding]:
    """The bytes of an adapter's folder against its adapter.json; a file it doesn't name is a note."""
    from adapterhub.manifest import describe

    manifest = AdapterManifest.read(folder)
    if manifest is None:
        raise NotFoundError(str(folder), f"there is no {ADAPTER_JSON} to check its files against", "Pull it, or push it first")
    found = describe.digests(folder, told(progress, sum(_size_of(folder / path) for path in listing(folder).files)))
    findings = []
    for entry in manifest.files:
        path, digest = entry.path, found.get(entry.path, ("", 0))[0]
        if not digest:
            findings.append(Finding("missing", "error", f"{folder}/{path}", "is missing", "Pull the adapter again"))
        elif digest != entry.digest:
            findings.append(Finding("flipped", "error", f"{folder}/{path}", "is not what adapter.json says", "Pull it again"))
    named = {entry.path for entry in manifest.files} | {ADAPTER_JSON}
    findings += [
        Finding("unlisted", "note", f"{folder}/{path}", "is not named by adapter.json") for path in sorted(set(found) - named)
    ]
    return findings
