"""Disk usage of versions: as stored, as separate copies, and by base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from adapterhub.digest import Digest
from adapterhub.index import tensors
from adapterhub.index.queries import Row
from adapterhub.manifest import oci_manifest
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Progress
from adapterhub_converters.errors import IntegrityError

_BASE = "io.adapterhub.base"  # prefix of a manifest's annotations about the base
_Key = TypeVar("_Key", str, tuple[str, str])


@dataclass(frozen=True)
class Usage:
    """Disk usage of some versions, in bytes.

    Attributes:
        name: The adapter or base that the versions have in common; empty for all.
        versions: Number of versions.
        adapters: Number of their names.
        files: All blobs of every version, each as often as a version has it: the size of a copy of each version.
        distinct: Every blob once.
        stored: The same on the disk, where packed ones take less than their size.
    """

    name: str
    versions: int
    adapters: int
    files: int
    distinct: int
    stored: int

    @property
    def shared(self) -> int:
        """Bytes that need no storage because another version has the same file."""
        return self.files - self.distinct

    @property
    def saved(self) -> int:
        """Bytes that packing saves."""
        return self.distinct - self.stored


@dataclass(frozen=True)
class BaseUsage:
    """Usage of the versions for one base, as their adapter.json names it; repo and fingerprint may be unknown."""

    repo: str | None
    fingerprint: str | None
    usage: Usage


@dataclass(frozen=True)
class Report:
    """Usage by name and by base, both sorted, and in total.

    Attributes:
        repeated: Bytes of tensors that files which differ as a whole have in common. Packed against each other they take next
            to nothing; plain, each copy is stored.
        unlisted: Number of files of weights whose tensors are unknown, as they are missing or damaged.
    """

    names: list[Usage]
    bases: list[BaseUsage]
    total: Usage
    repeated: int
    unlisted: int


def usage(registry: Registry, prefix: str | None = None, *, progress: Progress | None = None) -> Report:
    """Return the usage of the versions of a name or namespace, or of all; a blob that several of a group need counts once.

    Files of weights whose tensors are not listed yet are read once; `progress` is called with bytes read and total bytes.
    """
    registry.list_tensors(progress, prefix=prefix)
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
        tensors.repeated(registry.index, stored),
        len(tensors.unlisted(registry.index).keys() & stored.keys()),
    )


def _grouped(pairs: Iterable[tuple[_Key, Row]]) -> list[tuple[_Key, list[Row]]]:
    found: dict[_Key, list[Row]] = {}
    for key, row in pairs:
        found.setdefault(key, []).append(row)
    return sorted(found.items(), key=lambda item: item[0])


@dataclass(frozen=True)
class _Seen:
    """Bytes of a version and of each of its blobs, and its base; of an unreadable one, which fsck reports, of the manifest."""

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
