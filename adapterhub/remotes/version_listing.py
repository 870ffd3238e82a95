"""The versions at a remote address: what each tag is at, read from its manifest and, for an adapter, from its adapter.json."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from adapterhub.digest import Digest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.registry import version_selection, withdrawals
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .protocol import OpenRemote
from .version_copy import read_adapter_manifest

ADAPTER, IMAGE, OTHER, WITHDRAWN = "adapter", "image", "other", "withdrawn"
_IMAGE_OF = "io.adapterhub.digest"
_BASE = "io.adapterhub.base.repo"
_UNREADABLE = (FormatError, IntegrityError, NotFoundError, RefusedError)


@dataclass(frozen=True, slots=True)
class ListedVersion:
    """A version with its tags.

    Attributes:
        tags: Its tags, the version number first.
        kind: ADAPTER, IMAGE for a container image that contains an adapter, WITHDRAWN where a hub says so, or OTHER.
        digest: Digest of its manifest; empty if that is not the manifest of an adapter or an image.
        size: Size of its files in bytes.
        base: The base model's name.
        created: When its training began, ISO 8601 in UTC.
    """

    tags: tuple[str, ...]
    kind: str
    digest: Digest = ""
    size: int | None = None
    base: str | None = None
    created: str | None = None


def list_versions(remote: OpenRemote, tags: Sequence[str]) -> list[ListedVersion]:
    """Return the versions that these tags are at, highest number first; an unreadable manifest is a version of its own."""
    manifests_and_tags: dict[str, tuple[Manifest | str, list[str]]] = {}
    # A manifest takes a request per tag, so read several at once where the remote allows it.
    with ThreadPoolExecutor(remote.max_readers) as pool:
        for tag, manifest in zip(tags, pool.map(lambda tag: _read_manifest(remote, tag), tags), strict=True):
            # Tags of one digest are one version.
            manifests_and_tags.setdefault(tag if isinstance(manifest, str) else manifest.digest, (manifest, []))[1].append(tag)
        listed = list(pool.map(lambda entry: _describe_version(remote, *entry), manifests_and_tags.values()))
    return sorted(listed, key=lambda version: (-(version_selection.number(version.tags[0]) or 0), version.tags))


def _read_manifest(remote: OpenRemote, tag: str) -> Manifest | str:
    """Return the manifest of a tag; WITHDRAWN or OTHER if it cannot be read."""
    try:
        return remote.manifest(tag)
    except _UNREADABLE as error:
        return WITHDRAWN if error.code == withdrawals.CODE else OTHER


def _describe_version(remote: OpenRemote, manifest: Manifest | str, tags: Sequence[str]) -> ListedVersion:
    ordered = tuple(sorted(tags, key=lambda tag: (version_selection.number(tag) is None, tag)))
    if isinstance(manifest, str):
        return ListedVersion(ordered, manifest)
    # Attachments and other artifacts have no weights by name.
    kind = ADAPTER if any(is_weights(layer.path) for layer in manifest.layers) else OTHER
    kind = IMAGE if _IMAGE_OF in manifest.annotations else kind
    base, created = manifest.annotations.get(_BASE), None
    if kind == ADAPTER:
        with suppress(*_UNREADABLE):
            adapter_manifest = read_adapter_manifest(remote, manifest, remote.location)
            base = adapter_manifest.base.repo or base
            created = adapter_manifest.training.created if adapter_manifest.training else None
    return ListedVersion(ordered, kind, manifest.digest, manifest.size, base, created)
