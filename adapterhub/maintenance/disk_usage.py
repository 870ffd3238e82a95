"""What versions take on the disk, and what they would: as separate copies, and as whole models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from adapterhub.digest import Digest
from adapterhub.index import tensor_search
from adapterhub.index.database import Row
from adapterhub.manifest import oci_manifest
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import IntegrityError

_BASE = "io.adapterhub.base"  # what a manifest's annotations say of the base
_Key = TypeVar("_Key", str, tuple[str, str])


@dataclass(frozen=True)
class Usage:
    """Bytes of some versions.

    Attributes:
        name: The adapter, the base or whatever else the versions have in common; empty for all.
        versions: How many there are.
        adapters: Names that they belong to.
        files: All blobs of every version, each as often as a version has it: what a copy of each would take.
        distinct: Every blob once.
        stored: What those take on the disk; packed ones less than their size.
    """

    name: str
    versions: int
    adapters: int
    files: int
    distinct: int
    stored: int

    @property
    def shared(self) -> int:
        """Bytes that need not be stored because another version has the same file."""
        return self.files - self.distinct

    @property
    def saved(self) -> int:
        """Bytes that packing saves."""
        return self.distinct - self.stored


@dataclass(frozen=True)
class BaseUsage:
    """What the versions take that were trained on one base, as their adapter.json names it: either may be unknown."""

    repo: str | None
    fingerprint: str | None
    usage: Usage


@dataclass(frozen=True)
class Report:
    """By name and by base, both sorted, and all of it.

    Attributes:
        repeated: Bytes of tensors that files have in common which differ as a whole. Packed against each other they take next
            to nothing; plain, they are there as often as `distinct` says.
        unlisted: Files of weights of which it isn't known what tensors they have.
    """

    names: list[Usage]
    bases: list[BaseUsage]
    total: Usage
    repeated: int
    unlisted: int


def usage(registry: Registry, prefix: str | None = None) -> Report:
    """What the versions take that `Registry.list(prefix)` names. A blob that several of a group need counts there once."""
    seen = {row: _Seen.of(registry, row) for row in registry.list(prefix)}
    stored = {digest: registry.store.stored(digest) for found in seen.values() for digest in found.blobs}

    def of(name: str, rows: Sequence[Row]) -> Usage:
        distinct = {digest: size for row in rows for digest, size in seen[row].blobs.items()}
        adapters, files = len({row.name for row in rows}), sum(seen[row].size for row in rows)
        return Usage(name, len(rows), adapters, files, sum(distinct.values()), sum(stored[digest] for digest in distinct))

    names = _grouped((row.name, row) for row in seen)
    bases = _grouped(((found.repo or "", found.fingerprint or ""), row) for row, found in seen.items())
    return Report(
        [of(name, rows) for name, rows in names],
        [BaseUsage(repo or None, print_ or None, of(repo or print_, rows)) for (repo, print_), rows in bases],
        of("", list(seen)),
        tensor_search.repeated(registry.catalog, stored),
        len(registry.catalog.unlisted().keys() & stored.keys()),
    )


def _grouped(pairs: Iterable[tuple[_Key, Row]]) -> list[tuple[_Key, list[Row]]]:
    found: dict[_Key, list[Row]] = {}
    for key, row in pairs:
        found.setdefault(key, []).append(row)
    return sorted(found.items(), key=lambda item: item[0])


@dataclass(frozen=True)
class _Seen:
    """Bytes of a version and of each of its blobs, and its base. Of one that can't be read, as fsck tells, the manifest."""

    size: int
    blobs: Mapping[Digest, int]
    repo: str | None = None
    fingerprint: str | None = None

    @classmethod
    def of(cls, registry: Registry, row: Row) -> _Seen:
        blobs = {row.digest: row.manifest_size}
        try:
            made = oci_manifest.parse(registry.store.read_document(row.digest), str(row.ref))
        except IntegrityError:
            return cls(row.manifest_size, blobs)
        blobs |= {blob.digest: blob.size for blob in (made.config, *made.layers)}
        size = row.manifest_size + made.config.size + made.size
        named = made.annotations.get
        return cls(size, blobs, named(f"{_BASE}.repo"), named(f"{_BASE}.fingerprint"))
