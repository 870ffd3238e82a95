"""Disk usage of versions: as stored, as separate copies, and by base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from adapterhub.digest import Digest
from adapterhub.index import tensor_search
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import oci_manifest
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Progress
from adapterhub_converters.errors import IntegrityError
from adapterhub_converters.lazy_dataclass import dataclass

_BASE_ANNOTATION = "io.adapterhub.base"  # prefix of the manifest annotations that describe the base
_Key = TypeVar("_Key", str, tuple[str, str])


@dataclass(frozen=True)
class Usage:
    """The disk usage of some versions, in bytes.

    Attributes:
        name: The adapter or base that the versions have in common; empty for all versions.
        versions: Number of versions.
        adapters: Number of distinct names.
        files: All blobs of every version, counted once per version that has them: the size of separate copies.
        distinct: Every blob counted once.
        stored: Every blob once, as stored on disk, where packed blobs are smaller.
    """

    name: str
    versions: int
    adapters: int
    files: int
    distinct: int
    stored: int

    @property
    def shared_size(self) -> int:
        """Bytes that need no storage because another version has the same file."""
        return self.files - self.distinct

    @property
    def saved_size(self) -> int:
        """Bytes that packing saves."""
        return self.distinct - self.stored


@dataclass(frozen=True)
class BaseUsage:
    """The usage of the versions for one base, as their adapter.json names it; repo and fingerprint may be unknown."""

    repo: str | None
    fingerprint: str | None
    usage: Usage


@dataclass(frozen=True)
class UsageReport:
    """Usage by name and by base, both sorted, and in total.

    Attributes:
        repeated: Bytes of tensors that occur in several files which differ as a whole. Packed against each other they take next
            to nothing; plain, each copy is stored.
        unlisted: Number of weight files whose tensors are unknown because the file is missing or damaged.
    """

    names: list[Usage]
    bases: list[BaseUsage]
    total: Usage
    repeated: int
    unlisted: int


def usage(registry: Registry, prefix: str | None = None, *, progress: Progress | None = None) -> UsageReport:
    """Return the disk usage of the versions of a name or namespace, or of all; blobs shared within a group count once.

    Weight files whose tensors are not listed yet are read once; `progress` is called with bytes read and total bytes.
    """
    # `repeated` counts equal tensors in different files, so all must be listed first.
    registry.list_tensors(progress, prefix=prefix)
    with registry.index.snapshot():
        return usage_of_versions(registry, registry.list(prefix))


def usage_of_versions(registry: Registry, rows: Sequence[VersionRow]) -> UsageReport:
    """Return the disk usage of some versions; weight files whose tensors are not listed are counted, but not read."""
    version_sizes = {row: _VersionSize.read(registry, row) for row in rows}
    stored = {
        digest: registry.store.stored_size(digest) for version_size in version_sizes.values() for digest in version_size.blobs
    }

    def usage_of(name: str, rows: Sequence[VersionRow]) -> Usage:
        distinct = {digest: size for row in rows for digest, size in version_sizes[row].blobs.items()}
        adapters, files = len({row.name for row in rows}), sum(version_sizes[row].size for row in rows)
        return Usage(name, len(rows), adapters, files, sum(distinct.values()), sum(stored[digest] for digest in distinct))

    names = _group_rows((row.name, row) for row in version_sizes)
    bases = _group_rows(
        ((version_size.repo or "", version_size.fingerprint or ""), row) for row, version_size in version_sizes.items()
    )
    with registry.index.snapshot():
        repeated = tensor_search.repeated_bytes(registry.index, stored)
        unlisted_files = tensor_search.unlisted_files(registry.index)
    return UsageReport(
        [usage_of(name, rows) for name, rows in names],
        [
            BaseUsage(repo or None, fingerprint or None, usage_of(repo or fingerprint, rows))
            for (repo, fingerprint), rows in bases
        ],
        usage_of("", list(version_sizes)),
        repeated,
        len(unlisted_files.keys() & stored.keys()),
    )


def _group_rows(pairs: Iterable[tuple[_Key, VersionRow]]) -> list[tuple[_Key, list[VersionRow]]]:
    """Group rows by key, sorted by key."""
    groups: dict[_Key, list[VersionRow]] = {}
    for key, row in pairs:
        groups.setdefault(key, []).append(row)
    return sorted(groups.items(), key=lambda item: item[0])


@dataclass(frozen=True)
class _VersionSize:
    """The size of a version and of each of its blobs, with its base; only the manifest's size if that is unreadable."""

    size: int
    blobs: Mapping[Digest, int]
    repo: str | None = None
    fingerprint: str | None = None

    @classmethod
    def read(cls, registry: Registry, row: VersionRow) -> _VersionSize:
        """Read the sizes from the version's manifest."""
        blobs = {row.digest: row.manifest_size}
        try:
            manifest = oci_manifest.parse(registry.store.read_document(row.digest), str(row.ref))
        except IntegrityError:
            return cls(row.manifest_size, blobs)  # a damaged manifest, which fsck reports
        blobs |= {blob.digest: blob.size for blob in (manifest.config, *manifest.layers)}
        size = row.manifest_size + manifest.config.size + manifest.size
        annotation = manifest.annotations.get
        return cls(size, blobs, annotation(f"{_BASE_ANNOTATION}.repo"), annotation(f"{_BASE_ANNOTATION}.fingerprint"))
