"""Bundles: several versions in one image layout under their names, for offline use, and refs in them.

A name in a bundle is that of its ref, `team/sql:v2`, so that a pull finds it as in a registry.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapterhub import semver
from adapterhub.digest import Digest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref
from adapterhub.registry.registry import Registry
from adapterhub.remotes import copy
from adapterhub.remotes.download import Steady
from adapterhub.remotes.protocol import Progress, Reader, Source
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import NotFoundError, UsageError

from . import archive
from . import index as layout_index
from .archive import Opener
from .folder import LayoutFolder
from .index import Entry
from .layout import Layout


@dataclass(frozen=True, slots=True)
class Item:
    """A version to bundle: the source of its blobs, its manifest, and its name in the bundle, or None."""

    source: Source
    made: Manifest
    name: str | None


def bundle(items: Sequence[Item], out: Path, *, archived: bool, progress: Progress | None = None, replace: bool = False) -> int:
    """Write a layout with these versions, a tar or a folder, completely or not at all; return the bytes of its blobs.

    A layout that is there is replaced only with `replace`.
    """
    entries = _entries(items)
    blobs = {blob.digest: (blob, item.source) for item in items for blob in copy.unique(item.made)}
    total, done = sum(blob.size for blob, _ in blobs.values()), 0

    def more(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(min(done, total), total)

    if archived:
        openers: dict[Digest, Opener] = {digest: partial(Steady, source, blob) for digest, (blob, source) in blobs.items()}
        everything = {digest: blob for digest, (blob, _) in blobs.items()}
        for item in items:
            everything[item.made.digest] = Descriptor("", item.made.digest, len(item.made.raw))
            openers[item.made.digest] = partial(_in_memory, item.made.raw)
        archive.write(out, entries, everything.values(), openers, more, replace=replace)
        return total
    with atomic.whole(out, replace=replace) as folder, LayoutFolder(folder, str(out)) as target:
        for blob, source in blobs.values():
            target.put_blob(blob, source)
            more(blob.size)
        for item in items:
            target.put_manifest(item.made, item.name)
        target.remove_stale()
    return total


def _in_memory(raw: bytes) -> contextlib.AbstractContextManager[Reader]:
    return contextlib.nullcontext(io.BytesIO(raw))


def _entries(items: Iterable[Item]) -> list[Entry]:
    """The entries of index.json; UsageError if two items have one name."""
    entries: list[Entry] = []
    for item in items:
        there = layout_index.find(entries, item.name) if item.name else None
        if there and there["digest"] != item.made.digest:
            raise UsageError(str(item.name), "two different versions would have this name", "Bundle them separately")
        descriptor = layout_index.descriptor(item.made.raw, item.made.digest, item.source.where)
        entries = layout_index.put(entries, descriptor, item.name)
    return entries


def ancestors(registry: Registry, digests: Iterable[Digest]) -> tuple[list[Ref], list[Digest]]:
    """All ancestors of adapters: the refs of those in the registry, and the digests of the others."""
    here: list[Ref] = []
    elsewhere: list[Digest] = []
    seen = set(waiting := list(digests))
    while waiting:
        manifest = registry.adapter_manifest(waiting.pop())
        for digest in [parent.digest for parent in manifest.parents if parent.digest] if manifest else []:
            if digest in seen:
                continue
            seen.add(digest)
            if rows := registry.holding(digest):
                here.append(rows[0].ref)
                waiting.append(digest)
            else:
                elsewhere.append(digest)
    return here, elsewhere


# ---- refs in a bundle


def named(layout: Layout, text: str) -> str:
    """The name or digest in a layout that a ref selects: the name itself, else as in a registry."""
    names = layout.tags()
    if text in names:
        return text
    ref = Ref.parse(text)
    found = sorted(set(_meant(layout, ref, names)))
    if len({_digest(layout, name) for name in found}) == 1:
        return found[0]
    there = f"{layout.where} has {', '.join(names[:5])}{' …' if names[5:] else ''}" if names else "nothing in it has a name"
    if found:
        raise UsageError(text, f"ambiguous: {', '.join(found[:5])}", "Name one of them", code="ambiguous")
    raise NotFoundError(
        text, f"no such version in the bundle; {there}", code="no-such-tag", repository=f"layout://{layout.where}"
    )


def _meant(layout: Layout, ref: Ref, names: Sequence[str]) -> Iterator[str]:
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


def _digest(layout: Layout, name: str) -> Digest:
    found = layout_index.find(layout.entries(), name)
    return found["digest"] if found else name
