"""Bundles: several versions in one image layout under their names, for offline use, and the resolution of refs in them.

A version's name in a bundle is its ref, `team/sql:v2`, so that a pull finds it as in a registry.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from adapterhub import semver
from adapterhub.digest import Digest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import NotFoundError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import attached_signatures, version_copy
from .download import ResumingReader
from .layouts import layout_archive, layout_index
from .layouts.image_layout import Layout
from .layouts.layout_archive import Opener
from .layouts.layout_folder import LayoutFolder
from .layouts.layout_index import Entry
from .protocol import Progress, Reader, Source


@dataclass(frozen=True, slots=True)
class BundleItem:
    """A version to bundle: the source of its blobs, its manifest, its name in the bundle, or None, and its signatures."""

    source: Source
    manifest: Manifest
    name: str | None
    signatures: Sequence[bytes] = ()


def write_bundle(
    items: Sequence[BundleItem], out: Path, *, archived: bool, progress: Progress | None = None, replace: bool = False
) -> int:
    """Write a layout with these versions, a tar or a folder, completely or not at all; return the bytes of its blobs.

    An existing layout is replaced only with `replace`.
    """
    entries = _entries(items)
    # Versions often share blobs: each is stored, and counted, once.
    blobs = {blob.digest: (blob, item.source) for item in items for blob in version_copy.distinct_blobs(item.manifest)}
    total, done_bytes = sum(blob.size for blob, _ in blobs.values()), 0

    def report(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        if progress:
            progress(min(done_bytes, total), total)

    if archived:
        openers: dict[Digest, Opener] = {
            digest: partial(ResumingReader, source, blob) for digest, (blob, source) in blobs.items()
        }
        documents_and_blobs = {digest: blob for digest, (blob, _) in blobs.items()}
        for item in items:
            documents_and_blobs[item.manifest.digest] = Descriptor("", item.manifest.digest, len(item.manifest.raw))
            openers[item.manifest.digest] = partial(_in_memory, item.manifest.raw)
        # An archive is written as a whole, so what is attached is first a layout of its own.
        with tempfile.TemporaryDirectory() as scratch, LayoutFolder(Path(scratch)) as attachments:
            _attach_signatures(attachments, items)
            entries += attachments.entries()
            for path in Path(scratch).glob("blobs/sha256/*"):
                blob = Descriptor("", f"sha256:{path.name}", path.stat().st_size)
                documents_and_blobs[blob.digest], openers[blob.digest] = blob, partial(attachments.open_blob, blob)
            layout_archive.write_archive(out, entries, documents_and_blobs.values(), openers, report, replace=replace)
        return total
    with atomic.pending_output(out, replace=replace) as folder, LayoutFolder(folder, str(out)) as target:
        for blob, source in blobs.values():
            target.put_blob(blob, source)
            report(blob.size)
        for item in items:
            target.put_manifest(item.manifest, item.name)
        _attach_signatures(target, items)
        target.remove_stale()
    return total


def _attach_signatures(target: LayoutFolder, items: Iterable[BundleItem]) -> None:
    for item in items:
        attached_signatures.attach_all(target, item.manifest, item.signatures)


def _in_memory(raw: bytes) -> contextlib.AbstractContextManager[Reader]:
    return contextlib.nullcontext(io.BytesIO(raw))


def _entries(items: Iterable[BundleItem]) -> list[Entry]:
    """Return the entries of index.json.

    Raises:
        UsageError: Two items have the same name.
    """
    entries: list[Entry] = []
    for item in items:
        existing = layout_index.find_entry(entries, item.name) if item.name else None
        if existing and existing["digest"] != item.manifest.digest:
            raise UsageError(str(item.name), "two different versions would have this name", "Bundle them separately")
        descriptor = layout_index.describe_manifest(item.manifest.raw, item.manifest.digest, item.source.location)
        entries = layout_index.with_entry(entries, descriptor, item.name)
    return entries


def ancestors(registry: Registry, digests: Iterable[Digest]) -> tuple[list[Ref], list[Digest]]:
    """Return all ancestors of adapters: the refs of those in the registry, and the digests of the others."""
    held_refs: list[Ref] = []
    missing_digests: list[Digest] = []
    visited = set(pending := list(digests))
    while pending:
        manifest = registry.adapter_manifest(pending.pop())
        for digest in [parent.digest for parent in manifest.parents if parent.digest] if manifest else []:
            if digest in visited:
                continue
            visited.add(digest)
            if rows := registry.versions_with(digest):
                held_refs.append(rows[0].ref)
                pending.append(digest)
            else:
                missing_digests.append(digest)
    return held_refs, missing_digests


# ---- refs in a bundle


def resolve_name(layout: Layout, text: str) -> str:
    """Return the name or digest in a layout that a ref selects: the name itself, else resolved as in a registry.

    Raises:
        UsageError: The ref is ambiguous.
        NotFoundError: It selects nothing in the layout.
    """
    names = layout.tags()
    if text in names:
        return text
    ref = Ref.parse(text)
    candidates = sorted(set(_candidate_names(layout, ref, names)))
    # Several names of one digest are not ambiguous.
    if len({_digest_of(layout, name) for name in candidates}) == 1:
        return candidates[0]
    contents = (
        f"{layout.location} has {', '.join(names[:5])}{' …' if names[5:] else ''}" if names else "nothing in it has a name"
    )
    if candidates:
        raise UsageError(text, f"ambiguous: {', '.join(candidates[:5])}", "Name one of them", code="ambiguous")
    raise NotFoundError(
        text, f"no such version in the bundle; {contents}", code="no-such-tag", repository=f"layout://{layout.location}"
    )


def _candidate_names(layout: Layout, ref: Ref, names: Sequence[str]) -> Iterator[str]:
    """Yield the names, or digests, that a ref may select in a layout."""
    tags = [name.partition(":")[2] for name in names if name.partition(":")[0] == ref.name]
    if ref.digest:
        yield from {entry["digest"] for entry in layout.entries() if entry["digest"].startswith(ref.digest)}
    elif ref.range or (ref.tag and semver.parse_range(ref.tag)):
        yield from (f"{ref.name}:{tag}" for tag in semver.highest_in(ref.range or ref.tag or "", tags))
    elif ref.number or ref.tag:
        return
    elif LATEST in tags:
        yield f"{ref.name}:{LATEST}"
    else:
        yield from (f"{ref.name}:{tag}" if tag else ref.name for tag in tags)


def _digest_of(layout: Layout, name: str) -> Digest:
    entry = layout_index.find_entry(layout.entries(), name)
    return entry["digest"] if entry else name
