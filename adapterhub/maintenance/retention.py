"""What keeps a registry small and whole: which versions may go, what goes with them, and bytes put back.

Retention is an entry of a name's log. What `gc` and `repair` are allowed to touch is decided under the registry's write lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub.digest import Digest
from adapterhub.index.database import Name, Row
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.ref import Ref, RefError
from adapterhub.registry.registry import Registry, now
from adapterhub.store import named_documents
from adapterhub.store.store import BASES, MERGES, Entry
from adapterhub_converters.errors import AdapterhubError

from . import gc as sweeping
from . import repair as healing

GRACE = 24.0
"""Hours that what no version needs any more stays."""


def keep(registry: Registry, ref: Ref, last: int | None) -> None:
    """Have `gc` drop the versions of a name but the `last` newest and those with a tag; None: none."""
    if ref != Ref(ref.name):
        raise RefError(str(ref), "what is kept is said of a whole name", f"Write {ref.name}")
    registry.row(ref)

    def decide(state: Name) -> Entry | None:
        registry.row(ref)
        if registry.catalog.marks("keep", ref.name).get("") == (None if last is None else str(last)):
            return None
        op, number = ("keep-all", 0) if last is None else ("keep", last)
        return Entry(ref.name, state.seq + 1, op, now(), previous=state.head, keep=number)

    registry.move(ref.name, decide)


def kept(registry: Registry, ref: Ref) -> int | None:
    """What was last said with `keep`."""
    said = registry.catalog.marks("keep", registry.row(ref).name).get("")
    return int(said) if said is not None else None


def gc(
    registry: Registry,
    *,
    grace: float = GRACE,
    last: int | None = None,
    dry_run: bool = False,
    progress: sweeping.Progress | None = None,
) -> sweeping.Swept:
    """Drop versions that are not to be kept; remove what nothing needs, and what killed processes left.

    A version stays as long as one that was made from it does: without it that could not be made again.

    Args:
        grace: Hours that a blob stays after it was put or let go.
        last: For names of which nothing was said with `keep`: how many of the newest versions are kept beside the tagged.
        dry_run: Change nothing.
        progress: Is told blobs done and blobs in all.
    """
    swept = sweeping.Swept(dry_run)
    unkept = _drop_all(registry, swept, last)
    needs = sweeping.Needs(
        registry.store,
        lambda: {name.name: name.seq for name in registry.catalog.names()},
        grace * 3600,
        unkept if dry_run else {},
    )

    @contextmanager
    def locked() -> Iterator[None]:
        with registry.locked():
            for name in registry.store.names():
                registry.catalog.catch_up(registry.store, name)
            # Whoever was killed there may not have come to it.
            if registry.store.pending() and not registry.store.index_is(registry.catalog.index()):
                registry.catalog.write_index(registry.store)
            yield

    sweeping.collect(registry.store, needs, locked, swept, grace=grace * 3600, progress=progress)
    return swept


def _drop_all(registry: Registry, swept: sweeping.Swept, last: int | None) -> dict[str, list[int]]:
    """Drop what isn't kept, or say so for a dry run; by name the numbers."""
    dropped: dict[str, set[int]] = {}
    again = True
    while again:  # as long as a parent may have lost its last child
        again = False
        for name in (name.name for name in registry.catalog.names() if not name.deleted):
            if numbers := _drop(registry, name, last, dropped, dry_run=swept.dry_run):
                dropped[name] = dropped.get(name, set()).union(numbers)
                again = True
    swept.dropped = [Ref(name, number=number) for name in sorted(dropped) for number in sorted(dropped[name])]
    held = {name.name: _unkept(registry, name.name, last) for name in registry.catalog.names() if not name.deleted}
    swept.parents = [
        Ref(name, number=number)
        for name, numbers in held.items()
        for number in sorted(numbers)
        if number not in dropped.get(name, ())
    ]
    return {name: sorted(numbers) for name, numbers in dropped.items()}


def _drop(registry: Registry, name: str, last: int | None, dropped: dict[str, set[int]], *, dry_run: bool) -> list[int]:
    """Drop what isn't kept of a name and nothing that stays was made from; the numbers. `dropped` are gone already."""
    numbers: list[int] = []

    def unneeded() -> list[int]:
        return _without_parents(registry, name, _unkept(registry, name, last), dropped)

    def decide(state: Name) -> Entry | None:
        numbers[:] = [] if state.deleted else unneeded()
        if not numbers:
            return None
        return Entry(name, state.seq + 1, "drop", now(), previous=state.head, numbers=tuple(numbers))

    if dry_run:
        return unneeded()
    if unneeded():
        registry.move(name, decide)
    return numbers


def _unkept(registry: Registry, name: str, last: int | None) -> dict[int, Digest]:
    """The versions of a name that are not to be kept, unless something was made from them."""
    said = registry.catalog.marks("keep", name).get("")
    kept = last if said is None else int(said)
    return {} if kept is None else sweeping.unkept(registry.catalog.rows("name = ?", name), kept)


def _without_parents(registry: Registry, name: str, unkept: dict[int, Digest], dropped: dict[str, set[int]]) -> list[int]:
    """Those of `unkept` that are there and from which nothing was made but others of them, and what was dropped."""
    goes = set(unkept) - dropped.get(name, set())
    children = {number: registry.children(unkept[number]) for number in goes}

    def stays(row: Row) -> bool:
        return row.number not in dropped.get(row.name, ()) and not (row.name == name and row.number in goes)

    before = None
    while goes != before:
        before = goes
        goes = {number for number in goes if not any(stays(row) for row in children[number])}
    return sorted(goes)


def repair(registry: Registry, source: Path | healing.Find) -> list[Digest]:
    """Put back blobs that are missing or damaged from a registry, an OCI layout, a folder, or what finds bytes elsewhere.

    The digests of these.
    """
    find = healing.source(source) if isinstance(source, Path) else source
    rows = registry.catalog.rows()
    versions = [Descriptor(oci_manifest.MANIFEST_TYPE, row.digest, row.manifest_size) for row in rows]
    bases = list(_documents(registry))
    healed = healing.heal(registry.store, versions, bases, find, registry.locked)
    if healed:
        registry.rebuild_index()  # what lists show of a version comes from its blobs
    return healed


def _documents(registry: Registry) -> Iterator[Descriptor]:
    for log, name in [(kind, name) for kind in (BASES, MERGES) for name in registry.store.shelved(kind)]:
        with contextlib.suppress(AdapterhubError):  # fsck says so
            state = named_documents.current(registry.store, name, log=log)
            if state.there and state.entry:
                yield Descriptor("application/json", state.entry.digest, state.entry.size, "its document")
